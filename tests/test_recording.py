"""Many workers, one run: workers that die, hang, fail, or are interrupted."""

import contextlib
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import xarray as xr
from test_store import one_line, same

import memlib
from memlib import cli
from memlib.models import ModelError
from memlib.runs import engines, work
from memlib.runs.engines import InProcess, Job, OnRay
from memlib.runs.store import Task

SEEDS, PROMPTS = 4, 6
SMALL = dict(seeds=range(SEEDS), steps=3, similarity="ncc", batch_size=4, threads=1, progress=False)
COMMAND = f"trace --prompts {PROMPTS} --seeds {SEEDS} --steps 3 --severity ncc --batch-size 4"
COMMAND += " --threads 1"


@pytest.fixture(scope="module")
def lab():
    return memlib.load("lab")


@pytest.fixture
def pairs():
    return memlib.load_pairs("lab").iloc[:PROMPTS].copy()


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory):
    """One process, one thread, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pairs = memlib.load_pairs("lab").iloc[:PROMPTS]
    memlib.record(model=lab, pairs=pairs, address=folder, **SMALL)
    return folder


def memlib_command(*arguments, **more) -> subprocess.Popen:
    command = [sys.executable, "-m", "memlib.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


# ------------------------------------------------------------------------------- workers in trouble


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Ray, started once for the tests that do not start their own; it believes in two GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES")
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setenv("MEMLIB_PROGRESS", "a file of the parent")
        patch.setenv("ONCE", str(tmp_path_factory.mktemp("once")))
        ray, own = engines.connect(2, None)
    assert own
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray
    ray.shutdown()


class OddError(Exception):
    """It cannot be unpickled: its own arguments are not those of its message."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def once(name: str) -> bool:
    """True for the first who asks, in whatever process."""
    with contextlib.suppress(FileExistsError):
        Path(os.environ["ONCE"], name).touch(exist_ok=False)
        return True
    return False


def troubled(model, pairs, **settings):
    """As `reverse_trace`, with a trouble of its own for some prompts."""
    (name, *_) = [*pairs.prompt_id, ""]
    if name == "planted-001-1" or (name == "planted-001-3" and once("kills")):
        os.kill(os.getpid(), signal.SIGKILL)  # as a lack of memory would
    if name == "planted-001-2" and once("hangs"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if name == "planted-001-4":
        raise OddError("flesh", "fell")
    return memlib.reverse_trace(model, pairs, **settings)


troubled.__signature__ = inspect.signature(memlib.reverse_trace)


def same_values(folder: Path, whole: Path, prompts: list[str]) -> None:
    """Bit by bit; the function's name is in the plan, and in what the checksums are of."""
    ours, theirs = (memlib.open_run(f).sel(prompt=prompts).load() for f in (folder, whole))
    assert all(ours[n].values.tobytes() == theirs[n].values.tobytes() for n in theirs.variables)


@pytest.mark.slow
def test_workers_in_trouble(session, lab, pairs, whole, tmp_path, monkeypatch, capfd):
    """One is killed, one hangs, an error cannot travel, and one prompt kills whoever has it.

    The last is given up after three attempts; all others are recorded, bit by bit as from one
    process, and Ray keeps quiet about it.
    """
    sent, submit = [], OnRay.submit

    def note(self, task, *more):
        sent.append(task.number)
        return submit(self, task, *more)

    monkeypatch.setattr(OnRay, "submit", note)
    summary = memlib.record(
        troubled, model=lab, pairs=pairs, address=tmp_path / "run", workers=2, **SMALL
    )
    assert summary.failed == {
        "planted-001-1": "its worker died 3 times",
        "planted-001-4": "test_recording.OddError: flesh and fell",
    }
    assert summary.done == PROMPTS - 2
    assert sent.count(2) == 2  # the one that hangs
    assert set(sent) == {*range(PROMPTS)}
    assert capfd.readouterr() == ("", "")
    report = memlib.verify(tmp_path / "run")
    assert (report.ok, report.done, report.missing) == (True, PROMPTS - 2, 2)
    same_values(tmp_path / "run", whole, [p for p in pairs.prompt_id if p not in summary.failed])


class Pretended(Job):
    """A job without a model: its traces say where they were made."""

    def load(self):
        return threading.Barrier(2)

    def sample(self, model, rows, seeds, batch_size):
        def finish():
            model.wait(60)  # for the next, which is sampled meanwhile
            return xr.Dataset(attrs={n: os.environ.get(n) for n in names})

        names = ("CUDA_VISIBLE_DEVICES", "MEMLIB_PROGRESS")
        return finish


def test_two_gpus(session, pairs):
    """Each worker has its own, and two tasks: one is finished while the next is sampled."""
    pool = OnRay(Pretended(troubled, {}, {"device": "cuda"}, 1), 2)
    futures = []
    while pool._idle(2) != pool.workers:
        time.sleep(0.1)
    for n in range(4):
        assert pool.room(3)
        futures.append(pool.submit(Task(n, (n,), (0,), 4), pairs, [0]))
    assert not pool.room(0)
    found = [pool.result(future).attrs for future in futures if future.exception() is None]
    pool.close()
    assert sorted(a["CUDA_VISIBLE_DEVICES"] for a in found) == ["0", "0", "1", "1"]
    assert [a["MEMLIB_PROGRESS"] for a in found] == [None] * 4


def test_what_comes_second_is_dropped(lab, pairs, whole, tmp_path, monkeypatch):
    """A slow task is with two workers; the first result counts, an error only if both have one."""
    monkeypatch.setattr(work, "STRAGGLER", 0.0)
    slow, sent, taken = Future(), [], []

    class Two(InProcess):
        """The last task is slow, and ends with an error when it was begun once more."""

        def room(self, left):
            return super().room(left) or len(sent) == len(taken) + 1 == PROMPTS

        def submit(self, task, *more):
            sent.append(task.number)
            if sent.count(PROMPTS - 1) == 1:
                self.busy.append(slow)
                return slow
            future = super().submit(task, *more)
            if len(sent) > PROMPTS:
                slow.set_exception(ValueError("the slow one"))
            return future

        def result(self, future):
            taken.append(future)
            return super().result(future)

    monkeypatch.setattr(engines, "InProcess", Two)
    summary = memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", **SMALL)
    assert sent == [*range(PROMPTS), PROMPTS - 1]
    assert (summary.done, summary.failed) == (PROMPTS, {})
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_failure_costs_its_task_alone(session, lab, pairs, whole, tmp_path, capsys, workers):
    """An image that cannot be read is named; mended, the same command records it, nothing else."""
    shutil.copytree(Path(pairs.image[0]).parent, tmp_path / "images")
    names = [Path(f).name for f in pairs.image]
    table = pairs.assign(image=[f"images/{name}" for name in names])
    table.to_csv(tmp_path / "pairs.csv", index=False)
    loaded = memlib.load_pairs(tmp_path / "pairs.csv")
    picture = tmp_path / "images" / names[2]
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])  # after the list was checked
    summary = memlib.record(
        model=lab, pairs=loaded, address=tmp_path / "run", workers=workers, **SMALL
    )
    assert summary.done == PROMPTS - 1
    ((name, reason),) = summary.failed.items()
    assert name == loaded.prompt_id[2]
    assert f"{names[2]} cannot be decoded" in reason
    assert "5 pieces recorded, 0 were there, 1 failed" in str(summary).splitlines()[0]
    assert str(summary).splitlines()[1].strip().startswith(f"{name}: image")
    picture.write_bytes(content)
    command = f"{COMMAND} --pairs {tmp_path / 'pairs.csv'} --store {tmp_path / 'run'}"
    assert cli.main(shlex.split(command)) == 0
    assert "1 pieces recorded, 5 were there, 0 failed" in capsys.readouterr().out
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("bad", [0, 4])
def test_a_failure_costs_its_prompt_alone(lab, pairs, tmp_path, monkeypatch, bad):
    """Of five prompts in a task one fails: the others have the bits they would have had."""
    real, together, seen = memlib.runs.tracing.sample, SMALL | {"batch_size": 20}, []

    def sample(model, captions, *rest):
        seen.append(captions)
        if pairs.caption[bad] in captions:
            raise FloatingPointError("not finite")
        return real(model, captions, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(memlib.runs.tracing, "sample", sample)
        summary = memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", **together)
    assert (summary.done, summary.failed) == (PROMPTS - 1, {pairs.prompt_id[bad]: "not finite"})
    assert [len(captions) for captions in seen[:-1]] == [20] * (len(seen) - 1)
    assert len(seen) <= 8
    assert memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", **together).done == 1
    memlib.record(model=lab, pairs=pairs, address=tmp_path / "whole", **together)
    same(tmp_path / "run", tmp_path / "whole")


def test_failure_is_the_exit_status(lab, pairs, whole, tmp_path, monkeypatch, capsys):
    """Predictions that are not finite, for one prompt: the others are recorded; exit status 1."""
    real = memlib.runs.tracing.sample
    broken = pairs.caption[3]

    def sample(model, captions, *rest):
        if broken in captions:
            raise FloatingPointError("the predictions of lab are not finite in float32")
        return real(model, captions, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(memlib.runs.tracing, "sample", sample)
        command = f"{COMMAND} --store {tmp_path / 'run'} --out {tmp_path / 'D.csv'}"
        assert cli.main(shlex.split(command)) == 1
    out = capsys.readouterr().out
    assert "5 pieces recorded, 0 were there, 1 failed" in out
    assert "  planted-001-3: the predictions of lab are not finite in float32" in out
    assert cli.main(shlex.split(command)) == 0
    assert "1 pieces recorded, 5 were there, 0 failed" in capsys.readouterr().out
    same(tmp_path / "run", whole)


def test_strict_raises(lab, pairs, tmp_path, monkeypatch):
    def sample(*_):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(memlib.runs.tracing, "sample", sample)
    with pytest.raises(FloatingPointError, match="not finite"):
        memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", strict=True, **SMALL)


# --------------------------------------------------------------------------------------- interrupt


def session_of(leader: int) -> list[str]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == leader and state != "Z":
                found.append(stat.with_name("cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are counted in /proc")
@pytest.mark.parametrize(
    ("when", "how"),
    [
        ("workers load", signal.SIGINT),
        ("workers sample", signal.SIGINT),
        ("workers sample", signal.SIGKILL),
    ],
)
def test_interrupted(tmp_path, when, how):
    """Ctrl-C reaches all processes: one line, a whole store, no orphans; SIGKILL: no orphans."""
    folder = tmp_path / "run"
    command = f"{COMMAND} --prompts 60 --workers 2 --store {folder}".split()
    with memlib_command(*command, start_new_session=True) as process:
        wanted = "plan.json" if when == "workers load" else "sha256/1.0.0.0"
        while not (folder / wanted).exists() or "::_Worker" not in str(session_of(process.pid)):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        time.sleep(0.5)
        if how == signal.SIGINT:
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors.strip().splitlines()[-1] == "interrupted: what was complete is kept"
        assert not (folder / ".work").exists()
    deadline = time.monotonic() + 30
    # after SIGKILL two processes of Ray that do not work look for a minute where it is
    while left := [p for p in session_of(process.pid) if how == signal.SIGINT or "Agent" not in p]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    report = memlib.verify(folder)
    assert report.ok
    assert (report.done > 0) == (when == "workers sample")
    assert report.done < 60


# ------------------------------------------------------------------------------------- settings


def test_processes(monkeypatch):
    """All GPUs that are visible, unless fewer are asked for; on a CPU this one, or several."""
    free, fixed, cpu = ({"device": d} for d in (None, "cuda:1", "cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [engines.processes("local", free, n) for n in (None, 1, 2, 9)] == [4, 0, 2, 4]
    assert [engines.processes("local", fixed, n) for n in (None, 3)] == [0, 0]
    assert [engines.processes("local", cpu, n) for n in (None, 1, 3)] == [0, 0, 3]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [engines.processes("local", free, n) for n in (None, 2)] == [0, 2]
    assert engines.processes("local", None, None) == 0
    assert [engines.processes("ray", free, n) for n in (None, 2)] == [1, 2]


@pytest.mark.parametrize(("threads", "each"), [(None, 4), (3, 3)])
def test_threads_are_divided(lab, monkeypatch, threads, each):
    monkeypatch.setattr(engines, "cores", lambda: 8)
    monkeypatch.setattr(engines, "OnRay", lambda *arguments: arguments)
    job = Job(memlib.reverse_trace, {}, lab.recipe | {"device": None}, threads)
    job, count = engines.start(job, lab, "local", 2, None)
    assert (job.threads, job.recipe["device"], count) == (each, "cpu", 2)
    assert isinstance(engines.start(job, lab, "local", None, None), InProcess)
    torch.set_num_threads(1)


def test_progress_and_summary(lab, pairs, tmp_path, capfd):
    """Not on a terminal: lines with counts, and the summary; a second call skips everything."""
    for counts in ("6 pieces recorded, 0 were", "0 pieces recorded, 6 were"):
        summary = memlib.record(
            model=lab, pairs=pairs, address=tmp_path / "run", **SMALL | {"progress": "lines"}
        )
        assert counts in str(summary)
        assert str(tmp_path / "run") in str(summary)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1  # once in 30 seconds, and at the end
    assert lines[0].startswith("24 of 24 images, ")
    assert "a second, 0 s left" in lines[0]


def test_progress_names_failures(capfd):
    bar = work._Progress(6, "sample", "lines")
    bar.said -= 31
    bar.update(2)
    bar.update(2)
    bar.update(2, failed=1)
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("2 of 6 images")
    assert second.startswith("6 of 6 images")
    assert second.endswith(", 1 failed")


def test_a_model_that_no_worker_can_load(session, lab, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "recipe", lab.recipe | {"name": str(tmp_path / "gone")})
    with pytest.raises(ModelError) as error:
        memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", workers=2, **SMALL)
    one_line(error, "gone")
    assert memlib.verify(tmp_path / "run").ok


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        (dict(engine="rya"), ValueError, "unknown engine 'rya': did you mean 'ray'"),
        (dict(workers=0), ValueError, "workers=0 must be at least 1"),
        (dict(workers=-2, engine="ray"), ValueError, "workers=-2 must be at least 1"),
        (dict(engine="ray", ray_address="127.0.0.1:1"), ValueError, "no Ray cluster at 127.0.0.1"),
        (dict(engine="ray", ray_address="nonsense"), ValueError, "no Ray cluster at nonsense"),
    ],
)
def test_wrong_options(lab, pairs, tmp_path, options, kind, text):
    if "ray_address" in options:
        pytest.importorskip("ray").shutdown()
    begun = time.monotonic()
    with pytest.raises(kind) as error:
        memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", **options, **SMALL)
    one_line(error, text)
    assert time.monotonic() - begun < 30  # Ray alone would try the wrong address for minutes


@pytest.mark.parametrize("options", [dict(engine="ray"), dict(workers=2)])
def test_ray_is_not_installed(lab, pairs, tmp_path, monkeypatch, options):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError) as error:
        memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", **options, **SMALL)
    one_line(error, "pip install -e '.[cluster]'")


def test_a_model_without_a_name(pairs, tmp_path, lab):
    """It cannot be loaded anew by workers; here it can be sampled."""
    exact = memlib.load("exact")
    del exact.recipe
    with pytest.raises(ValueError, match="workers load their own model") as error:
        memlib.record(model=exact, pairs=pairs, address=tmp_path / "run", workers=2, **SMALL)
    one_line(error)
    summary = memlib.record(model=exact, pairs=pairs, address=tmp_path / "run", **SMALL)
    assert summary.done == PROMPTS


# ---------------------------------------------------------------------- a Ray of its own, a cluster


@pytest.mark.slow
def test_workers_from_the_command_line(whole, tmp_path):
    """Ray is started and stopped, and says nothing."""
    command = [*COMMAND.split(), "--workers", "2", "--store", tmp_path / "run"]
    with memlib_command(*command, start_new_session=True) as process:
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "6 pieces recorded, 0 were there, 0 failed" in out
    assert len(out.splitlines()) == 3 + PROMPTS  # what is to do, what was done, a table
    assert re.fullmatch(r"(.* left\n)*24 of 24 images, .* a second, 0 s left\n", errors)
    assert session_of(process.pid) == []
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_cluster_that_loses_a_node(lab, pairs, whole, tmp_path, monkeypatch):
    """Two nodes; one is lost with a task in hand; bit by bit as from one process."""
    pytest.importorskip("ray").shutdown()
    from ray.cluster_utils import Cluster

    submit, lost = OnRay.submit, []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)

        def lose(self, *arguments):
            future = submit(self, *arguments)
            if len(self.busy) == 2 and not lost:
                lost.append(node)
                cluster.remove_node(node)
            return future

        monkeypatch.setattr(OnRay, "submit", lose)
        summary = memlib.record(
            model=lab, pairs=pairs, address=tmp_path / "run", engine="ray",
            ray_address=cluster.address, **SMALL,
        )  # fmt: skip
    finally:
        cluster.shutdown()
    assert lost
    assert (summary.done, summary.failed) == (PROMPTS, {})
    same(tmp_path / "run", whole)
