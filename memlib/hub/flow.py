"""Stable Diffusion 3 and its kind: flow matching by a transformer, through the same functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from memlib.hub.accelerated import AcceleratedModel
from memlib.models import quiet
from memlib.schedule import is_flow

KINDS = {
    "transformer": SD3Transformer2DModel, "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}  # fmt: skip
EMPTY = 256  # places of T5's tokens, zeros where there is no T5, as in diffusers' pipeline


class FlowModel(AcceleratedModel):
    """A `StableDiffusion3Pipeline`; T5, its third text encoder, may be missing.

    An embedding is one tensor, [prompt, token, width]: the tokens', and as a last row the pooled
    one, filled up with zeros. `max_sequence_length` is the pipeline's option of that name.
    """

    def __init__(self, pipe, source, fingerprint, precision="float32", max_sequence_length=EMPTY):
        super().__init__(pipe, source, fingerprint, precision)
        self.max_sequence_length = max_sequence_length
        self.scheduler_config["_class_name"] = type(pipe.scheduler).__name__
        self.prediction_type = "velocity"

    @staticmethod
    def _denoiser(pipe) -> torch.nn.Module:
        return pipe.transformer

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the captions and of as many empty captions, [prompt, token + 1, width]."""
        with quiet():
            cond, uncond, *pooled = self.pipe.encode_prompt(
                list(captions), None, None, device=self.device,
                max_sequence_length=self.max_sequence_length,
            )  # fmt: skip
        rows = [pad(row, (0, cond.shape[-1] - row.shape[-1]))[:, None] for row in pooled]
        return torch.cat([cond, rows[0]], 1), torch.cat([uncond, rows[1]], 1)

    def _asked(self, x_t, timestep, text) -> tuple[tuple, dict]:
        pooled = text[:, -1, : self.denoiser.config.pooled_projection_dim]
        times = torch.as_tensor(timestep, device=x_t.device).expand(len(x_t))
        named = {"encoder_hidden_states": text[:, :-1], "pooled_projections": pooled}
        return (x_t,), named | {"timestep": times}

    def to_epsilon(self, output, x_t, alpha_bar):
        r"""A velocity as noise, $\epsilon=x_t+(1-\sigma)v$; `alpha_bar` is $a^2/(a^2+s^2)$."""
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        return x_t + signal / (signal + noise) * output

    def _reader(self) -> tuple:
        if self.pipe.tokenizer_3 is not None:
            return self.pipe.tokenizer_3, self.max_sequence_length
        return super()._reader()


def faults(pipe, sides: set[int]) -> list[tuple[object, str]]:
    """What does not fit, for `hub.weights.refuse`."""
    network, vae, scheduler = pipe.transformer.config, pipe.vae.config, pipe.scheduler
    clips = [pipe.text_encoder.config, pipe.text_encoder_2.config]
    channels = (network.in_channels, network.out_channels, vae.latent_channels)
    width, pooled = sum(c.hidden_size for c in clips), sum(c.projection_dim for c in clips)
    t5 = pipe.text_encoder_3 and pipe.text_encoder_3.config.d_model
    name = type(scheduler).__name__
    return [
        (not is_flow({"_class_name": name}),
         f"its scheduler is a {name}: a flow model needs a FlowMatchEulerDiscreteScheduler"),
        (len({*channels}) > 1,
         "its transformer takes {} channels and gives {}, its VAE has {}".format(*channels)),
        (width > network.joint_attention_dim or t5 not in (None, network.joint_attention_dim),
         f"its transformer takes text of width {network.joint_attention_dim}, its text encoders "
         f"give {width}{f' and {t5}' if t5 else ''}"),
        (pooled != network.pooled_projection_dim or pooled > network.joint_attention_dim,
         f"its transformer takes {network.pooled_projection_dim} pooled numbers, its text encoders "
         f"give {pooled}"),
        (len(sides) > 1 or min(sides) < 1,
         f"its sample_size is {network.sample_size}; supported is one side of square latents"),
    ]  # fmt: skip
