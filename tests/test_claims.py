"""The ledger: its arithmetic by a second path, its rows, its pages.

Its verdicts on the lab are tested in `test_site.py`, which builds the book.
"""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from memlib import book, claims

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def numbers():
    return np.random.default_rng(3).normal(2.0, 1.0, 40)


def trace_of(sampler="ddim", model="lab", direction="reverse"):
    attrs = {"model": model, "sampler": sampler, "direction": direction, "fingerprint": "f" * 64,
             "versions": '{"torch": "2"}', "guidance": 7.5}  # fmt: skip
    return xr.Dataset({"gram": (("prompt", "seed", "step"), np.zeros((5, 3, 4)))}, attrs=attrs)


def test_the_interval_is_that_of_resampled_prompts(numbers):
    """Against a bootstrap written out, and against the normal theory of a mean."""
    value, low, high = claims.interval(np.median, numbers)
    rng = np.random.default_rng(9)
    by_hand = [np.median(rng.choice(numbers, len(numbers))) for _ in range(4000)]
    assert value == np.median(numbers)
    # two independent sets of resamples; their quantiles scatter by a few hundredths of a sigma
    assert np.allclose([low, high], np.quantile(by_hand, [0.025, 0.975]), atol=0.12)
    _, low, high = claims.interval(np.mean, numbers)
    half = 1.96 * numbers.std() / np.sqrt(len(numbers))
    assert np.allclose([low, high], [numbers.mean() - half, numbers.mean() + half], atol=0.05)


def test_pairs_stay_together(numbers):
    twice = 2 * numbers
    assert claims.interval(claims.pearson, numbers, twice, paired=True) == pytest.approx((1, 1, 1))
    assert claims.interval(claims.ratio, twice, numbers, paired=True) == pytest.approx((2, 2, 2))
    _, low, high = claims.interval(claims.ratio, twice, numbers)  # drawn apart
    assert low < 1.95
    assert high > 2.05


def test_the_statistics_are_the_textbooks(numbers):
    other = numbers**3 + np.random.default_rng(4).normal(0, 9, 40)
    assert np.isclose(claims.pearson(numbers, other), np.corrcoef(numbers, other)[0, 1])
    assert np.isclose(claims.spearman(numbers, other), stats.spearmanr(numbers, other).statistic)
    block = np.stack([numbers, other])
    rows = claims.spearman(block, block[::-1], axis=-1)
    assert np.allclose(rows, claims.spearman(numbers, other))
    assert claims.ratio(np.array([1.0, 4, 9]), np.array([2.0, 2, 8])) == 2


@pytest.mark.parametrize(
    ("name", "low", "high", "expected"),
    [
        ("overestimated", 1.1, 2.0, "holds"),
        ("overestimated", 1.0, 2.0, "not decided"),
        ("overestimated", 0.2, 1.0, "does not hold"),
        ("conditional-loss", 0.2, 0.9, "holds"),
        ("conditional-loss", 0.2, 1.0, "not decided"),
        ("conditional-loss", 1.0, 1.2, "does not hold"),
        ("overestimated", np.nan, np.nan, "not decided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(name, low, high, expected):
    assert claims.verdict(name, low, high) == expected


def test_too_few_or_equal_numbers_decide_nothing(numbers):
    assert np.isnan(claims.interval(np.median, np.ones(1))[1])
    equal = np.ones(8)
    assert np.isnan(claims.interval(claims.pearson, equal, numbers[:8], paired=True)[1])


def test_a_row_is_kept_and_replaced(tmp_path, monkeypatch, numbers):
    monkeypatch.chdir(tmp_path)
    claims.settle("overestimated", trace_of(), np.median, np.zeros(9))
    claims.settle("overestimated", trace_of(), np.median, numbers + 3)
    claims.settle("overestimated", trace_of("ddpm", "./my/pipe"), np.median, numbers)
    claims.settle("loss-identity", trace_of("none", direction="forward"), np.max, numbers)
    table = claims.read()
    assert list(table.claim) == ["loss-identity", "overestimated", "overestimated"]
    assert list(table.model) == ["lab", "lab", "pipe"]
    assert list(table.sampler) == ["any", "ddim", "ddpm"]
    assert table.verdict[1] == "holds"
    assert np.isclose(table.value[1], np.median(numbers) + 3)
    assert not list(tmp_path.rglob("*.partial"))
    shown = claims.table(table.to_dict("records"))
    assert shown.line["overestimated"].iloc[0] == "above 1"


def test_a_group_without_prompts_leaves_no_row(tmp_path, monkeypatch, numbers):
    monkeypatch.chdir(tmp_path)
    claims.settle("converge-earlier", trace_of(), claims.ratio, numbers, numbers)
    assert len(claims.read()) == 1
    row = claims.settle("converge-earlier", trace_of(), claims.ratio, numbers, numbers[:0])
    assert row is None
    assert claims.read().empty
    assert claims.table([row]).empty


def test_an_unknown_claim_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError, match="did you mean 'overestimated'"):
        claims.settle("overestimate", trace_of(), np.median, np.ones(4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_claim_has_a_line_a_figure_and_a_chapter_that_settles_it(name):
    claim = claims.CLAIMS[name]
    assert ("above" in claim) != ("below" in claim)
    assert claim["by"] in ("paper", "book")
    assert all(claim[text] for text in ("title", "words", "ours", "statistic"))
    text = (ROOT / f"book/{claim['chapter']}.md").read_text()
    assert f"name: {claim['figure']}\n" in text
    assert f'"{name}"' in text


def ledger_of(tmp_path, rows):
    """The files that the driver makes of these rows."""
    for row in rows:
        file = tmp_path / "results" / row["model"] / row["sampler"] / f"{row['claim']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
    (tmp_path / "stage/_static").mkdir(parents=True)
    book.write_ledger(ROOT, tmp_path / "results", tmp_path / "stage")
    return [(tmp_path / "stage" / n).read_text() for n in ("_matrix.md", "_ledger.md")]


def row(claim="overestimated", model="lab", sampler="ddim", verdict="holds"):
    return {"claim": claim, "model": model, "sampler": sampler, "verdict": verdict, "value": 6.9,
            "low": 6.8, "high": 7.0, "prompts": [18], "sizes": {"seed": 10, "step": 51},
            "guidance": 7.5, "fingerprint": "f" * 12, "versions": {"torch": "2"}}  # fmt: skip


def test_what_was_not_run_says_so(tmp_path):
    matrix, ledger = ledger_of(tmp_path, [])
    assert matrix.count('colspan="2" class="not-run">not run</td>') == 4 * len(claims.CLAIMS)
    assert ledger.count("- not run") == len(claims.CLAIMS)
    assert "holds</a>" not in matrix


def test_the_matrix_has_a_column_for_each_model_and_sampler(tmp_path):
    rows = [row(), row(sampler="ddpm", verdict="not decided"), row(model="a<b>"),
            row("loss-identity", sampler="any"), row("gone")]  # fmt: skip
    matrix, ledger = ledger_of(tmp_path, rows)
    cells = next(line for line in matrix.splitlines() if "ledger.html#overestimated" in line)
    cells = re.findall(r"<td[^>]*>(?:<a [^>]*>)?([^<]*)", cells)
    assert cells[:2] == ["✓ holds", "? not decided"]
    assert cells[2:] == ["not run"] * 3 + ["✓ holds", "not run"]  # the last two: the fifth model
    assert "a&lt;b&gt;" in matrix
    assert "a<b>" not in matrix + ledger
    identity = next(line for line in matrix.splitlines() if "#loss-identity" in line)
    assert identity.count("✓ holds") == 2  # without a sampler: a row for both
    assert (
        "- **holds** on the lab, DDIM: 6.9 (95 %: 6.8 to 7; 18 prompts, 10 seeds, 51 states)"
        in ledger
    )
    table = pd.read_csv(tmp_path / "stage/_static/results.csv")
    assert list(table.claim) == ["loss-identity", "overestimated", "overestimated", "overestimated"]
    assert table.value.eq(6.9).all()
    assert table.versions.eq("torch 2").all()
