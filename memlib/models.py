"""What a model must offer: encode text and images, predict noise, decode latents.

`DiffusersModel` is a text-to-image pipeline of diffusers: the lab, Stable Diffusion, any folder of
that shape. `ExactModel` is the closed-form optimal denoiser of a finite training set. Both have

- `source`, `fingerprint`, `dtype`, `precision`, `device`, `latent_shape`, `scheduler_config`
- `encode_text(captions)`, `predict(x_t, timestep, text)`, and `to_epsilon(output, x_t, alpha_bar)`
  of diffusion models; of flow models (`schedule.is_flow`) what is predicted is a velocity
- `encode_images(files)` and `decode(latents)`
- `uncached`: the model itself, where answers are kept on disk (`memlib.hub.answers`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, UInt8

from memlib.errors import ModelError
from memlib.prompts import read_image
from memlib.schedule import is_flow, signal_and_noise

DECODED = 2**15  # pixels that are decoded together


@contextlib.contextmanager
def quiet():
    """No loading bars, no advice and no reports: what matters of them is an error of ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class DiffusersModel:
    """A `StableDiffusionPipeline` seen as the few functions that a trace needs, in float32.

    `memlib.hub.accelerated` has the same in half precision and compiled.
    """

    dtype, precision, decoder = torch.float32, "float32", "float32"
    compiled, compiling = False, staticmethod(contextlib.nullcontext)

    def __init__(self, pipe, source: str, fingerprint: str):
        self.pipe, self.source, self.fingerprint = pipe, source, fingerprint
        self.denoiser, self.vae = self._denoiser(pipe).eval(), pipe.vae.eval()
        self.device = self.denoiser.device
        if self.device.type == "cuda":
            exact_float32()
        # Once a block of this size was freed, glibc keeps what is freed. Before that it asks the
        # system for every buffer of every update anew (8 % of the lab's time on two cores).
        torch.ones(31 << 20, dtype=torch.uint8)
        self.scheduler_config = dict(pipe.scheduler.config)
        self.shift = pipe.vae.config.get("shift_factor") or 0.0
        size = self.denoiser.config.sample_size
        size = size if isinstance(size, int) else size[0]  # `hub.weights` lets only squares pass
        self.latent_shape = (self.denoiser.config.in_channels, size, size)
        self.image_size = size * pipe.vae_scale_factor
        self.prediction_type = self.scheduler_config.get("prediction_type", "epsilon")
        pipe.set_progress_bar_config(disable=True)

    @staticmethod
    def _denoiser(pipe) -> torch.nn.Module:
        return pipe.unet

    @property
    def unet(self) -> torch.nn.Module:
        return self.denoiser

    @property
    def uncached(self) -> DiffusersModel:
        """Itself; of a model whose answers are kept on disk, the model without that."""
        return self

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the captions and of as many empty captions, [prompt, token, width]."""
        with quiet():  # `tokens_cut` tells of long captions
            return self.pipe.encode_prompt(list(captions), self.device, 1, True)[:2]

    def read(self, captions: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each caption that the text encoder is given, end and padding left out."""
        tokenizer, most = self._reader()
        found = tokenizer(list(captions), truncation=True, max_length=most)
        return [tuple(tokens) for tokens in found.input_ids]

    def _reader(self) -> tuple:
        """The tokenizer that reads most of a caption, and how many tokens."""
        return self.pipe.tokenizer, self.pipe.tokenizer.model_max_length

    def tokens_cut(self, captions: Sequence[str]) -> np.ndarray:
        """How many tokens of each caption are not read, for want of places, [prompt]."""
        tokenizer, most = self._reader()
        with quiet():
            whole = tokenizer(list(captions)).input_ids if len(captions) else []
        return np.array([max(0, len(tokens) - most) for tokens in whole], int)

    @torch.no_grad()
    def predict(
        self,
        x_t: Float[torch.Tensor, "batch channel height width"],
        timestep: int | torch.Tensor,
        text: torch.Tensor,
    ) -> Float[torch.Tensor, "batch channel height width"]:
        """The network's output as it is (epsilon, v or sample; a flow's velocity)."""
        dtype = next(self.denoiser.parameters()).dtype  # diffusers' own looks at every parameter
        x_t, text = x_t.to(dtype), text.to(dtype)
        return self._call(x_t, timestep, text).to(self.dtype)

    def _call(self, x_t, timestep, text) -> torch.Tensor:
        given, named = self._asked(x_t, timestep, text)
        return self.denoiser(*given, **named, return_dict=False)[0]

    def _asked(self, x_t, timestep, text) -> tuple[tuple, dict]:
        """What the network takes: here a state, a timestep and an embedding."""
        return (x_t, timestep), {"encoder_hidden_states": text}

    def to_epsilon(self, output, x_t, alpha_bar):
        r"""An output as noise; from v, $\epsilon=\sqrt{\bar\alpha}v+\sqrt{1-\bar\alpha}x_t$."""
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            return alpha_bar**0.5 * output + (1 - alpha_bar) ** 0.5 * x_t
        if self.prediction_type == "sample":
            return (x_t - alpha_bar**0.5 * output) / (1 - alpha_bar) ** 0.5
        raise ModelError(
            f"{self.source} predicts {self.prediction_type!r}, not epsilon, v_prediction or sample"
        )

    @torch.no_grad()
    def encode_images(self, files: Iterable[str | Path]) -> torch.Tensor:
        """Latents of image files: EXIF, RGB, resize, posterior *mode*, times the scaling factor."""
        latents = []
        for file in files:
            picture = read_image(file, self.image_size)
            x = torch.from_numpy(picture).permute(2, 0, 1)[None].to(self.device, self.dtype)
            posterior = self.vae.encode(x / 127.5 - 1).latent_dist
            latents.append((posterior.mode()[0] - self.shift) * self.vae.config.scaling_factor)
        latents = torch.stack(latents)
        if not latents.isfinite().all():
            raise FloatingPointError(
                f"the training images' latents of {self.source} are not finite"
            )
        return latents

    @torch.no_grad()
    def decode(
        self, latents: Float[torch.Tensor, "batch channel height width"]
    ) -> UInt8[np.ndarray, "batch y x rgb"]:
        """Pictures of latents, as diffusers' pipeline makes them."""
        return self._decode(self._unscaled(latents))

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.to(self.device, self.dtype) / self.vae.config.scaling_factor + self.shift

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        # A few at a time, large ones one by one: decoding must not set the size of the batch.
        together = max(1, DECODED // self.image_size**2)
        pictures = []
        for part in latents.tensor_split(-(-len(latents) // together)):
            x = self.vae.decode(part, return_dict=False)[0]
            if not x.isfinite().all():
                raise FloatingPointError(f"the pictures of {self.source} are not finite")
            images = self.pipe.image_processor.postprocess(x, output_type="np")
            pictures.append((images * 255).round().astype(np.uint8))
        return np.concatenate(pictures)


def exact_float32() -> None:
    """What is float32 on a GPU is computed so: by default torch's convolutions use TF32, 10 bits.

    By the older of torch's two names for it: its compiler fails where the newer one was used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions advise the newer one
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def tf32(device: torch.device) -> bool:
    """Whether float32 on this device is TF32 somewhere."""
    if device.type != "cuda":
        return False
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


class ExactModel:
    r"""The optimal denoiser of a finite training set of atoms $a_i$ with weights $p_i$.

    $\hat x_0=\sum_i r_i a_i$ with
    $r_i\propto p_i\exp(-\|x_t-\sqrt{\bar\alpha_t}a_i\|^2/2(1-\bar\alpha_t))$, the posterior
    mean; the conditional branch has only the atoms with the given caption. A caption that no atom
    has is predicted like the empty one: the model knows nothing about it. With a flow's scheduler
    the levels are a flow's and the prediction is the velocity.

    Parameters
    ----------
    atoms : latents, [atom, channel, height, width], used in float64.
    captions : one an atom.
    counts : how often each atom is in the training set; 1 by default.
    scheduler_config : Stable Diffusion v1.4's by default; `flow_schedule()` of a flow.
    """

    source = "exact"
    prediction_type = "epsilon"
    compiled, compiling = False, staticmethod(contextlib.nullcontext)  # there is no network
    dtype, precision, device = torch.float64, "float64", torch.device("cpu")

    def __init__(self, atoms, captions, counts=None, scheduler_config=None, codec=None):
        self.atoms = torch.as_tensor(atoms, dtype=torch.float64)
        self._energy = self.atoms.flatten(1).square().sum(1)
        self.captions = list(captions)
        if len(self.atoms) == 0 or len(self.atoms) != len(self.captions):
            raise ModelError(f"{len(self.atoms)} atoms do not fit {len(self.captions)} captions")
        counts = torch.ones(len(self.atoms)) if counts is None else torch.tensor(list(counts))
        self.log_counts = counts.double().log()
        config = scheduler_config or stable_diffusion_schedule()
        self.flow = is_flow(config)
        self.scheduler_config = {**config} | ({} if self.flow else {"prediction_type": "epsilon"})
        self._alpha_bar = None if self.flow else _alpha_bar_table(self.scheduler_config)
        self.latent_shape = tuple(self.atoms.shape[1:])
        self.codec = codec  # a model that encodes and decodes pictures
        self.image_size = getattr(codec, "image_size", None)
        self.fingerprint = hashlib.sha256(
            self.atoms.numpy().tobytes()
            + repr(
                (self.captions, counts.tolist(), self.latent_shape, self.scheduler_config)
            ).encode()
            + getattr(codec, "fingerprint", "").encode()
        ).hexdigest()

    uncached = DiffusersModel.uncached

    def encode_text(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log weights of the atoms for each caption and for the empty one, [prompt, atom]."""
        known = torch.tensor([[a == c for a in self.captions] for c in captions])
        known |= ~known.any(1, keepdim=True)
        return self.log_counts.where(known, -torch.inf), self.log_counts.expand(len(captions), -1)

    def log_posterior(self, x_t, alpha_bar, text):
        """Log probability of each atom given each row of `x_t`, [row, atom]."""
        levels = signal_and_noise(torch.as_tensor(alpha_bar, dtype=torch.float64))
        return self._log_posterior(x_t, *levels, text)

    def _log_posterior(self, x_t, signal, noise, text):
        a, s = signal.reshape(-1, 1), noise.reshape(-1, 1)
        fit = a * (x_t.double().flatten(1) @ self.atoms.flatten(1).T) - a**2 * self._energy / 2
        return torch.log_softmax(text + fit / s**2, -1)

    def _levels(self, timestep):
        t = torch.as_tensor(timestep)
        if self.flow:
            return signal_and_noise(None, t.double() / self.scheduler_config["num_train_timesteps"])
        return signal_and_noise(self._alpha_bar[t])

    def posterior_mean(self, x_t, timestep, text):
        """$E[x_0 | x_t]$ for each row of `x_t`."""
        share = self._log_posterior(x_t, *self._levels(timestep), text).exp()
        return (share @ self.atoms.flatten(1)).reshape(x_t.shape)

    def predict(self, x_t, timestep, text):
        """The predicted noise, or a flow's velocity, of the posterior mean."""
        signal, noise = (level.reshape(-1, 1, 1, 1) for level in self._levels(timestep))
        mean = self.posterior_mean(x_t, timestep, text)
        return (x_t.double() - (1.0 if self.flow else signal) * mean) / noise

    def to_epsilon(self, output, x_t, alpha_bar):
        return output

    def encode_images(self, files):
        if self.codec is None:
            raise ModelError("this exact model has atoms only: give pairs without images")
        return self.codec.encode_images(files).double()

    def decode(self, latents):
        return None if self.codec is None else self.codec.decode(latents)


def stable_diffusion_schedule() -> dict:
    """The noise schedule of Stable Diffusion v1.4, as a scheduler config."""
    return dict(
        DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        ).config
    )  # fmt: skip


def flow_schedule(shift: float = 3.0) -> dict:
    """The noise levels of Stable Diffusion 3, as a scheduler config."""
    config = FlowMatchEulerDiscreteScheduler(shift=shift).config
    return {**config, "_class_name": "FlowMatchEulerDiscreteScheduler"}


def _alpha_bar_table(config: dict) -> torch.Tensor:
    return DDIMScheduler.from_config(config).alphas_cumprod.double()
