"""Runs on disk: killed, damaged, full, vanished, grown, shared, and right in the end."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memlib
from memlib import cli, sampler
from memlib.runs import plan as plans
from memlib.runs import store, tracing
from memlib.runs.store import Run, StoreError

PROMPTS, SEEDS, TOGETHER = 6, 4, 8  # two prompts in a task
SMALL = dict(steps=3, similarity="ncc", batch_size=TOGETHER, progress=False)


@pytest.fixture(scope="module")
def lab():
    return memlib.load("lab")


@pytest.fixture(scope="module")
def pairs():
    pairs = memlib.load_pairs("lab").iloc[:PROMPTS].copy()
    pairs.loc[4, "image"] = ""  # one without a training image: NaN where it would be
    return pairs


@pytest.fixture(scope="module")
def whole(lab, pairs, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    memlib.record(model=lab, pairs=pairs, address=folder, seeds=range(SEEDS), **SMALL)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, to be maltreated."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def sampled(monkeypatch):
    """The (caption, seed) of every image that is sampled."""
    seen, real = [], sampler.sample

    def count(model, captions, seeds, *rest):
        seen.extend(zip(captions, seeds, strict=True))
        return real(model, captions, seeds, *rest)

    monkeypatch.setattr(tracing, "sample", count)
    return seen


def again(lab, pairs, folder, seeds=range(SEEDS), **more):
    return memlib.record(model=lab, pairs=pairs, address=folder, seeds=seeds, **(SMALL | more))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    }


def same(folder: Path, other: Path) -> None:
    a, b = contents(Path(folder)), contents(Path(other))
    assert [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)] == []
    assert not (Path(folder) / ".work").exists()


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# ------------------------------------------------------------------------------------------ kills

FORKER = """
import json, os, signal, sys
import memlib
from memlib.runs import store
lab = memlib.load("lab")
pairs = memlib.load_pairs("lab").iloc[:{prompts}].copy()
pairs.loc[4, "image"] = ""
print("ready", flush=True)
for line in sys.stdin:
    options = json.loads(line)
    left, real = options.pop("allowed"), os.replace
    child = os.fork()
    if not child:
        def replace(source, target):
            global left
            left -= 1
            if left == -1:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
        store.os = type("os", (), {{**vars(os), "replace": staticmethod(replace)}})
        os._exit(memlib.record(model=lab, pairs=pairs, **{small} | options).done)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def loaded(python: list[str]):
    """A process with the model loaded, which forks one that records.

    It is told after how many files, moved into place, its child kills itself; it gives the child's
    pid, and a function that waits for its end and returns the number of pieces it did, or -signal.
    """
    script = FORKER.format(prompts=PROMPTS, small=SMALL)
    process = subprocess.Popen(
        [*python, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "ready"

    def start(folder, allowed=-2, **options):
        options = {"seeds": list(range(SEEDS)), **options}
        options |= {"address": str(folder), "allowed": allowed}
        process.stdin.write(json.dumps(options) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline()), lambda: int(process.stdout.readline())

    yield start
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def forker(forks):
    with loaded(forks()) as start:
        yield start


@pytest.fixture(scope="module")
def other(forks):
    with loaded(forks()) as start:
        yield start


def pieces(folder: Path) -> int:
    return len(list(folder.glob("sha256/[0-9]*")))


def files(folder: Path) -> int:
    return sum(f.is_file() and ".work" not in f.parts for f in folder.rglob("*"))


@pytest.mark.slow
def test_killed_at_any_moment(forker, whole, tmp_path):
    """Twenty SIGKILLs; each run is started again until it is finished, and equals one never hurt.

    Each kill comes a random moment after the next piece is there, or after the start.
    """
    chance, kills, at, finished = random.Random(7), 0, set(), 0
    folder = tmp_path / "0"
    while kills < 20:
        already = pieces(folder)
        wanted = already + chance.choice((0, 1, 1, 2))
        pid, wait = forker(folder)
        while pieces(folder) < wanted and Path(f"/proc/{pid}").exists():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.4 if wanted == already else 0.05))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if (status := wait()) < 0:
            assert status == -signal.SIGKILL
            kills += 1
            at.add((pieces(folder), files(folder)))
            if (folder / "plan.json").exists() and (folder / ".zmetadata").exists():
                assert memlib.verify(folder).damaged == []
        else:  # it was faster
            same(folder, whole)
            finished += 1
            folder = tmp_path / str(finished)
    print(f"{kills} kills at {sorted(at)} (pieces, files); {finished} were faster")
    # Moments that differ in what was there; tests of single files follow.
    assert len(at) >= 3
    assert any(0 < n < PROMPTS for n, _ in at)
    assert forker(folder)[1]() >= 0
    same(folder, whole)
    assert str(memlib.verify(folder)).count("whole; 6 pieces of 6 recorded, 0 to do") == 1


def test_killed_before_any_file(forker, whole, tmp_path):
    """SIGKILL just before the k-th file is moved into place, for k all over the run."""
    total = files(whole) - 1  # .lock is not moved
    at = set()
    for k in [0, 1, 2, *range(20, total, 7), total - 1]:
        folder = tmp_path / str(k)
        _, wait = forker(folder, k)
        assert wait() == -signal.SIGKILL, k
        assert files(folder) == k + 1
        at.add(there := pieces(folder))
        assert forker(folder)[1]() == PROMPTS - there
        same(folder, whole)
    assert len(at) > 3


def test_what_a_kill_leaves_is_valid(forker, whole, tmp_path):
    """A half-recorded run opens as it is: NaN where nothing is yet, without a warning."""
    _, wait = forker(tmp_path / "run", files(whole) - 4)  # in the midst of the last piece
    assert wait() == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = xr.open_zarr(tmp_path / "run", chunks=None)
        assert np.isfinite(trace.gram.sel(vec="x_t", vec_="x_t")[:5]).all()
        report = memlib.verify(tmp_path / "run")
        assert (report.ok, report.done, report.missing) == (True, PROMPTS - 1, 1)
        early = forker(tmp_path / "early", files(whole) - 1 - PROMPTS * 7)  # only the header
        assert early[1]() == -signal.SIGKILL
        trace = xr.open_zarr(tmp_path / "early", chunks=None).load()
    assert trace.gram.isnull().all()
    assert trace.seed_distance.isnull().all()
    assert trace.severity.isnull().all()
    assert (trace.image == 0).all()
    assert list(trace.seed) == list(range(SEEDS))
    report = memlib.verify(tmp_path / "early")
    assert (report.ok, report.done, report.missing) == (True, 0, PROMPTS)


# ----------------------------------------------------------------------------------------- damage

KINDS = (
    "gram/2.0.0.0.0", "seed_distance/2.0.0.0", "severity/2.0", "image/2.0.0.0.0", "sha256/2.0.0.0",
    "caption/0", "seed_/0", "gram/.zarray", "gram/.zattrs", ".zmetadata", ".zgroup", ".zattrs",
    "plan.json", ".plan.json",
)  # fmt: skip


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def flip_early(file: Path) -> None:
    """Of a plan: in its checksum; of a Zarr chunk: in the header of the compressed frame."""
    data = bytearray(file.read_bytes())
    data[min(20, len(data) - 1)] ^= 1
    file.write_bytes(data)


HARMS = {
    "flip": flip, "flip-early": flip_early, "delete": Path.unlink,
    "truncate": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "harm"),
    [(kind, harm) for n, kind in enumerate(KINDS) for harm in [*HARMS][n % 2 :: 2]]
    + [(kind, "flip") for kind in KINDS[1::2]],
)
def test_damage_is_named_and_mended(lab, pairs, run, whole, capsys, sampled, kind, harm):
    HARMS[harm](run / kind)
    before = {k: os.stat(run / k).st_ino for k in contents(run)}
    status = cli.main(["verify", str(run)])
    out = capsys.readouterr().out
    piece = kind.split("/")[-1][0] == "2"
    if (kind[:6], harm) == ("sha256", "delete"):  # as if it was not recorded yet
        assert (status, out.count("whole; 5 pieces of 6 recorded, 1 to do")) == (0, 1)
    else:
        assert status == 1
        name = f"prompt {pairs.prompt_id[2]}, seeds 0, 1, 2, 3: {kind.split('/')[0]}"
        (_,) = [x for x in out.splitlines() if (name if piece else f"  {kind} ") in x]
        assert out.splitlines()[0].startswith(f"{run}: DAMAGED; ")
    summary = again(lab, pairs, run)
    assert (summary.done, summary.skipped) == (piece, PROMPTS - piece)
    assert len(sampled) == (TOGETHER if piece else 0)
    same(run, whole)
    changed = {k for k in before if k != kind and os.stat(run / k).st_ino != before[k]}
    assert all(piece and k.split("/")[1][0] == "2" for k in changed), changed
    assert cli.main(["verify", str(run)]) == 0


def test_both_plans_damaged(lab, pairs, run):
    flip(run / "plan.json")
    flip(run / ".plan.json")
    before = contents(run)
    with pytest.raises(StoreError) as error:
        again(lab, pairs, run)
    one_line(error, "plan.json and its copy are damaged")
    assert contents(run) == before
    assert xr.open_zarr(run, chunks=None).gram.sizes["prompt"] == PROMPTS


def test_damage_where_pieces_share_files(lab, pairs, tmp_path, sampled):
    """Seeds that were added later lie in the same files: all of them are redone, nothing else."""
    two = pairs.iloc[:2]
    for folder in ("a", "b"):
        again(lab, two, tmp_path / folder, range(3))
        again(lab, two, tmp_path / folder, range(5))
    same(tmp_path / "a", tmp_path / "b")
    for kind, harm in (
        ("gram/0.0.0.0.0", "flip"), ("sha256/0.0.0.0", "empty"), ("seed_distance/0.0.0.0", "flip"),
        ("image/0.0.0.0.0", "delete"), ("sha256/0.0.0.0", "delete"),
    ):  # fmt: skip
        sampled.clear()
        HARMS[harm](tmp_path / "a" / kind)
        report = memlib.verify(tmp_path / "a")
        assert len(report.damaged) + report.missing == 2, (kind, harm)
        summary = again(lab, two, tmp_path / "a", range(5))
        assert (summary.done, summary.skipped) == (2, 2), (kind, harm)
        same(tmp_path / "a", tmp_path / "b")


# ------------------------------------------------------------------------------------------- disk


def mounted(*options: str) -> None:
    subprocess.run(["mount", *options], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, small enough to be filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted("-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root mounts a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(lab, pairs, disk, whole, capsys):
    """One line; what was recorded is kept and whole; with more space the rest is recorded."""
    command = f"trace --prompts {PROMPTS} --seeds {SEEDS} --steps 3 --severity ncc --batch-size 8"
    assert cli.main([*command.split(), "--store", str(disk / "run")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {disk / 'run'} cannot be written (No space left on device)")
    assert "run the same command again" in line
    report = memlib.verify(disk / "run")
    assert report.ok
    assert 0 < report.done == pieces(disk / "run") < PROMPTS
    assert not (disk / "run" / ".work").exists()
    mounted("-o", "remount,size=4m", str(disk))
    assert cli.main([*command.split(), "--store", str(disk / "run")]) == 0
    assert f"{PROMPTS - report.done} pieces recorded, {report.done} were" in capsys.readouterr().out
    there = memlib.load_pairs("lab").iloc[:PROMPTS]
    again(lab, there, disk / "other")
    same(disk / "run", disk / "other")


@pytest.mark.parametrize("begun", [False, True])
def test_read_only_disk(lab, pairs, disk, whole, sampled, begun):
    if begun:
        mounted("-o", "remount,size=4m", str(disk))
        shutil.copytree(whole, disk / "run")
        (disk / "run/sha256/0.0.0.0").unlink()
    before = contents(disk)
    mounted("-o", "remount,ro", str(disk))
    with pytest.raises(StoreError) as error:
        again(lab, pairs, disk / "run")
    one_line(error, "cannot be written (Read-only file system)", disk / "run")
    assert sampled == []
    assert contents(disk) == before


def test_forbidden_folder(lab, pairs, tmp_path, sampled):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError) as error:
        again(lab, pairs, tmp_path / "run")
    tmp_path.chmod(0o700)
    one_line(error, "cannot be written (Permission denied)")
    assert sampled == []


@pytest.mark.parametrize("how", ["rename", "delete"])
@pytest.mark.parametrize("when", ["while sampling", "between tasks", "before the last is put"])
def test_vanishing_folder(lab, pairs, tmp_path, whole, monkeypatch, how, when):
    folder, away, calls = tmp_path / "run", tmp_path / "away", []

    def vanish():
        folder.rename(away) if how == "rename" else shutil.rmtree(folder)

    def at(number, function, after=False):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == number and not after:
                vanish()
            result = function(*args, **kwargs)
            if len(calls) == number and after:
                vanish()
            return result

        return call

    if when == "while sampling":
        monkeypatch.setattr(tracing, "sample", at(2, sampler.sample))
    else:
        after = when == "between tasks"
        monkeypatch.setattr(Run, "put", at(2 if after else PROMPTS, Run.put, after))
    with pytest.raises(StoreError) as error:
        again(lab, pairs, folder)
    one_line(error, folder, "has vanished", "run the same command again")
    assert not folder.exists()
    monkeypatch.undo()
    if how == "rename":
        assert memlib.verify(away).ok
        assert memlib.verify(away).done == (5 if "last" in when else 2)
        away.rename(folder)
    again(lab, pairs, folder)
    same(folder, whole)


# ----------------------------------------------------------------------------------------- growth


def agree(trace: xr.Dataset, other: xr.Dataset) -> None:
    """What a run holds is what sampling gives, to the last bit."""
    names = "gram seed_distance severity float32_fallback image caption alpha_bar"
    for name in names.split():
        np.testing.assert_array_equal(trace[name].values, other[name].values, err_msg=name)
        assert trace[name].dims == other[name].dims


def test_growth(lab, pairs, tmp_path, sampled):
    """More prompts, then more seeds: only what is new is sampled, what is there stays."""
    folder = tmp_path / "run"
    more = dict(steps=3, similarity="ncc", progress=False)
    again(lab, pairs.iloc[:2], folder)
    agree(memlib.open_run(folder), memlib.reverse_trace(lab, pairs.iloc[:2], range(4), **more))
    first, sampled[:] = contents(folder), []
    summary = again(lab, pairs.iloc[:5], folder)  # one of these has no image
    assert (summary.done, summary.skipped) == (3, 2)
    assert sampled == [(c, s) for c in pairs.caption[2:5] for s in range(4)]
    one = memlib.reverse_trace(lab, pairs.iloc[:5], range(4), batch_size=TOGETHER, **more)
    agree(memlib.open_run(folder), one)
    kept = [k for k in first if k[-1].isdigit() and k.split("/")[0] in (*one, "sha256")]
    assert kept
    sampled.clear()
    summary = again(lab, pairs.iloc[:5], folder, range(7))  # three more: tasks of 2, 2 and 1
    assert (summary.done, summary.skipped) == (5, 5)
    assert sorted(sampled) == sorted((c, s) for c in pairs.caption[:5] for s in (4, 5, 6))
    trace = memlib.open_run(folder)
    old, new = (trace.isel(seed=part, seed_=part) for part in (slice(0, 4), slice(4, 7)))
    agree(old, one)
    agree(new, memlib.reverse_trace(lab, pairs.iloc[:5], [4, 5, 6], batch_size=6, **more))
    # distances are known within what was recorded together
    across = trace.seed_distance.isel(seed=slice(0, 4), seed_=slice(4, 7))
    assert across.isnull().all()
    d = trace.seed_distance.values
    known = [(a, b) for a in range(7) for b in range(7) if a < b and (a < 4) == (b < 4)]
    by_hand = np.mean([d[..., a, b] for a, b in known], axis=0)
    np.testing.assert_allclose(
        memlib.mean_seed_distance(trace), by_hand, rtol=1e-12
    )  # another order of sums
    sampled.clear()
    assert again(lab, pairs.iloc[:5], folder, range(7)).skipped == 10
    assert again(lab, pairs.iloc[1:3], folder, [5, 2]).skipped == 4  # two pieces each
    assert sampled == []
    assert memlib.verify(folder).ok


def test_prompts_with_seeds_of_their_own(lab, pairs, tmp_path, sampled):
    folder = tmp_path / "run"
    again(lab, pairs.iloc[:2], folder, [3, 0])
    again(lab, pairs.iloc[2:4], folder, [1, 9])
    trace = memlib.open_run(folder)
    assert list(trace.seed) == [3, 0, 1, 9]
    known = np.isfinite(trace.gram.sel(vec="x_t", vec_="x_t").isel(step=0)).values
    assert known.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    sampled.clear()
    again(lab, pairs.iloc[:4], folder, [0, 1, 3, 9])
    assert len(sampled) == len(set(sampled)) == 8
    trace = memlib.open_run(folder)
    assert np.isfinite(trace.gram.sel(vec="x_t", vec_="x_t")).all()
    one = memlib.reverse_trace(
        lab, pairs.iloc[2:4], [3, 0], steps=3, similarity="ncc", batch_size=4
    )
    agree(trace.isel(prompt=[2, 3], seed=[0, 1], seed_=[0, 1]), one)
    assert memlib.verify(folder).ok


def test_part_of_a_task(lab, pairs, run, whole, sampled):
    """One prompt of two that are sampled together is asked for: a stand-in takes the other's place.

    So the bits are the same, and nothing but what was asked for is written.
    """
    for n in (0, 1, 2):
        (run / f"sha256/{n}.0.0.0").unlink()
    (run / "gram/2.0.0.0.0").unlink()
    summary = again(lab, pairs.iloc[1:2], run)
    assert (summary.done, summary.skipped, len(sampled)) == (1, 0, TOGETHER)
    assert {caption for caption, _ in sampled} == {pairs.caption[1]}
    assert memlib.verify(run).missing == 2
    assert again(lab, pairs.iloc[2:0:-1], run).done == 1
    assert again(lab, pairs.iloc[:1], run).done == 1
    same(run, whole)


def test_no_prompts(lab, pairs, tmp_path):
    with pytest.raises(ValueError, match="no prompts") as error:
        again(lab, pairs.iloc[:0], tmp_path / "run")
    one_line(error)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------- two processes


def test_two_processes_share_a_run(forker, other, lab, pairs, tmp_path):
    """Each piece is done by one of them, once; bit by bit as if one had done all."""
    _, first = forker(tmp_path / "run", batch_size=4)
    _, second = other(tmp_path / "run", batch_size=4)
    done = first(), second()
    print(done)
    assert sum(done) == PROMPTS
    assert min(done) > 0
    again(lab, pairs, tmp_path / "one", batch_size=4)
    same(tmp_path / "run", tmp_path / "one")


def test_two_processes_let_a_run_grow(forker, other, tmp_path):
    _, first = forker(tmp_path / "run", seeds=[0, 1, 2])
    _, second = other(tmp_path / "run", seeds=[2, 3, 4, 5])
    done = first(), second()
    report = memlib.verify(tmp_path / "run")
    assert (report.ok, report.missing, report.done) == (True, 0, 2 * PROMPTS)
    assert sum(done) == 2 * PROMPTS
    trace = memlib.open_run(tmp_path / "run")
    assert sorted(trace.seed.values) == list(range(6))
    assert np.isfinite(trace.gram.sel(vec="x_t", vec_="x_t")).all()
    assert not (tmp_path / "run/.work").exists()


# ---------------------------------------------------------------------------------------- refused


def test_unknown_schema(lab, pairs, run):
    plan = json.loads((run / "plan.json").read_text())["plan"] | {"schema": "memlib-run-99"}
    for name in ("plan.json", ".plan.json"):
        (run / name).write_bytes(plans.plan_file(plan))
    before = contents(run)
    calls = (lambda: again(lab, pairs, run), lambda: memlib.verify(run),
             lambda: memlib.open_run(run))  # fmt: skip
    for call in calls:
        with pytest.raises(StoreError) as error:
            call()
        one_line(error, "schema memlib-run-99, and this memlib knows memlib-run-1")
    assert contents(run) == before


def test_what_is_large_is_read_when_it_is_used(lab, pairs, run, whole, monkeypatch):
    """All of it or a part, in any order: as if it had been read at once."""
    near = memlib.open_run(run)
    monkeypatch.setattr(store, "LARGE", 0)
    far, part = memlib.open_run(run), Run(run)
    part.plan = part.read_plan()
    few = part.read([part.plan["prompts"][n] for n in (4, 1)], [3, 0])
    for trace in (far, few):
        assert not trace.image.variable._in_memory
        assert not trace.seed_distance.variable._in_memory
        assert trace.gram.variable._in_memory
    assert near.image.variable._in_memory
    xr.testing.assert_identical(far.load(), near)
    chosen = dict(prompt=[4, 1], seed=[3, 0], seed_=[3, 0])
    xr.testing.assert_identical(few.load(), near.isel(chosen))


def test_a_run_of_an_older_memlib(lab, pairs, tmp_path, monkeypatch, sampled):
    """Its plan does not say how many seeds share a chunk: 50 did. It is read, and grows."""
    with monkeypatch.context() as patch:
        patch.setattr(plans, "SEEDS", (50, 50))
        again(lab, pairs.iloc[:2], tmp_path / "run")
    plan = json.loads((tmp_path / "run/plan.json").read_text())["plan"]
    assert plan.pop("chunk") == 50
    for name in ("plan.json", ".plan.json"):
        (tmp_path / "run" / name).write_bytes(plans.plan_file(plan))
    before = memlib.open_run(tmp_path / "run").load()
    sampled.clear()
    summary = again(lab, pairs.iloc[:3], tmp_path / "run")
    assert (summary.done, summary.skipped, len(sampled)) == (1, 2, SEEDS)
    assert memlib.verify(tmp_path / "run").ok
    agree(memlib.open_run(tmp_path / "run").isel(prompt=[0, 1]), before)


def test_a_run_from_before_names_changed(lab, tmp_path):
    """It is read by the names of today, and damage in it is named. (Of an earlier lab.)"""
    run = tmp_path / "run"
    shutil.unpack_archive(Path(__file__).parent / "data/run-1.zip", run)
    pairs, before = memlib.load_pairs("lab").iloc[:2], contents(run)
    assert "pair_distance/0.0.0.0" in before
    report, trace = memlib.verify(run), memlib.open_run(run)
    assert (report.ok, report.done) == (True, 2)
    assert trace.schema == "memlib-trace-2"
    again(lab, pairs, tmp_path / "fresh", range(2), steps=2, images=False)
    fresh = memlib.open_run(tmp_path / "fresh")
    assert {*trace.variables} == {*fresh.variables}
    for name in ("gram", "seed_distance", "severity"):
        assert trace[name].shape == fresh[name].shape
        assert np.isfinite(trace[name]).equals(np.isfinite(fresh[name]))
    assert contents(run) == before
    flip(run / "pair_distance/0.0.0.0")
    assert "pair_distance cannot be read" in memlib.verify(run).damaged[0]
    schema = json.loads((run / ".zattrs").read_text())["schema"]
    assert schema == xr.open_zarr(run, chunks=None).schema == "memlib-trace-1"


@pytest.mark.parametrize("kind", ["thesis", "old trace"])
def test_folder_of_something_else(lab, pairs, tmp_path, whole, sampled, kind):
    if kind == "thesis":
        (tmp_path / "run/chapter").mkdir(parents=True)
        (tmp_path / "run/chapter/1.tex").write_text("Once upon a time")
    else:
        memlib.open_run(whole).to_zarr(tmp_path / "run", zarr_format=2)
    before = contents(tmp_path / "run")
    with pytest.raises(StoreError) as error:
        again(lab, pairs, tmp_path / "run")
    one_line(error, "it is left as it is", "1.tex" if kind == "thesis" else ".z")
    assert sampled == []
    assert contents(tmp_path / "run") == before


def test_address_that_is_a_file(lab, pairs, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(StoreError) as error:
        again(lab, pairs, tmp_path / "run")
    one_line(error, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_unknown_protocol(lab, pairs):
    with pytest.raises(StoreError) as error:
        again(lab, pairs, "nowhere://run")
    one_line(error, "nowhere")


def test_other_settings(lab, pairs, run, whole, sampled, tmp_path):
    exact = memlib.load("exact")
    picture = tmp_path / "other.png"
    shutil.copy(pairs.image[1], picture)
    cases = (
        (lambda: again(lab, pairs, run, guidance_scale=3.0), "guidance_scale=7.5, not 3.0"),
        (lambda: again(lab, pairs, run, steps=4), "steps=3, not 4"),
        (lambda: again(lab, pairs, run, images=False), "images=True, not False"),
        (lambda: again(exact, pairs, run), "model="),
        (
            lambda: again(lab, pairs.assign(caption=pairs.caption + "!"), run),
            f"prompt {pairs.prompt_id[0]} with another caption",
        ),
        (
            lambda: again(lab, pairs.assign(image=str(picture)), run),
            f"prompt {pairs.prompt_id[0]} with another image",
        ),
    )
    for call, text in cases:
        with pytest.raises(StoreError) as error:
            call()
        one_line(error, text, "another address")
    assert sampled == []
    same(run, whole)


# ------------------------------------------------------------------------------------ anywhere else


def test_fsspec_address(lab, pairs, whole, sampled):
    fs = Run("memory://runs/a").fs
    address = "memory://runs/a"
    try:
        again(lab, pairs.iloc[:4], address)
        sampled.clear()
        summary = again(lab, pairs, address)
        assert (summary.done, summary.skipped, len(sampled)) == (2, 4, TOGETHER)
        again(lab, pairs, "memory://runs/b")
        there = {f.removeprefix("/runs/b/"): fs.cat_file(f) for f in fs.find("/runs/b")}
        here = contents(whole)
        assert here.pop(".lock") == b""
        assert there == here
        assert cli.main(["verify", address]) == 0
        agree(xr.open_zarr(address, chunks=None), memlib.open_run(whole))
        agree(memlib.open_run(address), memlib.open_run(whole))
        key = "/runs/a/gram/3.0.0.0.0"
        fs.pipe_file(key, fs.cat_file(key)[:-1])
        assert memlib.verify(address).damaged[0].startswith(f"prompt {pairs.prompt_id[3]}")
        assert cli.main(["verify", address]) == 1
        assert again(lab, pairs, address).done == 1
        assert memlib.verify(address).ok
    finally:
        fs.rm("/runs", recursive=True)


# ------------------------------------------------------------------------------------------- size


def fake_gram(seeds: int, states: int, stochastic: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inner products and distances of random vectors that stand to each other as a run's do."""
    random = np.random.default_rng(3)
    t = np.linspace(1, 0, states)[:, None]
    x_0, x_gen = random.normal(size=(2, 256))
    x_T = random.normal(size=(seeds, 256))
    noise = random.normal(size=(seeds, states, 256)) * stochastic * (1 - t)
    x_t = t * x_T[:, None] + (1 - t) * x_gen + 0.1 * noise
    eps = [x_T[:, None] + 0.1 * random.normal(size=(seeds, states, 256)) for _ in range(2)]
    eps = [np.where(np.arange(states)[:, None] < states - 1, e, np.nan) for e in eps]
    columns = [x_t, *eps, x_0, x_T[:, None], x_t[:, -1:], noise]
    v = np.stack([np.broadcast_to(c, x_t.shape) for c in columns], 2)
    gap = x_t.swapaxes(0, 1)[:, :, None] - x_t.swapaxes(0, 1)[:, None]
    return v @ v.swapaxes(-1, -2), np.linalg.norm(gap, axis=-1)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_bytes(lab, pairs, tmp_path, sampler):
    """At most 400 bytes for each prompt, seed and state, checksums and distances included."""
    seeds, steps = 50, 50
    template = memlib.reverse_trace(
        lab, pairs.iloc[:0], range(seeds), sampler=sampler, similarity=None, images=False
    )
    gram, distance = fake_gram(seeds, steps + 1, sampler == "ddpm")
    shape = dict(prompt=[0] * 0)
    piece = template.reindex(shape)
    piece = xr.Dataset(
        {
            "gram": (("seed", "step", "vec", "vec_"), gram),
            "seed_distance": (("step", "seed", "seed_"), distance),
            "float32_fallback": ("seed", np.zeros(seeds, np.uint8)),
            "tokens_cut": ("seed", np.zeros(seeds, np.uint16)),
        },
        {"seed": range(seeds), "seed_": range(seeds)},
    )
    run = Run(tmp_path / "run")
    identity = {"settings": {}, "model": {}, "function": "reverse_trace"}
    with run.work():
        run.open_plan(identity, store.prompt_rows(pairs[:2]), list(range(seeds)), 50, template)
        for task in run.tasks():
            for p in task.prompts:
                run.put(task, p, piece)
    found = contents(tmp_path / "run")
    used = sum(len(v) for k, v in found.items() if k.split("/")[0] in (*piece, "sha256"))
    each = used / (2 * seeds * (steps + 1))
    print(f"{sampler}: {each:.0f} bytes")
    assert each <= 400
    assert each > 100  # a lossless one cannot be smaller than its random digits
    np.testing.assert_array_equal(memlib.open_run(tmp_path / "run").gram[1], gram)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    groups=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    prompts=st.integers(1, 3),
    number=st.integers(0, 2**32 - 1),
)
def test_what_is_put_is_read(groups, prompts, number):
    """Any pieces, in any order, NaN and infinity included; what was not put is missing."""
    random = np.random.default_rng(number)
    dims = {"gram": ("seed", "step"), "image": ("seed", "y"), "seed_distance": ("seed", "seed_")}
    sizes = {"step": 3, "y": 2}

    def dataset(seeds):
        size = sizes | {"seed": len(seeds), "seed_": len(seeds)}
        values = {}
        for name, names in dims.items():
            bits = random.integers(0, 256, [*(size[d] for d in names), 8], np.uint8)
            values[name] = (names, bits[..., 0] if name == "image" else bits.view("f8")[..., 0])
        return xr.Dataset(values, {"seed": seeds, "seed_": seeds})

    rows = [{"prompt_id": str(p), "caption": "c", "image": ""} for p in range(prompts)]
    identity = {"settings": {}, "model": {}, "function": "f"}
    run, begin = Run("memory://property"), 0
    try:
        for size in groups:
            seeds = list(range(begin, begin + size))
            template = dataset(seeds).expand_dims(prompt=0)
            run.open_plan(identity, rows, seeds, 2, template)
            begin += size
        todo = [(task, p) for task in run.tasks() for p in task.prompts]
        random.shuffle(todo)
        put = {}
        for task, p in todo[: random.integers(1, len(todo) + 1)]:
            put[task, p] = dataset(list(task.seeds))
            run.put(task, p, put[task, p])
        states = {(task, p): state for task, p, state in run.check(run.tasks())}
        assert states == {key: "done" if key in put else "missing" for key in todo}
        # a damaged file: the pieces in it are put once more, and all is well again
        file = random.choice([f for name in dims for f in run.fs.glob(f"{run.root}/{name}/[0-9]*")])
        run.fs.pipe_file(file, run.fs.cat_file(file)[:-1])
        harmed = [key[:2] for key in run.check(run.tasks()) if key[2] not in ("done", "missing")]
        assert harmed
        for task, p in harmed:
            run.put(task, p, put[task, p])
        assert sum(state == "done" for _, _, state in run.check(run.tasks())) == len(put)
        trace = memlib.open_run("memory://property")
        group = zarr.open_group("memory://property", mode="r")
        assert all(group[n][:].tobytes() == trace[n].values.tobytes() for n in trace.variables)
        for (task, p), piece in put.items():
            seeds = list(task.seeds)
            part = trace.isel(prompt=p, seed=seeds, seed_=seeds)
            for name in dims:  # the bits: NaN has many
                values = np.ascontiguousarray(part[name].transpose(*dims[name]).values)
                assert values.tobytes() == piece[name].values.tobytes()
    finally:
        run.fs.rm("/property", recursive=True)


# ------------------------------------------------------------------------------- the book's cache

BOOK = dict(steps=3, similarity="ncc", progress=False)


def ask(lab, pairs, seeds=range(SEEDS)):
    return memlib.cached(memlib.reverse_trace, lab, pairs, seeds=seeds, batch_size=4, **BOOK)


@pytest.fixture
def book(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_killed_book_goes_on(lab, pairs, book, monkeypatch):
    seen, real = [], sampler.sample

    def killed(model, captions, seeds, *rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(captions[0])
        return real(model, captions, seeds, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tracing, "sample", killed)
        with pytest.raises(KeyboardInterrupt) as held:  # its frames live on, as in a notebook
            ask(lab, pairs)
    (folder,) = book.glob("reverse_trace-*/")
    assert memlib.verify(folder).done == 2
    monkeypatch.setattr(tracing, "sample", lambda *a: seen.append(a[1][0]) or real(*a))
    trace = ask(lab, pairs)
    assert seen == list(pairs.caption)
    assert held.traceback
    agree(trace, memlib.reverse_trace(lab, pairs, range(SEEDS), batch_size=4, **BOOK))
    seen.clear()
    ask(lab, pairs)
    assert seen == []


@pytest.mark.parametrize("kind", [".zgroup", "gram/.zarray", "sha256/0.0.0.0"])
def test_a_damaged_book_is_mended(lab, pairs, book, sampled, kind):
    trace = ask(lab, pairs.iloc[:2])
    (folder,) = book.glob("reverse_trace-*/")
    sampled.clear()
    for harm in ("delete", "flip"):
        HARMS[harm](folder / kind)
        agree(ask(lab, pairs.iloc[:2]), trace)
        assert memlib.verify(folder).ok
    assert len(sampled) == (2 * 4 if kind.startswith("sha256") else 0)


def test_the_book_takes_what_trace_recorded(lab, book, sampled, capsys):
    """All of it or a part; but not seeds that were added later, whose distances nobody knows."""
    command = "trace --steps 3 --severity ncc --batch-size 8 --prompts"
    assert cli.main(f"{command} 3 --seeds 3".split()) == 0
    there = memlib.load_pairs("lab").iloc[:3]
    sampled.clear()
    trace = ask(lab, there.iloc[[2, 0]], [2, 0])
    assert sampled == []
    one = memlib.reverse_trace(lab, there, range(3), batch_size=6, **BOOK)  # the same batches
    agree(trace, one.isel(prompt=[2, 0], seed=[2, 0], seed_=[2, 0]))
    assert cli.main(f"{command} 3 --seeds 5".split()) == 0
    sampled.clear()
    ask(lab, there, range(3))
    ask(lab, there, [3, 4])
    assert sampled == []
    assert np.isfinite(ask(lab, there, [2, 3]).seed_distance).all()
    assert len(sampled) == 6
    assert cli.main(["verify"]) == 0  # all that is in the cache
    assert capsys.readouterr().out.count("whole") == 2
