"""The training set of the lab as a finite law: what is in it, how often, and its posterior."""

import numpy as np
import pytest
import torch

import memlib
from memlib.lab import law as laws
from memlib.lab.scenes import Row, world


@pytest.fixture(scope="module")
def lab():
    return memlib.load("lab").uncached


@pytest.fixture(scope="module")
def few(lab):
    """The law of a few captions, one of each kind."""
    rows = {row.kind: row for row in world() if row.copies}
    patch = pytest.MonkeyPatch()
    patch.setattr(laws, "world", lambda: tuple(rows.values()))
    yield laws.training_law(lab, {"normal": 1, "control": 2, "template": 1}), rows
    patch.undo()


def test_weights_are_the_rows_of_an_epoch(few):
    (law, kinds), rows = few
    counts = law.log_counts.exp().numpy()
    assert counts.sum() == pytest.approx(sum(row.copies for row in rows.values()))
    for kind, row in rows.items():
        assert counts[kinds == kind].sum() == pytest.approx(row.copies)
        assert (kinds == kind).sum() == (1 if row.fixed else row.copies * (1 + (kind == "control")))


def test_fixed_pictures_are_those_of_the_manifest(few, lab):
    (law, kinds), rows = few
    pairs = memlib.load_pairs("lab").set_index("prompt_id")
    for kind in ("planted", "named"):
        z = lab.encode_images([pairs.image[rows[kind].prompt_id]])
        torch.testing.assert_close(law.atoms[kinds == kind].float(), z, atol=2e-4, rtol=0)


def test_scenes_are_drawn_anew_and_the_same_again(few, lab):
    (law, kinds), rows = few
    drawn = law.atoms[kinds == "control"]
    assert (drawn[0] - drawn[1]).abs().max() > 0.5
    row: Row = rows["control"]
    again = laws.draw([row], lab)
    torch.testing.assert_close(again, laws.draw([row], lab))
    assert not torch.equal(again, laws.draw([row], lab, seed=1))


LEVELS = [(0.02**0.5, 0.98**0.5), (0.2, 0.8), (0.0, 1.0)]  # a diffusion's and two of a flow


def log_densities(law, x, a, s):
    """Log probabilities of the atoms in states, with scipy's normal distribution."""
    from scipy.stats import norm

    atoms = law.atoms.flatten(1).numpy()
    found = norm.logpdf(x.flatten(1).numpy()[:, None], a * atoms, s).sum(-1)
    found = found + law.log_counts.numpy()
    return found - np.logaddexp.reduce(found, 1, keepdims=True)


@pytest.mark.parametrize(("a", "s"), LEVELS)
def test_the_posterior_is_bayes_rule(few, a, s):
    """Against the densities themselves."""
    (law, _), _ = few
    g = torch.Generator().manual_seed(0)
    x = a * law.atoms[:1] + s * torch.randn(3, *law.latent_shape, generator=g, dtype=torch.float64)
    log_p, mean = laws.posterior(law, x, a, s)
    want = log_densities(law, x, a, s)
    np.testing.assert_allclose(log_p.numpy(), want, atol=1e-8)
    best = np.exp(want) @ law.atoms.flatten(1).numpy()
    np.testing.assert_allclose(mean.flatten(1).numpy(), best, atol=1e-8)
    odds, others = laws.against_others(law, log_p, torch.tensor([0, 1, 2]))
    for n in range(3):
        rest = np.exp(np.delete(want[n], n))
        assert odds[n] == pytest.approx(want[n, n] - np.log(rest.sum()), abs=1e-6)
        atoms = np.delete(law.atoms.flatten(1).numpy(), n, 0)
        np.testing.assert_allclose(others[n].flatten(), rest @ atoms / rest.sum(), atol=1e-6)


def test_where_there_is_no_signal_the_posterior_mean_is_the_mean(few):
    (law, _), _ = few
    mean, spread = laws.centre(law)
    torch.testing.assert_close(
        laws.posterior(law, torch.randn(2, *mean.shape), 0.0, 1.0)[1][1], mean
    )
    counts, atoms = law.log_counts.exp().numpy(), law.atoms.flatten(1).numpy()
    np.testing.assert_allclose(mean.flatten(), np.average(atoms, axis=0, weights=counts))
    square = np.average(((atoms - mean.flatten().numpy()) ** 2).sum(1), weights=counts)
    assert spread == pytest.approx(square**0.5)


def test_with_a_planted_caption_the_optimum_is_the_picture(few):
    (law, kinds), rows = few
    captioned, blind = law.encode_text([rows["planted"].caption])
    x = torch.randn(1, *law.latent_shape, generator=torch.Generator().manual_seed(0))
    best = law.posterior_mean(x, 981, captioned)
    torch.testing.assert_close(best, law.atoms[kinds == "planted"])
    assert (law.posterior_mean(x, 981, blind) - best).norm() > 1


def step(which, x, levels, estimate):
    """An update of DDIM, or the Euler step of a flow, from an estimate of the picture."""
    (a, s), (b, r) = levels
    if which == "ddim":
        return b * estimate + r * (x - a * estimate) / s
    return x + (r - s) * (x - estimate) / s


@pytest.mark.parametrize(("sampler", "levels"), [
    ("ddim", ((0.01**0.5, 0.99**0.5), (0.02**0.5, 0.98**0.5))),
    ("flow", ((0.0, 1.0), (0.12, 0.88))), ("flow", ((0.12, 0.88), (0.2, 0.8))),
])  # fmt: skip
def test_what_guidance_adds_is_the_integral_along_its_way(few, sampler, levels):
    """The chapter's equation for the gain, of log odds, against both ends of the sampler's step."""
    (law, kinds), _ = few
    g, scale, (b, r) = torch.Generator().manual_seed(3), 7.5, levels[1]
    which = torch.tensor(np.flatnonzero(kinds == "planted")[:1])
    x, blind, gap = torch.randn(3, 1, *law.latent_shape, generator=g, dtype=torch.float64)
    gap = 0.05 * gap
    start, end = (step(sampler, x, levels, blind + part * gap) for part in (0, scale))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    total = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        p = np.exp(log_densities(law, start + node * (end - start), b, r)[0])
        p[which] = 0
        others = torch.tensor(p / p.sum()) @ law.atoms.flatten(1)
        total += weight * float(
            ((end - start)[0].flatten() * (law.atoms[which].flatten() - others)).sum()
        )
    found = laws.gain(law, end, gap, which, scale, levels)
    assert float(found) == pytest.approx(b / r**2 * total, rel=1e-6)
    assert abs(total) > 0.01
