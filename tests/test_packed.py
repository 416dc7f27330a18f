"""The traces that come with the book: packed without loss that matters, read, and found out."""

import json

import numpy as np
import pytest
import xarray as xr

import memlib
from memlib.bench import traces
from memlib.hub.files import sha256
from memlib.paths import TRACES, cache_folder
from memlib.runs import cache, packed
from memlib.runs.store import Run

CALLS = []


def reverse_trace(model, pairs, seeds=(0, 1, 2), steps=3, similarity="ncc", images=True):
    CALLS.append(len(pairs))
    return memlib.reverse_trace(
        model, pairs, seeds=seeds, steps=steps, similarity=similarity, images=images, progress=False
    )


@pytest.fixture
def shipped(lab, tmp_path, monkeypatch):
    """A trace that was recorded, packed, and forgotten by the cache: itself and its file."""
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path / "before"))
    pairs = memlib.load_pairs("lab").iloc[:3]
    trace = memlib.cached(reverse_trace, lab, pairs)
    (run,) = (Run(f) for f in (tmp_path / "before").iterdir() if f.is_dir())
    plan, name = run.planned(), run.folder.name.rsplit("-", 1)[0]
    monkeypatch.setattr(cache, "TRACES", tmp_path / "shipped")
    monkeypatch.setattr(traces, "TRACES", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    file = tmp_path / f"shipped/{name}.zip"
    plan["identity"]["function"] = "reverse_trace"
    packed.pack(
        trace, file, identity=plan["identity"], seeds=plan["seeds"], by={},
        prompts=list(pairs.prompt_id),
    )  # fmt: skip
    sums(file)
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path / "after"))
    CALLS.clear()
    return pairs, trace, file


def sums(file):
    (file.parent / "SHA256SUMS").write_text(f"{sha256(file)}  {file.name}\n")


def test_a_packed_trace_is_the_trace(shipped):
    _, trace, file = shipped
    found = packed.unpack(file)
    assert list(found) == [name for name, v in trace.data_vars.items() if "prompt" in v.dims]
    for name, v in found.items():
        assert v.dims == trace[name].dims
        assert v.dtype == trace[name].dtype
        if name in ("gram", "seed_distance"):
            rounding = 2.0**-33 if name == "gram" else 2.0**-25
            np.testing.assert_allclose(v.values, trace[name].values, rtol=rounding, atol=0)
        else:
            np.testing.assert_array_equal(v.values, trace[name].values)


def test_a_packed_trace_of_noised_images_is_whole(lab, tmp_path):
    """A loss is a difference of scalar products: bits that are left out would show in it."""
    pairs = memlib.load_pairs("lab").iloc[:2]
    trace = memlib.forward_trace(lab, pairs, timesteps=[100, 600, 999], draws=2, progress=False)
    packed.pack(trace, tmp_path / "forward.zip")
    np.testing.assert_array_equal(packed.unpack(tmp_path / "forward.zip")["gram"], trace.gram)


def test_it_is_read_and_nothing_is_sampled(lab, shipped):
    pairs, trace, _ = shipped
    read = memlib.cached(reverse_trace, lab, pairs)
    assert max(CALLS) == 0  # asked for no prompts, it tells its shapes
    np.testing.assert_array_equal(read.image, trace.image)
    np.testing.assert_allclose(memlib.weights(read).w_0, memlib.weights(trace).w_0, atol=1e-9)
    assert read.drop_vars(["gram", "seed_distance"]).identical(
        trace.drop_vars(["gram", "seed_distance"])
    )
    assert not any(f.is_dir() for f in cache_folder().iterdir())


def test_other_settings_and_other_weights_are_recorded(lab, shipped, monkeypatch):
    pairs, *_ = shipped
    memlib.cached(reverse_trace, lab, pairs, steps=2)
    assert max(CALLS) > 0
    CALLS.clear()
    monkeypatch.setattr(lab, "fingerprint", "other weights")
    memlib.cached(reverse_trace, lab, pairs)
    assert max(CALLS) > 0


def test_everything_can_be_recorded_anew(lab, shipped, monkeypatch):
    pairs, trace, _ = shipped
    monkeypatch.setenv("MEMLIB_FRESH", "1")
    again = memlib.cached(reverse_trace, lab, pairs)
    assert max(CALLS) > 0
    np.testing.assert_allclose(again.gram, trace.gram, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_flipped_byte_is_noticed_and_it_is_recorded_anew(lab, shipped, at):
    pairs, trace, file = shipped
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 0xFF
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=r"cannot be used .*recorded anew; git checkout"):
        again = memlib.cached(reverse_trace, lab, pairs)
    assert max(CALLS) > 0
    np.testing.assert_array_equal(again.image, trace.image)
    with pytest.raises(ValueError, match="is missing or damaged, by the checksum"):
        traces.compare(share=1.0)


def test_sampling_again_finds_what_changed(shipped):
    _, trace, file = shipped
    about = packed.read_about(file)
    found = traces.compare(share=0.5, seed=1)
    assert (found["sampled"], found["of"], found["seed"]) == (2, 3, 1)
    assert 0 < found["largest"]["gram"] < 1e-4
    assert found["largest"]["severity"] < 1e-3
    wrong = trace.copy(deep=True)
    wrong["severity"][1, 2] += 0.03
    kept = {name: about[name] for name in ("identity", "seeds", "by", "prompts")}
    packed.pack(wrong, file, **kept)
    sums(file)
    with pytest.raises(ValueError, match=r"not what this code makes: severity differs by 0\.03"):
        traces.compare(share=1.0)
    kept["identity"]["model"]["fingerprint"] = "another training"
    packed.pack(trace, file, **kept)
    sums(file)
    assert traces.compare() is None


def test_the_shipped_ones_are_whole_and_of_the_shipped_labs():
    known = {name: model.fingerprint for name, model in traces.models().items()}
    files = sorted(TRACES.glob("*.zip"))
    assert files
    lines = (TRACES / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{sha256(file)}  {file.name}" for file in files]
    assert sum(file.stat().st_size for file in files) <= traces.BUDGET
    for file in files:
        about = packed.read_about(file)
        assert about["by"].keys() == {"commit", "date", "machine"}
        if not file.name.startswith("kept-"):  # an experiment of a chapter, known by its source
            model = about["identity"]["model"]
            assert model["fingerprint"] == known[model["source"]]
            assert json.loads(about["attrs"]["versions"])["torch"]


def test_the_traces_of_a_book_are_packed_within_the_budget(lab, tmp_path, monkeypatch, capsys):
    """The dearest for its size goes first; experiments of chapters always go; then it is full."""
    made, there = tmp_path / "made", tmp_path / "data/traces"
    there.parent.mkdir()
    monkeypatch.setenv("MEMLIB_CACHE", str(made))
    monkeypatch.setattr(traces, "TRACES", there)
    pairs = memlib.load_pairs("lab").iloc[:2]
    settings = {"plain": {"images": False}, "pictured": {"steps": 2}}
    for more in settings.values():
        asked = {"seeds": [0], "steps": 6, "similarity": "ncc"} | more
        memlib.cached(memlib.reverse_trace, lab, pairs, **asked)
    experiment = xr.Dataset({"v": (("prompt", "seed"), np.ones((2, 1)))})
    packed.pack(experiment, made / "kept-measured-abc-place.zip", source="lab")
    traces.make(made)
    files = sorted(there.glob("*.zip"))
    assert len(files) == 3
    sums = dict(line.split()[::-1] for line in (there / "SHA256SUMS").read_text().splitlines())
    assert sums == {file.name: sha256(file) for file in files}
    abouts = {file: packed.read_about(file) for file in files}
    assert all(about["by"]["machine"] and about["by"]["commit"] for about in abouts.values())
    pictured = max(files, key=lambda f: f.stat().st_size)
    other = xr.Dataset({"v": (("prompt", "seed"), np.zeros((2, 1)))})
    packed.pack(other, made / "kept-seen-abc-place.zip", source="lab")
    before = {file.name: file.read_bytes() for file in files}
    traces.make(made, add=True)  # what is there stays, bit for bit
    added = {file.name: file.read_bytes() for file in there.glob("*.zip")}
    assert {name: added.pop(name) for name in before} == before
    assert list(added) == ["kept-seen-abc.zip"]
    (made / "kept-seen-abc-place.zip").unlink()
    monkeypatch.setattr(traces, "BUDGET", sum(f.stat().st_size for f in files) - 1)
    traces.make(made)
    assert {f.name for f in there.glob("*.zip")} == {f.name for f in files} - {pictured.name}
    assert "2 of 3 files" in capsys.readouterr().out


def test_shipped_results_are_proved_from_nothing(lab, tmp_path, monkeypatch):
    """Each against a fresh one; the note is of this code, these packages and these files."""
    made, there = tmp_path / "made", tmp_path / "data/traces"
    there.mkdir(parents=True)
    monkeypatch.setenv("MEMLIB_CACHE", str(made))
    monkeypatch.setattr(traces, "TRACES", there)
    pairs = memlib.load_pairs("lab").iloc[:2]
    trace = memlib.cached(memlib.reverse_trace, lab, pairs, seeds=[0], steps=2, similarity="ncc")
    kept = xr.Dataset({"v": (("prompt", "seed"), np.arange(8.0).reshape(2, 4))})
    packed.pack(kept, made / "kept-measured-abc-place.zip", source="lab")
    traces.make(made)
    assert not traces.proved()
    traces.prove(made)
    assert traces.proved()
    monkeypatch.setattr(traces, "version", lambda package: "another")
    assert not traces.proved()
    monkeypatch.undo()
    monkeypatch.setattr(traces, "TRACES", there)
    assert traces.proved()

    wrong = kept.copy(deep=True)
    wrong["v"][1] += 1.0
    packed.pack(wrong, made / "kept-measured-abc-place.zip", source="lab")
    with pytest.raises(ValueError, match=r"kept-measured-abc.zip: v differs by 0\.14"):
        traces.prove(made)
    packed.pack(kept, made / "kept-measured-abc-place.zip", source="lab")
    (file,) = there.glob("reverse_trace-*.zip")
    about = packed.read_about(file)
    about = {name: about[name] for name in ("identity", "seeds", "by", "prompts")}
    packed.pack(trace.assign(severity=trace.severity + 0.1), file, **about)
    with pytest.raises(ValueError, match=r"reverse_trace-\w+.zip: severity differs by 0\.1"):
        traces.prove(made)
    (made / "kept-measured-abc-place.zip").unlink()
    with pytest.raises(ValueError, match="has no kept-measured-abc: run make book FRESH=1 first"):
        traces.prove(made)
