"""What `make bench` compares does the same work, and the page has all of its numbers."""

import json
import shutil

import numpy as np
import pytest
import torch

import memlib
from memlib.bench import measure as bench


@pytest.fixture
def load():
    load = bench.Workload("lab", prompts=2, seeds=3, steps=4)
    yield load
    shutil.rmtree(load.folder)


def test_both_ways_give_the_same_numbers(load):
    """From inner products on disk, and from all vectors on disk: only rounding differs."""
    ours = load.analyse_trace(load.recorded("ddim"))
    theirs = load.analyse_everything(load.everything("ddim"))
    assert sorted(ours) == sorted(theirs)
    assert len(ours.columns) == 14  # with three of the first states
    np.testing.assert_allclose(ours, theirs[list(ours)], rtol=1e-9, atol=1e-9)
    assert (ours.abs() > 1e-3).to_numpy().all()  # nothing of it is trivially equal


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_invented_run_is_a_run(tmp_path, sampler):
    bench.synthetic(tmp_path / "run", prompts=12, seeds=4, steps=6, sampler=sampler)
    assert memlib.verify(tmp_path / "run").done == 12
    trace = memlib.open_run(tmp_path / "run")
    dev = memlib.deviations(trace)
    found = bench.correlations(trace)
    assert found["D1, schedule"] == pytest.approx(np.corrcoef(dev.D1, dev.severity)[0, 1])
    assert found["D1, schedule, low"] <= found["D1, schedule"] <= found["D1, schedule, high"]


def test_the_network_apart(load):
    """The ways that are compared make the same calls of it; without it they still do the rest."""
    ways = {"recorded": lambda: load.recorded("ddpm"), "plain": lambda: load.plain("ddpm")}
    found = bench.apart(load, ways, 1)
    assert bench.in_network(load, ways["plain"])[1] == 4  # one call an update
    for way, seconds in found["whole"].items():
        assert seconds == pytest.approx(found["network"] + found["rest"]["seconds"][way])
    assert found["ratio"] == found["whole"]["recorded"] / found["whole"]["plain"]
    before = load.recorded("ddpm").joinpath("gram/0.0.0.0.0").read_bytes()
    with bench.without_network(load):
        without = load.recorded("ddpm").joinpath("gram/0.0.0.0.0").read_bytes()
        assert bench.in_network(load, ways["plain"])[1] == 4
    assert without != before == load.recorded("ddpm").joinpath("gram/0.0.0.0.0").read_bytes()
    ways["plain"] = lambda: None
    with pytest.raises(RuntimeError, match="differ in their calls"):
        bench.apart(load, ways, 1)


def test_a_goal_that_is_missed_says_so():
    results = {"recording": {"ddim": {"ratio": 1.2}, "ddpm": {"ratio": 1.0}}}
    table = bench.goals(results).set_index("quantity")
    assert table.met["recorded / plain, DDIM"] == "NO"
    assert table.met["recorded / plain, DDPM"] == "yes"
    assert len(table) == 2  # what was not measured has no row


def test_the_shipped_measurements_are_whole():
    results = json.loads(bench.RESULTS.read_text())
    assert set(bench.SECTIONS) <= set(results)
    assert len(bench.goals(results)) == len(bench.GOALS)
    assert results["machine"]["cores"] >= 2


def test_the_section_on_a_card_is_rehearsed(tmp_path, capsys, monkeypatch):
    """With a small network on a CPU: the program runs to its table, and nothing is written."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("sys.argv", ["bench", "--only", "gpu", "--out", str(tmp_path / "b.json")])
    bench.main()
    out = capsys.readouterr().out
    assert "it was not written and does not count" in out
    for name in bench.GPU_GOALS:
        assert name in out
    assert not (tmp_path / "b.json").exists()


def test_without_a_card_the_section_is_not_run(tmp_path, capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["bench", "--only", "quick", "gpu", "--out", str(tmp_path / "b.json")]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setitem(bench.SECTIONS, "quick", lambda *_: {"done": 1})
    bench.SECTIONS["quick"].__doc__ = "Nothing."
    bench.main()
    assert "gpu: not run, torch finds no GPU here" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "b.json").read_text())) == {"machine", "model", "quick"}


def test_the_goals_of_a_card():
    rate = {"diffusers, 40 at once": 3.0, "ours": 4.2, "ours, without pictures": 4.3}
    load = bench.OnCard(torch.device("cpu"), small=True)
    found = bench.summary(load, rate, 1.01) | {"share of the peak": 0.39}
    assert found["operations a second"] > 0
    table = bench.goals({"gpu": found}, bench.GPU_GOALS).set_index("quantity")
    assert (table.met == "yes").all()
    assert len(table) == 4  # the T4's part was not measured
    shutil.rmtree(load.folder)


def test_a_process_of_its_own():
    assert bench.measured("machine") == bench.machine()
