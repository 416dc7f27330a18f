"""The instrumented sampler against diffusers' own pipeline."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from test_findings import WithTarget

import memlib
from memlib import schedule
from memlib.sampler import sample

SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
CAPTIONS = ["a red apple on a blue background", "a dog on a pink background", ""]


def pipeline_latents(lab, captions, seeds, sampler, guidance_scale, steps, pipe=None):
    """The independent path: diffusers' pipeline from the folder, with its own scheduler."""
    pipe = pipe or StableDiffusionPipeline.from_pretrained(memlib.paths.LAB)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(
        captions, num_inference_steps=steps, guidance_scale=guidance_scale,
        generator=generators, output_type="latent",
    ).images  # fmt: skip


def our_latents(lab, captions, seeds, sampler, guidance_scale, steps):
    scheduler = schedule.make_scheduler(lab.scheduler_config, sampler, steps)
    guidance = schedule.guidance_values(guidance_scale, steps)
    return sample(lab, captions, seeds, scheduler, guidance)["x_t"][-1]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("guidance_scale", [7.5, 3.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_latents_equal_the_pipeline_bit_for_bit(lab, sampler, guidance_scale, steps):
    args = (CAPTIONS, [0, 5, 5], sampler, guidance_scale, steps)
    assert torch.equal(our_latents(lab, *args), pipeline_latents(lab, *args))


def test_fifty_steps_equal_the_pipeline(lab):
    for sampler in SCHEDULERS:
        args = (CAPTIONS[:2], [1, 2], sampler, 7.5, 50)
        assert torch.equal(our_latents(lab, *args), pipeline_latents(lab, *args))


def test_images_equal_the_pipeline(lab):
    pipe = StableDiffusionPipeline.from_pretrained(memlib.paths.LAB)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(
        CAPTIONS[:2], num_inference_steps=5, output_type="pil",
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
    ).images  # fmt: skip
    ours = lab.decode(our_latents(lab, CAPTIONS[:2], [3, 4], "ddim", 7.5, 5))
    np.testing.assert_array_equal(ours, np.stack([np.asarray(i) for i in theirs]))


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


@pytest.mark.parametrize("branch", ["uncond", "cond"])
def test_predictions_that_are_not_finite_are_refused(branch, monkeypatch):
    lab = memlib.load("lab")
    pairs = memlib.load_pairs("lab").iloc[:1]
    predict = lab.predict

    def broken(x, t, text):
        out = predict(x, t, text)
        out.chunk(2)[branch == "cond"].fill_(torch.nan)
        return out

    monkeypatch.setattr(lab, "predict", broken)
    with pytest.raises(FloatingPointError, match=r"not finite in float32: are its weights whole"):
        memlib.reverse_trace(lab, pairs, seeds=[0], steps=2, similarity=None, progress=False)
    with pytest.raises(FloatingPointError, match="not finite"):
        memlib.forward_trace(lab, pairs, [500], draws=1, progress=False)
