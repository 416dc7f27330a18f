"""What can be done about a prompt that is memorized: other guidance, another condition.

A `Method` says how strong guidance is at each step, what the caption's embedding is replaced by,
or both; `memlib.guard` applies it to a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from memlib.detection.statistics import Calls, blurred
from memlib.schedule import estimate

LADDER = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)  # shares of words that `smoothed` replaces
REPLACED = 0.4  # where there is nothing to compare with
VARIANTS = 64  # of each caption


@dataclass(frozen=True)
class Step:
    """One update, as a schedule sees it; tensors are [image, channel, height, width]."""

    timestep: int | float  # of the training schedule, from about 1000 down to 0
    x: torch.Tensor
    alpha_bar: float
    eps_uncond: torch.Tensor | None  # None in a run without guidance
    eps_cond: torch.Tensor
    scale: int | float  # of guidance, as the pipeline was asked for
    kept: dict = field(default_factory=dict)  # for whatever must last through one run

    @property
    def magnitude(self) -> torch.Tensor:
        """How far the branches are apart, [image]."""
        return (self.eps_cond - self.eps_uncond).flatten(1).norm(dim=1)


@dataclass(frozen=True)
class Request:
    """What a caption's embedding is made from; embeddings are [image, token, width].

    `read(tokens)` embeds rows of token ids; `predict(text)` asks the network in the first state,
    with gradients, and gives epsilon.
    """

    tokens: torch.Tensor  # [image, token]
    cond: torch.Tensor
    first: Calls  # both branches in the first state, [image, 1, channel, height, width]
    read: Callable[[torch.Tensor], torch.Tensor]
    predict: Callable[[torch.Tensor], torch.Tensor]
    words: torch.Tensor  # token ids that may stand in a caption
    special: torch.Tensor  # those that may not: begin, end, padding
    places: list[int]  # of the images in their batch: what is drawn hangs on that, not on others
    statistic: Callable[[Calls], np.ndarray]  # what flags an image
    usual: float  # its median over captions that are not memorized; NaN if not known


@dataclass(frozen=True)
class Method:
    """What is done: a scale for each step, an embedding for a run, or another one at each step."""

    scale: Callable[[Step], float | torch.Tensor] | None = None
    embed: Callable[[Request], torch.Tensor] | None = None
    vary: Callable[[torch.Tensor, float, list[int]], torch.Tensor] | None = None


# --------------------------------------------------------------------------- guidance as a schedule


def static(until: int | float = 700) -> Method:
    """No guidance in the first steps (Jain et al. 2025, with a fixed transition).

    A negative prompt is then all that is followed.
    """
    return opposite(0.0, until)


def opposite(scale: int | float = -2.0, until: int | float = 650) -> Method:
    """Guidance away from the caption in the first steps (Jain et al. 2025)."""
    return Method(lambda step: scale if step.timestep > until else step.scale)


def interval(low: int | float = 200, high: int | float = 700) -> Method:
    """Guidance between two timesteps alone (Kynkäänniemi et al. 2024); 1, not 0, outside."""
    return Method(lambda step: step.scale if low < step.timestep <= high else 1.0)


def dynamic() -> Method:
    """No guidance until the magnitude has passed its first minimum (Jain et al. 2025)."""

    def scale(step: Step):
        before, on = step.kept.get("magnitude"), step.kept.get("on")
        on = torch.zeros(len(step.x), dtype=bool, device=step.x.device) if on is None else on
        on = on if before is None else on | (step.magnitude > before)
        step.kept.update(magnitude=step.magnitude, on=on)
        return torch.where(on, step.scale, 0.0)

    return Method(scale)


def capped(most: int | float = 1.2) -> Method:
    r"""Guidance no stronger than keeps the guided estimate $\hat x_0$ within its own caption's.

    With $k_\varnothing=\langle\hat x_{0,\varnothing},\hat x_{0,c}\rangle/\|\hat x_{0,c}\|^2$ the
    guided estimate holds $k_\varnothing+g(1-k_\varnothing)$ of the conditional one; $g$ is as large
    as keeps that under `most` (ours: the book's overestimation, without the image).
    """

    def scale(step: Step):
        uncond, cond = (
            estimate(step.x, eps, step.alpha_bar).flatten(1)
            for eps in (step.eps_uncond, step.eps_cond)
        )
        k = (uncond * cond).sum(1) / cond.square().sum(1)
        room = (most - k) / (1 - k).clamp(min=1e-3)
        return torch.where(k < 1, room, step.scale).clamp(max=step.scale).clamp(min=1.0)

    return Method(scale)


# ----------------------------------------------------------------------------- another condition


def noised(sigma: int | float = 0.3, seed: int = 0) -> Method:
    """Gaussian noise on the embedding, in units of its own spread (Somepalli et al. 2023)."""

    def embed(request: Request):
        cond = request.cond
        return cond + sigma * cond.std((1, 2), keepdim=True) * _noise(cond, request.places, seed)

    return Method(embed=embed)


def annealed(
    sigma: int | float = 0.25, low: int | float = 600, high: int | float = 900, seed: int = 0
) -> Method:
    r"""CADS (Sadat et al. 2024): $\sqrt\gamma\,c+\sigma\sqrt{1-\gamma}\,n$, rescaled.

    $\gamma$ falls linearly from 1 at timestep `low` to 0 at `high`; mean and spread of the
    embedding are restored, as the paper does with $\psi=1$.
    """

    def vary(cond: torch.Tensor, timestep: int | float, places: list[int]):
        gamma = float(np.clip((high - timestep) / (high - low), 0, 1))
        noise = _noise(cond, places, seed, round(timestep))
        new = gamma**0.5 * cond + sigma * (1 - gamma) ** 0.5 * noise
        mean, spread = (getattr(new, f)((1, 2), keepdim=True) for f in ("mean", "std"))
        old = cond.mean((1, 2), keepdim=True), cond.std((1, 2), keepdim=True)
        return (new - mean) / spread * old[1] + old[0]

    return Method(vary=vary)


def more_words(count: int = 2, seed: int = 0) -> Method:
    """Random words put into the caption at random places (Somepalli et al. 2023)."""

    def embed(request: Request):
        rows = []
        for place, row in zip(request.places, request.tokens.tolist(), strict=True):
            rng = np.random.default_rng([seed, place])
            inside = [n for n, t in enumerate(row) if t not in request.special]
            new, end = list(row), inside[-1] + 1 if inside else 1
            for _ in range(count):
                new.insert(rng.integers(1, end + 1), int(rng.choice(request.words.tolist())))
                end += 1
            rows.append([*new[: len(row) - 1], row[-1]] if end >= len(row) else new[: len(row)])
        return request.read(torch.tensor(rows))

    return Method(embed=embed)


def optimized(
    statistic: str = "magnitude",
    target: int | float = 2.0,
    rate: int | float = 0.05,
    most: int = 10,
) -> Method:
    """The embedding moved by AdamW until a statistic of the first call is under a target.

    With the magnitude it is Wen et al.'s (2024); with the detail of the first conditional estimate
    (`memlib.detection.statistics.detail`) it is ours. At most `most` iterations.
    """

    def embed(request: Request):
        first, moved = request.first, request.cond.detach().float().clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([moved], rate)
        found, done = moved.detach().clone(), torch.zeros_like(moved[:, 0, 0], dtype=bool)
        if statistic == "magnitude" and first.eps_uncond is None:
            raise ValueError("the magnitude compares branches, and without guidance there is one")
        for n in range(most + 1):
            with torch.enable_grad():
                cond = request.predict(moved)
                if statistic == "magnitude":
                    value = (cond - first.eps_uncond[:, 0]).flatten(1).norm(dim=1)
                else:
                    guess = estimate(first.x[:, 0], cond, first.alpha_bar)[None]
                    detail = (guess - blurred(guess))[0]
                    value = detail.square().mean((1, 2, 3)).sqrt()
                new = (value.detach() <= target) & ~done
                found[new], done = moved.detach()[new], done | new
                if done.all() or n == most:
                    break
                (moved.grad,) = torch.autograd.grad(value[~done].sum(), moved)  # no weight's
            optimizer.step()
        found[~done] = moved.detach()[~done]
        return found.to(request.cond.dtype)

    return Method(embed=embed)


def smoothed(
    replaced: int | float | None = None, variants: int = VARIANTS, seed: int = 0
) -> Method:
    """Each word's embedding averaged over captions in which others are replaced (ours).

    It supposes that a memory hangs on several words together. Of `variants` captions in
    which each word is replaced by a random one with probability `replaced`, a place gets the mean
    embedding of those that keep its word; the places after the end get the mean of all. With None
    an image gets the least of `LADDER` with which its first call looks like those of captions that
    are not memorized. Costs calls of the text encoder, and one of the U-Net for each try.
    """

    def mixed(request: Request, share: float) -> torch.Tensor:
        rows = []
        each = zip(request.places, request.tokens, request.cond, strict=True)
        for place, tokens, own in each:
            rng, size = np.random.default_rng([seed, place]), (variants, len(tokens))
            keep = torch.from_numpy(rng.random(size) >= share)
            keep |= torch.isin(tokens, request.special)
            others = request.words[torch.from_numpy(rng.integers(len(request.words), size=size))]
            read = request.read(torch.where(keep, tokens, others))
            keep = keep.to(read)[..., None]
            mean = (read * keep).sum(0) / keep.sum(0).clamp(min=1)
            rows.append(torch.where(keep.sum(0) > 0, mean, own))
        return torch.stack(rows).to(request.cond.dtype)

    def embed(request: Request) -> torch.Tensor:
        if replaced is not None or np.isnan(request.usual):
            return mixed(request, REPLACED if replaced is None else replaced)
        found, left = request.cond.clone(), np.ones(len(request.cond), bool)
        for share in LADDER:
            text = mixed(request, share)
            found[left] = text[left]
            with torch.no_grad():
                asked = replace(request.first, eps_cond=request.predict(text)[:, None])
            left &= request.statistic(asked) > request.usual
            if not left.any():
                break
        return found

    return Method(embed=embed)


def both(first: Method, second: Method) -> Method:
    """Two methods at once: of each part, the first one's where it has one."""
    parts = {n: getattr(first, n) or getattr(second, n) for n in ("scale", "embed", "vary")}
    return Method(**parts)


def late(name: str, until: int | float = 700, **options) -> Method:
    """Another condition, by the name of its function here, with `static` guidance."""
    return both(static(until), globals()[name](**options))


def late_and_smoothed(until: int | float = 700, replaced: int | float | None = None) -> Method:
    """`smoothed` captions, and no guidance in the first steps; what `memlib.guard` does."""
    return both(static(until), smoothed(replaced))


def _noise(like: torch.Tensor, places: list[int], *seed: int) -> torch.Tensor:
    """Noise by an image's place in its batch."""
    draw = [np.random.default_rng([*seed, n]).standard_normal(like.shape[1:]) for n in places]
    return torch.from_numpy(np.stack(draw)).to(like)
