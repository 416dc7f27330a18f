"""The plan of a run: what is recorded together, and the files that say so (its header).

Nothing here reads or writes: `memlib.runs.store` does.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numcodecs import Zstd

from memlib.errors import short

SCHEMA = "memlib-run-1"
PLAN, COPY = "plan.json", ".plan.json"
# What old runs call it, and go on calling it on disk → what it is called now.
RENAMED = {
    "pair_distance": "seed_distance", "rescued": "float32_fallback",
    "memlib-trace-1": "memlib-trace-2",
}  # fmt: skip
NEWER = ("compiled", "tokens_cut")  # variables that runs without a list of them do not have
COLUMNS = ("prompt_id", "caption", "kind", "multiplicity", "group")
# Seeds in a chunk: as many as the run began with, within these; a picture is large.
SEEDS, PICTURES = (10, 50), 10
# In order F the same number of all seeds and steps lies together, so the symmetric half, zeros
# and what never changes cost next to nothing; zstd adds a checksum of its own.
COMPRESSOR = Zstd(level=6, checksum=True)
DIMS = "_ARRAY_DIMENSIONS"  # where xarray looks for them


class StoreError(OSError):
    """A run that cannot be read or written; the message says why and what to do."""


@dataclass(frozen=True)
class Task:
    """Prompts (by position in the plan) that are recorded together, with the same seeds."""

    number: int
    prompts: tuple[int, ...]
    seeds: tuple[int, ...]  # positions in the plan; none for a forward trace
    batch_size: int | None


def new_plan(identity: dict, seeds: list[int], template: xr.Dataset) -> dict:
    """A plan without work; `template` is a trace of no prompts, with the shapes of the pieces."""
    return {
        "schema": SCHEMA, "identity": identity, "prompts": [], "seeds": [],
        "chunk": sorted((*SEEDS, len(seeds)))[1], "work": [], "versions": [], "header": {},
        "parts": [name for name, v in template.data_vars.items() if "prompt" in v.dims],
    }  # fmt: skip


def agree(address: str, plan: dict, identity: dict, template: xr.Dataset) -> None:
    """Refuse another identity (function, settings, model); warn of other versions of packages."""
    was, now = ({**i, **i["settings"], "settings": None} for i in (plan["identity"], identity))
    for name in sorted(n for n in {*was, *now} if was.get(n) != now.get(n)):
        raise StoreError(
            f"{address} was recorded with {name}={was.get(name)!r}, not {now.get(name)!r}: "
            "use the same, or give another address"
        )
    versions = json.loads(template.attrs.get("versions", "{}"))
    if versions not in plan["versions"]:
        if plan["versions"]:
            text = "other versions of packages: new pieces may differ in the last digits"
            warnings.warn(f"{address} was begun with {text}", stacklevel=3)
        plan["versions"].append(versions)


def extend(
    address: str, plan: dict, rows: list[dict], seeds: list[int], batch_size, begun: Callable
) -> None:
    """Add what is asked for and not planned, as tasks of about `batch_size` images each.

    A prompt may change until `begun`, of its number, says that something of it is recorded.
    """
    places = {row["prompt_id"]: n for n, row in enumerate(plan["prompts"])}
    for row in rows:
        n = places.setdefault(row["prompt_id"], len(places))
        old = plan["prompts"][n] if n < len(plan["prompts"]) else row
        if dump(old) != dump(row) and begun(n):
            name = next(c for c in {**old, **row} if old.get(c) != row.get(c))
            raise StoreError(
                f"{address} has prompt {short(row['prompt_id'])} with another {name}: "
                "give the new one a prompt_id of its own, or record into another address"
            )
        plan["prompts"][n : n + 1] = [row]
    plan["seeds"] += [s for s in seeds if s not in plan["seeds"]]
    columns = [plan["seeds"].index(s) for s in seeds] or [None]
    planned = {(p, c) for w in plan["work"] for p in w["prompts"] for c in w["seeds"] or [None]}
    wanted: dict[tuple, list[int]] = {}  # seeds → the prompts that lack just these
    for p in (places[row["prompt_id"]] for row in rows):
        if lacking := tuple(c for c in columns if (p, c) not in planned):
            wanted.setdefault(lacking, []).append(p)
    for lacking, prompts in wanted.items():
        size = max(1, (batch_size or 1) // len(lacking)) if seeds else 1
        for n in range(0, len(prompts), size):
            task = {"prompts": prompts[n : n + size], "seeds": [*lacking] if seeds else []}
            plan["work"].append(task | {"batch_size": batch_size})


def header(plan: dict, template: xr.Dataset) -> dict[str, bytes]:
    """The plan and the files of its empty dataset: coordinates, arrays that have no piece yet.

    That has the variables that the run has had from its beginning: whether `compiled` is among them
    depends on the device, and older runs have none of the `NEWER` ones. The metadata, last, are
    written here and not by zarr, whose versions spell them differently.
    """
    if "compiled" in plan.get("parts", ()) and "compiled" not in template:
        template = template.assign(compiled=template.float32_fallback)
    if names := old_names(plan):
        template = template.rename(names).assign_attrs(schema="memlib-trace-1")
    parts = [n for n, v in template.data_vars.items() if "prompt" in v.dims]
    kept = plan.setdefault("parts", [n for n in parts if n not in NEWER])
    template = template[[n for n in template.data_vars if n not in parts] + kept]
    rows, seeds, chunk = plan["prompts"], plan["seeds"], plan.get("chunk", 50)
    sizes = {"prompt": len(rows), "seed": len(seeds), "seed_": len(seeds)}
    sizes = {**template.sizes, **sizes, "part": len(kept), "byte": 32}
    fixed = {n: v for n, v in template.variables.items() if "prompt" not in v.dims}
    for name in (name for name in COLUMNS if name in rows[0]):
        column = xr.Variable("prompt", [row.get(name, "") for row in rows])
        fixed["prompt" if name == "prompt_id" else name] = column
    fixed |= {dim: xr.Variable(dim, seeds) for dim in ("seed", "seed_") if dim in template.dims}
    dims = ("prompt", "seed", "part", "byte") if seeds else ("prompt", "part", "byte")
    sums = xr.Variable(dims, np.empty([0] * len(dims), np.uint8), {"parts": kept})
    coords = sorted({*template.coords, *COLUMNS} & {*fixed} - {*sizes})
    attrs = {**template.attrs, "coordinates": " ".join(coords)}
    files, metadata = {}, {".zgroup": {"zarr_format": 2}, ".zattrs": attrs}
    for name, v in {**fixed, **template[kept].data_vars, "sha256": sums}.items():
        shape = chunks = [sizes[dim] for dim in v.dims]
        if name in fixed:
            v = v.astype(str) if v.dtype.kind == "O" else v  # a column of texts and gaps
            key = f"{name}/{'.'.join('0' * v.ndim) or 0}"
            files[key] = COMPRESSOR.encode(np.ascontiguousarray(v.values))
        else:
            most = {"prompt": 1, "seed": PICTURES if name == "image" else chunk, "seed_": chunk}
            chunks = [most.get(dim) or max(1, sizes[dim]) for dim in v.dims]
        metadata[f"{name}/.zarray"] = {
            "zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": v.dtype.str,
            "fill_value": "NaN" if v.dtype.kind == "f" else None,
            "order": "C" if name in {*fixed, "image"} else "F", "filters": None,
            "compressor": COMPRESSOR.get_config(), "dimension_separator": ".",
        }  # fmt: skip
        metadata[f"{name}/.zattrs"] = {DIMS: v.dims, **v.attrs}
    metadata[".zmetadata"] = {"zarr_consolidated_format": 1, "metadata": {**metadata}}
    for key, value in metadata.items():
        files[key] = json.dumps(value, default=lambda v: np.asarray(v).tolist()).encode()
    plan["header"] = {key: digest(data) for key, data in sorted(files.items())}
    return {COPY: plan_file(plan), PLAN: plan_file(plan)} | files


def dump(value) -> str:
    return json.dumps(value, sort_keys=True)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def plan_file(plan: dict) -> bytes:
    return json.dumps({"sha256": digest(dump(plan).encode()), "plan": plan}).encode()


def old_names(plan: dict) -> dict[str, str]:
    """What variables are called now → in a run that was begun before they were renamed."""
    return {new: old for old, new in RENAMED.items() if f"{old}/.zarray" in plan["header"]}
