"""Noise levels of the states of a trajectory, and what a perfect denoiser makes of them.

A trajectory of S updates has S + 1 *states*. State 0 is the initial noise; state i + 1 is what
update i makes, and it has the noise level of the *next* timestep, not of the one the update was
computed at. `state_levels` says so once and for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from memlib.errors import nearest

Guidance = float | int | Sequence[float] | Callable[[int], float]
SAMPLERS = {
    "ddim": DDIMScheduler, "ddpm": DDPMScheduler, "flow-euler": FlowMatchEulerDiscreteScheduler
}  # fmt: skip


class WideFlowEuler(FlowMatchEulerDiscreteScheduler):
    """The same update in float64: diffusers' rounds every state to float32."""

    def step(self, model_output, timestep, sample):
        n = self.index_for_timestep(timestep)
        moved = sample + (self.sigmas[n + 1] - self.sigmas[n]) * model_output
        return SimpleNamespace(prev_sample=moved)


def is_flow(config) -> bool:
    r"""Whether a scheduler is of rectified flow: states $(1-\sigma)x+\sigma\epsilon$."""
    return "FlowMatch" in config.get("_class_name", "")


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
    if is_flow(config) != (sampler == "flow-euler"):
        kind, valid = ("a flow", "'flow-euler'") if is_flow(config) else ("a diffusion", "'ddim'")
        raise ValueError(f"{sampler!r} does not sample {kind} model: take sampler={valid}")
    if is_flow(config):
        return _flow_scheduler(config, steps, dtype)
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


def _flow_scheduler(config, steps: int, dtype: torch.dtype):
    """Its noise levels shifted by a fixed number, as Stable Diffusion 3's."""
    for option, what in (
        ("use_dynamic_shifting", "noise levels that hang on the picture's size"),
        ("stochastic_sampling", "fresh noise at each update"),
        ("invert_sigmas", "its noise levels turned round"),
    ):
        if config.get(option):
            raise ValueError(f"a flow scheduler with {what} ({option}) is not supported")
    wide = dtype == torch.float64
    scheduler = (WideFlowEuler if wide else FlowMatchEulerDiscreteScheduler).from_config(config)
    scheduler.set_timesteps(steps)
    if wide:
        scheduler.sigmas = scheduler.sigmas.double()
        scheduler.timesteps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
    return scheduler


def signal_and_noise(alpha_bar, sigma=None):
    r"""$a$ and $s$ of states $a\,x+s\,\epsilon$.

    Diffusion: $\sqrt{\bar\alpha}$, $\sqrt{1-\bar\alpha}$. Rectified flow: $1-\sigma$, $\sigma$.
    """
    if sigma is not None:
        return 1 - sigma, sigma
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def estimate(x, prediction, alpha_bar, sigma=None):
    r"""$\hat x_0$ of a predicted noise; of a predicted velocity $v=\epsilon-x$ with `sigma`.

    $(x_t-s\,\epsilon)/a$, or $x_t-\sigma v$: a flow begins without any signal, where its noise
    tells nothing of the picture and its velocity all.
    """
    signal, noise = signal_and_noise(alpha_bar, sigma)
    return x - noise * prediction if sigma is not None else (x - noise * prediction) / signal


def flow_sigmas(scheduler) -> np.ndarray | None:
    r"""$\sigma$ of every state, of length S + 1; None for a diffusion."""
    flows = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    return scheduler.sigmas.cpu().double().numpy() if flows else None


def state_levels(scheduler) -> tuple[np.ndarray, np.ndarray]:
    r"""Timestep and $\bar\alpha$ of every state, each of length S + 1.

    The last state has timestep -1. Its $\bar\alpha$ is the scheduler's own:
    ``final_alpha_cumprod`` for DDIM (0.99915 with Stable Diffusion's settings), 1 for DDPM. Of a
    flow $\bar\alpha$ is the signal's share of the variance, $a^2/(a^2+s^2)$.
    """
    if (sigma := flow_sigmas(scheduler)) is not None:
        shares = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
        return np.append(scheduler.timesteps.cpu().double().numpy(), -1), shares
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


def oracle_weights(
    alpha_bar: np.ndarray, sampler: str, sigma: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    r"""Coefficients of x_0, x_T (and fresh noise) when every prediction is perfect.

    DDIM and the flow's Euler step keep the predicted noise, so $w_T=s_t/s_T$. DDPM shrinks it,
    $w_T=(a_T/a_t)\,s_t^2/s_T^2$, and replaces the rest by fresh noise, whose accumulated vector has
    coefficient 1 while it is not 0. In all, $w_0=a_t-a_T\,w_T$: the first state is $x_T$ alone. A
    flow that begins at $\sigma=1$ has $w_0=1-\sigma$ and $w_T=\sigma$: its schedule is its oracle.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"no oracle is known for sampler {sampler!r}")
    signal, noise = signal_and_noise(alpha_bar, sigma)
    w_T = noise / noise[0]
    if sampler == "ddpm":
        w_T = signal[0] / signal * w_T**2
    weights = {"w_0": signal - signal[0] * w_T, "w_T": w_T}
    if sampler == "ddpm":
        # There is none before the first update, and none is added by the last.
        weights["w_noise"] = ((noise < noise[0]) & (noise > 0)).astype(float)
    return weights


def schedule_weights(
    alpha_bar: np.ndarray, sigma: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    r"""$\sqrt{\bar\alpha_t}$ and $\sqrt{1-\bar\alpha_t}$ (Kim et al. 2025), or a flow's levels."""
    return dict(zip(("w_0", "w_T"), signal_and_noise(alpha_bar, sigma), strict=True))


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
