"""Runs: traces on disk, recorded piece by piece, so that a run survives whatever stops it.

A run is one Zarr dataset (format 2) in a folder or at any fsspec address; `xarray.open_zarr` reads
it at any time, and what is not recorded yet is NaN. A *piece* is one prompt with the seeds that
were asked for together. It is written apart, then moved into place, its checksums (`sha256`, one
for each seed and variable, over the values) last: a piece without them does not count. What is to
be recorded stands in ``plan.json``, kept twice; the rest of the header follows from it.

`Run` knows nothing of models and samplers: `memlib.record` does the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import xarray as xr
import zarr
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from numcodecs import Zstd

from memlib.checksums import sha256
from memlib.errors import first_line

SCHEMA = "memlib-run-1"
PLAN, COPY = "plan.json", ".plan.json"
COLUMNS = ("prompt_id", "caption", "kind", "multiplicity", "group")
# Seeds in a chunk: pictures are large and read one at a time. A chunk is padded to its full size.
SEEDS, PICTURES = 50, 10
# The same inner product of all seeds and steps lies together (order F), so the symmetric half,
# zeros and what never changes cost next to nothing; zstd adds a checksum of its own.
COMPRESSOR = Zstd(level=3, checksum=True)


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
        self._staging = Path(self.root, ".work", uuid.uuid4().hex)

    # --- files that appear as a whole or not at all ---------------------------------------------

    def _get(self, key: str) -> bytes | None:
        try:
            return self.fs.cat_file(f"{self.root}/{key}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"{self.address}: {key} cannot be read: {first_line(error)}"
            ) from error

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

    @contextlib.contextmanager
    def _apart(self):
        """A folder that nobody reads, on the same disk; what a killed run left there is removed.

        It is used again: to remove its folders would take as long as to write a piece.
        """
        if not self.local:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)
            return
        self._staging.parent.mkdir(exist_ok=True)
        self._staging.mkdir(exist_ok=True)
        try:
            yield self._staging
        except BaseException:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise

    def _publish(self, staging: Path, keys: Iterable[str]) -> None:
        """Move files into place, in this order."""
        for key in keys:
            if not self.local:
                self.fs.pipe_file(f"{self.root}/{key}", (staging / key).read_bytes())
                continue
            if key in (PLAN, COPY):  # the rest has checksums: what a power cut takes is redone
                with (staging / key).open("rb") as file:
                    os.fsync(file.fileno())
            target = self.folder / key
            target.parent.mkdir(exist_ok=True)
            os.replace(staging / key, target)

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
                plan |= {"work": [], "versions": [], "header": {}}
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
            self._write_header(plan, template)
            self.plan = plan

    def _write_header(self, plan: dict, template: xr.Dataset) -> None:
        with self._apart() as staging:
            _build_header(staging / "header", plan, template)
            files = sorted(f for f in (staging / "header").rglob("*") if f.is_file())
            # .zmetadata last: readers find what it promises
            files = sorted(files, key=lambda f: (f.name == ".zmetadata", f.name[0] == "."))
            keys = [f.relative_to(staging / "header").as_posix() for f in files]
            plan["header"] = {k: sha256(staging / "header" / k) for k in keys}
            for name in (COPY, PLAN):
                (staging / name).write_bytes(_plan_file(plan))
            self._publish(staging, [n for n in (COPY, PLAN) if self._get(n) != _plan_file(plan)])
            self._publish(staging / "header", [k for k in keys if self._damage(k, plan)])
            shutil.rmtree(staging / "header")

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

    # --- pieces ---------------------------------------------------------------------------------

    def _group(self) -> zarr.Group:
        try:
            return zarr.open_group(self.address, mode="r", use_consolidated=False)
        except OSError as error:
            raise StoreError(f"{self.address} cannot be read: {first_line(error)}") from error

    def put(self, task: Task, p: int, piece: xr.Dataset) -> None:
        """Write the piece of prompt number `p`: apart, then into place, its checksums last."""
        with self._writing():
            self._still_here()
            with self._locked(), self._apart() as staging:
                keys = self._write_piece(staging, task, p, piece)
                self._publish(staging, sorted(keys, key=lambda k: k.startswith("sha256/")))

    def _write_piece(self, staging: Path, task: Task, p: int, piece: xr.Dataset) -> list[str]:
        """Zarr files of one piece, and of what other pieces have in the same files."""
        parts = json.loads(self._get("sha256/.zattrs"))["parts"]
        piece = piece[parts].reset_coords(drop=True)
        sums = np.zeros((max(1, len(task.seeds)), len(piece), 32), np.uint8)
        for n, (name, value) in enumerate(piece.items()):
            for s, digest in enumerate(self._digests(p, task.seeds, name, value)):
                sums[s, n] = np.frombuffer(digest, np.uint8)
        dims = ("seed", "part", "byte") if task.seeds else ("one", "part", "byte")
        whole = piece.assign(sha256=(dims, sums))
        if not task.seeds:
            whole["sha256"] = whole.sha256.isel(one=0)
        keys = []
        for name, value in whole.items():
            (staging / name).mkdir(exist_ok=True)
            for meta in (".zarray", ".zattrs"):
                (staging / name / meta).write_bytes(self._get(f"{name}/{meta}") or b"")
            array = zarr.open_array(staging / name, mode="r+")
            dims = ("prompt", *value.dims)
            for key in _touched(name, array, dims, p, task.seeds):
                keys.append(key)
                old = self._get(key)
                if old is not None and _decodes(old):  # else its neighbours are redone, too
                    (staging / key).write_bytes(old)
            at = {"prompt": [p], "seed": list(task.seeds), "seed_": list(task.seeds)}
            array.oindex[tuple(at.get(d, slice(None)) for d in dims)] = value.values[None]
        return [key for key in keys if (staging / key).is_file()]

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

    def state(self, p: int, task: Task, group: zarr.Group | None = None) -> str:
        """``done``, ``missing``, or what is wrong with the piece of prompt number `p`."""
        group = self._group() if group is None else group  # its length would list the folder
        try:
            sums = group["sha256"][p]
        except (RuntimeError, ValueError, OSError) as error:
            return f"sha256 cannot be read: {first_line(error)}"
        seeds = task.seeds or (0,)
        sums = sums[list(seeds)] if task.seeds else sums[None]
        if not sums.any((1, 2)).all():
            return "missing"
        for n, name in enumerate(group["sha256"].attrs["parts"]):
            try:
                values = group[name][p]
            except (RuntimeError, ValueError, OSError) as error:
                return f"{name} cannot be read: {first_line(error)}"
            value = xr.Variable(group[name].attrs["_ARRAY_DIMENSIONS"][1:], values)
            if task.seeds:
                value = value.isel({d: list(seeds) for d in ("seed", "seed_") if d in value.dims})
            found = self._digests(p, task.seeds, name, value)
            if any(digest != bytes(sums[s, n]) for s, digest in enumerate(found)):
                return f"{name} is not what its checksum says"
        return "done"

    def check(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, int, str]]:
        """The `state` of every piece of these tasks: task, prompt number, state."""
        group = self._group()
        for task in tasks:
            for p in task.prompts:
                yield task, p, self.state(p, task, group)

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
        trace = xr.open_dataset(self.address, engine="zarr", chunks=None).drop_vars("sha256")
        if rows is not None:
            places = {_dump(row): n for n, row in enumerate(plan["prompts"])}
            chosen = [places[_dump(row)] for row in rows]
            if chosen != list(range(len(plan["prompts"]))):
                trace = trace.isel(prompt=chosen)
        if seeds and list(seeds) != plan["seeds"]:
            columns = [plan["seeds"].index(s) for s in seeds]
            trace = trace.isel({d: columns for d in ("seed", "seed_") if d in trace.dims})
        for name in set(trace.variables) - {"image", "pair_distance"}:
            trace[name].load()
        return trace


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


def _decodes(chunk: bytes) -> bool:
    try:
        return bool(COMPRESSOR.decode(chunk))
    except RuntimeError:
        return False


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
    for row in rows:
        known = places.get(row["prompt_id"])
        if known is None:
            places[row["prompt_id"]] = len(plan["prompts"])
            plan["prompts"].append(row)
        elif _dump(old := plan["prompts"][known]) != _dump(row):
            if not any(key.startswith(f"sha256/{known}.") for key in run._keys()):
                plan["prompts"][known] = row  # nothing is recorded: an image was mended, say
                continue
            name = next(c for c in {**old, **row} if old.get(c) != row.get(c))
            raise StoreError(
                f"{run.address} has prompt {row['prompt_id']} with another {name}: give the new "
                "one a prompt_id of its own, or record into another address"
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


def _build_header(folder: Path, plan: dict, template: xr.Dataset) -> None:
    """The empty dataset of a plan: coordinates, and arrays that have no piece yet."""
    fixed = template.drop_dims("prompt").drop_vars(["seed", "seed_"], errors="ignore")
    names = [c for c in COLUMNS if c in plan["prompts"][0]]
    columns = {c: [row.get(c, "") for row in plan["prompts"]] for c in names}
    fixed = fixed.assign_coords(prompt=columns.pop("prompt_id"))
    fixed = fixed.assign_coords({name: ("prompt", values) for name, values in columns.items()})
    parts = {name: v for name, v in template.data_vars.items() if "prompt" in v.dims}
    sizes = {**template.sizes, "prompt": len(plan["prompts"])}
    dims = ("prompt", "part", "byte")
    if plan["seeds"]:
        seeds = {d: plan["seeds"] for d in ("seed", "seed_") if d in template.dims}
        fixed, sizes = fixed.assign_coords(seeds), sizes | {d: len(plan["seeds"]) for d in seeds}
        dims = ("prompt", "seed", "part", "byte")
    fixed.to_zarr(folder, zarr_format=2, consolidated=False)
    sums = xr.Variable(dims, np.empty([0] * len(dims), np.uint8), {"parts": list(parts)})
    sizes |= {"part": len(parts), "byte": 32}
    group = zarr.open_group(folder, mode="r+", use_consolidated=False)
    for name, value in {**parts, "sha256": sums}.items():
        many = {"prompt": 1, "seed": PICTURES if name == "image" else SEEDS, "seed_": SEEDS}
        group.create_array(
            name,
            shape=tuple(sizes[d] for d in value.dims),
            chunks=tuple(many.get(d) or max(1, sizes[d]) for d in value.dims),
            dtype=value.dtype,
            order="C" if name == "image" else "F",
            fill_value=np.nan if value.dtype.kind == "f" else None,
            compressors=COMPRESSOR,
            attributes={"_ARRAY_DIMENSIONS": list(value.dims), **value.attrs},
        )
    zarr.consolidate_metadata(folder, zarr_format=2)


def _touched(name: str, array: zarr.Array, dims: tuple, p: int, seeds: tuple) -> list[str]:
    """The files that hold a piece."""
    keys = [()]
    for dim, chunk in zip(dims, array.chunks, strict=True):
        if dim == "prompt":
            numbers = [p]
        elif dim in ("seed", "seed_"):
            numbers = sorted({s // chunk for s in seeds})
        else:
            numbers = [0]
        keys = [(*key, n) for key in keys for n in numbers]
    return [f"{name}/{'.'.join(map(str, key))}" for key in keys]
