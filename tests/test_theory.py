"""Closed forms: the exact denoiser, the oracle's weights, the loss identity."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlib
from memlib import schedule
from memlib.models import stable_diffusion_schedule

SHAPE = (2, 3, 3)


@pytest.fixture(scope="module")
def atoms():
    return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class WithTarget(memlib.ExactModel):
    """An exact model whose "image files" are indices of its atoms."""

    def encode_images(self, files):
        return torch.stack([self.atoms[int(f)] for f in files])


def pairs_of(captions, targets):
    return pd.DataFrame({"prompt_id": captions, "caption": captions, "image": targets})


def trace_of(model, pairs, sampler="ddim", steps=50, seeds=(0, 1, 2), **kw):
    return memlib.reverse_trace(
        model, pairs, seeds=seeds, sampler=sampler, steps=steps, similarity=None, images=False,
        progress=False, **kw,
    )  # fmt: skip


def test_the_exact_prediction_is_the_posterior_mean(atoms):
    """Against Bayes' rule written out with scipy's normal densities, atom by atom."""
    from scipy.stats import multivariate_normal

    counts = [1, 4, 1, 2, 8]
    model = memlib.ExactModel(atoms, list("abcab"), counts)
    table = schedule.make_scheduler(stable_diffusion_schedule(), "ddim", 50).alphas_cumprod.double()
    x_t = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cond, uncond = model.encode_text(["a", "b", "c", "unknown"])
    for t in (0, 300, 981):
        a = float(table[t])
        for text, groups in ((cond, ["a", "b", "c", "abc"]), (uncond, ["abc"] * 4)):
            out = model.predict(x_t, t, text)
            for i, group in enumerate(groups):
                inside = [k for k, c in enumerate("abcab") if c in group]
                log_p = np.array([
                    multivariate_normal.logpdf(
                        x_t[i].flatten(), np.sqrt(a) * atoms[k].flatten(), 1 - a)
                    + np.log(counts[k]) for k in inside
                ])  # fmt: skip
                p = np.exp(log_p - log_p.max())
                mean = sum(w * atoms[k].numpy() for w, k in zip(p / p.sum(), inside, strict=True))
                eps = (x_t[i].numpy() - np.sqrt(a) * mean) / np.sqrt(1 - a)
                np.testing.assert_allclose(out[i], eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [50, 13])
def test_a_single_atom_follows_the_oracle(atoms, sampler, steps):
    model = WithTarget(atoms[:1], ["a"])
    trace = trace_of(model, pairs_of(["a"], ["0"]), sampler, steps, guidance_scale=7.5)
    found = memlib.weights(trace)
    expected = memlib.reference_weights(trace, "oracle")
    for name in expected:
        np.testing.assert_allclose(
            found[name], expected[name].broadcast_like(found[name]), rtol=0, atol=1e-10
        )
    # The residual is the root of a difference of squares: 1e-16 rounds to 1e-8.
    assert float(found.residual.max()) < 1e-7


@pytest.mark.parametrize(
    ("sampler", "D1", "D2"), [("ddim", -2.743, -0.104), ("ddpm", -0.711, 26.61)]
)
def test_the_oracle_against_the_schedule(atoms, sampler, D1, D2):
    """The numbers of the design: the deviations of a perfect model are not zero."""
    trace = trace_of(WithTarget(atoms[:1], ["a"]), pairs_of(["a"], ["0"]), sampler)
    table = memlib.deviations(trace, "schedule")
    assert table.D1[0] == pytest.approx(D1, abs=6e-4)
    assert table.D2[0] == pytest.approx(D2, abs=6e-3 if sampler == "ddpm" else 6e-4)
    oracle = memlib.deviations(trace, "oracle")
    assert abs(oracle.D1[0]) < 1e-8
    assert abs(oracle.D2[0]) < 1e-8


def test_states_have_their_own_noise_level():
    """The lagged sums, which public code reports, are other numbers."""
    scheduler = schedule.make_scheduler(stable_diffusion_schedule(), "ddim", 50, torch.float64)
    timesteps, alpha_bar = schedule.state_levels(scheduler)
    assert list(timesteps[:2]) == [981, 961]
    assert timesteps[-1] == -1
    assert alpha_bar[-1] == pytest.approx(0.99915)
    weights, reference = (
        schedule.oracle_weights(alpha_bar, "ddim"),
        schedule.schedule_weights(alpha_bar),
    )
    lag = {k: (weights[k][1:] - reference[k][:-1]).sum() for k in ("w_0", "w_T")}
    assert lag["w_0"] == pytest.approx(-1.820, abs=6e-4)
    assert -lag["w_T"] == pytest.approx(0.864, abs=6e-4)


def test_the_accumulated_noise_is_what_the_sampler_added(atoms):
    """DDPM: x_{i+1} = c_0 x0_hat + c_t x_t + sigma z, so with one atom the rest is the noise."""
    model = WithTarget(atoms[:1], ["a"])
    scheduler = schedule.make_scheduler(model.scheduler_config, "ddpm", 50, torch.float64)
    kept = memlib.runs.tracing.sample(model, ["a"], [3], scheduler, np.full(50, 1.0))
    _, alpha_bar = schedule.state_levels(scheduler)
    w = schedule.oracle_weights(alpha_bar, "ddpm")
    for i in (0, 1, 25, 50):
        rest = kept["x_t"][i] - w["w_0"][i] * atoms[:1] - w["w_T"][i] * kept["x_t"][0]
        torch.testing.assert_close(kept["noise"][i], rest, rtol=0, atol=1e-9)


def test_the_loss_identity():
    """Both sides of Eq. 5 of the loss chapter on the lab's own forward traces, to 1e-10."""
    lab = memlib.load("lab")
    pairs = memlib.load_pairs("lab").iloc[[0, 60]]
    trace = memlib.forward_trace(lab, pairs, [1, 250, 600, 999], draws=3, progress=False)
    snr = trace.alpha_bar / (1 - trace.alpha_bar)
    for branch, g in (("cond", 1.0), ("uncond", 0.0)):
        left = memlib.noise_loss(trace, branch)
        right = memlib.image_error(trace, g) * snr
        np.testing.assert_allclose(left, right, rtol=1e-10)
        # and the loss itself against a training step written out with diffusers' add_noise
    from diffusers import DDPMScheduler

    noise = torch.randn(
        lab.latent_shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    x_0 = lab.encode_images(pairs.image[:1])
    t = torch.tensor([600])
    noisy = DDPMScheduler.from_config(lab.scheduler_config).add_noise(x_0, noise[None].float(), t)
    out = lab.predict(noisy, t, lab.encode_text(list(pairs.caption[:1]))[0])
    direct = torch.nn.functional.mse_loss(out, noise[None].float())
    ours = memlib.noise_loss(trace).isel(prompt=0, draw=2, step=2)
    assert float(direct) == pytest.approx(float(ours), rel=1e-4)  # float32 on one side


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


def test_guidance_overestimates_by_the_formula(atoms):
    """With a single-atom condition the guided estimate is mu + g (x - mu), at every state."""
    model = WithTarget(atoms, list("abcde"))
    trace = trace_of(model, pairs_of(["a"], ["0"]), steps=20)
    mu = memlib.inner(trace, memlib.x0_hat(trace, 0.0), "x_0") / memlib.inner(trace, "x_0", "x_0")
    for g in (1.0, 3.0, 7.5):
        k = memlib.overestimation(trace, g)
        np.testing.assert_allclose(
            k.isel(step=slice(20)), (mu + g * (1 - mu)).isel(step=slice(20)), rtol=1e-8
        )


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


def test_the_exact_model_of_the_lab_copies_every_caption_it_knows():
    """One atom has the caption, so sampling returns it; a caption nobody has is unconditional."""
    exact = memlib.load("exact")
    pairs = memlib.load_pairs("lab").iloc[[0, 44]]
    trace = memlib.reverse_trace(exact, pairs, seeds=[0, 1], steps=10, progress=False)
    for n, file in enumerate(pairs.image):  # as alike as what the VAE leaves of the picture
        target = memlib.prompts.read_image(file, 64)
        best = memlib.similarity(exact.decode(exact.encode_images([file])), target)
        assert float(trace.severity[n].min()) > best - 0.1
    assert (
        float(memlib.mean_seed_distance(trace)[:, -1].max() / memlib.norm(trace, "x_0")[0, 0, 0])
        < 0.1
    )
    cond, uncond = exact.encode_text(["a caption of no atom"])
    assert torch.equal(cond, uncond)


def test_the_law_of_the_guided_error(atoms):
    """L_g = L_c + (g-1)^2 (L_uncond - L_c) for the best conditional branch, averaged over noise.

    Two pictures share the caption, so that L_c is not zero; a million draws would be exact.
    """
    model = WithTarget(0.1 * atoms, list("aabbb"))
    pairs = pd.DataFrame({"prompt_id": ["0", "1"], "caption": "a", "image": ["0", "1"]})
    trace = memlib.forward_trace(model, pairs, [250], draws=4000, progress=False)
    cond, uncond = (memlib.noise_loss(trace, b).mean() for b in ("cond", "uncond"))
    snr = trace.alpha_bar / (1 - trace.alpha_bar)
    assert float(cond) > 0.01 * float(uncond)
    for g in (0.0, 2.0, 5.0, 7.5):
        guided = float((memlib.image_error(trace, g) * snr).mean())
        law = float(cond + (g - 1) ** 2 * (uncond - cond))
        assert guided == pytest.approx(law, rel=0.05)  # 8,000 noises
