"""Recording into a run: what is missing is sampled, here, on all devices, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import os
import pickle
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from memlib.errors import first_line, nearest, renamed
from memlib.hub.loading import load
from memlib.measures import OFFICIAL, PREPROCESSING
from memlib.runs import cost
from memlib.runs.store import Run, StoreError, Task, prompt_rows
from memlib.runs.tracing import progress_bar, reverse_trace, sample_trace, tell_of_long_captions
from memlib.schedule import guidance_values
from memlib.trace import score

ENGINES = ("local", "ray")
ATTEMPTS = 3  # a task whose worker dies so often is given up
PRIVATE = ("seeds", "batch_size", "compile")  # settings that may differ within one run
LATE = 2.0  # times the median: a task that takes longer is begun once more by a worker that is idle
GRACE = 10.0  # seconds for a worker to end
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
        text = f"{self.done} pieces recorded, {self.skipped} were there, {len(self.failed)} failed"
        lines = [f"{text} ({self.seconds:.0f} s): {self.address}"]
        lines += [f"  {name}: {reason}" for name, reason in list(self.failed.items())[:10]]
        if len(self.failed) > 10:
            lines.append(f"  and {len(self.failed) - 10} more")
        return "\n".join(lines)


class LostWorkerError(RuntimeError):
    """A worker died with a task in hand."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to record any task of a run."""

    function: Callable[..., xr.Dataset]
    settings: dict
    recipe: dict | None = None  # arguments of `memlib.load`
    threads: int | None = None
    together: int | None = None  # pictures that a GPU decodes at once

    def load(self):
        """The model, in a process of its own."""
        if self.threads:
            torch.set_num_threads(self.threads)
        model = load(**self.recipe).uncached
        if self.together:
            model.together = self.together
        return model

    def sample(
        self, model, rows: pd.DataFrame, seeds: list[int], batch_size
    ) -> Callable[[], xr.Dataset]:
        """What is left of a task when the device has sampled it: to decode and to score."""
        settings = dict(self.settings)
        names = inspect.signature(self.function).parameters
        more = {"seeds": seeds, "batch_size": batch_size, "progress": False}
        settings |= {k: v for k, v in more.items() if k in names}
        if settings.get("similarity"):  # scored afterwards, while the device samples the next
            settings |= {"similarity": None, "images": True}
        if self.function is not reverse_trace:
            trace = self.function(model, rows, **settings)
            return lambda: self._score(trace, rows, model)
        bound = inspect.signature(reverse_trace).bind(model, rows, **settings)
        bound.apply_defaults()
        sampled = sample_trace(**bound.arguments)
        return lambda: self._score(sampled.finish(), rows, model)

    def _score(self, trace: xr.Dataset, rows: pd.DataFrame, model) -> xr.Dataset:
        if measure := self.settings.get("similarity"):
            trace = score(trace, rows, measure, model.device)
            if not self.settings["images"]:
                trace = trace.drop_vars("image", errors="ignore")
        return trace


# --- engines: submit a task, wait for results ---------------------------------------------------


def _on_gpu(model) -> bool:
    return model.device.type == "cuda"


def _finish(rest: Callable[[], xr.Dataset], device: threading.Lock) -> xr.Dataset:
    """`rest()`, beside the next task; where that leaves it too little memory, after it."""
    with contextlib.suppress(MemoryError, torch.OutOfMemoryError):
        return rest()
    with device:
        torch.cuda.empty_cache()
        return rest()


class Here:
    """This process. On a GPU one task is decoded and scored while the next is sampled."""

    def __init__(self, job: Job, model):
        self.job, self.model = job, model
        self.waiting: list[tuple[Task, Future]] = []
        self.depth = 2 if _on_gpu(model) else 1
        self.helper, self.device = ThreadPoolExecutor(1), threading.Lock()

    def room(self, left: int) -> bool:
        return left > 0 and len(self.waiting) < self.depth

    def submit(self, task: Task, rows: pd.DataFrame, seeds: list[int]) -> None:
        future: Future = Future()
        try:
            with self.device:
                rest = self.job.sample(self.model, rows, seeds, task.batch_size)
            if self.depth == 1:
                future.set_result(rest())
            else:
                future = self.helper.submit(_finish, rest, self.device)
        except Exception as error:
            future.set_exception(error)
        self.waiting.append((task, future))

    def wait(self) -> Iterator[tuple[Task, xr.Dataset | Exception]]:
        if not self.waiting:  # all that is left is in another process's hands
            time.sleep(0.2)
            return
        task, future = self.waiting.pop(0)
        yield task, future.exception() or future.result()

    def close(self) -> None:
        self.helper.shutdown(cancel_futures=True)


def _serve(connection, job: Job) -> None:
    """A worker process: tasks in, traces out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    sending, device = threading.Lock(), threading.Lock()

    def answer(number: int, result) -> None:
        if isinstance(result, Exception):
            result = _portable(result)
        with sending, contextlib.suppress(OSError):
            connection.send((number, result))

    try:
        model = job.load()
    except Exception as error:
        answer(-1, error)
        return

    def finish(number, rest):
        try:
            answer(number, _finish(rest, device))
        except Exception as error:
            answer(number, error)

    overlap = ThreadPoolExecutor(1) if _on_gpu(model) else None
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, rows, seeds, batch_size = connection.recv()
            try:
                with device:
                    rest = job.sample(model, rows, seeds, batch_size)
            except Exception as error:
                answer(number, error)
                continue
            overlap.submit(finish, number, rest) if overlap else finish(number, rest)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, if it cannot travel to another process."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {first_line(error)}")


class Processes:
    """Worker processes of this machine, one for each of `jobs`; one that dies is replaced."""

    def __init__(self, jobs: list[Job]):
        self.context = multiprocessing.get_context("spawn")
        self.workers = [self._start(job) for job in jobs]

    def _start(self, job: Job) -> dict:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, job), daemon=True)
        with _environment(OMP_NUM_THREADS=job.threads, MEMLIB_PROGRESS=None), _deaf():
            process.start()
        theirs.close()
        return {"job": job, "process": process, "connection": ours, "tasks": {}}

    def room(self, left: int) -> bool:
        # One more each, so that none waits for the next; not at the end, where some would idle.
        depth = 2 if left > len(self.workers) else 1
        return any(len(worker["tasks"]) < depth for worker in self.workers)

    def submit(self, task: Task, rows: pd.DataFrame, seeds: list[int]) -> None:
        worker = min(self.workers, key=lambda w: len(w["tasks"]))
        worker["tasks"][task.number] = task
        with contextlib.suppress(OSError):  # it died: `wait` sees that
            worker["connection"].send((task.number, rows, seeds, task.batch_size))

    def wait(self) -> Iterator[tuple[Task, xr.Dataset | Exception]]:
        by_connection = {w["connection"]: n for n, w in enumerate(self.workers)}
        for connection in wait_for(list(by_connection), timeout=1.0):
            n = by_connection[connection]
            worker = self.workers[n]
            try:
                number, result = connection.recv()
            except (EOFError, OSError):
                worker["process"].join()
                self.workers[n] = self._start(worker["job"])
                for task in worker["tasks"].values():
                    yield (
                        task,
                        LostWorkerError(f"its worker died (exit {worker['process'].exitcode})"),
                    )
                continue
            if number < 0:  # it could not load the model, and no other will
                raise result
            yield worker["tasks"].pop(number), result

    def close(self) -> None:
        for worker in self.workers:
            worker["connection"].close()
            if worker["tasks"]:
                worker["process"].terminate()
        for worker in self.workers:
            worker["process"].join(GRACE)
            worker["process"].kill()  # one that hangs
            worker["process"].join()


class OnRay:
    """Actors of a Ray cluster; a lost one is replaced as soon as a node has room for it.

    The images of a task travel with it, and its trace comes back: nodes need no common disk. A
    model is loaded on each node by its name.
    """

    def __init__(self, job: Job, workers: int | None, address: str | None):
        try:
            import ray
        except ImportError as error:
            text = "engine 'ray' needs Ray: pip install -e '.[cluster]' in a checkout"
            raise ImportError(text) from error
        self.ray, self.job = ray, job
        self.own = not ray.is_initialized()
        if self.own:
            try:
                _reach(address)
                ray.init(address=address, log_to_driver=False, logging_level="error")
            except (OSError, ValueError, RuntimeError) as error:
                raise ValueError(f"no Ray cluster at {address}: {first_line(error)}") from error
        gpu, has = job.recipe["device"].startswith("cuda"), ray.cluster_resources()
        if gpu and not has.get("GPU"):
            raise ValueError("the model is on a GPU and the cluster has none: load it on 'cpu'")
        room = has.get("GPU", 0) if gpu else has.get("CPU", 1) // (job.threads or 1)
        options = {"num_gpus": 1} if gpu else {"num_cpus": job.threads or 1}
        actor = ray.remote(max_concurrency=2, **options)(_Actor)
        self.start = lambda: actor.remote(ray.cloudpickle.dumps(job))
        self.depth = 2 if gpu else 1  # one is decoded and scored while the next is sampled
        self.starting, self.busy = {}, {}
        self.hands = {}  # how many tasks each actor has that is ready
        for _ in range(int(workers or max(1, room))):
            self._begin()

    def _begin(self) -> None:
        actor = self.start()
        self.starting[actor.ready.remote()] = actor

    def room(self, left: int) -> bool:
        depth = self.depth if left > len(self.hands) else 1  # at the end some would idle
        return any(count < depth for count in self.hands.values())

    def submit(self, task: Task, rows: pd.DataFrame, seeds: list[int]) -> None:
        actor = min(self.hands, key=self.hands.get)
        self.hands[actor] += 1
        images = [Path(f).read_bytes() if f else b"" for f in rows.get("image", [])]
        ref = actor.run.remote(rows, images, seeds, task.batch_size)
        self.busy[ref] = task, actor

    def wait(self) -> Iterator[tuple[Task, xr.Dataset | Exception]]:
        from ray.exceptions import RayActorError, RayTaskError

        refs = [*self.starting, *self.busy]
        ready, _ = self.ray.wait(refs, num_returns=1, timeout=1.0)
        for ref in ready:
            starting = self.starting.pop(ref, None)
            task, actor = (None, starting) if starting else self.busy.pop(ref)
            try:
                result = self.ray.get(ref)
            except RayActorError as error:
                if error.actor_init_failed:
                    why = str(error).strip().splitlines()[-1]
                    raise ValueError(f"a node of the cluster starts no worker: {why}") from error
                if starting or self.hands.pop(actor, None):  # it may lose two tasks
                    self._begin()
                result, actor = LostWorkerError(first_line(error)), None
            except RayTaskError as error:
                result = error.cause
                if starting:
                    raise result from error
            if actor in self.hands:
                self.hands[actor] -= 1
            elif starting and actor:
                self.hands[actor] = 0
            if task:
                yield task, result

    def close(self) -> None:
        for actor in [*self.hands, *self.starting.values()]:
            self.ray.kill(actor)
        if self.own:
            self.ray.shutdown()


def _reach(address: str | None) -> None:
    """Fail at once where nothing listens: Ray would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


class _Actor:
    def __init__(self, job: bytes):
        self.job: Job = pickle.loads(job)
        self.device = threading.Lock()

    def ready(self) -> None:
        self.model = self.job.load()

    def run(self, rows: pd.DataFrame, images: list[bytes], seeds: list[int], batch_size):
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for n, content in enumerate(images):
                files.append(str(Path(folder, f"{n}.image")) if content else "")
                if content:
                    Path(files[-1]).write_bytes(content)
            rows = rows.assign(image=files) if images else rows
            with self.device:
                rest = self.job.sample(self.model, rows, seeds, batch_size)
            return _finish(rest, self.device)


@contextlib.contextmanager
def _deaf():
    """Ctrl-C does not reach the processes that are started within, nor this one until the end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # or it would be started within, and let Ctrl-C in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(**values):
    """Environment variables for the processes that are started within; None removes one."""
    before = {name: os.environ.get(name) for name in values}

    def put(chosen: dict) -> None:
        for name, value in chosen.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = str(value)

    put(values)
    try:
        yield
    finally:
        put(before)


def devices(recipe: dict | None, workers: int | None) -> list[str]:
    """A device for each worker: all visible GPUs, or as many CPU workers as asked for.

    An empty list is this process.
    """
    named = (recipe or {}).get("device")
    gpus = torch.cuda.device_count() if named in (None, "cuda") else 0
    if gpus:
        count = min(workers or gpus, gpus)  # two on one card would plan with the same memory
        return [f"cuda:{n % gpus}" for n in range(count)] if count > 1 else []
    return [named or "cpu"] * workers if workers and workers > 1 else []


def cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _engine(job: Job, model, engine: str, workers: int | None, address: str | None):
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}{nearest(engine, ENGINES)}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    chosen = devices(job.recipe, workers)
    if engine == "local" and not chosen:
        if job.threads:
            torch.set_num_threads(job.threads)
        return Here(job, model)
    if job.recipe is None:
        raise ValueError("workers load their own model: give one that memlib.load can name")
    if engine == "ray":
        threads = job.threads or 1
        recipe = job.recipe | {"device": model.device.type}  # one kind of device in one run
        return OnRay(replace(job, recipe=recipe, threads=threads), workers, address)
    threads = job.threads or max(1, cores() // len(chosen))
    recipes = [job.recipe | {"device": device} for device in chosen]
    return Processes([replace(job, recipe=r, threads=threads) for r in recipes])


# --- the run ------------------------------------------------------------------------------------


class _Progress:
    """A bar on a terminal; elsewhere a line now and then, or nothing."""

    def __init__(self, total: int, name: str, how: bool | str):
        self.bar = progress_bar(total, name, bool(how))
        self.lines = how == "lines" and self.bar.disable
        self.total, self.done, self.failed = total, 0, 0
        self.begun = self.said = time.monotonic()

    def update(self, images: int, failed: int = 0) -> None:
        self.done += images
        self.failed += failed
        self.bar.update(images)
        if failed:
            self.bar.set_postfix(failed=self.failed)
        now = time.monotonic()
        if self.lines and (now - self.said > 30 or self.done >= self.total):
            self.said = now
            rate = self.done / (now - self.begun + 1e-9)
            left = (self.total - self.done) / rate if rate else float("nan")
            text = f"{self.done} of {self.total} images, {rate:.2f} a second, {left:.0f} s left"
            text += f", {self.failed} failed" if self.failed else ""
            print(text, file=sys.stderr, flush=True)


def identity(function: Callable, model, pairs: pd.DataFrame, settings: dict) -> tuple[dict, dict]:
    """What must agree in one run, and all settings of `function` with its defaults filled in."""
    bound = inspect.signature(function).bind(model, pairs, **settings)
    bound.apply_defaults()
    values = {k: v for k, v in list(bound.arguments.items())[2:] if k != "progress"}
    if callable(values.get("guidance_scale")):
        values["guidance_scale"] = guidance_values(values["guidance_scale"], values["steps"])
    values = {k: list(v) if isinstance(v, range) else v for k, v in values.items()}
    fixed = {k: v for k, v in values.items() if k not in PRIVATE}
    if "similarity" in fixed:
        fixed["severity"] = fixed.pop("similarity")  # what runs on disk call it
    scheduler = json.dumps(model.scheduler_config, default=str, sort_keys=True)
    known = {"source": model.source, "fingerprint": model.fingerprint}
    known |= {"precision": model.precision, "scheduler": scheduler}
    if (measure := values.get("similarity")) in PREPROCESSING:  # another file is another score
        known["score"] = OFFICIAL[PREPROCESSING[measure][0]].trusted
    whole = {"function": function.__name__, "settings": fixed, "model": known}
    return json.loads(json.dumps(whole, default=_listed)), values


def _listed(value):
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else list(value)


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
    engine : ``local`` or ``ray``. workers : processes on a CPU, or fewer GPUs than all; with Ray
        actors, by default as many as the cluster has room for.
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
    rows = prompt_rows(pairs)
    seeds = [int(s) for s in values.get("seeds", [])]
    template = function(kernel, pairs.iloc[:0], **settings)  # refuses what cannot be
    run, summary = Run(address), Summary(os.fspath(address))
    recipe = getattr(kernel, "recipe", None)
    others = [""] * (workers or 1) if engine == "ray" else devices(recipe, workers)
    sizes = partial(_sizes, kernel, values, seeds, len(others))
    with run.work():
        batch, compile = values.get("batch_size"), values.get("compile", False)
        old = _old_plan(run, compile)
        if batch is None and _on_gpu(kernel):  # all batches of a run are of one size
            batch = next((work["batch_size"] for work in old.get("work", [])), None)
        if batch is None and "batch_size" in values:
            batch, compile = sizes(None, compile, len(rows) * max(1, len(seeds)))
        run.open_plan(agreed, rows, seeds, batch, template)
        places = {row["prompt_id"]: n for n, row in enumerate(run.plan["prompts"])}
        files = {places[row["prompt_id"]]: n for n, row in enumerate(rows)}
        columns = {run.plan["seeds"].index(s) for s in seeds}
        # what is asked for, and what can be: the image of a prompt that was not given is not here
        tasks = [t for t in run.tasks() if set(t.prompts) & set(files) and _asked(t, columns)]
        todo: dict[Task, list[int]] = {}
        for task, p, state in run.check(tasks):
            if state == "done":
                summary.skipped += p in files
            elif p in files:
                todo.setdefault(task, []).append(p)
        if todo:
            tell_of_long_captions(kernel, pairs)
            total = sum(_images(task) * len(wanted) for task, wanted in todo.items())
            with contextlib.ExitStack() as stack:
                bar = _Progress(total, function.__name__.split("_")[0], progress)
                stack.callback(bar.bar.close)
                _, compile = sizes(batch, compile, total)
                # never where there is no place to say which images were compiled
                inner = values | {"compile": compile and "compiled" in run.plan["parts"]}
                inner = {k: inner[k] for k in values if k not in ("seeds", "batch_size")}
                job = Job(function, inner, recipe, threads, getattr(kernel, "together", None))
                pool = _engine(job, kernel, engine, workers, ray_address)
                stack.callback(pool.close)
                _Work(run, todo, pairs, files, summary, bar, strict).all(pool)
    summary.seconds = time.monotonic() - begun
    if strict and summary.error:
        raise summary.error
    return summary


def _sizes(kernel, values: dict, seeds: list, others: int, batch_size, compile, images: int):
    """Batch size and whether to compile, where they are not given; decided once for all workers.

    Workers of GPUs have copies of the weights of their own, one of them beside this process's.
    """
    others = others if _on_gpu(kernel) else 0
    parts = (kernel.unet, kernel.vae, kernel.pipe.text_encoder) if others else ()
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    share, each = -(-images // max(1, others)), max(1, len(seeds))  # of one worker
    size, compile = cost.decide(
        kernel, "reverse" if seeds else "forward", batch_size, compile, share, each,
        values.get("steps", 0), decoding=bool(values.get("images") or values.get("similarity")),
        beside=weights + CONTEXT if others else 0,
    )  # fmt: skip
    if batch_size is None and others > 1:  # no worker shall idle
        size = max(1, min(size, -(-share // each) * each))
    return size, compile


def _old_plan(run: Run, compile: bool | None) -> dict:
    """The plan of a run that was begun before, if any; compiling must have a place in it."""
    plan = run.read_plan() or {}
    if plan and compile and "compiled" not in plan.get("parts", ()):
        raise StoreError(
            f"{run.address} was begun without compiling, and has no place to say which images "
            "are made so: record without it, or into another address"
        )
    return plan


def _asked(task: Task, columns: set[int]) -> bool:
    return not task.seeds or bool(columns & set(task.seeds))


@dataclass
class _InHand:
    """A part of a task that a worker has; or two, where the first is late."""

    wanted: list[int]
    apart: bool  # its prompts may have failed with others: they are sampled without them
    give_up: Callable[[], None]
    arguments: tuple
    copies: int = 1
    since: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


class _Work:
    """Tasks are handed out until none is left; what comes back is published."""

    def __init__(self, run: Run, todo: dict[Task, list[int]], pairs, files, summary, bar, strict):
        self.run, self.pairs, self.files = run, pairs, files
        self.summary, self.bar, self.strict = summary, bar, strict
        self.queue = [(task, wanted, False) for task, wanted in todo.items()]
        self.attempts = dict.fromkeys(todo, 0)
        self.in_hand: dict[Task, _InHand] = {}
        self.took: list[float] = []

    def all(self, workers) -> None:
        while self.queue or self.in_hand:
            for unit in list(self.queue):
                if not workers.room(len(self.queue)):
                    break
                self._hand_out(workers, unit)
            if not self.queue and workers.room(0) and (task := self._late()):
                self.in_hand[task].copies += 1  # its worker may hang: whoever is first counts
                workers.submit(task, *self.in_hand[task].arguments)
            for task, result in workers.wait():
                if task not in self.in_hand:  # the other worker was first
                    continue
                if isinstance(result, Exception) and self.in_hand[task].copies > 1:
                    self.in_hand[task].copies -= 1
                    continue
                self._take(task, result)
                if self.strict and self.summary.error:
                    return

    def _hand_out(self, workers, unit: tuple) -> None:
        task, wanted, apart = unit
        give_up = None if task in self.in_hand else self.run.claim(task)
        if give_up is None:  # another process is at it, or another part of it is in hand
            return
        self.queue.remove(unit)
        left = {p for _, p, state in self.run.check([task]) if state != "done"}
        still = [p for p in wanted if p in left]
        if there := len(wanted) - len(still):  # another process has done it meanwhile
            self.summary.skipped += there
            self.bar.update(_images(task) * there)
        if not still:
            give_up()
            return
        # Others of the task are sampled, too, for the same bits in the same place of a batch of
        # the same size; one that was not given, or may have failed, has a stand-in.
        others = still if apart else self.files
        rows = [self.files[p if p in others else still[0]] for p in task.prompts]
        arguments = self.pairs.iloc[rows], [self.run.plan["seeds"][s] for s in task.seeds]
        self.in_hand[task] = _InHand(still, apart, give_up, arguments)
        workers.submit(task, *arguments)

    def _late(self) -> Task | None:
        """A task that takes far longer than others did, and that only one worker has."""
        limit = LATE * statistics.median(self.took) if self.took else float("inf")
        late = (t for t, hand in self.in_hand.items() if hand.copies == 1 and hand.seconds > limit)
        return next(late, None)

    def _take(self, task: Task, result: xr.Dataset | Exception) -> None:
        hand = self.in_hand.pop(task)
        wanted, half = hand.wanted, len(hand.wanted) // 2
        lost = isinstance(result, LostWorkerError)
        try:
            if lost and self.attempts[task] + 1 < ATTEMPTS:
                self.attempts[task] += 1
                self.queue.insert(0, (task, wanted, hand.apart))
            elif isinstance(result, Exception) and half and not (lost or self.strict):
                self.queue[:0] = [(task, part, True) for part in (wanted[:half], wanted[half:])]
            elif isinstance(result, Exception):
                names = [self.run.plan["prompts"][p]["prompt_id"] for p in wanted]
                self.summary.failed |= dict.fromkeys(names, first_line(result))
                self.summary.error = self.summary.error or result
                self.bar.update(_images(task) * len(wanted), failed=len(names))
            else:
                self.took.append(hand.seconds)
                for p in wanted:
                    self.run.put(task, p, result.isel(prompt=task.prompts.index(p), drop=True))
                    self.summary.done += 1
                    self.bar.update(_images(task))
        finally:
            hand.give_up()


def _images(task: Task) -> int:
    """Images of each prompt; a forward trace counts as one."""
    return max(1, len(task.seeds))
