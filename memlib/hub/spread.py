"""A model on several devices, each of which has the network and predicts a part of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


class SpreadModel:
    """The first of `models`, as of `memlib.load`; what it predicts is shared among all.

    They have the same weights, each on a device of its own. All else, as text encoder and VAE, is
    the first one's.
    """

    def __init__(self, models: Sequence):
        if len({(model.fingerprint, model.precision) for model in models}) != 1:
            raise ValueError("a batch is shared by models of the same weights and precision")
        self.models, self.pool = models, ThreadPoolExecutor(len(models))

    def __getattr__(self, name: str):
        return getattr(self.models[0], name)

    @property
    def uncached(self) -> SpreadModel:
        return self

    def predict(self, x_t: torch.Tensor, timestep, text: torch.Tensor) -> torch.Tensor:
        """As `DiffusersModel.predict`, on the device of the first model."""

        def ask(model, x, text):
            t = torch.as_tensor(timestep).to(model.device)
            return model.predict(x.to(model.device), t, text.to(model.device)).to(x_t.device)

        parts = (v.tensor_split(min(len(x_t), len(self.models))) for v in (x_t, text))
        return torch.cat([*self.pool.map(ask, self.models, *parts)])
