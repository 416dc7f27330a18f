"""Traces: their schema, how they are contracted, and what a batch or an argument may do to them."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_findings import WithTarget, pairs_of
from test_models import one_line

import memlib
from memlib import schedule
from memlib.gram import VECTORS
from memlib.sampler import sample


def test_the_schema(lab):
    pairs = memlib.load_pairs("lab").iloc[[0, 1]].assign(image=lambda p: [p.image.iloc[0], ""])
    trace = memlib.reverse_trace(
        lab, pairs, seeds=[0, 1], steps=3, similarity="ncc", progress=False
    )
    assert trace.gram.dims == ("prompt", "seed", "step", "vec", "vec_")
    assert trace.gram.dtype == np.float64
    assert list(trace.vec.values) == list(VECTORS)
    assert trace.sizes["step"] == 4 == len(trace.alpha_bar)
    assert trace.image.shape == (2, 2, 64, 64, 3)
    per_state = trace.gram[0, 0, 0].nbytes
    assert per_state <= 400
    known = trace.isel(prompt=0)
    assert np.isfinite(known.gram.isel(step=slice(3))).all()
    assert np.isnan(known.gram.isel(step=3).sel(vec="eps_cond")).all()
    unknown = trace.isel(prompt=1)  # a prompt without an image still runs, on its own result
    assert np.isnan(unknown.gram.sel(vec="x_0")).all()
    assert np.isnan(unknown.severity).all()
    assert np.isfinite(memlib.weights(trace, "x_gen").w_0).all()
    assert np.isnan(memlib.weights(trace).w_0.isel(prompt=1)).all()
    for name in ("model", "fingerprint", "sampler", "scheduler", "dtype", "versions", "schema"):
        assert trace.attrs[name]


def test_seed_distances_are_the_states_own(lab):
    pairs = memlib.load_pairs("lab").iloc[[3]]
    trace = memlib.reverse_trace(
        lab, pairs, seeds=[0, 9, 4], steps=5, similarity=None, progress=False
    )
    scheduler = schedule.make_scheduler(lab.scheduler_config, "ddim", 5)
    kept = sample(lab, list(pairs.caption) * 3, [0, 9, 4], scheduler, np.full(5, 7.5))["x_t"]
    direct = torch.linalg.vector_norm(
        kept[:, :, None].double() - kept[:, None].double(), dim=(3, 4, 5)
    )
    np.testing.assert_allclose(trace.seed_distance[0], direct, rtol=1e-12)
    off = direct[:, [0, 0, 1], [1, 2, 2]].mean(1)
    np.testing.assert_allclose(memlib.mean_seed_distance(trace)[0], off, rtol=1e-12)
    part = memlib.mean_seed_distance(trace.isel(seed=[0, 1]))
    np.testing.assert_allclose(part[0], direct[:, 0, 1], rtol=1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_batch_size_changes_no_noise_and_rounds_latents_only(lab, sampler):
    pairs = memlib.load_pairs("lab").iloc[[0, 50]]
    kw = dict(seeds=[0, 1, 2], sampler=sampler, steps=6, similarity=None, progress=False)
    one = memlib.reverse_trace(lab, pairs, batch_size=6, **kw)
    for batch_size in (1, 4):
        other = memlib.reverse_trace(lab, pairs, batch_size=batch_size, **kw)
        for vec in ("x_T", "noise"):  # drawn, not computed: the same bits
            np.testing.assert_array_equal(
                one.gram.sel(vec=vec, vec_=vec), other.gram.sel(vec=vec, vec_=vec)
            )
        # Convolutions sum in another order in another batch: float32 rounding, amplified by
        # guidance over the steps.
        np.testing.assert_allclose(one.gram, other.gram, rtol=2e-3, atol=2e-1)
        np.testing.assert_allclose(one.seed_distance, other.seed_distance, rtol=2e-3, atol=2e-2)
        # and the pictures belong to their own prompt and seed
        np.testing.assert_allclose(one.image.astype(int), other.image.astype(int), atol=3)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_out_of_memory_halves_the_batch_and_loses_nothing(direction, monkeypatch):
    lab = memlib.load("lab")
    pairs = memlib.load_pairs("lab").iloc[[0, 50]]

    def record(batch_size):
        if direction == "forward":
            return memlib.forward_trace(
                lab, pairs, [100, 900], draws=3, batch_size=batch_size, progress=False
            )
        return memlib.reverse_trace(
            lab, pairs, seeds=[0, 1, 2], steps=3, similarity=None, batch_size=batch_size,
            progress=False,
        )  # fmt: skip

    expected = record(batch_size=1)
    predict, sizes = lab.predict, []

    def small(x, t, text):
        sizes.append(len(x))
        if len(x) > 2:  # one image, two branches
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(x, t, text)

    monkeypatch.setattr(lab, "predict", small)
    found = record(batch_size=6)
    assert max(sizes) > 2
    np.testing.assert_array_equal(found.gram, expected.gram)
    monkeypatch.setattr(lab, "predict", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(MemoryError, match="single image"):
        record(batch_size=2)


def test_forward_traces_recover_the_closed_form_weights(atoms):
    model = WithTarget(atoms, list("abcde"))
    trace = memlib.forward_trace(
        model, pairs_of(["a", "b"], ["0", "1"]), [10, 500, 990], draws=4, progress=False
    )
    found = memlib.weights(trace)
    a = trace.alpha_bar
    np.testing.assert_allclose(
        found.w_0, np.sqrt(a).broadcast_like(found.w_0).transpose(*found.w_0.dims), rtol=1e-10
    )
    np.testing.assert_allclose(
        found.w_T, np.sqrt(1 - a).broadcast_like(found.w_T).transpose(*found.w_T.dims), rtol=1e-10
    )


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda lab, p: memlib.reverse_trace(lab, p, sampler="dim"), "did you mean 'ddim'"),
        (lambda lab, p: memlib.reverse_trace(lab, p, similarity="ssdc"), "did you mean 'sscd'"),
        (lambda lab, p: memlib.reverse_trace(lab, p, steps=1001), "1000 timesteps"),
        (lambda lab, p: memlib.reverse_trace(lab, p, steps=0), "steps=0"),
        (lambda lab, p: memlib.reverse_trace(lab, p, steps=-5), "steps=-5"),
        (lambda lab, p: memlib.forward_trace(lab, p, [1], draws=0), "draws=0"),
        (lambda lab, p: memlib.reverse_trace(lab, p, steps=1000), "at most 999"),
        (lambda lab, p: memlib.reverse_trace(lab, p, batch_size=0), "at least 1"),
        (lambda lab, p: memlib.reverse_trace(lab, p, seeds=[1, 1]), "distinct"),
        (lambda lab, p: memlib.reverse_trace(lab, p, seeds=[]), "at least one"),
        (
            lambda lab, p: memlib.reverse_trace(lab, p, guidance_scale=[1.0, 2.0]),
            "2 guidance scales",
        ),
        (lambda lab, p: memlib.reverse_trace(lab, p, guidance_scale=float("nan")), "finite"),
        (lambda lab, p: memlib.forward_trace(lab, p, [1000]), r"0 \.\.\. 999"),
        (lambda lab, p: memlib.forward_trace(lab, p.assign(image=""), [1]), "has none"),
    ],
)
def test_wrong_arguments(lab, call, pattern):
    with pytest.raises(ValueError, match=pattern) as error:
        call(lab, memlib.load_pairs("lab").iloc[:1])
    one_line(error, pattern)


def test_captions_longer_than_the_model_reads(lab, tmp_path, capfd):
    """One warning, and the trace says how much was not read; nothing of it on the terminal."""
    long = "a red apple on a blue background near the old harbour " * 3
    pairs = pd.DataFrame(
        {"prompt_id": list("abc"), "caption": [f"{long} one", f"{long} two", "a red apple"]}
    )
    options = dict(seeds=[0, 1], steps=2, similarity=None, images=False, progress=False)
    pattern = (
        r"2 of 3 captions are longer than lab reads .*\(a, b\); 2 of them are alike .*\(a, b\)"
    )
    with pytest.warns(UserWarning, match=pattern):
        trace = memlib.reverse_trace(lab, pairs, **options)
    limit = lab.pipe.tokenizer.model_max_length
    whole = [len(lab.pipe.tokenizer(caption).input_ids) for caption in pairs.caption]
    assert trace.tokens_cut.values.tolist() == [[max(0, n - limit)] * 2 for n in whole]
    assert trace.tokens_cut.values[:, 0].tolist()[2] == 0 < trace.tokens_cut.values[0, 0]
    np.testing.assert_array_equal(trace.gram[0], trace.gram[1])  # what is read is the same
    with pytest.warns(UserWarning, match=pattern) as told:
        memlib.record(
            model=lab, pairs=pairs, address=tmp_path / "run",
            **{k: v for k, v in options.items() if k != "progress"}, progress=False,
        )  # fmt: skip
    assert len(told) == 1
    kept = memlib.open_run(tmp_path / "run").tokens_cut
    np.testing.assert_array_equal(kept, trace.tokens_cut)
    assert capfd.readouterr().err == ""
