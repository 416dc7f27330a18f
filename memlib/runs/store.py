"""Runs: traces on disk, recorded piece by piece, so that a run survives whatever stops it.

A run is one Zarr dataset (format 2) in a folder or at any fsspec address; `xarray.open_zarr` reads
it at any time, and what is not recorded yet is NaN. A *piece* is one prompt with the seeds that
were asked for together. It is written apart, then moved into place, its checksums (`sha256`, one
for each seed and variable, over the values) last: a piece without them does not count. What is to
be recorded stands in ``plan.json``, kept twice; the rest of the header follows from it.

`Run` knows nothing of models and samplers: `memlib.runs.work` does the work.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import xarray as xr
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from memlib.errors import first_line, short
from memlib.files import sha256
from memlib.runs.chunks import Array, group

SCHEMA = "memlib-run-1"
PLAN, COPY = "plan.json", ".plan.json"
NEWER = ("compiled", "tokens_cut")  # variables that runs without a list of them do not have
COLUMNS = ("prompt_id", "caption", "kind", "multiplicity", "group")
# Seeds in a chunk: as many as the run began with, within these; a picture is large.
SEEDS, PICTURES = (10, 50), 10
LARGE = 2**26  # bytes of an array that is read when it is used


class StoreError(OSError):
    """A run that cannot be read or written; the message says why and what to do."""


@dataclass(frozen=True)
class Task:
    """Prompts (by position in the plan) that are recorded together, with the same seeds."""

    number: int
    prompts: tuple[int, ...]
    seeds: tuple[int, ...]  # positions in the plan; none for a forward trace
    batch_size: int | None


@dataclass
class Report:
    """What `verify` found: counts of pieces, and what is wrong with which."""

    address: str
    pieces: int = 0
    done: int = 0
    missing: int = 0
    damaged: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is damaged; pieces may still be missing."""
        return not self.damaged and not self.header

    def __str__(self) -> str:
        state = "whole" if self.ok else "DAMAGED"
        counts = f"{self.done} pieces of {self.pieces} recorded, {self.missing} to do"
        lines = [f"{self.address}: {state}; {counts}, {len(self.damaged)} damaged"]
        lines += [f"  {problem}" for problem in self.header + self.damaged]
        if not self.ok:
            lines.append("  the command that recorded it redoes these, and only these")
        return "\n".join(lines)


class Run:
    """One run at an address: its plan, its pieces, their checksums."""

    def __init__(self, address: str | os.PathLike):
        self.address = os.fspath(address)
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.address)
        except (ValueError, ImportError) as error:
            raise StoreError(f"{self.address}: {first_line(error)}") from error
        self.local = isinstance(self.fs, LocalFileSystem)
        self.folder = Path(self.root) if self.local else None
        self.plan: dict | None = None
        self._arrays: dict[str, Array] | None = None
        self._staging = Path(self.root, ".work", uuid.uuid4().hex)

    # --- files that appear as a whole or not at all ---------------------------------------------

    def _get(self, key: str) -> bytes | None:
        try:
            if self.local:
                with open(f"{self.root}/{key}", "rb", buffering=0) as file:
                    return file.readall()
            return self.fs.cat_file(f"{self.root}/{key}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"{self.address}: {key} cannot be read: {first_line(error)}"
            ) from error

    def _getter(self, arrays: Iterable[Array], at: dict) -> Callable[[str], bytes | None]:
        """How the files at these positions are read: from afar all at once."""
        if self.local:
            return self._get
        keys = {f"{self.root}/{part[0]}": part[0] for array in arrays for part in array.parts(at)}
        found = self.fs.cat([*keys], on_error="return") if keys else {}
        for error in found.values():
            if isinstance(error, Exception) and not isinstance(error, FileNotFoundError):
                raise StoreError(f"{self.address} cannot be read: {first_line(error)}") from error
        known = {keys[k]: v for k, v in found.items() if isinstance(v, bytes)}
        return known.get

    @contextlib.contextmanager
    def _reading(self):
        try:
            yield
        except (ValueError, KeyError) as error:
            hint = f"`memlib verify {self.address}` says more, and recording it again mends it"
            raise StoreError(f"{self.address}: {first_line(error)}; {hint}") from error

    @contextlib.contextmanager
    def _writing(self, *other: type[Exception]):
        try:
            yield
        except (StoreError, *other):
            raise
        except OSError as error:
            text = getattr(error, "strerror", None) or first_line(error)
            raise StoreError(
                f"{self.address} cannot be written ({text}): every piece recorded so far is kept; "
                "give it space, permission or another address, and run the same command again"
            ) from error

    @contextlib.contextmanager
    def _locked(self):
        """Alone in this run, among the processes that see this folder."""
        with FileLock(self.folder / ".lock") if self.local else contextlib.nullcontext():
            yield

    def _publish(self, *groups: dict[str, bytes]) -> None:
        """Write files, each group of them before the next; none is ever there in part.

        In a folder all are written apart, on the same disk, and moved into place, in this order.
        """
        if not self.local:
            for group in groups:
                self.fs.pipe({f"{self.root}/{key}": data for key, data in group.items()})
            return
        self._staging.mkdir(parents=True, exist_ok=True)
        files = [file for group in groups for file in group.items()]
        try:
            for n, (key, data) in enumerate(files):
                with open(self._staging / str(n), "wb") as file:
                    file.write(data)
                    # The rest has checksums: what a power cut takes of it is redone.
                    if key in (PLAN, COPY):
                        file.flush()
                        os.fsync(file.fileno())
            for n, (key, _) in enumerate(files):
                target = self.folder / key
                target.parent.mkdir(exist_ok=True)
                os.replace(self._staging / str(n), target)
        except BaseException:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise

    @contextlib.contextmanager
    def work(self):
        """While a process records: its mark in ``.work``, so that the leavings of dead ones go."""
        if not self.local:
            yield
            return
        marks = self.folder / ".work"
        mark = FileLock(marks / f"{uuid.uuid4().hex}.mark")
        self.read_plan()  # a folder that holds something else is left as it is
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._sweep()
                marks.mkdir(exist_ok=True)
                mark.acquire()
        try:
            yield
        finally:
            mark.release()
            with contextlib.suppress(OSError, Timeout):
                if self.folder.is_dir():
                    with self._locked():
                        self._sweep()

    def _sweep(self) -> None:
        """Remove ``.work`` unless a living process has a mark in it."""
        marks = self.folder / ".work"
        for file in marks.glob("*.mark"):
            lock = FileLock(file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return
            lock.release()
        shutil.rmtree(marks, ignore_errors=True)

    def _still_here(self) -> None:
        if not self.fs.exists(f"{self.root}/{PLAN}"):
            raise StoreError(
                f"{self.address} has vanished (an unmounted disk, a deleted folder?): put it "
                "back and run the same command again, and only what is missing is recorded"
            )

    def claim(self, task: Task) -> Callable[[], None] | None:
        """The right to record a task, as what gives it up; None while another process has it."""
        if not self.local:
            return lambda: None  # nobody can be asked: both would write the same
        lock = FileLock(self.folder / ".work" / f"{task.number}.claim")
        try:
            with self._writing(Timeout):
                self._still_here()  # a lock would make the folder anew
                lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock.release

    # --- the plan -------------------------------------------------------------------------------

    def read_plan(self) -> dict | None:
        """The plan, from its copy where it is damaged; None where there is no run."""
        found = [self._get(PLAN), self._get(COPY)]
        for text in found:
            with contextlib.suppress(TypeError, ValueError, KeyError):
                whole = json.loads(text)
                if whole["sha256"] == _digest(_dump(whole["plan"])):
                    return self._known(whole["plan"])
        if any(text is not None for text in found):
            raise StoreError(
                f"{self.address}: plan.json and its copy are damaged; the pieces are still read by "
                "xarray.open_zarr. Record into another address"
            )
        foreign = [f for f in self._keys() if not f.startswith((".lock", ".work"))]
        if foreign:
            raise StoreError(
                f"{self.address} holds no run but {foreign[0]} (a Zarr of an older memlib, another "
                "program's folder?): it is left as it is; record into another address"
            )
        return None

    def _known(self, plan: dict) -> dict:
        if plan["schema"] != SCHEMA:
            raise StoreError(
                f"{self.address} is of schema {plan['schema']}, and this memlib knows {SCHEMA}: "
                "use the memlib that wrote it, or record into another address"
            )
        return plan

    def open_plan(self, identity: dict, rows: list[dict], seeds: list[int], batch_size, template):
        """Begin the run, or extend its plan by what is asked for and not in it; mend its header.

        `identity` is all that must agree (function, settings, model), `rows` the prompts,
        `template` a trace of no prompts: it has the shapes of the pieces.
        """
        with self._writing(), self._locked():
            plan = self.read_plan()
            if plan is None:
                plan = {"schema": SCHEMA, "identity": identity, "prompts": [], "seeds": []}
                chunk = sorted((*SEEDS, len(seeds)))[1]
                plan |= {"chunk": chunk, "work": [], "versions": [], "header": {}}
                plan["parts"] = [n for n, v in template.data_vars.items() if "prompt" in v.dims]
            _check_identity(self.address, plan["identity"], identity)
            versions = json.loads(template.attrs.get("versions", "{}"))
            if versions not in plan["versions"]:
                if plan["versions"]:
                    warnings.warn(
                        f"{self.address} was begun with other versions of packages: new pieces "
                        "may differ from its old ones in the last digits",
                        stacklevel=2,
                    )
                plan["versions"].append(versions)
            _extend(self, plan, rows, seeds, batch_size)
            self._write_header(plan, _as_begun(plan, template))
            self.plan = plan

    def _write_header(self, plan: dict, template: xr.Dataset) -> None:
        header = _header(plan, template)
        plan["header"] = {key: _digest(data) for key, data in sorted(header.items())}
        plans = {name: _plan_file(plan) for name in (COPY, PLAN)}
        self._publish(
            {name: data for name, data in plans.items() if self._get(name) != data},
            {key: data for key, data in header.items() if self._damage(key, plan)},
        )
        self._arrays = _arrays(header[".zmetadata"])

    def _damage(self, key: str, plan: dict) -> str | None:
        found = self._get(key)
        if found is None:
            return "is missing"
        return None if _digest(found) == plan["header"][key] else "is damaged"

    def _keys(self) -> list[str]:
        try:
            found = self.fs.find(self.root)
        except FileNotFoundError:
            return []
        return [f.removeprefix(self.root).lstrip("/") for f in found]

    def tasks(self) -> list[Task]:
        """All work of the plan; `check` tells which of it is done."""
        return [
            Task(n, tuple(w["prompts"]), tuple(w["seeds"]), w["batch_size"])
            for n, w in enumerate(self.plan["work"])
        ]

    def covers(self, identity: dict, rows: list[dict], seeds: list[int]) -> bool:
        """Whether all of this is recorded, every two seeds of a prompt in the same piece."""
        try:
            plan = self.plan = self.read_plan()
        except StoreError:
            return False
        if plan is None or plan["identity"] != identity:
            return False
        if any(self._damage(key, plan) for key in plan["header"]):
            return False
        places = {_dump(row): n for n, row in enumerate(plan["prompts"])}
        wanted = {places.get(_dump(row)) for row in rows}
        if None in wanted or not set(seeds) <= set(plan["seeds"]):
            return False
        columns = {plan["seeds"].index(s) for s in seeds}
        tasks = [t for t in self.tasks() if columns <= set(t.seeds) and wanted & set(t.prompts)]
        return wanted <= {p for _, p, state in self.check(tasks) if state == "done"}

    def takes(self, rows: list[dict]) -> bool:
        """Whether these can be of the list here: not where every id that both have is another's."""
        plan = self.read_plan() or {"prompts": []}
        known = {row["prompt_id"]: _dump(row) for row in plan["prompts"]}
        same = {known[i] == _dump(row) for row in rows if (i := row["prompt_id"]) in known}
        return same != {False}

    # --- pieces ---------------------------------------------------------------------------------

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays of the run, as its header describes them."""
        if self._arrays is None:
            found = self._get(".zmetadata")
            if found is None:
                raise StoreError(f"{self.address} cannot be read: .zmetadata is missing")
            with self._reading():
                self._arrays = _arrays(found)
        return self._arrays

    def _parts(self) -> list[str]:
        return self.arrays["sha256"].attrs["parts"]

    def put(self, task: Task, p: int, piece: xr.Dataset) -> None:
        """Write the piece of prompt number `p`: apart, then into place, its checksums last."""
        piece = piece[self._parts()]
        sums = [list(self._digests(p, task.seeds, n, v.variable)) for n, v in piece.items()]
        sums = np.frombuffer(b"".join(itertools.chain(*zip(*sums, strict=True))), np.uint8)
        sums = sums.reshape(max(1, len(task.seeds)), len(piece), 32)
        at = {"prompt": [p], "seed": task.seeds, "seed_": task.seeds}
        with self._writing():
            self._still_here()
            with self._locked():
                files, old = {}, self._getter(self.arrays.values(), at)
                for name, value in piece.items():
                    files |= self.arrays[name].write(value.values[None], at, old)
                if not task.seeds:
                    sums = sums[0]
                last = self.arrays["sha256"].write(sums[None], at, old)
                self._publish(files, last)

    def _digests(self, p: int, seeds: tuple[int, ...], name: str, value) -> Iterator[bytes]:
        """One checksum a seed (one in all without seeds), over values and whose they are."""
        owner = _dump([self.plan["identity"], self.plan["prompts"][p], name]).encode()
        dims, values = value.dims, value.values
        if "seed" not in dims:
            yield _sha(owner, values)
            return
        values = np.moveaxis(values, dims.index("seed"), 0)
        for s, number in enumerate(seeds):
            seed = str(self.plan["seeds"][number]).encode()
            yield _sha(owner + seed, np.asarray(values[s]))

    def state(self, p: int, task: Task) -> str:
        """``done``, ``missing``, or what is wrong with the piece of prompt number `p`."""
        at = {"prompt": [p], "seed": task.seeds, "seed_": task.seeds}
        try:
            get = self._getter(self.arrays.values(), at)
            sums = self.arrays["sha256"].read(at, get)[0]
            sums = sums if task.seeds else sums[None]
            if not sums.any((1, 2)).all():
                return "missing"
            for n, name in enumerate(self._parts()):
                array = self.arrays[name]
                value = xr.Variable(array.dims[1:], array.read(at, get)[0])
                found = self._digests(p, task.seeds, name, value)
                if any(digest != sums[s, n].tobytes() for s, digest in enumerate(found)):
                    return f"{name} is not what its checksum says"
        except (ValueError, StoreError) as error:
            return first_line(error)
        return "done"

    def check(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, int, str]]:
        """The `state` of every piece of these tasks: task, prompt number, state."""
        self._arrays = None  # another process may have let the run grow
        for task in tasks:
            for p in task.prompts:
                yield task, p, self.state(p, task)

    def verify(self) -> Report:
        """Compare everything on disk with its checksums."""
        report = Report(self.address)
        plan = self.plan = self.read_plan()
        if plan is None:
            raise StoreError(f"{self.address}: there is no run here (no plan.json)")
        for name in (PLAN, COPY):
            if self._get(name) != _plan_file(plan):
                report.header.append(f"{name} is damaged or missing; its copy is whole")
        for key in plan["header"]:
            if wrong := self._damage(key, plan):
                report.header.append(f"{key} {wrong}")
        tasks = self.tasks()
        report.pieces = sum(len(task.prompts) for task in tasks)
        if any(".z" in problem for problem in report.header):
            report.header.append("pieces are not checked before the header is mended")
            return report
        for task, p, state in self.check(tasks):
            report.done += state == "done"
            report.missing += state == "missing"
            if state not in ("done", "missing"):
                seeds = [plan["seeds"][s] for s in task.seeds]
                name = plan["prompts"][p]["prompt_id"]
                report.damaged.append(f"prompt {name}, seeds {_spell(seeds)}: {state}")
        return report

    def read(self, rows: list[dict] | None = None, seeds: list[int] | None = None) -> xr.Dataset:
        """The dataset, or these prompts and seeds of it; what is large is read when it is used."""
        plan = self.plan or self.read_plan()
        numbers = range(len(plan["prompts"]))
        if rows is not None:
            places = {_dump(row): n for n, row in enumerate(plan["prompts"])}
            numbers = [places[_dump(row)] for row in rows]
        seeds = seeds or plan["seeds"]
        columns = [plan["seeds"].index(s) for s in seeds]
        at = {"prompt": numbers, "seed": columns, "seed_": columns}
        at = {dim: n for dim, n in at.items() if dim == "prompt" or columns}
        lazy, found = None, {}
        with self._reading():
            for name, array in self.arrays.items():
                if name == "sha256":
                    continue
                if array.dtype.itemsize * math.prod(array.shape) < LARGE or name == "gram":
                    values = array.read(at, self._getter([array], at))
                    found[name] = xr.Variable(array.dims, values, array.attrs)
                    continue
                if lazy is None:
                    lazy = xr.open_dataset(self.address, engine="zarr", chunks=None)
                    there = {d: n for d, n in at.items() if n != list(range(lazy.sizes.get(d, 0)))}
                    lazy = lazy.isel(there, missing_dims="ignore")
                found[name] = lazy[name].variable
        attrs = json.loads(self._get(".zattrs"))
        coords = {*attrs.pop("coordinates").split()} | {
            n for n, v in found.items() if v.dims == (n,)
        }
        return xr.Dataset(found, attrs=attrs).set_coords(coords)


def verify(address: str | os.PathLike) -> Report:
    """Compare every file of a run with its checksums (``memlib verify``).

    Raises
    ------
    StoreError
        There is no run at this address, or it is of another schema.
    """
    return Run(address).verify()


def open_run(address: str | os.PathLike) -> xr.Dataset:
    """A run as one trace; what is not recorded yet is NaN. `xarray.open_zarr` reads it, too."""
    run = Run(address)
    run.plan = run.read_plan()
    if run.plan is None:
        raise StoreError(f"{run.address}: there is no run here (no plan.json)")
    return run.read()


def prompt_rows(pairs: pd.DataFrame) -> list[dict]:
    """What identifies each prompt: its columns, and the checksum of its image."""
    columns = [c for c in COLUMNS if c in pairs]
    images = list(pairs["image"]) if "image" in pairs else [""] * len(pairs)
    rows = [
        {c: _plain(v) for c, v in zip(columns, values, strict=True)}
        | {"image": sha256(Path(image)) if image else ""}
        for values, image in zip(pairs[columns].itertuples(index=False), images, strict=True)
    ]
    return rows


def _plain(value):
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _dump(value) -> str:
    return json.dumps(value, sort_keys=True)


def _plan_file(plan: dict) -> bytes:
    return json.dumps({"sha256": _digest(_dump(plan)), "plan": plan}).encode()


def _digest(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def _sha(owner: bytes, values: np.ndarray) -> bytes:
    total = hashlib.sha256(owner)
    total.update(np.ascontiguousarray(values).tobytes())
    return total.digest()


def _spell(seeds: list[int]) -> str:
    whole = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds)) or "none"


def _check_identity(address: str, old: dict, new: dict) -> None:
    flat = [{**i["settings"], "model": i["model"], "function": i["function"]} for i in (old, new)]
    for name in sorted({*flat[0], *flat[1]}):
        a, b = (f.get(name) for f in flat)
        if a != b:
            raise StoreError(
                f"{address} was recorded with {name}={a!r}, not {b!r}: use the same, or give "
                "another address"
            )


def _extend(run: Run, plan: dict, rows: list[dict], seeds: list[int], batch_size) -> None:
    """Add what is asked for and not planned, as tasks of about `batch_size` images each."""
    places = {row["prompt_id"]: n for n, row in enumerate(plan["prompts"])}
    begun = functools.cache(
        lambda: {k[7:].split(".")[0] for k in run._keys() if k[:7] == "sha256/"}
    )
    for row in rows:
        known = places.get(row["prompt_id"])
        if known is None:
            places[row["prompt_id"]] = len(plan["prompts"])
            plan["prompts"].append(row)
        elif _dump(old := plan["prompts"][known]) != _dump(row):
            if str(known) not in begun():
                plan["prompts"][known] = row  # nothing is recorded: an image was mended, say
                continue
            name = next(c for c in {**old, **row} if old.get(c) != row.get(c))
            raise StoreError(
                f"{run.address} has prompt {short(row['prompt_id'])} with another {name}: give "
                "the new one a prompt_id of its own, or record into another address"
            )
    plan["seeds"] += [s for s in seeds if s not in plan["seeds"]]
    columns = [plan["seeds"].index(s) for s in seeds]
    planned: dict[int, set] = {}
    for work in plan["work"]:
        for p in work["prompts"]:
            planned.setdefault(p, set()).update(work["seeds"] or [None])
    wanted: dict[tuple, list[int]] = {}  # seeds → the prompts that lack just these
    for row in rows:
        p = places[row["prompt_id"]]
        lacking = tuple(c for c in columns or [None] if c not in planned.get(p, ()))
        if lacking:
            wanted.setdefault(lacking, []).append(p)
    for lacking, prompts in wanted.items():
        together = max(1, (batch_size or 1) // len(lacking)) if columns else 1
        lacking = [c for c in lacking if c is not None]
        for n in range(0, len(prompts), together):
            group = {"prompts": prompts[n : n + together], "seeds": lacking}
            plan["work"].append(group | {"batch_size": batch_size})


def _as_begun(plan: dict, template: xr.Dataset) -> xr.Dataset:
    """The template with the variables that the run has had from its beginning.

    Whether `compiled` is among them depends on the device; a run of an older memlib has none of
    the `NEWER` ones.
    """
    parts = [n for n, v in template.data_vars.items() if "prompt" in v.dims]
    kept = plan.setdefault("parts", [n for n in parts if n not in NEWER])
    if "compiled" in kept and "compiled" not in parts:
        template = template.assign(compiled=template.float32_fallback)
    return template[[n for n in template.data_vars if n not in (*parts, "compiled")] + kept]


def _header(plan: dict, template: xr.Dataset) -> dict[str, bytes]:
    """The files of the empty dataset of a plan: coordinates, and arrays that have no piece yet."""
    sizes = {**template.sizes, "prompt": len(plan["prompts"])}
    fixed = {n: v for n, v in template.variables.items() if "prompt" not in v.dims}
    for name in COLUMNS:
        if name in plan["prompts"][0]:
            values = [row.get(name, "") for row in plan["prompts"]]
            fixed["prompt" if name == "prompt_id" else name] = xr.Variable("prompt", values)
    many = {"prompt": 1}
    if plan["seeds"]:
        for dim in {"seed", "seed_"} & set(template.dims):
            fixed[dim] = xr.Variable(dim, plan["seeds"])
            sizes[dim], many[dim] = len(plan["seeds"]), plan.get("chunk", 50)
    arrays, files = {}, {}
    for name, v in fixed.items():
        v = v.astype(str) if v.dtype.kind == "O" else v  # a column of texts and gaps
        arrays[name] = Array(name, v.dims, v.shape, v.shape, v.dtype, "C", v.attrs)
        files |= arrays[name].write(v.values, {}, lambda _: None)
    parts = {name: v for name, v in template.data_vars.items() if "prompt" in v.dims}
    dims = ("prompt", "seed", "part", "byte") if plan["seeds"] else ("prompt", "part", "byte")
    sums = xr.Variable(dims, np.empty([0] * len(dims), np.uint8), {"parts": list(parts)})
    sizes |= {"part": len(parts), "byte": 32}
    for name, v in {**parts, "sha256": sums}.items():
        picture = name == "image"
        chunk = many | {"seed": PICTURES} if picture else many
        shape = tuple(sizes[d] for d in v.dims)
        chunks = tuple(chunk.get(d) or max(1, sizes[d]) for d in v.dims)
        arrays[name] = Array(name, v.dims, shape, chunks, v.dtype, "C" if picture else "F", v.attrs)
    coords = sorted({n for n in fixed if n not in sizes} & {*template.coords, *COLUMNS})
    attrs = {**template.attrs, "coordinates": " ".join(coords)}
    return files | group(arrays.values(), attrs)


def _arrays(metadata: bytes) -> dict[str, Array]:
    known = json.loads(metadata)["metadata"]
    names = [key.removesuffix("/.zarray") for key in known if key.endswith("/.zarray")]
    return {name: Array.known(name, known) for name in names}
