"""Results of a chapter's own experiments, kept on disk by the source of what made them."""

from __future__ import annotations

import ast
import dataclasses
import dis
import hashlib
import inspect
import json
import os
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from filelock import FileLock

from memlib.errors import first_line
from memlib.hub.files import code
from memlib.paths import TRACES, cache_folder
from memlib.runs import packed
from memlib.runs.cache import made_by
from memlib.runs.store import StoreError, prompt_rows

# Of kernels, of the results that one reads, and of one's rows: made again. Which kernel is drawn
# once, since what several results need, a whole law, is made once.
KERNELS, CHECKED, SHARE = 0.2, 0.1, 0.1
DRAWN = np.random.default_rng().random()
# Of the largest number of each variable. A grey level that rounds otherwise moves SSCD, which is
# int8, by up to 0.01; all else repeats to 1e-5.
TOLERANCE = 0.05


def kept(function: Callable[..., xr.Dataset], rows: pd.DataFrame, *arguments) -> xr.Dataset:
    """`function(rows, *arguments)`, from the disk where just this was computed before.

    For experiments that are no traces. The result is known by the source of `function` and of
    all that it uses of the chapter, by the weights of the models among its arguments, by the
    prompts and the bytes of their images: a change of any computes anew, and so does one of a
    module of this package whose functions it names, or of what samples. Results that come with
    the book, in ``data/traces``, are taken whatever has become of the package's code, unless
    MEMLIB_FRESH is set; on a CPU one kernel in five computes a part of them again, as made.

    Parameters
    ----------
    function : gives a Dataset of numbers whose variables begin with the dimension `prompt`, an
        entry for each row that depends on no other row.
    rows : prompts, as of `memlib.load_pairs`.
    arguments : numbers, texts, models, functions and classes of the chapter, lists and dicts.

    Returns
    -------
    The Dataset; its attributes say how many rows were computed again (`again`) and the largest
    difference (`largest`: of a row's numbers the median, in units of its variable's largest).

    Raises
    ------
    StoreError
        What comes with the book is not what this code makes; with MEMLIB_FRESH, a row is another
        alone than among others.
    TypeError
        An argument, or what `function` uses, cannot be told from others of its kind.
    """
    met: list = []  # models, and modules of this package
    words = json.dumps([_said(function, met), prompt_rows(rows), _said(arguments, met)])
    name = f"kept-{function.__name__}-{hashlib.sha256(words.encode()).hexdigest()[:20]}"
    models = [m for m in met if not isinstance(m, str)]
    modules = sorted({m for m in met if isinstance(m, str)})
    by = [made_by(m) for m in models[:1]] + [code(Path(sys.modules[m].__file__)) for m in modules]
    file = cache_folder() / f"{name}-{hashlib.sha256(json.dumps(by).encode()).hexdigest()[:12]}.zip"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        shipped = [] if os.environ.get("MEMLIB_FRESH") else [TRACES / f"{name}.zip"]
        for known in filter(lambda f: f.exists(), [file, *shipped]):
            try:
                found = xr.Dataset(packed.unpack(known))
            except packed.BROKEN as error:
                text = f"{known} cannot be used ({first_line(error)}): computed anew"
                warnings.warn(text, stacklevel=2)
                continue
            if known != file and all(model.device.type == "cpu" for model in models):
                found = _compared(found, known, function, rows, arguments)
            return found
        found = function(rows, *arguments)
        if os.environ.get("MEMLIB_FRESH") and len(rows) > 1:
            what = f"{function.__name__} gives a row other numbers alone than among others"
            _again(found, np.array([len(rows) - 1]), function, rows, arguments, what)
        packed.pack(found, file, source=models[0].source if models else "")
        return found


def _compared(found: xr.Dataset, file, function, rows, arguments) -> xr.Dataset:
    """A result that comes with the book, with some of its rows computed again."""
    rng = np.random.default_rng()
    count = int(SHARE * len(rows) + rng.random())  # of one row, all, now and then
    checked = DRAWN < KERNELS and rng.random() < CHECKED
    again = np.sort(rng.permutation(len(rows))[: count * checked])
    what = f"data/traces/{file.name} (make traces makes it anew) is not what this code makes"
    largest = _again(found, again, function, rows, arguments, what) if len(again) else 0.0
    return found.assign_attrs(again=len(again), largest=largest)


def _again(found: xr.Dataset, again: np.ndarray, function, rows, arguments, what: str) -> float:
    """The largest difference of these rows from what they give when only they are computed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as they were made: another number rounds otherwise
    try:
        new = function(rows.iloc[again], *arguments)
    finally:
        torch.set_num_threads(threads)
    largest = 0.0
    for name, values in found.items():
        differs = apart(values.values, new[name].values, again)
        if differs > TOLERANCE:
            raise StoreError(
                f"{what}: {name} differs by {differs:.2g} of its largest (a row's median), "
                f"{TOLERANCE:g} is tolerated (prompts {', '.join(rows.prompt_id.iloc[again])})"
            )
        largest = max(largest, differs)
    return largest


def apart(old: np.ndarray, new: np.ndarray, rows=slice(None)) -> float:
    """How far `new` is from these rows of `old`, in units of the largest number of all.

    Of a row's numbers the median: at a fork of its way a picture follows its last bits.
    """
    scale, old = np.nanmax(np.abs(old), initial=1e-12), old[rows].astype(float)
    gap = np.abs(old - new).reshape(len(old), -1) / scale
    gap = gap[~np.isnan(gap).all(1)]
    return float(np.nanmedian(gap, 1).max()) if len(gap) else 0.0


def _said(value, met: list, seen: dict | None = None):
    """A value as JSON that is the same wherever the chapter runs; what it meets is gathered."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return _said(value.tolist(), met, seen)
    if isinstance(value, list | tuple):
        return [_said(v, met, seen) for v in value]
    if isinstance(value, dict):
        return [[_said(k, met, seen), _said(v, met, seen)] for k, v in value.items()]
    if isinstance(value, pd.DataFrame):
        return prompt_rows(value)
    if hasattr(value, "fingerprint"):
        met.append(value)
        return ["model", value.fingerprint]
    if isinstance(value, types.ModuleType):
        met += [value.__name__] * value.__name__.startswith("memlib.")
        return value.__name__
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return [type(value).__name__, _said(fields, met, seen)]
    value = inspect.unwrap(value)  # of functools.cache
    if isinstance(value, type | types.FunctionType):
        return _source(value, met, seen)
    raise TypeError(f"a result cannot be kept by a {type(value).__name__}")


def _source(thing, met: list, seen: dict):
    """A function or class: its name, and, if it is the chapter's, its source and all it uses."""
    if thing.__module__ is None:
        raise TypeError(f"a result cannot be kept by {thing.__qualname__}: it is of no module")
    if thing.__module__ != "__main__":
        if getattr(thing, "__closure__", None):
            raise TypeError(f"a result cannot be kept by {thing.__qualname__}: it holds values")
        if thing.__module__.startswith("memlib."):
            met.append(thing.__module__)
        return f"{thing.__module__}.{thing.__qualname__}"
    if id(thing) in seen:
        return seen[id(thing)]
    seen[id(thing)] = thing.__qualname__  # met again within itself
    members = vars(thing).values() if isinstance(thing, type) else [thing]
    functions = [f for f in members if isinstance(f, types.FunctionType)]
    used = {}
    for function in functions:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        used |= {name: cell.cell_contents for name, cell in cells}
        names = _names(function.__code__) & function.__globals__.keys()
        used |= {name: function.__globals__[name] for name in names}
        used |= {f"default {n}": v for n, v in enumerate(function.__defaults__ or ())}
    # Of a class its methods: Python finds no source of a class of a notebook.
    sources = [ast.dump(ast.parse(textwrap.dedent(inspect.getsource(f)))) for f in functions]
    parts = [[name, _said(used[name], met, seen)] for name in sorted(used)]
    digest = hashlib.sha256("".join(sources).encode()).hexdigest()
    seen[id(thing)] = [thing.__qualname__, digest, parts]
    return seen[id(thing)]


def _names(code: types.CodeType) -> set[str]:
    """The globals that a function uses, those of functions within it, too."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return found.union(*map(_names, inner))
