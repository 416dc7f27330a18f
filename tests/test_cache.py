"""The cache of traces: what is recorded once, and what is another trace."""

import pytest

import memlib
from memlib.paths import cache_folder


def test_the_cache_computes_once_and_sees_every_change(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path))
    calls = []

    def reverse_trace(model, pairs, seeds=(0,), steps=2, guidance_scale=7.5):
        calls.extend([steps] * (len(pairs) > 0))  # asked for no prompts, it tells its shapes
        return memlib.reverse_trace(
            model, pairs, seeds=seeds, steps=steps, similarity=None, progress=False
        )

    pairs = memlib.load_pairs("lab").iloc[:1]
    first = memlib.cached(reverse_trace, lab, pairs)
    again = memlib.cached(reverse_trace, lab, pairs)
    assert calls == [2]
    assert first.identical(again)
    memlib.cached(reverse_trace, lab, pairs, steps=3)
    memlib.cached(reverse_trace, lab, pairs.assign(caption="other"))
    memlib.cached(reverse_trace, lab, pairs, guidance_scale=lambda step: step)
    assert calls == [2, 3, 2, 2]
    # which prompt an image belongs to, and what is in it
    two = memlib.load_pairs("lab").iloc[:2]
    first_only, second_only = (
        two.assign(image=[f if i == n else "" for i, f in enumerate(two.image)]) for n in (0, 1)
    )
    other = two.assign(image=list(two.image[::-1]))
    for changed in (first_only, second_only, other):
        memlib.cached(reverse_trace, lab, changed)
    monkeypatch.setattr(lab, "fingerprint", "other weights")
    memlib.cached(reverse_trace, lab, pairs)
    monkeypatch.undo()
    monkeypatch.setenv("MEMLIB_CACHE", str(tmp_path))
    assert len(calls) == 11  # without a batch size, each of two prompts is a task

    def broken(model, pairs):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        memlib.cached(broken, lab, pairs)
    assert not [p for p in tmp_path.glob("broken*") if p.is_dir()]
    # a piece that lost its checksums is not read: it is recorded again
    entries = [p for p in tmp_path.glob("reverse_trace*") if p.is_dir()]
    assert len(entries) == 8
    for entry in entries:
        (entry / "sha256" / "0.0.0.0").unlink()
    assert memlib.cached(reverse_trace, lab, pairs).identical(first)
    assert len(calls) == 12
    assert cache_folder() == tmp_path
