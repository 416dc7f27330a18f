"""The phase diagram's rows: made once, gone on with, and of the lab that is loaded."""

import numpy as np
import pytest

import memlib
from memlib.bench import phase


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two pairs, two scales, two updates, in a folder of its own; a list of what was sampled."""
    pairs = memlib.load_pairs("lab").query("kind == 'planted'").iloc[[0, -1]]
    sampled = []

    def sample(model, *arguments, **options):
        sampled.append((model.source, options["guidance_scale"]))
        return memlib.reverse_trace(model, *arguments, progress=False, **options)

    for name, value in (
        ("ROOT", tmp_path), ("FILE", tmp_path / "phase.csv"), ("SCALES", (1.0, 7.5)),
        ("STEPS", 2), ("SEEDS", 1), ("load_pairs", lambda _: pairs), ("reverse_trace", sample),
    ):  # fmt: skip
        monkeypatch.setattr(phase, name, value)
    return sampled


def test_what_is_missing_is_sampled_and_no_more(small):
    phase.main()
    assert len(set(small)) == len(small) == 8  # four training steps, two scales
    first = phase.FILE.read_bytes()
    phase.main()
    assert len(small) == 8
    assert phase.FILE.read_bytes() == first
    partial = phase.ROOT / "_build/phase.csv"
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:-2]))  # as if stopped before the last scale
    phase.main()
    assert len(small) == 9
    assert phase.FILE.read_bytes() == first


def test_rows_are_those_of_the_public_functions(small):
    phase.main()
    lab = memlib.load("lab")
    rows = phase.read(lab)
    last = rows[(rows.training_step == rows.training_step.max()) & (rows.guidance_scale == 7.5)]
    pairs = phase.load_pairs("lab")
    trace = memlib.reverse_trace(lab, pairs, range(1), 7.5, steps=2, similarity="ncc")
    assert np.allclose(last.ncc, trace.severity.values[:, 0], atol=1e-4)
    assert list(last.copies) == list(pairs.multiplicity)


def test_rows_of_another_lab_are_refused(small):
    phase.main()
    lab = memlib.load("lab")
    text = phase.FILE.read_text().replace(lab.fingerprint[:12], "0" * 12)
    phase.FILE.write_text(text)
    with pytest.raises(ValueError, match=r"of another lab: run python -m memlib\.bench\.phase"):
        phase.read(lab)
    exact = memlib.load("exact")
    assert phase.read(exact) is None


def test_the_rows_that_ship_are_of_the_lab_that_ships():
    rows = phase.read(memlib.load("lab"))
    assert len(rows) == 4 * len(phase.SCALES) * 66 * phase.SEEDS
    assert rows[["ncc", "sscd"]].notna().all(axis=None)
