"""Load a model: encode text and images, predict noise, decode latents.

Two kinds share one interface. `DiffusersModel` is a text-to-image pipeline in the diffusers folder
format: the lab, Stable Diffusion, or any folder of that shape. `ExactModel` is the closed-form
optimal denoiser of a finite training set. Both have

- `source`, `fingerprint`, `dtype`, `device`, `latent_shape`, `scheduler_config`
- `encode_text(captions)`, `predict(x_t, timestep, text)`, `to_epsilon(output, x_t, alpha_bar)`
- `encode_images(files)` and `decode(latents)`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError

from memlib.checksums import sha256, verify
from memlib.errors import first_line, nearest
from memlib.pairs import load_pairs, read_image

LAB = Path(__file__).resolve().parents[1] / "data" / "lab"
NAMES = ("lab", "exact")
WEIGHTS = (".safetensors", ".json", ".txt")  # what makes a model what it is


class ModelError(ValueError):
    """A model that cannot be used; the message says why and what to do."""


class DiffusersModel:
    """A `StableDiffusionPipeline` seen as the few functions that a trace needs."""

    def __init__(self, pipe, source: str, fingerprint: str):
        self.pipe, self.source, self.fingerprint = pipe, source, fingerprint
        self.unet, self.vae = pipe.unet.eval(), pipe.vae.eval()
        self.device, self.dtype = pipe.unet.device, pipe.unet.dtype
        self.scheduler_config = dict(pipe.scheduler.config)
        size = pipe.unet.config.sample_size
        self.latent_shape = (pipe.unet.config.in_channels, size, size)
        self.image_size = size * pipe.vae_scale_factor
        self.prediction_type = self.scheduler_config.get("prediction_type", "epsilon")
        pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the captions and of as many empty captions, [prompt, token, width]."""
        return self.pipe.encode_prompt(list(captions), self.device, 1, True)[:2]

    @torch.no_grad()
    def predict(
        self,
        x_t: Float[torch.Tensor, "batch channel height width"],
        timestep: int | torch.Tensor,
        text: torch.Tensor,
    ) -> Float[torch.Tensor, "batch channel height width"]:
        """The U-Net's output as it is (epsilon, v or sample)."""
        return self.unet(x_t, timestep, encoder_hidden_states=text, return_dict=False)[0]

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
            latents.append(posterior.mode()[0] * self.vae.config.scaling_factor)
        return torch.stack(latents)

    @torch.no_grad()
    def decode(
        self, latents: Float[torch.Tensor, "batch channel height width"]
    ) -> UInt8[np.ndarray, "batch y x rgb"]:
        """Pictures of latents, as diffusers' pipeline makes them."""
        latents = latents.to(self.device, self.dtype)
        x = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        images = self.pipe.image_processor.postprocess(x, output_type="np")
        return (images * 255).round().astype(np.uint8)

    @torch.no_grad()
    def checkpoint(self, folder: str | Path) -> DiffusersModel:
        """The same pipeline with the U-Net and text encoder of an earlier training step."""
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        folder = Path(folder)
        parts = self.pipe.components | {
            "unet": UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True),
            "text_encoder": CLIPTextModel.from_pretrained(
                folder / "text_encoder", dtype=torch.float32, use_safetensors=True
            ),
        }
        pipe = type(self.pipe)(**parts, requires_safety_checker=False).to(self.device)
        return DiffusersModel(
            pipe, f"{self.source}/{folder.name}", f"{self.fingerprint} {hash_files(folder)}"
        )


class ExactModel:
    r"""The optimal denoiser of a finite training set of atoms $a_i$ with weights $p_i$.

    $\hat x_0=\sum_i r_i a_i$ with
    $r_i\propto p_i\exp(-\|x_t-\sqrt{\bar\alpha_t}a_i\|^2/2(1-\bar\alpha_t))$, the posterior
    mean; the conditional branch has only the atoms with the given caption. A caption that no atom
    has is predicted like the empty one: the model knows nothing about it.

    Parameters
    ----------
    atoms : latents, [atom, channel, height, width], used in float64.
    captions : one an atom.
    counts : how often each atom is in the training set; 1 by default.
    scheduler_config : Stable Diffusion v1.4's by default.
    """

    source = "exact"
    prediction_type = "epsilon"
    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, atoms, captions, counts=None, scheduler_config=None, codec=None):
        self.atoms = torch.as_tensor(atoms, dtype=torch.float64)
        self.captions = list(captions)
        if len(self.atoms) == 0 or len(self.atoms) != len(self.captions):
            raise ModelError(f"{len(self.atoms)} atoms do not fit {len(self.captions)} captions")
        counts = torch.ones(len(self.atoms)) if counts is None else torch.tensor(list(counts))
        self.log_counts = counts.double().log()
        self.scheduler_config = {
            **(scheduler_config or stable_diffusion_schedule()),
            "prediction_type": "epsilon",
        }
        beta = self.scheduler_config
        self._alpha_bar = _alpha_bar_table(beta)
        self.latent_shape = tuple(self.atoms.shape[1:])
        self.codec = codec  # a model that encodes and decodes pictures
        self.image_size = getattr(codec, "image_size", None)
        self.fingerprint = hashlib.sha256(
            self.atoms.numpy().tobytes()
            + repr((self.captions, counts.tolist(), self.latent_shape, beta)).encode()
            + getattr(codec, "fingerprint", "").encode()
        ).hexdigest()

    def encode_text(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log weights of the atoms for each caption and for the empty one, [prompt, atom]."""
        known = torch.tensor([[a == c for a in self.captions] for c in captions])
        known |= ~known.any(1, keepdim=True)
        return self.log_counts.where(known, -torch.inf), self.log_counts.expand(len(captions), -1)

    def posterior_mean(self, x_t, timestep, text):
        """$E[x_0 | x_t]$ for each row of `x_t`."""
        a = self._alpha_bar[torch.as_tensor(timestep)].reshape(-1, 1)
        flat, atoms = x_t.double().flatten(1), self.atoms.flatten(1)
        distance = (flat[:, None] - a.sqrt()[..., None] * atoms).square().sum(-1)  # [batch, atom]
        share = torch.softmax(text - distance / (2 * (1 - a)), -1)
        return (share @ atoms).reshape(x_t.shape)

    def predict(self, x_t, timestep, text):
        """The predicted noise of the posterior mean."""
        a = self._alpha_bar[torch.as_tensor(timestep)].reshape(-1, 1, 1, 1)
        mean = self.posterior_mean(x_t, timestep, text)
        return (x_t.double() - a.sqrt() * mean) / (1 - a).sqrt()

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
    from diffusers import DDIMScheduler

    return dict(
        DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        ).config
    )  # fmt: skip


def _alpha_bar_table(config: dict) -> torch.Tensor:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(config).alphas_cumprod.double()


def hash_files(folder: Path) -> str:
    """sha256 over the names and contents of a folder's weights and configs."""
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in WEIGHTS):
        total.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return total.hexdigest()


@contextlib.contextmanager
def _quiet():
    """No loading bars and no advice on torchvision: they end up in pages."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load(name: str | Path = "lab", device: str | None = None):
    """Load a model by name.

    Parameters
    ----------
    name : ``lab`` (shipped with the book), ``exact`` (the optimal denoiser of the lab's pairs), or
        a local folder in the diffusers format.
    device : ``cuda`` where there is a GPU, else ``cpu``.

    Raises
    ------
    ModelError
        Unknown name, a folder that is no pipeline, damaged or missing weights.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "exact":
        lab = load("lab", "cpu")
        pairs = load_pairs("lab").query("kind != 'held-out'")
        atoms = lab.encode_images(pairs.image)
        counts = np.maximum(pairs.multiplicity, 1)
        return ExactModel(atoms, pairs.caption, counts, lab.scheduler_config, codec=lab)
    folder = LAB if name == "lab" else Path(name)
    if not folder.is_dir():
        raise ModelError(f"unknown model {str(name)!r}, and no such folder{nearest(name, NAMES)}")
    if not (folder / "model_index.json").exists():
        raise ModelError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    if name == "lab" or (folder / "SHA256SUMS").exists():
        try:
            verify(folder, lambda name: name.endswith(WEIGHTS))
        except ValueError as error:
            raise ModelError(str(error)) from error
    try:
        with _quiet():
            from diffusers import StableDiffusionPipeline

            pipe = StableDiffusionPipeline.from_pretrained(
                folder, safety_checker=None, requires_safety_checker=False, use_safetensors=True,
                local_files_only=True,
            ).to(device, torch.float32)  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded: {first_line(error)}") from error
    return DiffusersModel(pipe, str(name), hash_files(folder))
