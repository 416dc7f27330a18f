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


def test_the_posterior_is_bayes_rule(few):
    """Against the densities themselves, with scipy's normal distribution."""
    from scipy.stats import norm

    (law, _), _ = few
    alpha_bar, rng = 0.02, np.random.default_rng(0)
    atoms = law.atoms.flatten(1).numpy()
    x = np.sqrt(alpha_bar) * atoms[:1] + np.sqrt(1 - alpha_bar) * rng.standard_normal(
        (3, atoms.shape[1])
    )
    density = norm.logpdf(x[:, None], np.sqrt(alpha_bar) * atoms, np.sqrt(1 - alpha_bar)).sum(-1)
    want = density + law.log_counts.numpy()
    want -= np.logaddexp.reduce(want, 1, keepdims=True)
    got = law.log_posterior(torch.from_numpy(x), alpha_bar, law.log_counts)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-8)


def test_with_a_planted_caption_the_optimum_is_the_picture(few):
    (law, kinds), rows = few
    captioned, blind = law.encode_text([rows["planted"].caption])
    x = torch.randn(1, *law.latent_shape, generator=torch.Generator().manual_seed(0))
    best = law.posterior_mean(x, 981, captioned)
    torch.testing.assert_close(best, law.atoms[kinds == "planted"])
    assert (law.posterior_mean(x, 981, blind) - best).norm() > 1


def test_what_guidance_adds_is_the_integral_along_its_way(few):
    """The chapter's equation for the gain, against the difference of log probabilities."""
    (law, kinds), _ = few
    a, which = 0.02, int(np.flatnonzero(kinds == "planted")[0])
    g = torch.Generator().manual_seed(3)
    start = torch.randn(1, *law.latent_shape, generator=g, dtype=torch.float64)
    way = 0.05 * torch.randn(1, *law.latent_shape, generator=g, dtype=torch.float64)

    def log_p(x):
        return law.log_posterior(x, a, law.log_counts)[0, which].item()

    nodes, weights = np.polynomial.legendre.leggauss(40)
    x = law.atoms[which]
    total = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        p = law.log_posterior(start + node * way, a, law.log_counts).exp()
        mean = (p @ law.atoms.flatten(1)).reshape(law.latent_shape)
        total += weight * float((way[0] * (x - mean)).sum())
    assert log_p(start + way) - log_p(start) == pytest.approx(a**0.5 / (1 - a) * total, rel=1e-6)
