"""The law that the lab was trained on, as a finite one whose optimal denoiser is known.

Planted and named pairs are atoms that count as often as they were shown. The other captions'
scenes are drawn anew in training; here they are Monte-Carlo atoms, drawn by the same program from
random numbers of their own. Whether there are enough is seen by leaving out some.

A state is a x + s ε with a signal level a and a noise level s, of a diffusion or of a flow. Divided
by the root of a² + s² it is a diffusion's with ᾱ = a² / (a² + s²), whose posterior
`memlib.models.ExactModel` has.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from memlib.lab import scenes
from memlib.lab.scenes import Row, render, world
from memlib.lab.train import pixels, rng_for
from memlib.models import DiffusersModel, ExactModel


def draw(rows: list[Row], model: DiffusersModel, seed: int = 0) -> torch.Tensor:
    """Latents of a new scene for each row, float32 [row, channel, height, width]."""
    latents = []
    for n in tqdm(range(0, len(rows), 8), desc="scenes", disable=None):
        part = rows[n : n + 8]
        pictures = [render(row.draw(rng_for("law", seed, n + i))) for i, row in enumerate(part)]
        with torch.no_grad():
            x = model.vae.encode(pixels(pictures).to(model.vae.device)).latent_dist.mode()
        latents.append((x.cpu() - model.shift) * model.vae.config.scaling_factor)
    return torch.cat(latents)


def training_law(
    model: DiffusersModel, draws: Mapping[str, int], seed: int = 0
) -> tuple[ExactModel, np.ndarray]:
    """The optimal denoiser of the lab's training set, and the kind of each of its atoms.

    Parameters
    ----------
    model : the lab, uncached; its VAE encodes the scenes.
    draws : for each kind whose scenes are redrawn, how many are drawn for one row of an epoch.

    Each drawn scene counts ``1 / draws``, so that all weights sum to the rows of an epoch.
    """
    rows, counts = [], []
    for row in (row for row in world() if row.copies):
        times = 1 if row.fixed else row.copies * draws[row.kind]
        rows += [row] * times
        counts += [row.copies / times] * times
    captions = [row.caption for row in rows]
    law = ExactModel(draw(rows, model, seed), captions, counts, model.scheduler_config, model)
    # By what made it: encoded pictures differ in their last bits from machine to machine.
    drawn_by = [inspect.getsource(part) for part in (scenes, draw, training_law)]
    recipe = [model.fingerprint, dict(draws), seed, *drawn_by]
    law.fingerprint = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    return law, np.array([row.kind for row in rows])


def centre(law: ExactModel) -> tuple[Float[torch.Tensor, "channel height width"], float]:
    """The mean picture of a law, and its spread: the root mean square distance from that mean."""
    share, flat = law.log_counts.softmax(0), law.atoms.flatten(1)
    mean = share @ flat
    return mean.reshape(law.latent_shape), float((share @ (flat - mean).square().sum(1)).sqrt())


def posterior(
    law: ExactModel,
    x: Float[torch.Tensor, "row channel height width"],
    a: float,
    s: float,
    weights: Float[torch.Tensor, " atom"] | None = None,
) -> tuple[Float[torch.Tensor, "row atom"], Float[torch.Tensor, "row channel height width"]]:
    r"""Log probabilities of the atoms $x_i$ in states $x=a\,z+s\,\epsilon$, and their mean.

    $p_i\propto\pi_i\exp(-\|x-a\,x_i\|^2/2s^2)$; `weights` are other log counts than the law's.
    """
    size = float(a) ** 2 + float(s) ** 2
    weights = law.log_counts if weights is None else weights
    log_p = law.log_posterior(x.double() / size**0.5, float(a) ** 2 / size, weights)
    return log_p, (log_p.exp() @ law.atoms.flatten(1)).reshape(x.shape)


def against_others(
    law: ExactModel, log_p: Float[torch.Tensor, "row atom"], which: Int[torch.Tensor, " row"]
) -> tuple[Float[torch.Tensor, " row"], Float[torch.Tensor, "row channel height width"]]:
    """Log odds of one atom for each row against all others, and the mean of the others."""
    rest = log_p.scatter(1, which[:, None], -torch.inf)
    mean = (rest.softmax(1) @ law.atoms.flatten(1)).reshape(-1, *law.latent_shape)
    return log_p.gather(1, which[:, None])[:, 0] - rest.logsumexp(1), mean


def gain(law: ExactModel, after, gap, which, g: float, levels, weights=None):
    r"""What guidance adds in an update to the log odds of one atom for each row, [row].

    A guided update ends $g\kappa\Delta$ away from the unconditional one, $\kappa=a'-a\,s'/s$ for
    DDIM's step and a flow's (Euler's). On that way $x_u$ the log odds of atom $x$ rise by
    $\frac{a'}{s'^2}g\kappa\int\langle\Delta,x-\bar x'(x_u)\rangle du$, $\bar x'$ the others' mean.

    Parameters
    ----------
    after : states at the end of the guided update, [row, channel, height, width].
    gap : Δ, the conditional less the unconditional estimate of the picture, of the same shape.
    which : an atom for each row.
    levels : a and s of the states before the update, and of those after it.
    """
    (a, s), (b, r) = levels
    ends = (after, after - g * (b - a * r / s) * gap)
    reached, without = (posterior(law, x, b, r, weights)[0] for x in ends)
    return against_others(law, reached, which)[0] - against_others(law, without, which)[0]
