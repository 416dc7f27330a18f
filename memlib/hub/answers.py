"""What the chapters ask a Hub model directly, kept on disk beside its traces.

`memlib.cached` keeps traces. A chapter also decodes a few latents, encodes its images or follows
one trajectory; these answers are kept here, so that a book recorded on a GPU is built anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from memlib.files import sha256
from memlib.models import DiffusersModel, ModelError
from memlib.paths import cache_folder

Tensors = dict[str, torch.Tensor]


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
            out = {k: v.detach().cpu().contiguous() for k, v in answer(self.uncached).items()}
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


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    scale = max(float(a.abs().max()), 1.0) if a.numel() else 1.0
    return bool(torch.allclose(a, b, rtol=0, atol=1e-3 * scale, equal_nan=True))


class RecordedModel:
    """A model without weights: what its traces know of it. Whatever they lack is refused.

    `memlib.cached` leaves a card beside the traces of a Hub model; `load` makes this of it.
    """

    def __init__(self, card: dict):
        self.source, self.fingerprint = card["source"], card["fingerprint"]
        self.scheduler_config, self.precision = card["scheduler_config"], card["precision"]
        self.prediction_type = self.scheduler_config.get("prediction_type", "epsilon")
        self.latent_shape, self.image_size = tuple(card["latent_shape"]), card["image_size"]
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def _refuse(self, *_, **__):
        raise ModelError(
            f"this was not recorded, and the weights of {self.source} are not here: run it where "
            f"they are, or get them with memlib fetch {self.source}"
        )

    encode_text = predict = encode_images = decode = checkpoint = compiling = _refuse
    to_epsilon, uncached = DiffusersModel.to_epsilon, DiffusersModel.uncached

    def tokens_cut(self, captions: Sequence[str]) -> np.ndarray:
        return np.zeros(
            len(captions), int
        )  # there is no tokenizer; a trace that is read has its own


def card_file(name: str) -> Path:
    """Where the cache describes a Hub model, so that its traces are read without its weights."""
    return cache_folder() / "models" / f"{re.sub('[^A-Za-z0-9.-]', '_', name)}.json"


def leave_card(model) -> None:
    """Describe a Hub model in the cache, so that the book is built without its weights."""
    if not of_hub(model):
        return
    card = {
        "source": model.source,
        "fingerprint": model.fingerprint,
        "precision": model.precision,
        "latent_shape": list(model.latent_shape),
        "image_size": model.image_size,
        "scheduler_config": json.loads(json.dumps(model.scheduler_config, default=str)),
    }
    file = card_file(model.source)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(card, indent=1))
    os.replace(partial, file)


def of_hub(model) -> bool:
    return "@" in model.fingerprint.split()[0]  # repository@commit; a VAE's may follow
