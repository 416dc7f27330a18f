"""Noise levels of states, guidance that changes with the step, samplers that are refused."""

import numpy as np
import pytest
import torch

import memlib
from memlib import schedule
from memlib.gram import add, eps_cfg
from memlib.models import stable_diffusion_schedule


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


def test_guidance_may_change_with_the_step(lab):
    pairs = memlib.load_pairs("lab").iloc[[3]]
    kw = dict(seeds=[0], steps=4, similarity=None, images=False, progress=False)
    constant = memlib.reverse_trace(lab, pairs, guidance_scale=7.5, **kw)
    sequence = memlib.reverse_trace(lab, pairs, guidance_scale=[7.5] * 4, **kw)
    function = memlib.reverse_trace(lab, pairs, guidance_scale=lambda i: 0 if i < 2 else 7.5, **kw)
    np.testing.assert_array_equal(constant.gram, sequence.gram)
    assert list(function.guidance_scale[:4]) == [0, 0, 7.5, 7.5]
    # Guidance 0 follows the unconditional branch: one DDIM step by hand.
    a, b = constant.alpha_bar.values[:2]
    x0 = memlib.x0_hat(function, 0.0)
    step = add({k: np.sqrt(b) * v for k, v in x0.items()}, eps_cfg(0.0), np.sqrt(1 - b))
    at_zero = memlib.norm(function, step).isel(step=0)
    np.testing.assert_allclose(memlib.norm(function, "x_t").isel(step=1), at_zero, rtol=1e-6)
    assert a < b


def test_samplers_that_would_be_misread_are_refused():
    config = dict(memlib.models.stable_diffusion_schedule())
    config.pop("_use_default_values", None)  # else diffusers puts defaults in their place
    with pytest.raises(ValueError, match="with timestep_spacing='leading'"):
        schedule.make_scheduler({**config, "timestep_spacing": "linspace"}, "ddim", 50)
    with pytest.raises(ValueError, match="only 'fixed_small'"):
        schedule.make_scheduler({**config, "variance_type": "learned"}, "ddpm", 50)
    del config["clip_sample"]
    assert not schedule.make_scheduler(config, "ddpm", 50).config.clip_sample
