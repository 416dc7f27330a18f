"""The law that the lab was trained on, as a finite one whose optimal denoiser is known.

Planted and named pairs are atoms that count as often as they were shown. The other captions'
scenes are drawn anew in training; here they are Monte-Carlo atoms, drawn by the same program from
random numbers of their own. Whether there are enough is seen by leaving out some
(`memlib.models.ExactModel` has the posterior of any set).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping

import numpy as np
import torch
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
        latents.append(x.cpu() * model.vae.config.scaling_factor)
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
