"""What the chapters ask a Hub model directly, kept on disk beside its traces.

`memlib.recorded` keeps traces. A chapter also decodes a few latents, encodes its images or follows
one trajectory; these answers are kept here, so that a book recorded on a GPU is built anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from memlib.checksums import sha256
from memlib.paths import cache_folder

Tensors = dict[str, torch.Tensor]


class Remembering:
    """A model that answers the same question twice from disk; otherwise the model itself.

    Questions are compared exactly where they are words or numbers. Tensors need only be near
    (1e-3 of their largest number): another machine rounds otherwise.
    """

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def ask(
        self, name: str, exact: list, given: Tensors, answer: Callable[..., Tensors]
    ) -> Tensors:
        """`answer(model)`, from disk where the question was asked before."""
        given = {
            k: torch.as_tensor(v).detach().float().cpu().contiguous() for k, v in given.items()
        }
        shapes = {k: list(v.shape) for k, v in given.items()}
        words = json.dumps([self.fingerprint, name, exact, shapes], sort_keys=True, default=str)
        stem = f"{name}-{hashlib.sha256(words.encode()).hexdigest()[:20]}"
        folder = cache_folder() / "answers" / re.sub("[^A-Za-z0-9.-]", "_", self.source)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{stem}.lock"):
            files = sorted(folder.glob(f"{stem}-*.safetensors"))
            for file in files:
                kept = load_file(file)
                if all(_near(kept[f"given.{k}"], v) for k, v in given.items()):
                    return {k[4:]: v for k, v in kept.items() if k.startswith("out.")}
            out = {k: v.detach().cpu().contiguous() for k, v in answer(self.model).items()}
            kept = {f"given.{k}": v for k, v in given.items()}
            kept |= {f"out.{k}": v for k, v in out.items()}
            partial = folder / f"{stem}.partial"
            save_file(kept, partial)
            os.replace(partial, folder / f"{stem}-{len(files)}.safetensors")
        return out

    def encode_text(self, captions):
        def answer(model) -> Tensors:
            cond, uncond = model.encode_text(captions)
            return {"cond": cond, "uncond": uncond}

        out = self.ask("text", list(captions), {}, answer)
        return out["cond"].to(self.device), out["uncond"].to(self.device)

    def predict(self, x_t, timestep, text):
        given = {"x_t": x_t, "timestep": torch.as_tensor(timestep), "text": text}

        def answer(model) -> Tensors:
            return {"out": model.predict(x_t, timestep, text)}

        return self.ask("predict", [], given, answer)["out"].to(self.device)

    def encode_images(self, files):
        files = list(files)

        def answer(model) -> Tensors:
            return {"latents": model.encode_images(files)}

        out = self.ask("images", [sha256(Path(f)) for f in files], {}, answer)
        return out["latents"].to(self.device)

    def decode(self, latents):
        def answer(model) -> Tensors:
            return {"pictures": torch.from_numpy(model.decode(torch.as_tensor(latents)))}

        return self.ask("pictures", [], {"latents": latents}, answer)["pictures"].numpy()


def unwrapped(model):
    """The model itself, for whoever keeps results of their own."""
    return model.model if isinstance(model, Remembering) else model


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    scale = max(float(a.abs().max()), 1.0) if a.numel() else 1.0
    return bool(torch.allclose(a, b, rtol=0, atol=1e-3 * scale, equal_nan=True))
