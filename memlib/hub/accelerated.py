"""A pipeline that is faster than its float32: in half precision, compiled, decoded beside.

In half precision only the U-Net is: states, scheduler, text encoder and VAE stay in float32. On a
GPU a copy of the decoder is in half precision, too.
"""

from __future__ import annotations

import contextlib
import copy
import warnings

import numpy as np
import torch

from memlib.errors import first_line
from memlib.models import DiffusersModel

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DECODED_HALF = 10 * 2**18  # pixels that are decoded together in half precision, on a GPU


class AcceleratedModel(DiffusersModel):
    """`DiffusersModel` with a U-Net of any precision that can be compiled.

    `decoder` names the precision of the decoder, `compiled` whether `predict` runs compiled code,
    `fits` how many images a batch may have where more have run out of memory, `together` how many
    pictures are decoded at once.
    """

    compiled = False
    fits: int | None = None
    _network = _half_vae = None

    def __init__(self, pipe, source: str, fingerprint: str, precision: str = "float32"):
        super().__init__(pipe, source, fingerprint)
        self.precision = precision
        self.decoder = "float16" if precision in HALF and self.device.type == "cuda" else "float32"
        self.together = max(1, DECODED_HALF // self.image_size**2)
        self._cast(HALF.get(precision, torch.float32))

    def _call(self, x_t, timestep, text) -> torch.Tensor:
        if not self.compiled:
            return super()._call(x_t, timestep, text)
        x = x_t.contiguous(memory_format=torch.channels_last)
        given, named = self._asked(x, torch.as_tensor(timestep).to(self.device), text)
        try:
            return self._network(*given, **named, return_dict=False)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, a card that is too old, a limit of torch's
            if isinstance(getattr(error, "inner_exception", None), torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(first_line(error)) from None
            reason = first_line(error)
        # Not in `except`: the error would keep the tensors of the try in memory.
        out = self.denoiser(*given, **named, return_dict=False)[0]  # this raises by another cause
        self._give_up_compiling(reason)
        return out

    def _give_up_compiling(self, reason: str) -> None:
        text = f"{self.source} does not compile here, and goes on without: {reason}"
        warnings.warn(text, stacklevel=4)
        self.compiled, self._network = False, self.denoiser

    @contextlib.contextmanager
    def compiling(self):
        """For the time of the context `predict` runs compiled code, with channels last.

        The code is made by the first call with a number of latents, and kept. Where that fails,
        once, the model goes on as it is, here and later, with a warning.
        """
        if self._network is None:
            try:
                self._network = torch.compile(self.denoiser, dynamic=False)  # fastest: fixed shapes
            except RuntimeError as error:  # this Python or platform is not supported
                self._give_up_compiling(first_line(error))
        if self._network is self.denoiser:
            yield
            return
        self._cast(memory_format=torch.channels_last)
        self.compiled = True
        try:
            yield
        finally:
            self.compiled = False
            self._cast(memory_format=torch.contiguous_format)

    @contextlib.contextmanager
    def full_precision(self):
        """For the time of the context the U-Net computes in float32, with the same weights.

        Never compiled: to compile for one batch takes longer than the batch.
        """
        half, compiled = self.denoiser.dtype, self.compiled
        self.compiled = False
        self._cast(torch.float32)
        try:
            yield
        finally:
            self._cast(half)
            self.compiled = compiled

    def _cast(self, *dtype: torch.dtype, **layout) -> None:
        if self.device.type == "cuda":  # or the weights land in holes of the size of activations
            torch.cuda.empty_cache()
        torch.nn.Module.to(self.denoiser, *dtype, **layout)  # diffusers' own `to` prints a warning

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        if self.decoder == "float32":
            return super().decode(latents)
        latents = self._unscaled(latents)
        return np.concatenate([self._decode_half(x) for x in latents.split(self.together)])

    def _decode_half(self, latents: torch.Tensor) -> np.ndarray:
        """The same by a copy in float16, rounded to bytes on the device; float32 where it fails.

        bfloat16 has too few digits for the 256 levels of a picture.
        """
        if self._half_vae is None:
            vae = copy.deepcopy(self.vae)
            vae.encoder = vae.quant_conv = None
            self._half_vae = torch.nn.Module.to(vae, torch.float16)
        x = self._half_vae.decode(latents.half(), return_dict=False)[0].float()
        if not x.isfinite().all():
            warnings.warn("pictures are not finite in float16 and decoded in float32", stacklevel=3)
            return self._decode(latents)
        levels = ((x * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).cpu().numpy()
