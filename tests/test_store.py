"""Runs on disk: killed, damaged, full, vanished, grown, shared; what is there in the end is right."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memlib
from memlib import cache, cli, sample, store
from memlib.store import Run, StoreError

PROMPTS, SEEDS, TOGETHER = 6, 4, 8  # two prompts in a task
SMALL = dict(steps=3, severity="ncc", batch_size=TOGETHER, progress=False)


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
    seen, real = [], sample.sample

    def count(model, captions, seeds, *rest):
        seen.extend(zip(captions, seeds, strict=True))
        return real(model, captions, seeds, *rest)

    monkeypatch.setattr(sample, "sample", count)
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
import os, signal, sys, time
import memlib
from memlib import store
lab = memlib.load("lab")
pairs = memlib.load_pairs("lab").iloc[:{prompts}].copy()
pairs.loc[4, "image"] = ""
print("ready", flush=True)
for line in sys.stdin:  # a folder, and how many files come into place before the child dies
    folder, allowed = line.rsplit(" ", 1)
    child = os.fork()
    if not child:
        left, real = int(allowed), os.replace
        def replace(source, target):
            global left
            left -= not str(target).endswith((".mark", ".claim"))
            if left == -1:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
        if left >= 0:
            store.os = type("os", (), {{**vars(os), "replace": staticmethod(replace)}})
        memlib.record(model=lab, pairs=pairs, address=folder, seeds=range({seeds}), **{small})
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forker():
    """Start a recording in a process of its own, with the model loaded; returns pid and wait."""
    script = FORKER.format(prompts=PROMPTS, seeds=SEEDS, small=SMALL)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "ready"

    def start(folder, allowed=-1):
        process.stdin.write(f"{folder} {allowed}\n")
        process.stdin.flush()
        return int(process.stdout.readline()), lambda: int(process.stdout.readline())

    yield start
    process.stdin.close()
    process.wait()


def pieces(folder: Path) -> int:
    return len(list(folder.glob("sha256/[0-9]*")))


def files(folder: Path) -> int:
    return sum(f.is_file() and ".work" not in f.parts for f in folder.rglob("*"))


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
        if status := wait():
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
    assert len(at) >= 6  # moments that differ in what was there
    assert any(0 < n < PROMPTS for n, _ in at)
    assert forker(folder)[1]() == 0
    same(folder, whole)
    assert str(memlib.verify(folder)).count("whole; 6 pieces of 6 recorded, 0 to do") == 1


def test_killed_before_any_file(forker, whole, tmp_path):
    """SIGKILL just before the k-th file is moved into place, for k all over the run."""
    total = files(whole) - 1  # .lock is not moved
    at = set()
    for k in [0, 1, 2, *range(20, total, 7), total - 1]:
        folder = tmp_path / str(k)
        pid, wait = forker(folder, k)
        assert wait() == -signal.SIGKILL, k
        assert files(folder) == k + 1
        at.add(pieces(folder))
        assert forker(folder)[1]() == 0
        same(folder, whole)
    assert len(at) > 3


def test_what_a_kill_leaves_is_valid(forker, whole, tmp_path):
    """A half-recorded run opens as it is: NaN where nothing is yet, without a warning."""
    pid, wait = forker(tmp_path / "run", files(whole) - 4)  # in the midst of the last piece
    assert wait() == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = xr.open_zarr(tmp_path / "run", chunks=None)
        assert np.isfinite(trace.gram.sel(vec="x_t", vec_="x_t")[:5]).all()
        early = forker(tmp_path / "early", files(whole) - 6 * 5)  # only the header
        assert early[1]() == -signal.SIGKILL
        trace = xr.open_zarr(tmp_path / "early", chunks=None).load()
    assert trace.gram.isnull().all()
    assert trace.pair_distance.isnull().all()
    assert trace.severity.isnull().all()
    assert (trace.image == 0).all()
    assert list(trace.seed) == list(range(SEEDS))
    report = memlib.verify(tmp_path / "early")
    assert (report.ok, report.done, report.missing) == (True, 0, PROMPTS)


# ----------------------------------------------------------------------------------------- damage

KINDS = (
    "gram/2.0.0.0.0", "pair_distance/2.0.0.0", "severity/2.0", "image/2.0.0.0.0", "sha256/2.0.0.0",
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


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", KINDS)
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
        name = f"prompt {pairs.prompt_id[2]}, seeds 0 to 3: {kind.split('/')[0]}"
        (line,) = [x for x in out.splitlines() if (name if piece else f"  {kind} ") in x]
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
    for kind in ("gram/0.0.0.0.0", "sha256/0.0.0.0", "pair_distance/0.0.0.0", "image/0.0.0.0.0"):
        for harm in ("flip", "empty", "delete"):
            sampled.clear()
            HARMS[harm](tmp_path / "a" / kind)
            report = memlib.verify(tmp_path / "a")
            assert len(report.damaged) + report.missing == 2, (kind, harm)
            summary = again(lab, two, tmp_path / "a", range(5))
            assert (summary.done, summary.skipped) == (2, 2), (kind, harm)
            same(tmp_path / "a", tmp_path / "b")
