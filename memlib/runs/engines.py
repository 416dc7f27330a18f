"""Where tasks of a run are sampled: in this process, or by workers of Ray, here or on a cluster."""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
import xarray as xr

from memlib.errors import first_line, nearest
from memlib.hub.loading import load
from memlib.runs.store import Task
from memlib.runs.tracing import reverse_trace, sample_trace

ENGINES = ("local", "ray")
ATTEMPTS = 3  # a task whose worker dies so often is given up
QUIET = "^(Task _Worker|A worker died|The node with)"  # messages of Ray that are ours to handle


@dataclass(frozen=True)
class Job:
    """What a worker needs to sample any task of a run."""

    function: Callable[..., xr.Dataset]
    settings: dict
    recipe: dict | None = None  # arguments of `memlib.load`
    threads: int | None = None
    together: int | None = None  # pictures that a GPU decodes at once

    def load(self):
        """The model, in a process of its own."""
        torch.set_num_threads(self.threads)
        model = load(**self.recipe).uncached
        if self.together:
            model.together = self.together
        return model

    def sample(self, model, rows: pd.DataFrame, seeds, batch_size) -> Callable[[], xr.Dataset]:
        """What is left of a task when the device has sampled it: to decode and to score.

        `reverse_trace` in its two halves: the second runs beside the next task's first.
        """
        takes = inspect.signature(self.function).parameters
        more = {"seeds": seeds, "batch_size": batch_size, "progress": False}
        settings = self.settings | {name: more[name] for name in more if name in takes}
        if self.function is reverse_trace:
            return sample_trace(model, rows, **settings)
        trace = self.function(model, rows, **settings)
        return lambda: trace


def on_gpu(model) -> bool:
    """Whether a model computes on a GPU."""
    return model.device.type == "cuda"


def cores() -> int:
    """Cores this process may use."""
    some = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if some else os.cpu_count() or 1


def processes(engine: str, recipe: dict | None, workers: int | None) -> int:
    """Worker processes: one for each visible GPU, or as many as asked for on a CPU.

    None are needed where this process will do.
    """
    if engine == "ray":
        return workers or 1
    named = (recipe or {}).get("device") or "cuda"
    gpus = 1 if named.startswith("cuda:") else torch.cuda.device_count() * (named == "cuda")
    count = min(workers or gpus, gpus) if gpus else workers or 1
    return count if count > 1 else 0


def start(job: Job, model, engine: str, workers: int | None, address: str | None):
    """The engine that was asked for: it has `room`, `submit`, `result` and `close`."""
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}{nearest(engine, ENGINES)}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    count = processes(engine, job.recipe, workers)
    if not count:
        torch.set_num_threads(job.threads or torch.get_num_threads())
        return InProcess(job, model)
    if job.recipe is None:
        raise ValueError("workers load their own model: give one that memlib.load can name")
    threads = job.threads or (1 if engine == "ray" else max(1, cores() // count))
    recipe = job.recipe | {"device": model.device.type}  # one kind of device in one run
    job = replace(job, recipe=recipe, threads=threads)
    if engine == "ray":
        return OnRay(job, workers, address or os.environ.get("RAY_ADDRESS"))
    return OnRay(job, count)


def _finish(rest: Callable[[], xr.Dataset], device: threading.Lock) -> xr.Dataset:
    """`rest()`, beside the next task; where that leaves it too little memory, after it."""
    with contextlib.suppress(MemoryError, torch.OutOfMemoryError):
        return rest()
    with device:
        torch.cuda.empty_cache()
        return rest()


class InProcess:
    """This process. On a GPU one task is decoded and scored while the next is sampled."""

    def __init__(self, job: Job, model):
        self.job, self.model, self.busy = job, model, []
        self.depth = 2 if on_gpu(model) else 1
        self.helper, self.device = ThreadPoolExecutor(1), threading.Lock()

    def room(self, left: int) -> bool:
        """Whether a task can be submitted, where `left` are to do."""
        return left > 0 and len(self.busy) < self.depth

    def submit(self, task: Task, rows: pd.DataFrame, seeds: list[int]) -> Future:
        """Begin a task."""
        future: Future = Future()
        try:
            with self.device:
                rest = self.job.sample(self.model, rows, seeds, task.batch_size)
            if self.depth == 1:  # on a CPU another thread's cores would be this one's
                future.set_result(rest())
            else:
                future = self.helper.submit(_finish, rest, self.device)
        except Exception as error:
            future.set_exception(error)
        self.busy.append(future)
        return future

    def result(self, future: Future) -> xr.Dataset | Exception:
        """Take the trace of a task that is done, or why there is none."""
        self.busy.remove(future)
        return future.exception() or future.result()

    def close(self) -> None:
        """End at once."""
        self.helper.shutdown(cancel_futures=True)


class OnRay:
    """Workers of Ray, on this machine or on a cluster; the methods are those of `InProcess`.

    Ray replaces a worker that dies and redoes its tasks. Nodes need no common disk: the images of
    a task travel with it, and its trace comes back. A model is loaded on each node by its name.
    """

    def __init__(self, job: Job, workers: int | None, address: str | None = None):
        self.ray, self.own = connect(workers, address)
        self.near = self.own and not address  # files are where they are here
        gpu, has = job.recipe["device"] == "cuda", self.ray.cluster_resources()
        if gpu and not has.get("GPU"):
            raise ValueError("the model is on a GPU and the cluster has none: load it on 'cpu'")
        needs = {"num_gpus": 1} if gpu else {"num_cpus": 0 if self.near else job.threads}
        room = has["GPU"] if gpu else has.get("CPU", 1) // job.threads
        options = {"max_restarts": -1, "max_task_retries": ATTEMPTS - 1, "max_concurrency": 2}
        actor = self.ray.remote(**options, **needs)(_Worker)
        self.depth = 2 if gpu else 1  # one is decoded and scored while the next is sampled
        self.workers = [actor.remote(job) for _ in range(int(workers or max(1, room)))]
        self.busy = {worker.load.remote().future(): worker for worker in self.workers}
        self.starting = [*self.busy]

    def _idle(self, depth: int) -> list:
        """Workers that are ready and have less than `depth` tasks, those with the fewest first."""
        for future in [f for f in self.starting if f.done()]:
            self.starting.remove(future)
            if error := self.result(future):  # the model, which no other can load, either
                raise error
        tasks = Counter(self.busy.values())
        tasks.update({self.busy[future]: depth for future in self.starting})
        return sorted((w for w in self.workers if tasks[w] < depth), key=tasks.__getitem__)

    def room(self, left: int) -> bool:
        ready = len(self.workers) - len(self.starting)
        return bool(self._idle(self.depth if left > ready else 1))  # at the end some would idle

    def submit(self, task: Task, rows: pd.DataFrame, seeds: list[int]) -> Future:
        files = set() if self.near else {*rows.get("image", [])}
        images = {file: Path(file).read_bytes() for file in files if os.path.isfile(file)}
        worker = self._idle(self.depth)[0]
        future = worker.run.remote(rows, images, seeds, task.batch_size).future()
        self.busy[future] = worker
        return future

    def result(self, future: Future) -> xr.Dataset | Exception | None:
        from ray.exceptions import RayActorError, RayError, RayTaskError

        self.busy.pop(future)
        error = future.exception()
        if isinstance(error, RayActorError):
            why = str(error).strip().splitlines()[-1] if error.actor_init_failed else ""
            return ChildProcessError(f"its worker died {ATTEMPTS} times {why}".strip())
        error = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(error, RayError):  # it could not travel: here is its traceback
            return RuntimeError(str(error).strip().splitlines()[-1])
        return error or future.result()

    def close(self) -> None:
        for future in self.busy:
            self.ray.cancel(future.object_ref)  # or Ray would redo it when its worker is gone
        if self.own:
            self.ray.shutdown()
        else:
            for worker in self.workers:
                self.ray.kill(worker)


def connect(workers: int | None, address: str | None):
    """Ray, and whether it was started or joined by this; its own messages are kept quiet."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", QUIET)
    os.environ.setdefault("RAY_worker_niceness", "0")  # else all that runs beside comes first
    try:
        import ray
    except ImportError as error:
        text = "several workers need Ray (one does not): pip install -e '.[cluster]' in a checkout"
        raise ImportError(text) from error
    if ray.is_initialized():
        return ray, False
    here = {"num_cpus": workers, "num_gpus": torch.cuda.device_count(), "include_dashboard": False}
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if port.isdigit():  # where nothing listens Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        options = {"address": address or "local"} | ({} if address else here)
        ray.init(**options, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        where = f"no Ray cluster at {address}" if address else "Ray does not start here"
        raise ValueError(f"{where}: {first_line(error)}") from error
    return ray, True


class _Worker:
    """An actor of Ray."""

    def __init__(self, job: Job):
        os.environ.pop("MEMLIB_PROGRESS", None)  # it is the parent's
        self.job, self.model, self.device = job, None, threading.Lock()

    def load(self) -> None:
        with self.device:
            self.model = self.model or self.job.load()

    def run(self, rows: pd.DataFrame, images: dict[str, bytes], seeds: list[int], batch_size):
        self.load()  # Ray may have started it anew
        with tempfile.TemporaryDirectory() as folder:
            copies = {f: Path(folder, f"{n}-{Path(f).name}") for n, f in enumerate(images)}
            for file, copy in copies.items():
                copy.write_bytes(images[file])
            if copies:
                rows = rows.assign(image=[str(copies.get(f, f)) for f in rows.image])
            with self.device:
                rest = self.job.sample(self.model, rows, seeds, batch_size)
            return _finish(rest, self.device)
