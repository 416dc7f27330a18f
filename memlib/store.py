"""A cache of traces on disk: what was recorded once is never recorded again."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from filelock import FileLock

import memlib.pairs
from memlib import gram, models, sample, schedule, severity
from memlib.checksums import sha256

ROOT = Path(__file__).resolve().parents[1]


def cache_folder() -> Path:
    """``$MEMLIB_CACHE``, or ``_build/traces`` in a checkout, or ``~/.cache/memlib``."""
    if "MEMLIB_CACHE" in os.environ:
        return Path(os.environ["MEMLIB_CACHE"])
    if (ROOT / "pyproject.toml").exists():
        return ROOT / "_build" / "traces"
    return Path.home() / ".cache" / "memlib"


def recorded(function: Callable[..., xr.Dataset], model, pairs: pd.DataFrame, **settings):
    """`function(model, pairs, **settings)`, read from the cache when it was recorded before.

    `function` is `reverse_trace` or `forward_trace`. The key covers everything that matters: the
    weights, the prompts and the bytes of their images, the settings, the code and the versions of
    the packages. Traces of a Hub model are dear and travel: those of another machine, device or
    version of a package are taken too (their attributes say which), the newest first. An entry
    appears under its name only when it is complete, so a killed run leaves none.

    Raises
    ------
    OSError
        The trace cannot be written: no space, no permission. Nothing is left half-written.
    ModelError
        The weights are not on this machine, and this was not recorded anywhere.
    """
    if "seeds" in settings:
        settings["seeds"] = list(settings["seeds"])  # the key must not use up a generator
    what, where = _keys(function, model, pairs, settings)
    stem = f"{function.__name__}-{what}-"
    folder = cache_folder() / f"{stem}{where}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists() and "@" in model.fingerprint:
            known = [f for f in folder.parent.glob(f"{stem}*") if f.is_dir() and not f.suffix]
            folder = max(known, key=lambda f: f.stat().st_mtime, default=folder)
        if not folder.exists():
            trace = function(model, pairs, **settings)
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                trace.to_zarr(partial, zarr_format=2)
                _leave_card(model)
                os.replace(partial, folder)
            except OSError as error:
                shutil.rmtree(partial, ignore_errors=True)
                hint = "free some space, or set MEMLIB_CACHE to a folder on another disk"
                raise OSError(f"the trace could not be kept ({error}): {hint}") from error
        return xr.open_zarr(folder).load()


def card_file(name: str) -> Path:
    """Where the cache describes a Hub model, so that its traces are read without its weights."""
    return cache_folder() / "models" / f"{re.sub('[^A-Za-z0-9.-]', '_', name)}.json"


def _leave_card(model) -> None:
    if "@" not in model.fingerprint:
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


def _keys(function, model, pairs: pd.DataFrame, settings: dict) -> tuple[str, str]:
    """Two hashes: what is recorded, and by which code on which kind of device."""
    bound = inspect.signature(function).bind(model, pairs, **settings)
    bound.apply_defaults()
    values = dict(bound.arguments)
    for unimportant in ("model", "pairs", "progress"):
        values.pop(unimportant, None)
    if callable(values.get("guidance_scale")):
        values["guidance_scale"] = sample.guidance_values(values["guidance_scale"], values["steps"])
    columns = [c for c in ("prompt_id", "caption", "kind", "multiplicity") if c in pairs]
    modules = (gram, models, memlib.pairs, sample, schedule, severity)
    packages = ("torch", "diffusers", "transformers", "numpy", "pillow", "onnxruntime")
    what = [
        function.__name__,
        model.fingerprint,
        json.dumps(values, default=_plain, sort_keys=True),
        pairs[columns].to_csv(index=False),
        *(sha256(Path(f)) if f else "" for f in sample.image_files(pairs)),
        json.dumps(model.scheduler_config, default=str, sort_keys=True),
    ]
    where = [
        f"{model.precision} {model.device.type}",
        *(inspect.getsource(module) for module in modules),
        *(version(package) for package in packages),
    ]
    hashes = [hashlib.sha256("\0".join(parts).encode()).hexdigest() for parts in (what, where)]
    return hashes[0][:20], hashes[1][:12]


def _plain(value):
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return list(value)
