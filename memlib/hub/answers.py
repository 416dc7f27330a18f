"""What the chapters ask a Hub model directly, kept on disk beside its traces.

`memlib.cached` keeps traces. A chapter also decodes a few latents, encodes its images or follows
one trajectory; these answers are kept here, so that a book recorded on a GPU is built anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from memlib.errors import ModelError
from memlib.hub.files import sha256, whole
from memlib.models import DiffusersModel
from memlib.paths import cache_folder

Tensors = dict[str, torch.Tensor]
CARD = ("source", "fingerprint", "precision", "latent_shape", "image_size", "scheduler_config")


class CachedModel:
    """A model that answers the same question twice from disk; otherwise the model itself.

    Questions are compared exactly where they are words or numbers. Tensors need only be near
    (1e-3 of their largest number): another machine rounds otherwise.
    """

    def __init__(self, model):
        self.uncached = model  # for whoever keeps results of their own

    def __getattr__(self, name):
        return getattr(self.uncached, name)

    def ask(
        self, name: str, exact: list, given: Tensors, answer: Callable[..., Tensors]
    ) -> Tensors:
        """`answer(model)`, from disk where the question was asked before."""
        given = {k: v.detach().float().cpu().contiguous() for k, v in given.items()}
        shapes = {k: list(v.shape) for k, v in given.items()}
        words = json.dumps([self.fingerprint, name, exact, shapes], sort_keys=True, default=str)
        stem = f"{name}-{hashlib.sha256(words.encode()).hexdigest()[:20]}"
        folder = _place("answers", self.source)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{stem}.lock"):
            files = sorted(folder.glob(f"{stem}-*.safetensors"))
            for file in files:
                kept = load_file(file)
                if all(_near(kept[f"given.{k}"], v) for k, v in given.items()):
                    return {k[4:]: v for k, v in kept.items() if k.startswith("out.")}
            out = {k: v.detach().cpu().contiguous() for k, v in answer(self.uncached).items()}
            kept = {f"given.{k}": v for k, v in given.items()}
            with whole(folder / f"{stem}-{len(files)}.safetensors") as partial:
                save_file(kept | {f"out.{k}": v for k, v in out.items()}, partial)
        return out

    def encode_text(self, captions):
        def answer(model) -> Tensors:
            return dict(zip(("cond", "uncond"), model.encode_text(captions), strict=True))

        out = self.ask("text", list(captions), {}, answer)
        return out["cond"].to(self.device), out["uncond"].to(self.device)

    def predict(self, x_t, timestep, text):
        given = {"x_t": x_t, "timestep": torch.as_tensor(timestep), "text": text}
        out = self.ask("predict", [], given, lambda m: {"out": m.predict(x_t, timestep, text)})
        return out["out"].to(self.device)

    def encode_images(self, files):
        files = [Path(f) for f in files]
        sums = [sha256(f) for f in files]
        out = self.ask("images", sums, {}, lambda m: {"latents": m.encode_images(files)})
        return out["latents"].to(self.device)

    def decode(self, latents):
        def answer(model) -> Tensors:
            return {"pictures": torch.from_numpy(model.decode(latents))}

        latents = torch.as_tensor(latents)
        return self.ask("pictures", [], {"latents": latents}, answer)["pictures"].numpy()


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    scale = max(float(a.abs().max()), 1.0) if a.numel() else 1.0
    return bool(torch.allclose(a, b, rtol=0, atol=1e-3 * scale, equal_nan=True))


class RecordedModel:
    """A model without weights: what its traces know of it. Whatever they lack is refused."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, card: dict):
        vars(self).update(card, latent_shape=tuple(card["latent_shape"]))
        self.prediction_type = self.scheduler_config.get("prediction_type", "epsilon")

    def _refuse(self, *_, **__):
        raise ModelError(
            f"this was not recorded, and the weights of {self.source} are not here: run it where "
            f"they are, or get them with memlib fetch {self.source}"
        )

    encode_text = predict = encode_images = decode = compiling = _refuse
    to_epsilon, uncached = DiffusersModel.to_epsilon, DiffusersModel.uncached

    def tokens_cut(self, captions: Sequence[str]) -> np.ndarray:
        return np.zeros(len(captions), int)  # no tokenizer; a trace that is read says it itself


def _place(kind: str, source: str) -> Path:
    return cache_folder() / kind / re.sub("[^A-Za-z0-9.-]", "_", source)


def card(source: str) -> dict | None:
    """What earlier runs, perhaps on another machine, left to know of a Hub model."""
    file = _place("models", f"{source}.json")
    return json.loads(file.read_text()) if file.exists() else None


def leave_card(model) -> None:
    """Describe a Hub model in the cache, so that its traces are read without its weights."""
    if not of_hub(model):
        return
    file = _place("models", f"{model.source}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        known = {name: getattr(model, name) for name in CARD}
        partial.write_text(json.dumps(known, indent=1, default=str))


def of_hub(model) -> bool:
    return "@" in model.fingerprint.split()[0]  # repository@commit; a VAE's may follow
