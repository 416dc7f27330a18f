"""A cache of traces on disk: what was recorded once is never recorded again."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
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
    weights, the prompts and the bytes of their images, the settings, and the recorder's code.
    An entry appears under its name only when it is complete, so a killed run leaves none.

    Raises
    ------
    OSError
        The trace cannot be written: no space, no permission. Nothing is left half-written.
    """
    if "seeds" in settings:
        settings["seeds"] = list(settings["seeds"])  # the key must not use up a generator
    key = _key(function, model, pairs, settings)
    folder = cache_folder() / f"{function.__name__}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            trace = function(model, pairs, **settings)
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                trace.to_zarr(partial, zarr_format=2)
                os.replace(partial, folder)
            except OSError as error:
                shutil.rmtree(partial, ignore_errors=True)
                hint = "free some space, or set MEMLIB_CACHE to a folder on another disk"
                raise OSError(f"the trace could not be kept ({error}): {hint}") from error
        return xr.open_zarr(folder).load()


def _key(function, model, pairs: pd.DataFrame, settings: dict) -> str:
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
    parts = [
        function.__name__,
        model.fingerprint,
        json.dumps(values, default=_plain, sort_keys=True),
        pairs[columns].to_csv(index=False),
        *(sha256(Path(f)) if f else "" for f in sample.image_files(pairs)),
        json.dumps(model.scheduler_config, default=str, sort_keys=True),
        f"{model.dtype} {model.device.type}",
        *(inspect.getsource(module) for module in modules),
        *(version(package) for package in packages),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _plain(value):
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return list(value)
