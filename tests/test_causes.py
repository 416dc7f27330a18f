"""The interventions of the chapter on causes, on models whose outputs mean something else."""

import jupytext
import numpy as np
import pytest
import torch

import memlib
from memlib.paths import ROOT
from memlib.site import page


class AsV:
    """The same network, saying v where it says noise."""

    def __init__(self, net):
        self.net, self.uncached = net, self
        self.scheduler_config = {**net.scheduler_config, "prediction_type": "v_prediction"}
        self.levels = memlib.schedule.make_scheduler(net.scheduler_config, "ddim", 4).alphas_cumprod

    def __getattr__(self, name):
        return getattr(self.net, name)

    def predict(self, x, t, text):
        a = self.levels[int(t)]
        return (self.net.predict(x, t, text) - (1 - a).sqrt() * x) / a.sqrt()

    def to_epsilon(self, output, x, alpha_bar):
        return alpha_bar**0.5 * output + (1 - alpha_bar) ** 0.5 * x


@pytest.fixture
def interventions(lab, monkeypatch):
    """What the chapter defines before it runs anything, for a model."""
    cells = [c for c in jupytext.read(ROOT / "book/causes.md").cells if c.cell_type == "code"]
    first = next(n for n, cell in enumerate(cells) if cell.source.startswith("fifth, g ="))

    def define(model):
        monkeypatch.setattr(page, "load", lambda name: model)
        monkeypatch.setattr(page, "glue", lambda **values: None)
        names = {}
        for cell in cells[:first]:
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= {"model": "no training steps", "every": 20, "seeds": 2, "steps": 4}
        names["kept"] = lambda function, *arguments: function(*arguments)
        return names

    return define(lab), define(AsV(lab.uncached))


@pytest.mark.parametrize("which", ["cut", "shortened", "perfect", "another_seed", None])
def test_an_intervention_does_the_same_whatever_the_network_says(interventions, which):
    found = []
    for names in interventions:
        change = names[which] if which else None
        if which in ("cut", "shortened"):
            change = names["guided"](change)
        found.append(names["outcome"](change, of=names["prompts"].iloc[:2]))
    noise, v = found
    for name in noise.data_vars:
        np.testing.assert_allclose(noise[name], v[name], atol=0.03 if name != "size" else 0.05)
    assert float(noise["size"].min()) > 1


def test_cut_takes_the_surplus_and_nothing_else(interventions):
    names, _ = interventions
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    across = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    across -= names["along"](across, z) * z
    for held in (0.5, 3.0):
        left = names["cut"](held * z + across, None, z, None)
        np.testing.assert_allclose(names["along"](left, z).flatten(), min(held, 1.0), atol=1e-5)
        np.testing.assert_allclose(left - names["along"](left, z) * z, across, atol=1e-5)
