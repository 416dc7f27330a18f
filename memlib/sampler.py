"""The loop that samples: bit for bit diffusers' pipeline, and it keeps what it went through."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from memlib.schedule import ddpm_noise_coefficients, flow_sigmas, state_levels


@torch.no_grad()
def sample(model, captions: Sequence[str], seeds: Sequence[int], scheduler, guidance: np.ndarray):
    """Sample one batch and keep its whole trajectory on the device.

    Returns
    -------
    dict of tensors: `x_t` and `noise` [state, image, channel, height, width] with S + 1 states,
    `eps_uncond` and `eps_cond` with S, of a flow model its velocities `v_uncond` and `v_cond`.
    `noise` is the fresh noise accumulated so far (DDPM).
    """
    scheduler = copy.copy(scheduler)  # a flow's counts its steps
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    shape = (len(captions), *model.latent_shape)
    x = randn_tensor(shape, generators, model.device, model.dtype)
    cond, uncond = model.encode_text(captions)
    both = torch.cat([uncond, cond])
    # Without guidance the pipeline runs the conditional branch alone. Two separate calls keep its
    # bits: a kernel may round differently in a batch of twice the size.
    unguided = bool((guidance == 1).all())
    _, alpha_bar = state_levels(scheduler)
    stochastic = type(scheduler).__name__ == "DDPMScheduler"
    keep, fresh = ddpm_noise_coefficients(alpha_bar) if stochastic else (None, None)
    # The trajectory is written into its place: a list that is stacked needs twice the memory.
    steps = len(alpha_bar) - 1
    flow = flow_sigmas(scheduler) is not None
    names = ("v_uncond", "v_cond") if flow else ("eps_uncond", "eps_cond")
    kept = {name: x.new_empty((steps, *x.shape)) for name in names}
    kept["x_t"] = x.new_empty((steps + 1, *x.shape))
    kept["noise"] = torch.zeros_like(kept["x_t"] if stochastic else x).expand_as(kept["x_t"])
    kept["x_t"][0] = x
    times = scheduler.timesteps.to(model.device)  # at once: each one alone would wait for the GPU
    for i, t in enumerate(scheduler.timesteps):
        if unguided:
            out_uncond = model.predict(x, times[i], uncond)
            out = out_cond = model.predict(x, times[i], cond)
        else:
            out_uncond, out_cond = model.predict(torch.cat([x, x]), times[i], both).chunk(2)
            out = out_uncond + guidance[i] * (out_cond - out_uncond)
        for name, said in zip(names, (out_uncond, out_cond), strict=True):
            kept[name][i] = said if flow else model.to_epsilon(said, x, alpha_bar[i])
        if stochastic:
            copies = [generator.clone_state() for generator in generators]  # draw the same
            x = scheduler.step(out, t, x, generator=generators).prev_sample
            drawn = randn_tensor(out.shape, copies, out.device, out.dtype)
            kept["noise"][i + 1] = float(keep[i]) * kept["noise"][i] + float(fresh[i]) * drawn
        else:
            x = scheduler.step(out, t, x).prev_sample
        kept["x_t"][i + 1] = x
    # A state that is not finite stays so: the last one tells of all. Least and largest tell of
    # every number, in less time and memory than a test of each.
    last = (kept["x_t"][-1], *(kept[name] for name in names))
    if not all(value.isfinite() for tensor in last for value in tensor.aminmax()):
        raise FloatingPointError(not_finite(model))
    return kept


def not_finite(model) -> str:
    """What is said of predictions that are not finite."""
    half = model.precision in ("float16", "bfloat16")
    advice = "" if half else ": are its weights whole?"
    return f"the predictions of {model.source} are not finite in {model.precision}{advice}"
