"""Statistics of the first calls: closed forms, the sampler's own states, the lab's truth."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import mannwhitneyu

import memlib
from memlib import cli
from memlib.detection import detect as detection
from memlib.detection import statistics
from memlib.detection.statistics import STATISTICS, Calls
from memlib.hub.spread import SpreadModel
from memlib.lab.scenes import world

DOUBLE = dict(dtype=torch.float64)


def linear(count=3, seeds=4, side=8, shift=0.0) -> Calls:
    """Networks whose predictions are linear in the state: their Hessians are known."""
    generator = torch.Generator().manual_seed(1)
    size = 2 * side * side
    cond, uncond = (torch.randn(size, size, generator=generator, **DOUBLE) / size for _ in "ab")
    offset = torch.randn(count, 1, size, generator=generator, **DOUBLE)
    x = torch.randn(1, seeds, 2, side, side, generator=generator, **DOUBLE).expand(
        count, -1, -1, -1, -1
    )

    def ask(x, timestep):
        flat = x.flatten(2)
        made = (flat @ uncond.T, flat @ cond.T + offset + shift * timestep)
        return tuple(v.reshape(x.shape) for v in made)

    calls = Calls(x, 981, 0.01, *ask(x, 981), ask)
    calls.ask.matrices = cond, uncond
    return calls


def test_magnitudes_are_those_of_numpy():
    calls = linear()
    gap = (calls.eps_cond - calls.eps_uncond).numpy()
    want = np.sqrt((gap**2).sum((2, 3, 4))).mean(1)
    assert statistics.magnitude(calls) == pytest.approx(want)
    gap = gap - gap.mean((3, 4), keepdims=True)
    assert statistics.centred_magnitude(calls) == pytest.approx(
        np.sqrt((gap**2).sum((2, 3, 4))).mean(1)
    )


def test_the_norm_is_that_of_the_estimate(lab):
    """The estimate is the one that the trace has, from the sampler's own first state."""
    pairs = memlib.load_pairs("lab").iloc[[0, 40]]
    calls = detection.first_calls(lab, list(pairs.caption), seeds=2)
    trace = memlib.reverse_trace(lab, pairs, range(2), steps=50, similarity=None, progress=False)
    first = memlib.norm(trace, memlib.x0_hat(trace, 1.0)).isel(step=0)
    assert statistics.estimate_norm(calls) == pytest.approx(first.mean("seed").values, rel=1e-4)
    gap = memlib.norm(trace, {"eps_cond": 1.0, "eps_uncond": -1.0}).isel(step=0)
    assert statistics.magnitude(calls) == pytest.approx(gap.mean("seed").values, rel=1e-4)


def test_detail_is_what_a_blur_takes_away():
    x = torch.zeros(1, 1, 1, 8, 8, **DOUBLE)
    x[..., :4, :] = 3.0  # blocks are even: no detail
    flat = Calls(x, 981, 1.0, None, torch.zeros_like(x), None)
    assert statistics.detail(flat) == pytest.approx([0.0])
    checks = x + torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)
    assert statistics.detail(
        Calls(checks, 981, 1.0, None, torch.zeros_like(x), None)
    ) == pytest.approx([1])
    odd = torch.arange(6.0).reshape(1, 1, 1, 1, 6).expand(1, 1, 1, 5, 6)
    left = statistics.blurred(odd)[0, 0, 0]
    assert left[0].tolist() == [1.5, 1.5, 1.5, 1.5, 4.5, 4.5]  # what is left over is a block


def test_agreement_is_the_mean_cosine_of_pairs():
    calls = linear()
    flat = calls.estimate.flatten(2).numpy()
    for found, rows in zip(statistics.agreement(calls), flat, strict=True):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = rows @ rows.T
        assert found == pytest.approx(cosines[np.triu_indices(len(rows), 1)].mean())
    with pytest.raises(ValueError, match="needs two or more"):
        statistics.agreement(linear(seeds=1))


def test_sharpness_is_the_hessian_product():
    r"""With predictions that are linear the Hessian of the log density is -M / sqrt(1 - a)."""
    calls = linear()
    cond, uncond = calls.ask.matrices
    scale = (1 - calls.alpha_bar) ** 0.5
    score = -calls.difference.flatten(2) / scale
    want = (score @ ((cond - uncond) / -scale).T).norm(dim=-1).mean(1)
    assert statistics.sharpness(calls) == pytest.approx(want.numpy(), rel=1e-6)


def test_two_passes_look_at_the_last_timestep():
    calls = linear(shift=0.5)
    uncond, cond = (v.flatten(2).numpy() for v in calls.ask(calls.x, 1))
    gap = cond - uncond
    cosines = (gap * cond).sum(-1) / np.linalg.norm(gap, axis=-1) / np.linalg.norm(cond, axis=-1)
    assert statistics.two_passes(calls) == pytest.approx(cosines.mean(1))


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_costs_what_it_says(lab, name, monkeypatch):
    seen = []
    predict = type(lab.uncached).predict
    monkeypatch.setattr(
        type(lab.uncached), "predict", lambda *a: seen.append(len(a[1])) or predict(*a)
    )
    known = STATISTICS[name]
    seeds = known.seeds
    known.function(detection.first_calls(lab, ["a", "b"], seeds, known.first))
    assert sum(seen) == 2 * seeds * known.cost


@pytest.fixture(scope="module")
def told(lab):
    """Scores of all captions of the lab's world by one call, and their kinds."""
    rows = [row for row in world() if row.kind != "named"]
    table = detection.detect(lab, [row.caption for row in rows], progress=False)
    known = {row.caption: row for row in rows}
    kinds = [known[c].kind for c in table.caption]
    return table.assign(kind=kinds, copies=[known[c].copies for c in table.caption])


def test_the_lab_is_found_out_by_one_call(told):
    """An independent path: scipy's rank statistic on the table that a user gets."""
    deep = told.score[(told.kind == "planted") & (told.copies >= 8)]
    for kind in ("normal", "control", "held-out"):
        others = told.score[told.kind == kind]
        assert mannwhitneyu(deep, others).statistic / (len(deep) * len(others)) > 0.98, kind
    honest = told.score[told.kind.isin(["normal", "control", "held-out"])]
    assert (deep > honest.quantile(0.99)).mean() >= 0.95
    assert (told.calls == 1).all()
    assert told.score.is_monotonic_decreasing


def test_the_rate_of_false_alarms_is_right_with_calibration():
    """Of prompts like those calibrated with, as many are flagged as the rate says."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(300):
        null, scores = rng.gamma(2.0, size=199), rng.gamma(2.0, size=50)
        shares.append((detection.false_alarms(scores, null) <= 0.05).mean())
    assert np.mean(shares) == pytest.approx(0.05, abs=0.006)


def test_a_list_compared_with_itself():
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(5, 2, 970), np.full(30, 20.0)])
    rates = detection.false_alarms(scores, scores, own=True)
    assert (rates[-30:] < 1e-4).all()
    assert (rates[:970] <= 0.01).mean() == pytest.approx(0.01, abs=0.008)


def test_calibrated_verdicts(lab):
    held = list(dict.fromkeys(row.caption for row in world() if row.kind == "normal"))
    deep = [row.caption for row in world() if row.kind == "planted" and row.copies >= 64]
    table = detection.detect(lab, deep, held[:120], progress=False)
    assert (table.verdict == "memorized").all()
    assert table.false_alarms.tolist() == pytest.approx([1 / 121] * len(deep))


def test_a_stopped_run_goes_on(lab, tmp_path, monkeypatch):
    out, captions = tmp_path / "scores.csv", [row.caption for row in world()[:40]]
    whole = detection.detect(lab, captions, batch_size=8, progress=False)
    real, asked = detection.first_calls, []

    def stops(model, captions, *rest):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(captions))
        return real(model, captions, *rest)

    monkeypatch.setattr(detection, "first_calls", stops)
    with pytest.raises(KeyboardInterrupt):
        detection.detect(lab, captions, batch_size=8, out=out, progress=False)
    monkeypatch.setattr(detection, "first_calls", real)
    counted = []
    monkeypatch.setattr(
        detection, "first_calls", lambda m, c, *rest: counted.append(len(c)) or real(m, c, *rest)
    )
    table = detection.detect(lab, captions, batch_size=8, out=out, progress=False)
    assert sum(counted) == 16
    pd.testing.assert_frame_equal(table, whole, check_exact=False, rtol=1e-5)
    with pytest.raises(ValueError, match="is of other settings"):
        detection.detect(lab, captions, seeds=2, out=out)


@pytest.mark.parametrize(("options", "message"), [
    (dict(prompts=[]), "no prompts"),
    (dict(prompts=["a cat", " "]), "prompt 2 is empty"),
    (dict(prompts=["a cat"]), "1 prompts are too few to be compared with each other"),
    (dict(prompts=["a cat"], calibrate=["a dog"] * 98), "98 captions to calibrate with tell no"),
    (dict(prompts=["a cat"] * 20, rate=0.0), "lies between 0 and 1, not at 0"),
    (dict(prompts=["a cat"], statistic="detial"), "did you mean 'detail'"),
    (dict(prompts=["a cat"], statistic="agreement"), "agreement compares seeds: it needs 2"),
])  # fmt: skip
def test_bad_input_is_one_line(lab, options, message):
    with pytest.raises(ValueError, match=message) as error:
        memlib.detect(lab, **options)
    assert "\n" not in str(error.value)


def test_a_network_that_says_v(lab, monkeypatch):
    """Epsilon is what statistics see, whatever is predicted: the same scores from a v network."""
    captions = [row.caption for row in world()[:4]]
    plain = detection.first_calls(lab, captions, 2)
    scheduler = memlib.schedule.make_scheduler(lab.scheduler_config, "ddim", 50, lab.dtype)
    net, levels = lab.uncached, scheduler.alphas_cumprod

    class SaysV:
        def __getattr__(self, name):
            return getattr(net, name)

        def predict(self, x, t, text):
            a, eps = levels[int(t)], net.predict(x, t, text)
            x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            return a.sqrt() * eps - (1 - a).sqrt() * x0

        def to_epsilon(self, out, x, a):
            return a.sqrt() * out + (1 - a).sqrt() * x

    says_v = SaysV()
    says_v.uncached = says_v
    found = detection.first_calls(says_v, captions, 2)
    for name in ("detail", "magnitude", "agreement"):
        want = STATISTICS[name].function(plain)
        assert STATISTICS[name].function(found) == pytest.approx(want, rel=1e-3), name


def test_the_command(tmp_path, capsys):
    prompts = pd.DataFrame({"caption": [row.caption for row in world() if row.copies != 1][:60]})
    prompts.to_csv(tmp_path / "prompts.csv", index=False)
    out = tmp_path / "scores.csv"
    command = ["detect", "--prompts", str(tmp_path / "prompts.csv"), "--out", str(out)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "60 prompts, 1 seeds, detail: 60 calls of lab" in said
    assert len(pd.read_csv(out, skiprows=1)) == 60
    assert cli.main([*command[:3], "--statistic", "magnitud"]) == 1
    assert "did you mean 'magnitude'" in capsys.readouterr().err


class Elsewhere:
    """A model that notes the size of each batch it is asked."""

    def __init__(self, model, sizes, **other):
        self.model, self.sizes, self.other = model, sizes, other

    def __getattr__(self, name):
        return self.other.get(name) or getattr(self.model, name)

    def predict(self, x, timestep, text):
        assert len(x) == len(text)
        self.sizes.append(len(x))
        return self.model.predict(x, timestep, text)


@pytest.mark.parametrize("count", [1, 5])
def test_a_batch_is_shared_by_devices(lab, count):
    """Each device has a part of it, none an empty one; the numbers are those of one device."""
    captions = [f"a red fox number {n}" for n in range(count)]
    sizes = [[], []]
    shared = SpreadModel([Elsewhere(lab.uncached, each) for each in sizes])
    found, want = (detection.first_calls(m, captions, 1, branches=1) for m in (shared, lab))
    assert sizes == ([[3], [2]] if count == 5 else [[1], []])
    torch.testing.assert_close(found.eps_cond, want.eps_cond, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.x, want.x)


def test_a_batch_is_not_shared_by_other_weights(lab):
    with pytest.raises(ValueError, match="same weights and precision"):
        SpreadModel([lab, Elsewhere(lab, [], fingerprint="other")])


def test_the_command_on_two_devices(tmp_path, capsys):
    """The second has the same table; a device that is not here is one line."""
    for devices in ("cpu", "cpu,cpu"):
        out = tmp_path / f"{len(devices)}.csv"
        command = ["detect", "--out", str(out), "--device", devices]
        assert cli.main(command) == 0
        assert f"on {devices.replace(',', ', ')}, at most" in capsys.readouterr().out
    one, two = (pd.read_csv(tmp_path / f"{n}.csv", skiprows=1) for n in (3, 7))
    assert list(two.prompt_id) == list(one.prompt_id)
    assert two.score.to_numpy() == pytest.approx(one.score.to_numpy(), rel=1e-5)
    assert cli.main(["detect", "--device", "cuda:0,cuda:7"]) == 1
    assert "cuda:0" in capsys.readouterr().err
