"""Recording into a run: what is missing is sampled, piece by piece, whatever happens to workers."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import pandas as pd
import torch
import xarray as xr

from memlib.errors import first_line, renamed
from memlib.hub.sscd import OFFICIAL, PREPROCESSING
from memlib.runs import cost, engines
from memlib.runs.store import Run, StoreError, Task, prompt_rows
from memlib.runs.tracing import progress_bar, reverse_trace, tell_of_long_captions
from memlib.schedule import guidance_values

PRIVATE = ("seeds", "batch_size", "compile")  # settings that may differ within one run
STRAGGLER = 2.0  # times the median: a task that takes longer is begun again by an idle worker
CONTEXT = 2**29  # bytes that each process on a GPU takes for itself


@dataclass
class Summary:
    """How a run ended: pieces done now, found done, and failed with the reason."""

    address: str
    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None  # the first failure
    seconds: float = 0.0

    def __str__(self) -> str:
        head = f"{self.done} pieces recorded, {self.skipped} were there, {len(self.failed)} failed"
        lines = [f"  {name}: {reason}" for name, reason in self.failed.items()]
        more = [f"  and {len(lines) - 10} more"] * (len(lines) > 10)
        return "\n".join([f"{head} ({self.seconds:.0f} s): {self.address}", *lines[:10], *more])


class _Progress:
    """A bar on a terminal; elsewhere a line now and then, or nothing."""

    def __init__(self, total: int, name: str, how: bool | str):
        self.bar = progress_bar(total, name, bool(how))
        self.lines = how == "lines" and self.bar.disable
        self.total, self.done, self.failed = total, 0, 0
        self.begun = self.said = time.monotonic()

    def update(self, images: int, failed: int = 0) -> None:
        self.done, self.failed = self.done + images, self.failed + failed
        self.bar.update(images)
        if failed:
            self.bar.set_postfix(failed=self.failed)
        now = time.monotonic()
        if self.lines and (now - self.said > 30 or self.done >= self.total):
            self.said, rate = now, self.done / (now - self.begun + 1e-9)
            left = f"{(self.total - self.done) / (rate or float('nan')):.0f} s left"
            left += f", {self.failed} failed" * bool(self.failed)
            text = f"{self.done} of {self.total} images, {rate:.2f} a second, {left}"
            print(text, file=sys.stderr, flush=True)


def identity(function: Callable, model, pairs: pd.DataFrame, settings: dict) -> tuple[dict, dict]:
    """What must agree in one run, and all settings of `function` with its defaults filled in."""
    bound = inspect.signature(function).bind(model, pairs, **settings)
    bound.apply_defaults()
    values = {k: v for k, v in list(bound.arguments.items())[2:] if k != "progress"}
    values = {k: list(v) if isinstance(v, range) else v for k, v in values.items()}
    if callable(values.get("guidance_scale")):
        values["guidance_scale"] = guidance_values(values["guidance_scale"], values["steps"])
    fixed = {k: v for k, v in values.items() if k not in PRIVATE}
    if "similarity" in fixed:
        fixed["severity"] = fixed.pop("similarity")  # what runs on disk call it
    scheduler = json.dumps(model.scheduler_config, default=str, sort_keys=True)
    known = {"source": model.source, "fingerprint": model.fingerprint}
    known |= {"precision": model.precision, "scheduler": scheduler}
    if (measure := values.get("similarity")) in PREPROCESSING:  # another file is another score
        known["score"] = OFFICIAL[PREPROCESSING[measure][0]].trusted
    whole = {"function": function.__name__, "settings": fixed, "model": known}
    plain = json.dumps(whole, default=lambda v: v.tolist() if hasattr(v, "tolist") else list(v))
    return json.loads(plain), values


@renamed(severity="similarity")
def record(
    function: Callable[..., xr.Dataset] = reverse_trace,
    model=None,
    pairs: pd.DataFrame | None = None,
    *,
    address: str | os.PathLike,
    engine: str = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    threads: int | None = None,
    progress: bool | str = True,
    strict: bool = False,
    **settings,
) -> Summary:
    """Record what a run does not have yet: `function(model, pairs, **settings)`, piece by piece.

    Parameters
    ----------
    function : `reverse_trace` or `forward_trace`.
    address : a folder or fsspec address; begun, continued, extended or mended.
    engine : ``local``, this machine, or ``ray``, a cluster. workers : on a CPU one by default, else
        started by Ray; on GPUs one each, or fewer; on a cluster as many as it has room for.
    ray_address : of a running cluster; by default one is started here.
    threads : of each worker; by default this machine's cores are divided.
    progress : a bar on a terminal; ``"lines"`` also writes lines where there is none.
    strict : raise the first failure; otherwise go on, and name it in the summary.
    batch_size, compile : where they are not given they are decided once, for all workers, and a
        run on a GPU keeps its batch size. They change rounding alone, and may differ in one run.

    Returns
    -------
    Summary of pieces (a prompt with its seeds): done, skipped, failed with reason.

    Raises
    ------
    ValueError, StoreError
        Settings that cannot be, another run at this address, a disk that is full or gone. What was
        recorded is kept.
    """
    begun = time.monotonic()
    kernel = getattr(model, "uncached", model)
    if "seeds" in settings:
        settings["seeds"] = list(settings["seeds"])  # a generator is used up once
    agreed, values = identity(function, kernel, pairs, settings)
    if pairs.empty:
        raise ValueError("there are no prompts to record")
    pairs = pairs.reset_index(drop=True)
    rows, seeds = prompt_rows(pairs), [int(s) for s in values.get("seeds", [])]
    template = function(kernel, pairs.iloc[:0], **settings)  # refuses what cannot be
    run, summary = Run(address), Summary(os.fspath(address))
    recipe = getattr(kernel, "recipe", None)
    count = engines.processes(engine, recipe, workers)
    batch, compile = values.get("batch_size"), values.get("compile", False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.work())
        old = run.read_plan() or {"parts": ["compiled"], "work": []}
        if compile and "compiled" not in old.get("parts", ()):
            raise StoreError(
                f"{run.address} was begun without compiling, and has no place to say which images "
                "are made so: record without it, or into another address"
            )
        if batch is None and engines.on_gpu(kernel):  # all batches of a run are of one size
            batch = next((work["batch_size"] for work in old["work"]), None)
        if batch is None and "batch_size" in values:
            images = len(rows) * max(1, len(seeds))
            batch, compile = _sizes(kernel, values, count, None, compile, images)
        run.open_plan(agreed, rows, seeds, batch, template)
        places = {row["prompt_id"]: n for n, row in enumerate(run.plan["prompts"])}
        files = {places[row["prompt_id"]]: n for n, row in enumerate(rows)}
        columns = {run.plan["seeds"].index(s) for s in seeds}
        # what is asked for, and what can be: the image of a prompt that was not given is not here
        tasks = [t for t in run.tasks() if not t.seeds or columns & {*t.seeds}]
        todo: dict[Task, list[int]] = {}
        for task, p, state in run.check(t for t in tasks if files.keys() & t.prompts):
            if p in files and state != "done":
                todo.setdefault(task, []).append(p)
            summary.skipped += p in files and state == "done"
        if todo:
            tell_of_long_captions(kernel, pairs)
            total = sum(_images(task) * len(wanted) for task, wanted in todo.items())
            bar = _Progress(total, function.__name__.split("_")[0], progress)
            stack.callback(bar.bar.close)
            _, compile = _sizes(kernel, values, count, batch, compile, total)
            # never where there is no place to say which images were compiled
            if "compile" in values:
                values["compile"] = compile and "compiled" in run.plan["parts"]
            job = engines.Job(function, values, recipe, threads, getattr(kernel, "together", None))
            pool = engines.start(job, kernel, engine, workers, ray_address)
            stack.callback(pool.close)
            _Work(run, pairs, files, summary, bar, strict).do(todo, pool)
    summary.seconds = time.monotonic() - begun
    if strict and summary.error:
        raise summary.error
    return summary


def _sizes(kernel, values: dict, workers: int, batch_size, compile, images: int):
    """Batch size and whether to compile, where they are not given; decided once for all workers."""
    workers *= engines.on_gpu(kernel)
    share, seeds = -(-images // max(1, workers)), max(1, len(values.get("seeds", [])))
    # Workers have copies of the weights of their own, one of them beside this process's.
    beside = torch.cuda.memory_allocated(kernel.device) + CONTEXT if workers else 0
    size, compile = cost.decide(
        kernel, "reverse" if "seeds" in values else "forward", batch_size, compile, share, seeds,
        values.get("steps", 0), bool(values.get("images") or values.get("similarity")), beside,
    )  # fmt: skip
    if batch_size is None and workers > 1:  # no worker shall idle
        size = max(1, min(size, -(-share // seeds) * seeds))
    return size, compile


@dataclass
class _Running:
    """A part of a task that a worker has; two have it where the first is slow."""

    wanted: list[int]
    isolated: bool  # its prompts may have failed with others: they are sampled without them
    release: Callable[[], None]
    arguments: tuple
    copies: int = 1
    since: float = field(default_factory=time.monotonic)


@dataclass
class _Work:
    """Tasks are handed out until none is left; what comes back is published."""

    run: Run
    pairs: pd.DataFrame
    files: dict[int, int]  # row in `pairs` of prompts of the plan
    summary: Summary
    bar: _Progress
    strict: bool
    queue: list[tuple[Task, list[int], bool]] = field(default_factory=list)
    running: dict[Task, _Running] = field(default_factory=dict)
    futures: dict[Future, Task] = field(default_factory=dict)
    took: list[float] = field(default_factory=list)

    def do(self, todo: dict[Task, list[int]], workers) -> None:
        """All of it, by an engine's workers; with `strict` until the first failure."""
        self.queue = [(task, wanted, False) for task, wanted in todo.items()]
        while (self.queue or self.running) and not (self.strict and self.summary.error):
            for unit in list(self.queue):
                if not workers.room(len(self.queue)):
                    break
                self._hand_out(workers, unit)
            if not self.queue and workers.room(0) and (task := self._straggler()):
                self.running[task].copies += 1  # its worker may hang: whoever is first counts
                self.futures[workers.submit(task, *self.running[task].arguments)] = task
            if not self.running:  # all that is left is in another process's hands
                time.sleep(0.2)
            for future in wait(self.futures, 1.0, FIRST_COMPLETED).done:
                task, result = self.futures.pop(future), workers.result(future)
                if task not in self.running:  # the other worker was first
                    continue
                if isinstance(result, Exception) and self.running[task].copies > 1:
                    self.running[task].copies -= 1
                    continue
                self._take(task, result)

    def _hand_out(self, workers, unit: tuple[Task, list[int], bool]) -> None:
        task, wanted, isolated = unit
        release = None if task in self.running else self.run.claim(task)
        if release is None:  # another process is at it, or another part of it is running
            return
        self.queue.remove(unit)
        left = {p for _, p, state in self.run.check([task]) if state != "done"}
        still = [p for p in wanted if p in left]
        if there := len(wanted) - len(still):  # another process has done it meanwhile
            self.summary.skipped += there
            self.bar.update(_images(task) * there)
        if not still:
            release()
            return
        # Others of the task are sampled, too, for the same bits in the same place of a batch of
        # the same size; one that was not given, or may have failed, has a stand-in.
        others = still if isolated else self.files
        rows = [self.files[p if p in others else still[0]] for p in task.prompts]
        arguments = self.pairs.iloc[rows], [self.run.plan["seeds"][s] for s in task.seeds]
        self.running[task] = _Running(still, isolated, release, arguments)
        self.futures[workers.submit(task, *arguments)] = task

    def _straggler(self) -> Task | None:
        """A task that takes far longer than others did, and that only one worker has."""
        begun = time.monotonic() - STRAGGLER * statistics.median(self.took or [float("inf")])
        slow = (t for t, r in self.running.items() if r.copies == 1 and r.since < begun)
        return next(slow, None)

    def _take(self, task: Task, result: xr.Dataset | Exception) -> None:
        running = self.running.pop(task)
        wanted, half = running.wanted, len(running.wanted) // 2
        lost = isinstance(result, ChildProcessError)
        try:
            if not isinstance(result, Exception):
                self.took.append(time.monotonic() - running.since)
                for p in wanted:
                    self.run.put(task, p, result.isel(prompt=task.prompts.index(p), drop=True))
                    self.summary.done += 1
                    self.bar.update(_images(task))
            elif half and not (lost or self.strict):
                self.queue[:0] = [(task, part, True) for part in (wanted[:half], wanted[half:])]
            else:
                names = [self.run.plan["prompts"][p]["prompt_id"] for p in wanted]
                self.summary.failed |= dict.fromkeys(names, first_line(result))
                self.summary.error = self.summary.error or result
                self.bar.update(_images(task) * len(wanted), failed=len(names))
        finally:
            running.release()


def _images(task: Task) -> int:
    """Images of each prompt; a forward trace counts as one."""
    return max(1, len(task.seeds))
