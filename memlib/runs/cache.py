"""A cache of traces on disk: what was recorded once is never recorded again."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import xarray as xr
from filelock import FileLock

from memlib.errors import first_line, renamed
from memlib.hub.answers import leave_card, of_hub
from memlib.hub.files import code
from memlib.paths import ROOT, TRACES, cache_folder
from memlib.runs import MAKES, packed
from memlib.runs.store import Run, StoreError, prompt_rows
from memlib.runs.tracing import reverse_trace
from memlib.runs.work import identity, record


@renamed(severity="similarity")
def cached(function: Callable[..., xr.Dataset], model, pairs: pd.DataFrame, **settings):
    """`function(model, pairs, **settings)`, read from the cache as far as it was recorded before.

    `function` is `reverse_trace` or `forward_trace`. What is asked for is a run of its own
    (`memlib.runs.store`), whose name covers everything that matters: the weights, the prompts and
    the bytes of their images, the settings, the code and the versions of the packages. A run that
    was stopped goes on where it was. What ``memlib trace`` has recorded is taken, too, where it has
    all that is asked for. Traces of a Hub model are dear and travel: those of another machine,
    device or version of a package are taken (their attributes say which), the newest first. So are
    the traces of the lab that come with the book, in ``data/traces``, unless MEMLIB_FRESH is set.

    Raises
    ------
    StoreError
        The trace cannot be written: no space, no permission. What was recorded is kept.
    ModelError
        The weights are not on this machine, and this was not recorded anywhere.
    """
    if "seeds" in settings:
        settings["seeds"] = list(settings["seeds"])  # the key must not use up a generator
    agreed, values = identity(function, model.uncached, pairs, settings)
    rows, seeds = prompt_rows(pairs), [int(s) for s in values.get("seeds", [])]
    own, shared, where = _names(function, agreed, [rows, seeds], model)
    folder = cache_folder() / f"{own}-{where}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        anywhere = "" if of_hub(model) else where
        known = [f for name in (own, shared) for f in folder.parent.glob(f"{name}-{anywhere}*")]
        known = sorted((f for f in known if f.is_dir()), key=lambda f: -f.stat().st_mtime)
        for run in map(Run, sorted(known, key=lambda f: f != folder)):  # this one first
            if run.covers(agreed, rows, seeds):
                return run.read(rows, seeds)
        file = TRACES / f"{own}.zip"
        if file.exists() and not os.environ.get("MEMLIB_FRESH"):
            try:
                return packed.read(file, rows, function(model.uncached, pairs.iloc[:0], **settings))
            except packed.BROKEN as error:
                text = (
                    f"data/traces/{file.name} cannot be used ({first_line(error)}): recorded anew"
                )
                warnings.warn(f"{text}; git checkout -- data/traces restores it", stacklevel=2)
        try:
            record(function, model, pairs, address=folder, strict=True, **settings)
        except StoreError as error:
            raise StoreError(f"{error}; MEMLIB_CACHE may name a folder on another disk") from error
        leave_card(model)
        return Run(folder).read(rows, seeds)


def run_folder(model, pairs: pd.DataFrame, **settings) -> Path:
    """Where ``memlib trace`` keeps a run of these settings: more prompts or seeds join it.

    Another list, whose ids are those of recorded prompts and all stand for others, gets a run of
    its own beside it.
    """
    agreed, _ = identity(reverse_trace, model.uncached, pairs, settings)
    _, shared, where = _names(reverse_trace, agreed, [], model)
    rows, number = prompt_rows(pairs), itertools.count(2)
    folder = first = cache_folder() / f"{shared}-{where}"
    while not Run(folder).takes(rows):
        folder = Path(f"{first}-{next(number)}")
    return folder


def _names(function, agreed: dict, asked: list, model) -> tuple[str, str, str]:
    """Names of the run of just this, and of any run of its settings; a hash of code and device."""
    own, shared = (
        hashlib.sha256(json.dumps(part).encode()).hexdigest()[:20]
        for part in ([agreed, asked], agreed)
    )
    return f"{function.__name__}-{own}", f"run-{shared}", made_by(model)


def made_by(model) -> str:
    """A hash of the code, the packages and the kind of device that make a model's numbers."""
    packages = ("torch", "diffusers", "transformers", "numpy", "pillow", "onnxruntime")
    where = [
        f"{model.precision} {model.device.type}",
        *(code(ROOT / "memlib" / f"{name}.py") for name in MAKES),
        *(version(package) for package in packages),
    ]
    return hashlib.sha256(json.dumps(where).encode()).hexdigest()[:12]
