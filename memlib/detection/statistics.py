"""What tells a memorized prompt from others: statistics of a few calls of the network.

Each is a function of `Calls` and gives one number for each caption, higher where memory shows;
none needs the training image. `STATISTICS` says what a statistic costs and where it is from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, interpolate

from memlib.schedule import estimate, signal_and_noise

BLOCK = 4  # latent cells: what a block of them has in common is not detail


@dataclass(frozen=True)
class Calls:
    """Predictions in pure noise, and a way to ask for more.

    All tensors are [caption, seed, channel, height, width], epsilon whatever the network predicts;
    with `sigma`, of a flow model, velocities. `ask(x, timestep)` gives `eps_uncond` and `eps_cond`
    of the same captions in other states. What a statistic does not use may be None.
    """

    x: torch.Tensor
    timestep: int | float  # the first of the sampler
    alpha_bar: float  # its signal level, squared
    eps_uncond: torch.Tensor | None
    eps_cond: torch.Tensor | None
    ask: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]] | None
    sigma: float | None = None

    @property
    def difference(self) -> torch.Tensor:
        """Conditional less unconditional prediction."""
        return self.eps_cond - self.eps_uncond

    @property
    def estimate(self) -> torch.Tensor:
        r"""The conditional estimate $\hat x_{0,c}$ of the picture (the paper's Eq. 3)."""
        return estimate(self.x, self.eps_cond, self.alpha_bar, self.sigma)


def magnitude(calls: Calls) -> np.ndarray:
    r"""$\|\epsilon_c-\epsilon_\varnothing\|$, mean over seeds (Wen et al. 2024, first step)."""
    return _over_seeds(_length(calls.difference))


def centred_magnitude(calls: Calls) -> np.ndarray:
    """`magnitude` without each channel's mean, which is what colour a caption asks for."""
    difference = calls.difference
    return _over_seeds(_length(difference - difference.mean((-2, -1), keepdim=True)))


def estimate_norm(calls: Calls) -> np.ndarray:
    r"""$\|\hat x_{0,c}\|$: the mean of many pictures is short, one picture is not."""
    return _over_seeds(_length(calls.estimate))


def detail(calls: Calls) -> np.ndarray:
    r"""The share of fine detail in the first conditional estimate, root mean square (ours).

    In pure noise an honest estimate is the mean of all pictures that fit the caption, and the mean
    of many is blurred. What is finer than a block of 4 x 4 latent cells is there only if the
    network knows one picture. The unit is that of latents, whose spread is about one.
    """
    x = calls.estimate
    return _over_seeds((x - blurred(x)).square().mean((-3, -2, -1)).sqrt())


def agreement(calls: Calls) -> np.ndarray:
    r"""Mean cosine of $\hat x_{0,c}$ between seeds: memory ignores the noise (ours)."""
    x = torch.nn.functional.normalize(calls.estimate.flatten(2).double(), dim=-1)
    seeds = x.shape[1]
    if seeds < 2:
        raise ValueError("agreement compares seeds: it needs two or more")
    sums = (x @ x.mT).sum((1, 2)) - seeds
    return (sums / (seeds * (seeds - 1))).cpu().numpy()


def sharpness(calls: Calls, step: float = 1e-2) -> np.ndarray:
    r"""$\|(H_c-H_\varnothing)(s_c-s_\varnothing)\|$, $s=-\epsilon/\sqrt{1-\bar\alpha}$.

    Jeon et al. 2025. The product of the log density's Hessian with a vector is a finite difference
    of $s$: `step` times the length of the state, along $s_c-s_\varnothing$.
    """
    difference, scale = calls.difference, signal_and_noise(calls.alpha_bar, calls.sigma)[1]
    length = _length(difference).reshape(*difference.shape[:2], 1, 1, 1).clamp(min=1e-12)
    h = step * calls.x[0, 0].numel() ** 0.5
    uncond, cond = calls.ask(calls.x - h * difference / length, calls.timestep)
    change = ((cond - uncond) - difference) / h * length  # of epsilon, for the whole vector
    return _over_seeds(_length(change) / scale**2)


def two_passes(calls: Calls, last: int = 1) -> np.ndarray:
    r"""$\cos(s^\Delta,s_c)$ where pure noise is taken for a state at $t\approx0$.

    Asthana & Belagiannis 2026 add a multiple of `magnitude` at the first step, which is a statistic
    of its own here.
    """
    uncond, cond = calls.ask(calls.x, last)
    return _over_seeds(cosine_similarity((cond - uncond).flatten(2), cond.flatten(2), -1))


def blurred(x: torch.Tensor) -> torch.Tensor:
    """Each block of `BLOCK` x `BLOCK` cells replaced by its mean; what is left over is a block."""
    flat = x.flatten(0, -4)
    small = torch.nn.functional.avg_pool2d(flat, BLOCK, ceil_mode=True)
    large = interpolate(small, scale_factor=BLOCK, mode="nearest")
    return large[..., : x.shape[-2], : x.shape[-1]].reshape(x.shape)


def auroc(memorized: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
    """The probability that a memorized prompt scores more than another; ties count one half."""
    x, y = np.moveaxis(memorized, axis, -1)[..., None], np.moveaxis(others, axis, -1)[..., None, :]
    return 0.5 * ((x > y).mean((-2, -1)) + (x >= y).mean((-2, -1)))


@dataclass(frozen=True)
class Statistic:
    """A function of `Calls`; costs are calls of the network for each caption and seed.

    `first` of them are at the first state: none, the conditional one, or both.
    """

    function: Callable[[Calls], np.ndarray]
    cost: int
    source: str
    first: int
    seeds: int = 1  # at least


STATISTICS = {
    "detail": Statistic(detail, 1, "ours", 1),
    "agreement": Statistic(agreement, 1, "ours", 1, seeds=2),
    "estimate-norm": Statistic(estimate_norm, 1, "ours", 1),
    "magnitude": Statistic(magnitude, 2, "Wen et al. 2024", 2),
    "centred-magnitude": Statistic(centred_magnitude, 2, "ours, after Wen et al. 2024", 2),
    "sharpness": Statistic(sharpness, 4, "Jeon et al. 2025", 2),
    "two-passes": Statistic(two_passes, 2, "Asthana & Belagiannis 2026", 0),
}


def _length(x: torch.Tensor) -> torch.Tensor:
    """Norms over a latent, [caption, seed]."""
    return x.flatten(2).double().norm(dim=-1)


def _over_seeds(values: torch.Tensor) -> np.ndarray:
    return values.double().mean(1).cpu().numpy()
