"""Runs: traces on disk, recorded piece by piece, so that a run survives whatever stops it.

A run is one Zarr dataset (format 2) in a folder or at any fsspec address; `xarray.open_zarr` reads
it at any time, and what is not recorded yet is NaN. A *piece* is one prompt with the seeds that
were asked for together. Its files appear as a whole, its checksums (`sha256`, one for each seed and
variable, over the values) last: a piece without them does not count. What is to be recorded stands
in ``plan.json``, kept twice; the rest of the header follows from it.

`Run` knows nothing of models and samplers: `memlib.runs.work` does the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import xarray as xr
import zarr
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from zarr.storage import WrapperStore

from memlib.errors import first_line, short
from memlib.hub.files import sha256
from memlib.runs import plan as plans
from memlib.runs.plan import COPY, DIMS, PLAN, SCHEMA, StoreError, Task, digest, dump

LARGE = 2**26  # bytes of an array that is read when it is used
BROKEN = (OSError, ValueError, RuntimeError, KeyError)  # what zarr and its codecs raise
MENDED = "if it is damaged, `memlib verify` says where, and recording it again mends it"
KEPT = "every piece recorded so far is kept; give it space, permission or another address"


@dataclass
class Report:
    """What `verify` found: counts of pieces, and which of them or of other files are damaged."""

    address: str
    pieces: int
    damaged: list[str]
    done: int = 0
    missing: int = 0

    @property
    def ok(self) -> bool:
        """Nothing is damaged; pieces may still be missing."""
        return not self.damaged

    def __str__(self) -> str:
        state = "whole" if self.ok else "DAMAGED"
        counts = f"{self.done} pieces of {self.pieces} recorded, {self.missing} to do"
        lines = [f"{self.address}: {state}; {counts}, {len(self.damaged)} damaged", *self.damaged]
        if not self.ok:
            lines.append("the command that recorded it redoes these, and only these")
        return "\n  ".join(lines)


class _Pending(WrapperStore):
    """The files of a run for zarr to change: what it writes is kept here, to be published."""

    def __init__(self, store):
        super().__init__(store)
        self.files: dict[str, bytes] = {}

    async def get(self, key, *rest, **options):
        found = await super().get(key, *rest, **options)
        if found is not None and key[-1].isdigit():
            try:  # what cannot be read has neighbours that are redone, too: their checksums say so
                plans.COMPRESSOR.decode(found.to_bytes())
            except (RuntimeError, ValueError):
                return None
        return found

    async def set(self, key, value):
        self.files[key] = value.to_bytes()


class Run:
    """One run at an address: its plan, its pieces, their checksums."""

    def __init__(self, address: str | os.PathLike):
        self.address = os.fspath(address)
        with self._told("reached", (ValueError, ImportError), "give another address"):
            self.fs, self.root = fsspec.core.url_to_fs(self.address)
        self.folder = Path(self.root) if isinstance(self.fs, LocalFileSystem) else None
        self.plan: dict | None = None
        self._claims = contextlib.ExitStack()

    # --- files, and who may write them ----------------------------------------------------------

    @contextlib.contextmanager
    def _told(self, what: str = "read", errors=BROKEN, advice: str = MENDED):
        """What goes wrong within, in one line."""
        try:
            yield
        except (StoreError, Timeout):
            raise
        except errors as error:
            why = getattr(error, "strerror", None) or first_line(error)
            raise StoreError(f"{self.address} cannot be {what} ({why}): {advice}") from error

    @contextlib.contextmanager
    def _alone(self, begun: bool = True):
        """Writing, alone among the processes that see this folder."""
        with self._told("written", OSError, f"{KEPT}, and run the same command again"):
            if begun and not self.fs.exists(f"{self.root}/{PLAN}"):
                raise StoreError(
                    f"{self.address} has vanished (an unmounted disk, a deleted folder?): put it "
                    "back and run the same command again, and only what is missing is recorded"
                )
            if not self.folder:
                yield
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                (self.folder / ".work").mkdir(exist_ok=True)
                yield

    def _get(self, key: str) -> bytes | None:
        with self._told(), contextlib.suppress(FileNotFoundError):
            return self.fs.cat_file(f"{self.root}/{key}")

    def _publish(self, files: dict[str, bytes]) -> None:
        """Write files, in this order; in a folder each apart, then moved into place."""
        for key, data in files.items():
            if not self.folder:
                self.fs.pipe_file(f"{self.root}/{key}", data)
                continue
            apart, target = self.folder / ".work" / "file", self.folder / key
            target.parent.mkdir(exist_ok=True)
            with open(apart, "wb") as file:
                file.write(data)
                if key in (PLAN, COPY):  # what a power cut takes of the rest is redone
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(apart, target)

    @contextlib.contextmanager
    def work(self):
        """While a process records. Its claims end with it, and what dead ones left goes."""
        try:
            with contextlib.ExitStack() as self._claims:
                yield
        finally:
            with contextlib.suppress(OSError), self._alone():
                for claim in self.fs.glob(f"{self.root}/.work/*.claim"):
                    FileLock(claim, timeout=0).acquire()  # or another process is at work
                if self.folder:
                    self.fs.rm(f"{self.root}/.work", recursive=True)

    def claim(self, task: Task) -> Callable[[], None] | None:
        """The right to record a task, as what gives it up; None while another process has it."""
        if not self.folder:
            return lambda: None  # nobody can be asked: both would write the same
        lock = FileLock(self.folder / ".work" / f"{task.number}.claim", timeout=0)
        with contextlib.suppress(Timeout), self._alone():
            self._claims.enter_context(lock)
            return lock.release

    # --- the plan -------------------------------------------------------------------------------

    def read_plan(self) -> dict | None:
        """The plan, from its copy where it is damaged; None where there is no run."""
        found = [self._get(PLAN), self._get(COPY)]
        for text in found:
            with contextlib.suppress(TypeError, ValueError, KeyError):
                plan = json.loads(text)["plan"]
                if text != plans.plan_file(plan):
                    continue
                if plan["schema"] != SCHEMA:
                    raise StoreError(
                        f"{self.address} is of schema {plan['schema']}, and this memlib knows "
                        f"{SCHEMA}: use the memlib that wrote it, or record into another address"
                    )
                self.plan = plan
                return plan
        if found != [None, None]:
            raise StoreError(
                f"{self.address}: plan.json and its copy are damaged; the pieces are still read by "
                "xarray.open_zarr. Record into another address"
            )
        there = [f.removeprefix(self.root).lstrip("/") for f in self.fs.find(self.root)]
        if foreign := [f for f in there if not f.startswith((".lock", ".work"))]:
            raise StoreError(
                f"{self.address} holds no run but {foreign[0]} (a Zarr of an older memlib, another "
                "program's folder?): it is left as it is; record into another address"
            )

    def planned(self) -> dict:
        """The plan of a run that must be there."""
        if plan := self.read_plan():
            return plan
        raise StoreError(f"{self.address}: there is no run here (no plan.json)")

    def open_plan(self, identity: dict, rows: list[dict], seeds: list[int], batch_size, template):
        """Begin the run, or extend its plan by what is asked for and not in it; mend its header.

        `identity` is all that must agree (function, settings, model), `rows` the prompts,
        `template` a trace of no prompts: it has the shapes of the pieces.
        """
        self.read_plan()  # a folder that holds something else is left as it is
        with self._alone(begun=False):
            plan = self.read_plan() or plans.new_plan(identity, seeds, template)
            plans.agree(self.address, plan, identity, template)
            plans.extend(
                self.address, plan, rows, seeds, batch_size,
                begun=lambda p: bool(self.fs.glob(f"{self.root}/sha256/{p}.*")),
            )  # fmt: skip
            files = plans.header(plan, template).items()
            self._publish({key: data for key, data in files if self._get(key) != data})
            self.plan = plan

    def tasks(self) -> list[Task]:
        """All work of the plan; `check` tells which of it is done."""
        return [
            Task(n, tuple(w["prompts"]), tuple(w["seeds"]), w["batch_size"])
            for n, w in enumerate(self.plan["work"])
        ]

    def takes(self, rows: list[dict]) -> bool:
        """Whether these can be of the list here: not where every id that both have is another's."""
        plan = self.read_plan() or {"prompts": []}
        known = {row["prompt_id"]: dump(row) for row in plan["prompts"]}
        same = {known[i] == dump(row) for row in rows if (i := row["prompt_id"]) in known}
        return same != {False}

    def covers(self, identity: dict, rows: list[dict], seeds: list[int]) -> bool:
        """Whether all of this is recorded, every two seeds of a prompt in the same piece."""
        with contextlib.suppress(StoreError, KeyError, ValueError):
            plan = self.planned()
            numbers, columns = self._numbers(rows), {plan["seeds"].index(s) for s in seeds}
            tasks = [t for t in self.tasks() if columns <= {*t.seeds} and {*numbers} & {*t.prompts}]
            if plan["identity"] == identity and not self._wrong(plan["header"]):
                return {*numbers} <= {p for _, p, state in self.check(tasks) if state == "done"}
        return False

    def _numbers(self, rows: list[dict]) -> list[int]:
        """The positions of prompts in the plan; KeyError where one is not in it."""
        places = {dump(row): n for n, row in enumerate(self.plan["prompts"])}
        return [places[dump(row)] for row in rows]

    def _wrong(self, digests: dict[str, str]) -> list[str]:
        """What is wrong with these files of the header, a line for each."""
        found = {key: self._get(key) for key in digests}
        wrong = [key for key, data in found.items() if digest(data or b"") != digests[key]]
        return [f"{key} is {'missing' if found[key] is None else 'damaged'}" for key in wrong]

    # --- pieces ---------------------------------------------------------------------------------

    def put(self, task: Task, p: int, piece: xr.Dataset) -> None:
        """Write the piece of prompt number `p`, its checksums last."""
        piece = piece.rename(plans.old_names(self.plan))[self.plan["parts"]]
        sums = [self._sums(p, task, n, v.dims, v.values) for n, v in piece.items()]
        values = {n: v.values for n, v in piece.items()} | {"sha256": np.stack(sums, -2)}
        with self._alone(), zarr.config.set({"array.write_empty_chunks": True}):
            pending = _Pending(zarr.open_group(self.address, mode="r").store)
            arrays = dict(zarr.open_consolidated(pending, mode="r").arrays())
            for name, value in values.items():
                arrays[name].oindex[_at(arrays[name], p, task)] = value
            self._publish(pending.files)

    def _sums(self, p: int, task: Task, name: str, dims, values: np.ndarray) -> np.ndarray:
        """SHA-256 of each seed's values (of all, without seeds) and of whose they are."""
        owner, each = dump([self.plan["identity"], self.plan["prompts"][p], name]), [("", values)]
        if task.seeds:
            seeds = [str(self.plan["seeds"][s]) for s in task.seeds]
            each = zip(seeds, np.moveaxis(values, dims.index("seed"), 0), strict=True)
        sums = [hashlib.sha256((owner + s).encode() + v.tobytes()).digest() for s, v in each]
        sums = np.frombuffer(b"".join(sums), np.uint8).reshape(-1, 32)
        return sums if task.seeds else sums[0]

    def check(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, int, str]]:
        """Task, prompt number and state of every piece: ``done``, ``missing``, or what is wrong."""
        with self._told():  # read anew: another process may have let the run grow
            arrays = dict(zarr.open_consolidated(self.address, mode="r").arrays())
        for task in tasks:
            for p in task.prompts:
                yield task, p, self._state(arrays, task, p)

    def _state(self, arrays: dict[str, zarr.Array], task: Task, p: int) -> str:
        name = "sha256"
        try:
            sums = arrays[name].oindex[_at(arrays[name], p, task)]
            if not sums.any((-2, -1)).all():
                return "missing"
            for n, name in enumerate(arrays["sha256"].attrs["parts"]):
                values = arrays[name].oindex[_at(arrays[name], p, task)]
                dims = arrays[name].attrs[DIMS][1:]
                if (self._sums(p, task, name, dims, values) != sums[..., n, :]).any():
                    return f"{name} is not what its checksum says"
        except BROKEN as error:
            return f"{name} cannot be read: {first_line(error)}"
        return "done"

    def verify(self) -> Report:
        """Compare everything on disk with its checksums."""
        plan, tasks = self.planned(), self.tasks()
        digests = plan["header"] | dict.fromkeys((PLAN, COPY), digest(plans.plan_file(plan)))
        pieces = sum(len(task.prompts) for task in tasks)
        report = Report(self.address, pieces, self._wrong(digests))
        if any(".z" in problem for problem in report.damaged):
            report.damaged[-1] += "; pieces are not checked before the header is mended"
            return report
        for task, p, state in self.check(tasks):
            report.done += state == "done"
            report.missing += state == "missing"
            if state not in ("done", "missing"):
                seeds = ", ".join(str(plan["seeds"][s]) for s in task.seeds) or "none"
                name = plan["prompts"][p]["prompt_id"]
                report.damaged.append(f"prompt {name}, seeds {short(seeds)}: {state}")
        return report

    def read(self, rows: list[dict] | None = None, seeds: list[int] | None = None) -> xr.Dataset:
        """The dataset, or these prompts and seeds of it; what is large is read when it is used."""
        plan = self.plan or self.planned()
        at = {"prompt": self._numbers(rows)} if rows is not None else {}
        if seeds:
            at["seed"] = at["seed_"] = [plan["seeds"].index(s) for s in seeds]
        with self._told():
            found = xr.open_dataset(self.address, engine="zarr", chunks=None, consolidated=True)
            at = {dim: n for dim, n in at.items() if n != [*range(found.sizes.get(dim, 0))]}
            found = found.drop_vars("sha256").isel(at, missing_dims="ignore")
            for name, variable in found.variables.items():
                if variable.nbytes < LARGE or name == "gram":
                    variable.load()
        schema = found.attrs.get("schema")
        found.attrs["schema"] = plans.RENAMED.get(schema, schema)
        return found.rename({old: new for new, old in plans.old_names(plan).items()})


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
    return Run(address).read()


def prompt_rows(pairs: pd.DataFrame) -> list[dict]:
    """What identifies each prompt: its columns, and the checksum of its image."""
    columns = [c for c in plans.COLUMNS if c in pairs]
    images = pairs["image"] if "image" in pairs else [""] * len(pairs)
    return [
        {c: int(v) if isinstance(v, float) and v.is_integer() else v for c, v in row.items()}
        | {"image": sha256(Path(image)) if image else ""}
        for row, image in zip(pairs[columns].to_dict("records"), images, strict=True)
    ]


def _at(array: zarr.Array, p: int, task: Task) -> tuple:
    """Where a piece lies in an array."""
    at = {"prompt": p, "seed": [*task.seeds], "seed_": [*task.seeds]}
    return tuple(at.get(dim, slice(None)) for dim in array.attrs[DIMS])
