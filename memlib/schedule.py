"""Noise levels of the states of a trajectory, and what a perfect denoiser makes of them.

A trajectory of S updates has S + 1 *states*. State 0 is the initial noise; state i + 1 is what
update i makes, and it has the noise level of the *next* timestep, not of the one the update was
computed at. `state_levels` says so once and for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from memlib.errors import nearest

Guidance = float | int | Sequence[float] | Callable[[int], float]
SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


def make_scheduler(config, sampler: str, steps: int, dtype: torch.dtype = torch.float32):
    """diffusers' scheduler for `sampler` with `steps` timesteps set.

    With ``dtype=torch.float64`` its tables are widened, so that an exact model is followed to
    machine precision instead of the seven digits of the float32 tables.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}{nearest(sampler, SAMPLERS)}")
    limit = config["num_train_timesteps"]
    if not 1 <= steps <= limit:
        raise ValueError(f"steps={steps} is not possible: the model has {limit} timesteps")
    if config.get("thresholding"):
        raise ValueError("a scheduler with dynamic thresholding is not supported")
    # Latents are never clipped; a config that does not say so would get the pixel models' default.
    scheduler = SAMPLERS[sampler].from_config(config, clip_sample=False, thresholding=False)
    if dtype == torch.float64:
        for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "one"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(scheduler, name).double())
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if int(timesteps.max()) >= limit:
        raise ValueError(
            f"steps={steps} is not possible: with this steps_offset at most {limit - 1}"
        )
    if float(scheduler.alphas_cumprod[timesteps.cpu()].min()) <= 0:
        raise ValueError("this noise schedule ends at zero signal, where no estimate of x_0 exists")
    # DDIM's update goes `limit // steps` timesteps down, whatever the next one is.
    if sampler == "ddim" and (timesteps[:-1] - limit // steps != timesteps[1:]).any():
        spacing = scheduler.config.timestep_spacing
        raise ValueError(
            f"DDIM skips levels with timestep_spacing={spacing!r}: load the model with "
            "timestep_spacing='leading', or write that into its scheduler/scheduler_config.json"
        )
    # None is what other samplers' configs hold; diffusers takes it for the first case.
    if sampler == "ddpm" and scheduler.config.variance_type not in ("fixed_small", None):
        kind = scheduler.config.variance_type
        raise ValueError(f"DDPM with variance_type={kind!r} is not supported, only 'fixed_small'")
    return scheduler


def state_levels(scheduler) -> tuple[np.ndarray, np.ndarray]:
    r"""Timestep and $\bar\alpha$ of every state, each of length S + 1.

    The last state has timestep -1. Its $\bar\alpha$ is the scheduler's own:
    ``final_alpha_cumprod`` for DDIM (0.99915 with Stable Diffusion's settings), 1 for DDPM.
    """
    timesteps = scheduler.timesteps.cpu().numpy().astype(int)
    final = getattr(scheduler, "final_alpha_cumprod", None)
    final = 1.0 if final is None else float(final)
    table = scheduler.alphas_cumprod.cpu().double().numpy()
    return np.append(timesteps, -1), np.append(table[timesteps], final)


def ddpm_noise_coefficients(alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Per update, how the fresh noise already in the state is kept, and how much is added.

    $n_{i+1} = a_i n_i + \sigma_i z_i$ with
    $a=\sqrt{\alpha}\,\frac{1-\bar\alpha_{prev}}{1-\bar\alpha}$ and
    $\sigma^2=\frac{1-\bar\alpha_{prev}}{1-\bar\alpha}(1-\alpha)$,
    $\alpha=\bar\alpha/\bar\alpha_{prev}$ (Ho et al. 2020, Eq. 7; ``fixed_small`` in diffusers).
    """
    now, after = alpha_bar[:-1], alpha_bar[1:]
    alpha, share = now / after, (1 - after) / (1 - now)
    return np.sqrt(alpha) * share, np.sqrt(share * (1 - alpha))


def oracle_weights(alpha_bar: np.ndarray, sampler: str) -> dict[str, np.ndarray]:
    r"""Coefficients of x_0, x_T (and fresh noise) when every prediction is perfect.

    DDIM keeps the predicted noise, so $w_T=\sqrt{(1-\bar\alpha_t)/(1-\bar\alpha_T)}$.
    DDPM shrinks it, $w_T=\sqrt{\bar\alpha_T/\bar\alpha_t}\,(1-\bar\alpha_t)/(1-\bar\alpha_T)$, and
    replaces the rest by fresh noise, whose accumulated vector has coefficient 1 while it is not 0.
    In both, $w_0=\sqrt{\bar\alpha_t}-\sqrt{\bar\alpha_T}\,w_T$: the first state is $x_T$ alone.
    """
    start = alpha_bar[0]
    share = (1 - alpha_bar) / (1 - start)
    if sampler == "ddim":
        w_T = np.sqrt(share)
    elif sampler == "ddpm":
        w_T = np.sqrt(start / alpha_bar) * share
    else:
        raise ValueError(f"no oracle is known for sampler {sampler!r}")
    weights = {"w_0": np.sqrt(alpha_bar) - np.sqrt(start) * w_T, "w_T": w_T}
    if sampler == "ddpm":
        # There is none before the first update, and none is added by the last.
        weights["w_noise"] = ((share < 1) & (share > 0)).astype(float)
    return weights


def schedule_weights(alpha_bar: np.ndarray) -> dict[str, np.ndarray]:
    r"""The paper's, $\sqrt{\bar\alpha_t}$ and $\sqrt{1-\bar\alpha_t}$ (Kim et al. 2025)."""
    return {"w_0": np.sqrt(alpha_bar), "w_T": np.sqrt(1 - alpha_bar)}


def guidance_values(guidance_scale: Guidance, steps: int) -> np.ndarray:
    """The guidance scale of every update: a number, a sequence or a function of the step."""
    if callable(guidance_scale):
        values = [guidance_scale(step) for step in range(steps)]
    elif np.ndim(guidance_scale) == 0:
        values = [guidance_scale] * steps
    else:
        values = list(guidance_scale)
    if len(values) != steps:
        raise ValueError(f"{len(values)} guidance scales do not fit {steps} steps")
    values = np.asarray(values, dtype=float)
    if not np.isfinite(values).all():
        raise ValueError("guidance_scale must be finite")
    return values
