"""Traces that come with the book: each one file, packed small.

A file is a ZIP of `about.json` and one LZMA stream for each variable. Of what is symmetric the
lower half is kept: scalar products, as differences from the step before, with 32 bits of mantissa
(1e-10 of a number; those of noised images, which are few, with all), and distances with 24.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import xarray as xr

from memlib.hub.files import whole
from memlib.runs.plan import COLUMNS

CUT = {"gram": 52 - 32, "seed_distance": 52 - 24}  # bits that are left out
BROKEN = (OSError, ValueError, KeyError, BadZipFile, lzma.LZMAError, EOFError)


def pack(trace: xr.Dataset, file: Path, **about) -> None:
    """Write a trace with all that is to be said about it; `about` is JSON."""
    variables = {name: v for name, v in trace.data_vars.items() if "prompt" in v.dims}
    with whole(file) as partial, ZipFile(partial, "w") as packed:
        for name, v in variables.items():
            values, delta = v.values, []
            if _symmetric(v.dims):
                values = np.moveaxis(values[..., *np.tril_indices(v.shape[-1])], -1, 0).copy()
            if name in CUT and "step" in v.dims:
                cut = CUT[name] * ("draw" not in v.dims)
                bits = (values.view(np.int64) + (1 << cut >> 1)) & -(1 << cut)
                values = np.diff(bits, axis=v.dims.index("step") + 1, prepend=0)
            if name == "image" and (row := v.shape[-2] * v.shape[-1]) <= 256:  # less the row above
                delta = [{"id": lzma.FILTER_DELTA, "dist": row}]
            filters = [*delta, {"id": lzma.FILTER_LZMA2, "preset": 9}]
            data = np.moveaxis(_bytes(values), -1, 0).tobytes()
            packed.writestr(name, lzma.compress(data, filters=filters))
        shapes = {n: [v.dims, v.shape, v.dtype.str, v.attrs] for n, v in variables.items()}
        about |= {"variables": shapes, "attrs": trace.attrs}
        packed.writestr("about.json", json.dumps(about, default=lambda v: np.asarray(v).tolist()))


def read_about(file: Path) -> dict:
    """What is said about a packed trace."""
    with ZipFile(file) as packed:
        return json.loads(packed.read("about.json"))


def unpack(file: Path) -> dict[str, xr.Variable]:
    """The variables of a packed trace.

    Raises
    ------
    One of `BROKEN`, where the file is damaged.
    """
    found = {}
    with ZipFile(file) as packed:  # each of its files has a checksum, which reading compares
        for name, (dims, shape, dtype, attrs) in read_about(file)["variables"].items():
            side, dtype = shape[-1], np.dtype(dtype)
            half = np.tril_indices(side) if _symmetric(dims) else None
            kept = shape if half is None else [len(half[0]), *shape[:-2]]
            data = np.frombuffer(lzma.decompress(packed.read(name)), np.uint8)
            data = np.moveaxis(data.reshape(dtype.itemsize, *kept), 0, -1)
            values = np.ascontiguousarray(data).view(dtype)[..., 0]
            if name in CUT and "step" in dims:
                steps = dims.index("step") + 1
                values = np.cumsum(values.view(np.int64), steps).view(dtype)
            if half is not None:
                values, whole_ = np.moveaxis(values, 0, -1), np.empty(shape, dtype)
                whole_[..., *half] = whole_[..., half[1], half[0]] = values
                values = whole_
            found[name] = xr.Variable(dims, values, attrs)
    return found


def read(file: Path, rows: list[dict], template: xr.Dataset) -> xr.Dataset:
    """A packed trace of these prompts; `template` is one of no prompts."""
    columns = {"prompt" if c == "prompt_id" else c: c for c in COLUMNS if c in rows[0]}
    coords = {name: ("prompt", [row.get(c, "") for row in rows]) for name, c in columns.items()}
    found = template.drop_dims("prompt").assign(unpack(file)).assign_coords(coords)
    return found.assign_attrs(read_about(file)["attrs"])


def _symmetric(dims) -> bool:
    return len(dims) > 2 and dims[-1] == f"{dims[-2]}_"


def _bytes(values: np.ndarray) -> np.ndarray:
    """The bytes of each number, as a last axis."""
    return np.ascontiguousarray(values)[..., None].view(np.uint8)
