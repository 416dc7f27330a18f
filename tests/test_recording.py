"""Many workers, one run: processes and Ray actors that die, fail, or are interrupted."""

import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_store import one_line, same

import memlib
from memlib import cli
from memlib.models import ModelError
from memlib.runs.work import Here, LostWorkerError, OnRay, Processes

record = sys.modules["memlib.runs.work"]
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


# -------------------------------------------------------------------------------------- processes


def test_two_workers_and_a_killed_one(lab, pairs, whole, tmp_path, monkeypatch):
    """A worker is killed with a task in hand; another does it; bit by bit as from one process."""
    killed, submit = [], Processes.submit

    def kill(self, task, rows, seeds):
        submit(self, task, rows, seeds)
        if task.number == 4 and not killed:  # sent when the first results are back
            (worker,) = (w for w in self.workers if 4 in w["tasks"])
            killed.append(worker["process"].pid)
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Processes, "submit", kill)
    summary = memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", workers=2, **SMALL)
    assert killed
    assert (summary.done, summary.failed) == (PROMPTS, {})
    same(tmp_path / "run", whole)


def deadly(
    model, pairs, seeds=range(10), guidance_scale=7.5, sampler="ddim", steps=50, similarity="sscd",
    images=True, batch_size=20, progress=True,
):  # fmt: skip
    """As `reverse_trace`, but one prompt kills the process, as a lack of memory would."""
    if "planted-001-1" in list(pairs.prompt_id):
        os.kill(os.getpid(), signal.SIGKILL)
    return memlib.reverse_trace(
        model, pairs, seeds, guidance_scale, sampler, steps, similarity, images, batch_size,
        progress,
    )  # fmt: skip


def test_a_task_that_kills_its_worker(lab, pairs, tmp_path, monkeypatch):
    """It is given up after three attempts and named; what waited behind it is recorded."""
    sent, submit = [], Processes.submit

    def note(self, task, rows, seeds):
        sent.append(task.number)
        submit(self, task, rows, seeds)

    monkeypatch.setattr(Processes, "submit", note)
    devices = record.devices
    monkeypatch.setattr(record, "devices", lambda recipe, workers: devices(recipe, 2)[:1])
    summary = memlib.record(
        deadly, model=lab, pairs=pairs, address=tmp_path / "run", workers=2, **SMALL
    )
    assert sent.count(1) == 3
    assert summary.done == PROMPTS - 1
    assert summary.failed == {"planted-001-1": "its worker died (exit -9)"}
    report = memlib.verify(tmp_path / "run")
    assert (report.ok, report.done, report.missing) == (True, PROMPTS - 1, 1)


def hanging(
    model, pairs, seeds=range(10), guidance_scale=7.5, sampler="ddim", steps=50, similarity="sscd",
    images=True, batch_size=20, progress=True,
):  # fmt: skip
    """As `reverse_trace`, but the first process that samples the second prompt stops for ever."""
    if "planted-001-1" in list(pairs.prompt_id):
        with contextlib.suppress(FileExistsError):
            Path(os.environ["HANGING"]).touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGSTOP)
    return memlib.reverse_trace(
        model, pairs, seeds, guidance_scale, sampler, steps, similarity, images, batch_size,
        progress,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_worker_that_hangs(lab, pairs, whole, tmp_path, monkeypatch, engine):
    """It holds up nobody: another does its task, too, and it is ended with the rest."""
    if engine == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # its workers find `hanging`
    monkeypatch.setenv("HANGING", str(tmp_path / "hangs"))
    monkeypatch.setattr(record, "GRACE", 1.0)
    kind, sent = Processes if engine == "local" else OnRay, []
    submit = kind.submit

    def note(self, task, *more):
        sent.append(task.number)
        submit(self, task, *more)

    monkeypatch.setattr(kind, "submit", note)
    summary = memlib.record(
        hanging, model=lab, pairs=pairs, address=tmp_path / "run", engine=engine, workers=2, **SMALL
    )
    assert (tmp_path / "hangs").exists()
    assert (summary.done, summary.failed) == (PROMPTS, {})
    assert sent.count(1) == 2
    assert set(sent) == set(range(PROMPTS))
    if engine == "local":
        assert multiprocessing.active_children() == []
    # the function's name is in the plan, and in what the checksums are of
    ours, theirs = memlib.open_run(tmp_path / "run").load(), memlib.open_run(whole).load()
    assert all(ours[n].values.tobytes() == theirs[n].values.tobytes() for n in theirs.variables)


def test_what_comes_second_is_dropped(lab, pairs, whole, tmp_path, monkeypatch):
    """A late task is in two hands; the first result counts, an error only if both have one."""
    monkeypatch.setattr(record, "LATE", 0.0)
    real, held, sent = Here.submit, [], []

    class Two(Here):
        """Keeps the answers of the last task until there are two, and adds errors around them."""

        def room(self, left):
            return not self.waiting and len(held) < 2

        def submit(self, task, *more):
            sent.append(task.number)
            real(self, task, *more)
            if task.number == PROMPTS - 1:
                held.append(self.waiting.pop())

        def wait(self):
            if len(held) != 2:
                yield from super().wait()
                return
            (task, future), late = held[0], ValueError("the late one")
            held.append(None)
            yield from ((task, late), (task, future.result()), (task, late))

    monkeypatch.setattr(record, "Here", Two)
    summary = memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", **SMALL)
    assert sent == [*range(PROMPTS), PROMPTS - 1]
    assert (summary.done, summary.failed) == (PROMPTS, {})
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_failure_costs_its_task_alone(lab, pairs, whole, tmp_path, capsys, workers):
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
    assert f"image {picture} cannot be decoded" in reason
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


class OddError(Exception):
    """It cannot be unpickled: its own arguments are not those of its message."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def odd(
    model, pairs, seeds=range(10), guidance_scale=7.5, sampler="ddim", steps=50, similarity="sscd",
    images=True, batch_size=20, progress=True,
):  # fmt: skip
    """As `reverse_trace`, but every prompt fails, one of them with an odd error."""
    if "planted-001-1" in list(pairs.prompt_id):
        raise OddError("flesh", "fell")
    if len(pairs):
        raise ValueError("plain")
    return memlib.reverse_trace(
        model, pairs, seeds, guidance_scale, sampler, steps, similarity, images, batch_size,
        progress,
    )  # fmt: skip


def test_an_error_that_cannot_travel(lab, pairs, tmp_path):
    summary = memlib.record(
        odd, model=lab, pairs=pairs.iloc[:2], address=tmp_path / "run", workers=2, **SMALL
    )
    assert summary.failed == {
        pairs.prompt_id[0]: "plain", "planted-001-1": "OddError: flesh and fell",
    }  # fmt: skip


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


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


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
        while not (folder / wanted).exists() or len(session(process.pid)) < 4:  # workers, too
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(0.5)
        if how == signal.SIGINT:
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors.strip() == "interrupted: what was complete is kept"
        assert not (folder / ".work").exists()
    deadline = time.monotonic() + 20  # a worker notices when it has finished its task
    while session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert session(process.pid) == []
    report = memlib.verify(folder)
    assert report.ok
    assert (report.done > 0) == (when == "workers sample")
    assert report.done < 60


# ------------------------------------------------------------------------------------- settings


def test_devices(monkeypatch):
    """All GPUs that are visible, unless fewer are asked for; on a CPU one process, or several."""
    free, fixed, cpu = ({"device": d} for d in (None, "cuda:1", "cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert record.devices(free, None) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert record.devices(free, 2) == ["cuda:0", "cuda:1"]
    assert record.devices(free, 1) == record.devices(fixed, None) == []  # this process will do
    assert record.devices(cpu, None) == []
    assert record.devices(cpu, 3) == ["cpu"] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert record.devices(free, None) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert record.devices(free, None) == []
    assert record.devices(free, 2) == ["cpu"] * 2


@pytest.mark.parametrize(("threads", "each"), [(None, 4), (3, 3)])
def test_threads_are_divided(lab, monkeypatch, threads, each):
    monkeypatch.setattr(record, "cores", lambda: 8)
    monkeypatch.setattr(record, "Processes", lambda jobs: jobs)
    job = record.Job(memlib.reverse_trace, {}, lab.recipe | {"device": "cpu"}, threads)
    jobs = record._engine(job, lab, "local", 2, None)
    assert [(j.threads, j.recipe["device"]) for j in jobs] == [(each, "cpu")] * 2
    assert isinstance(record._engine(job, lab, "local", None, None), Here)
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
    bar = record._Progress(6, "sample", "lines")
    bar.said -= 31
    bar.update(2)
    bar.update(2)
    bar.update(2, failed=1)
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("2 of 6 images")
    assert second.startswith("6 of 6 images")
    assert second.endswith(", 1 failed")


def test_a_model_that_no_worker_can_load(lab, pairs, tmp_path, monkeypatch):
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
        pytest.importorskip("ray")
    begun = time.monotonic()
    with pytest.raises(kind) as error:
        memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", **options, **SMALL)
    one_line(error, text)
    assert time.monotonic() - begun < 30  # Ray alone would try the wrong address for minutes


def test_ray_is_not_installed(lab, pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError) as error:
        memlib.record(model=lab, pairs=pairs, address=tmp_path / "run", engine="ray", **SMALL)
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


# -------------------------------------------------------------------------------------------- Ray


@pytest.fixture
def ray():
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    yield ray
    left = ray.is_initialized()
    ray.shutdown()
    assert not left


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node(ray, lab, pairs, whole, tmp_path, monkeypatch):
    """Two nodes; one is lost with a task in hand; bit by bit as from one process."""
    from ray.cluster_utils import Cluster

    submit, wait, lost = OnRay.submit, OnRay.wait, []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)

        def lose(self, *arguments):
            submit(self, *arguments)
            if len(self.busy) == 2 and node in cluster.list_all_nodes():  # one is there
                cluster.remove_node(node)

        def note(self):
            for task, result in wait(self):
                if isinstance(result, Exception):
                    lost.append(result)
                yield task, result

        monkeypatch.setattr(OnRay, "submit", lose)
        monkeypatch.setattr(OnRay, "wait", note)
        summary = memlib.record(
            model=lab, pairs=pairs, address=tmp_path / "run", engine="ray",
            ray_address=cluster.address, **SMALL,
        )  # fmt: skip
    finally:
        cluster.shutdown()
    assert [type(error) for error in lost] == [LostWorkerError]
    assert (summary.done, summary.failed) == (PROMPTS, {})
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_ray_actor_with_two_tasks(ray, lab, pairs, whole, tmp_path, monkeypatch):
    """As on a GPU: one is finished while the next is sampled; lost with both, both are redone."""
    most, lost = [], []

    class Deep(OnRay):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.depth = 2

        def submit(self, *arguments):
            super().submit(*arguments)
            most.append(max(self.hands.values()))
            if most[-1] == 2 and not lost:
                lost.extend(self.hands)
                self.ray.kill(lost[0])

    monkeypatch.setattr(record, "OnRay", Deep)
    summary = memlib.record(
        model=lab, pairs=pairs, address=tmp_path / "run", engine="ray", workers=1, **SMALL
    )
    assert max(most) == 2
    assert (summary.done, summary.failed) == (PROMPTS, {})
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_ray_from_the_command_line(ray, pairs, whole, tmp_path):
    """A cluster of this machine is started, and stopped; a wrong model is one line, not a loop."""
    with memlib_command(
        *COMMAND.split(), "--engine", "ray", "--store", tmp_path / "run"
    ) as process:
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "6 pieces recorded, 0 were there, 0 failed" in out
    assert "24 of 24 images" in errors
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_model_that_no_node_can_load(ray, lab, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "recipe", lab.recipe | {"name": str(tmp_path / "gone")})
    with pytest.raises(ModelError) as error:
        memlib.record(
            model=lab, pairs=pairs, address=tmp_path / "run", engine="ray", workers=1, **SMALL
        )
    one_line(error, "gone")
