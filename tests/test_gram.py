"""Inner products: norms, cosines and fits against kept tensors, and against numpy's own."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampler import SCHEDULERS

import memlib
from memlib import schedule
from memlib.sampler import sample


def test_gram_equals_direct_tensors(lab):
    """Norms, cosines, weights, residual and x0_hat at three scales from kept tensors, 1e-9."""
    pairs = memlib.load_pairs("lab").iloc[[0]]
    for sampler in SCHEDULERS:
        trace = memlib.reverse_trace(
            lab, pairs, seeds=[4], sampler=sampler, steps=8, similarity=None, progress=False
        )
        scheduler = schedule.make_scheduler(lab.scheduler_config, sampler, 8)
        kept = sample(lab, list(pairs.caption), [4], scheduler, np.full(8, 7.5))
        kept = {k: v[:, 0].flatten(1).double().numpy() for k, v in kept.items()}
        x_0 = lab.encode_images(pairs.image)[0].flatten().double().numpy()
        x, x_T, x_gen = kept["x_t"], kept["x_t"][0], kept["x_t"][-1]

        def get(result):
            return result.isel(prompt=0, seed=0).values

        np.testing.assert_array_equal(trace.gram, trace.gram.values.swapaxes(-1, -2))
        close = dict(rtol=1e-9, atol=1e-12)
        vectors = {"x_t": x, "x_0": np.tile(x_0, (9, 1)), "x_T": np.tile(x_T, (9, 1)),
                   "x_gen": np.tile(x_gen, (9, 1)), "noise": kept["noise"]}  # fmt: skip
        for name in ("eps_uncond", "eps_cond"):
            vectors[name] = np.vstack([kept[name], np.full_like(x_0, np.nan)])
        vectors["eps_delta"] = vectors["eps_cond"] - vectors["eps_uncond"]
        for a in vectors:
            direct = np.linalg.norm(vectors[a], axis=1)
            np.testing.assert_allclose(get(memlib.norm(trace, a)), direct, **close)
            for b in ("x_0", "x_T", "eps_cond"):
                size = direct * np.linalg.norm(vectors[b], axis=1)
                size[size == 0] = np.nan
                expected = (vectors[a] * vectors[b]).sum(1) / size
                np.testing.assert_allclose(get(memlib.cosine(trace, a, b)), expected, **close)

        found = memlib.weights(trace)
        names = ["w_0", "w_T"] + (["w_noise"] if sampler == "ddpm" else [])
        basis = [x_0, x_T]
        for i in range(9):
            columns = np.stack(basis + ([kept["noise"][i]] if sampler == "ddpm" else []), 1)
            fit, *_ = np.linalg.lstsq(columns, x[i], rcond=None)
            left = np.linalg.norm(x[i] - columns @ fit) / np.linalg.norm(x[i])
            ours = [get(found[n])[i] for n in names]
            np.testing.assert_allclose(ours, fit, rtol=1e-9, atol=1e-10)
            # The square of the residual is a difference: at state 0 it is rounding, 1e-8.
            np.testing.assert_allclose(get(found.residual)[i], left, rtol=1e-9, atol=3e-8)

        alpha_bar = trace.alpha_bar.values[:, None]
        for g in (0.0, 3.0, 7.5):
            eps = vectors["eps_uncond"] + g * vectors["eps_delta"]
            direct = (x - np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha_bar)
            estimate = memlib.x0_hat(trace, g)
            np.testing.assert_allclose(
                get(memlib.norm(trace, estimate)), np.linalg.norm(direct, axis=1), **close
            )
            np.testing.assert_allclose(
                get(memlib.inner(trace, estimate, "x_0")), direct @ x_0, **close
            )
            np.testing.assert_allclose(
                get(memlib.overestimation(trace, g)), direct @ x_0 / (x_0 @ x_0), **close
            )
            np.testing.assert_allclose(
                get(memlib.image_error(trace, g)),
                ((direct - x_0) ** 2).mean(1), rtol=1e-9,
            )  # fmt: skip


def test_the_algebra_keeps_working_on_a_part_of_a_trace(lab):
    pairs = memlib.load_pairs("lab").iloc[:2]
    trace = memlib.reverse_trace(lab, pairs, seeds=[0, 1], steps=3, similarity=None, progress=False)
    whole = memlib.cosine(trace, "eps_cfg", "x_0").isel(prompt=1)
    np.testing.assert_array_equal(memlib.cosine(trace.isel(prompt=1), "eps_cfg", "x_0"), whole)
    difference = memlib.norm(trace, {"eps_cfg": 1, "eps_uncond": -1})
    np.testing.assert_allclose(difference, 7.5 * memlib.norm(trace, "eps_delta"), rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(np.float64, (3, 6), elements=st.floats(-3, 3, width=32)),
    st.integers(0, 2**31),
)
def test_least_squares_agrees_with_numpy_on_any_vectors(basis, seed):
    """Also on dependent or zero vectors, where only the fitted vector is unique."""
    import xarray as xr

    target = np.random.default_rng(seed).normal(size=6)
    names = ["x_t", "x_0", "x_T", "noise"]
    vectors = np.vstack([target, basis])
    trace = xr.Dataset(
        {
            "gram": (
                ("prompt", "seed", "step", "vec", "vec_"),
                (vectors @ vectors.T)[None, None, None],
            )
        },
        {"vec": names, "vec_": names},
    )
    coefficients, residual = memlib.gram.least_squares(trace, "x_t", names[1:])
    fit, *_ = np.linalg.lstsq(basis.T, target, rcond=1e-6)
    ours = target - coefficients.values.reshape(-1) @ basis
    theirs = target - fit @ basis
    # Squaring the condition number costs half the digits near dependence.
    assert np.linalg.norm(ours) <= np.linalg.norm(theirs) + 1e-4
    assert float(residual.item()) == pytest.approx(
        np.linalg.norm(ours) / np.linalg.norm(target), abs=1e-5
    )
