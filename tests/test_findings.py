"""The paper's quantities against closed forms: the oracle's weights, the loss identity."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_models import one_line

import memlib


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


def test_unknown_names_in_the_algebra(lab):
    pairs = memlib.load_pairs("lab").iloc[:1]
    trace = memlib.reverse_trace(lab, pairs, seeds=[0], steps=2, similarity=None, progress=False)
    for call, pattern in (
        (lambda: memlib.cosine(trace, "eps_con", "x_0"), "did you mean 'eps_cond'"),
        (lambda: memlib.reference_weights(trace, "schedul"), "did you mean 'schedule'"),
        (lambda: memlib.weights(trace, "x_gan"), "did you mean 'x_gen'"),
        (lambda: memlib.noise_loss(trace), "forward trace"),
        (lambda: memlib.deviations(trace, first=0), "must lie in 1"),
        (lambda: memlib.x0_hat(trace.drop_vars("guidance_scale")), "give one"),
        (lambda: memlib.mean_seed_distance(trace), "at least 2 seeds"),
        (lambda: memlib.reference_weights(trace.isel(step=[1, 2]), "oracle"), "first state"),
        (lambda: memlib.deviations(trace.isel(step=[1, 2])), "first state"),
        (
            lambda: memlib.norm(trace.isel(step=[0, 2]), memlib.x0_hat(trace.isel(step=[0, 1]))),
            "cut the trace first",
        ),
    ):
        with pytest.raises((KeyError, ValueError)) as error:
            call()
        one_line(error, pattern)
