"""The ledger: its arithmetic by a second path, its rows, its pages.

Its verdicts on the lab are tested in `test_site.py`, which builds the book.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from memlib import claims
from memlib.site import ledger, page

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def numbers():
    return np.random.default_rng(3).normal(2.0, 1.0, 40)


def trace_of(sampler="ddim", model="lab", direction="reverse", score="sscd"):
    attrs = {"model": model, "sampler": sampler, "direction": direction, "fingerprint": "f" * 64,
             "versions": '{"torch": "2"}', "guidance": 7.5, "dtype": "float32"}  # fmt: skip
    severity = (("prompt", "seed"), np.zeros((5, 3)), {"measure": score, "sha256": "9f26" * 16})
    gram = (("prompt", "seed", "step"), np.zeros((5, 3, 4)))
    return xr.Dataset({"gram": gram, "severity": severity}, attrs=attrs)


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


def grouped(values, **coords):
    names = ("prompt", "seed")[: np.ndim(values)]
    return xr.DataArray(values, {n: ("prompt", c) for n, c in coords.items()}, dims=names)


def test_designed_levels_are_kept():
    """Between levels nothing is drawn: what differs between them alone has no interval."""
    copies = np.repeat([1, 2, 4, 8], 6)
    value, low, high = claims.interval(np.mean, grouped(10.0 * copies, multiplicity=copies))
    assert value == low == high
    wide = claims.interval(np.mean, 10.0 * copies)
    assert wide[2] - wide[1] > 10
    # a level of one prompt cannot vary on its own: no level then
    alone = grouped(10.0 * copies[:19], multiplicity=copies[:19])
    assert claims.interval(np.mean, alone) == claims.interval(np.mean, 10.0 * copies[:19])


def test_a_levels_variance_is_that_of_its_mean(numbers):
    """n - 1 of n: of a stratified mean the variance has no bias, however small the levels."""
    x = numbers[:39].reshape(13, 3)
    drawn = grouped(x.ravel(), multiplicity=np.repeat(np.arange(13), 3))
    _, low, high = claims.interval(np.mean, drawn)
    expected = np.sqrt((x.var(1, ddof=1) / 3).mean() / 13)
    assert (high - low) / 2 / 1.96 == pytest.approx(expected, rel=0.06)


def test_near_duplicates_count_once(numbers):
    copied = np.concatenate([numbers, np.repeat(numbers[:1], 60)])
    groups = np.concatenate([np.arange(40), np.zeros(60, int)])
    assert claims.interval(np.mean, grouped(copied, group=groups)) == pytest.approx(
        claims.interval(np.mean, numbers), abs=0.05
    )
    unknown = grouped(numbers, group=np.where(np.arange(40) < 3, 7.0, np.nan))
    assert claims.interval(np.mean, unknown)[0] == pytest.approx(
        np.mean([numbers[:3].mean(), *numbers[3:]])
    )


def test_seeds_are_drawn_too():
    """The same for all prompts: what all share in a seed widens the interval of their mean."""
    rng = np.random.default_rng(5)
    prompts, seeds = rng.normal(0, 0.1, (200, 1)), rng.normal(0, 1, 10)
    _, low, high = claims.interval(np.mean, prompts + seeds)
    assert (high - low) / 2 / 1.96 == pytest.approx(seeds.std() / 10**0.5, rel=0.1)
    _, low, high = claims.interval(np.mean, prompts + seeds - seeds)
    assert high - low < 0.05


def test_no_verdict_hangs_on_what_was_drawn(numbers):
    """Ends from a few resamples lie outside those from very many, three standard errors each."""
    _, low, high = claims.interval(np.mean, numbers, resamples=400_000)
    for count in (1000, 5000, 20_000):
        _, lower, higher = claims.interval(np.mean, numbers, resamples=count)
        assert lower <= low + 1e-3
        assert higher >= high - 1e-3


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
        ("overestimated", 0.1, 1.0, "holds"),
        ("overestimated", 0.0, 1.0, "not decided"),
        ("overestimated", -0.8, 0.0, "does not hold"),
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
    claims.judge("grows-with-guidance", trace_of(), np.median, np.zeros(9))
    claims.judge("grows-with-guidance", trace_of(), np.median, numbers + 3)
    claims.judge("grows-with-guidance", trace_of("ddpm", "./my/pipe"), np.median, numbers)
    claims.judge("loss-identity", trace_of("none", direction="forward"), np.max, numbers)
    table = ledger.read()
    assert list(table.claim) == ["loss-identity", "grows-with-guidance", "grows-with-guidance"]
    assert list(table.model) == ["lab", "lab", "pipe"]
    assert list(table.sampler) == ["any", "ddim", "ddpm"]
    assert table.verdict[1] == "holds"
    assert np.isclose(table.value[1], np.median(numbers) + 3)
    assert not list(tmp_path.rglob("*.partial"))
    claims.judge("overestimated", trace_of(), np.median, numbers)
    claims.judge("overestimated", trace_of("ddpm"), np.median, numbers)
    first = [row for row in ledger.read_rows() if row["claim"] == "overestimated"]
    assert [row["sampler"] for row in first] == ["any"]  # one measurement, not two
    old = tmp_path / "results/lab/ddpm/overestimated.json"  # of a version that judged it twice
    old.parent.mkdir()
    old.write_text(json.dumps(first[0] | {"sampler": "ddpm"}))
    assert len([r for r in ledger.read_rows() if r["claim"] == "overestimated"]) == 1
    shown = claims.table(table.to_dict("records"))
    title = claims.CLAIMS["grows-with-guidance"]["title"]
    assert shown.needed[title].iloc[0] == "above 0"


def test_rows_of_another_score_stand_beside(tmp_path, monkeypatch, numbers):
    """Where the number depends on the score; elsewhere there is one row, whatever the score."""
    monkeypatch.chdir(tmp_path)
    for shift, score in enumerate(("sscd", "sscd-large288")):
        for name in ("guidance-needed", "overestimated"):
            claims.judge(name, trace_of(score=score), np.median, numbers + shift)
    table = ledger.read()
    assert list(table.claim) == ["overestimated", "guidance-needed", "guidance-needed"]
    assert list(table.measure) == ["", "sscd", "sscd-large288"]
    assert list(table.measure_sha256) == ["", "9f26" * 3, "9f26" * 3]
    assert np.allclose(table.value - np.median(numbers), [1, 0, 1])
    assert list(claims.table(table.to_dict("records")).score) == ["", "sscd", "sscd-large288"]
    assert "score" not in claims.table(table.to_dict("records")[:1])
    claims.judge("guidance-needed", trace_of(), np.median, numbers[:0])
    assert list(ledger.read().measure) == ["", "sscd-large288"]


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_claim_says_whether_its_number_depends_on_the_score(name):
    claim = claims.CLAIMS[name]
    depends = re.search("severity|copied|pictures", claim["statistic"])
    assert claim.get("score", False) == bool(depends)


def test_rows_of_earlier_versions_are_read(tmp_path):
    """Without measure and precision; a model of the Hub by its old name, but no folder."""
    old = [row("guidance-needed", "realvis", fingerprint=f"{REALVIS}@{'c' * 40}"), row()]
    old += [row(model="realvis", sampler="ddpm")]
    ledger_of(tmp_path, [{k: r[k] for k in r if k not in ("measure", "precision")} for r in old])
    table = ledger.read(tmp_path / "results").set_index(["claim", "model"])
    assert table.measure["guidance-needed", "realvis14"] == "sscd"
    assert table.measure["grows-with-guidance", "lab"] == ""
    assert ("grows-with-guidance", "realvis") in table.index
    lines = (tmp_path / "stage/_static/results.csv").read_text().splitlines()
    assert lines[1].startswith("grows-with-guidance,lab,the lab,")
    assert lines[2].startswith("grows-with-guidance,realvis,realvis,")
    assert lines[3].startswith(f"guidance-needed,realvis14,Realistic Vision V1.4,{REALVIS}@cccc")


def test_what_is_in_a_fingerprint_is_kept(tmp_path, monkeypatch, numbers):
    """Hashes are shortened, each of them; a folder that is called like a model is another one."""
    monkeypatch.chdir(tmp_path)
    for model, fingerprint in (
        ("lab", "a" * 64), ("./lab", f"{'b' * 64} vae {'c' * 64}"), ("./sd14", "d" * 64),
        ("realvis", f"{REALVIS}@{'e' * 40} {FILE}"),
    ):  # fmt: skip
        trace = trace_of(model=model)
        trace.attrs["fingerprint"] = fingerprint
        claims.judge("grows-with-guidance", trace, np.median, numbers)
    found = ledger.read()
    assert dict(zip(found.model, found.fingerprint, strict=True)) == {
        "lab": "a" * 12, "./lab": f"{'b' * 12} vae {'c' * 12}", "./sd14": "d" * 12,
        "realvis14": f"{REALVIS}@{'e' * 40} {FILE}",
    }  # fmt: skip
    titles = [ledger.build_of(row)[0] for row in ledger.read_rows()]
    assert titles == ["the lab", "./lab", "./sd14", "Realistic Vision V1.4"]


def test_a_group_without_prompts_leaves_no_row(tmp_path, monkeypatch, numbers):
    monkeypatch.chdir(tmp_path)
    claims.judge("converge-earlier", trace_of(), claims.ratio, numbers, numbers)
    assert len(ledger.read()) == 1
    row = claims.judge("converge-earlier", trace_of(), claims.ratio, numbers, numbers[:0])
    assert row is None
    assert ledger.read().empty
    assert claims.table([row]).empty


def test_an_unknown_claim_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError, match="did you mean 'overestimated'"):
        claims.judge("overestimate", trace_of(), np.median, np.ones(4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_claim_has_a_line_a_figure_and_a_chapter_that_settles_it(name):
    claim = claims.CLAIMS[name]
    assert ("above" in claim) != ("below" in claim)
    assert claim["by"] in ("paper", "book")
    texts = ("title", "words", "ours", "statistic", "baseline", "population")
    assert all(claim[text] for text in texts)
    assert isinstance(claim["seen"], bool)
    text = (ROOT / f"book/{claim['chapter']}.md").read_text()
    assert f"name: {claim['figure']}\n" in text
    assert f'"{name}"' in text


def ledger_of(tmp_path, rows):
    """The files that the driver makes of these rows."""
    for row in rows:
        name = f"{row['claim']}.{row.get('measure')}.{row['fingerprint'][-4:]}.json"
        file = tmp_path / "results" / row["model"] / row["sampler"] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
    (tmp_path / "stage/_static").mkdir(parents=True)
    ledger.write_pages(tmp_path / "results", tmp_path / "stage")
    return [(tmp_path / "stage" / n).read_text() for n in ("_matrix.md", "_ledger.md")]


REALVIS = "SG161222/Realistic_Vision_V1.4"
FILE = "Realistic_Vision_V1.4.safetensors config 123456789abc"
SD14 = "CompVis/stable-diffusion-v1-4"


def row(claim="grows-with-guidance", model="lab", sampler="ddim", verdict="holds", **more):
    measure = "sscd" if claims.CLAIMS.get(claim, {}).get("score") else ""
    return {"claim": claim, "model": model, "sampler": sampler, "verdict": verdict, "value": 6.9,
            "low": 6.8, "high": 7.0, "prompts": [18], "sizes": {"seed": 10, "step": 51},
            "guidance": 7.5, "fingerprint": "f" * 12, "versions": {"torch": "2"},
            "measure": measure, "precision": "float32"} | more  # fmt: skip


def cells_of(matrix, name):
    """The words of a claim's cells, one list for each of its lines."""
    lines = [line for line in matrix.splitlines() if f"ledger.html#{name}" in line]
    return [re.findall(r"<td[^>]*>(?:<a [^>]*>)?([^<]*)", line) for line in lines]


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_claim_says_what_a_run_found(name):
    row = {"claim": name, "value": 0.1234, "low": -0.2, "high": 0.3}
    told = [claims.said(row | {"verdict": v}) for v in ("holds", "does not hold", "not decided")]
    assert len(set(told)) == 3
    assert not any(re.search(r"[{}]|\d\.\d{5}|[ (]-\d", text) for text in told)
    assert told[2].startswith(
        f"“{claims.CLAIMS[name]['title']}” is not decided: 0.123 (95 %: −0.2 to 0.3; "
    )


def test_one_sentence_says_where_verdicts_differ(monkeypatch):
    glued = {}
    monkeypatch.setattr(page, "glue", glued.update)
    row = {"claim": "guided-error", "low": 0.1, "high": 0.9, "value": 0.5, "measure": ""}
    rows = [row | {"sampler": "ddim", "verdict": "does not hold"}, None]
    rows += [row | {"sampler": "ddpm", "verdict": "not decided"}]
    page.verdicts(rows)
    assert glued["verdicts"].endswith("once an epoch (DDIM). With DDPM it is not decided.")


def test_what_was_not_run_says_so(tmp_path):
    """The lab has its column; the models that the paper may mean are named in one line."""
    matrix, ledger = ledger_of(tmp_path, [])
    assert matrix.count('colspan="2" class="not-run">not run</td>') == len(claims.CLAIMS)
    assert ledger.count("- not run") == len(claims.CLAIMS)
    assert "holds</a>" not in matrix
    names = "SD v1.4, SD v2.1, SD v2.1-base, Realistic Vision V1.4, Realistic Vision V2.0"
    assert f"Not run yet: {names}.\n" in matrix


def test_the_matrix_has_a_column_for_each_model_and_sampler(tmp_path):
    rows = [row(), row(sampler="ddpm", verdict="not decided"), row(model="a<b>"),
            row("loss-identity", sampler="any"), row("gone")]  # fmt: skip
    matrix, ledger = ledger_of(tmp_path, rows)
    assert cells_of(matrix, "grows-with-guidance") == [
        ["✓ holds", "? not decided", "✓ holds", "not run"]  # the lab, then a model of one's own
    ]
    assert "a&lt;b&gt;" in matrix
    assert "a<b>" not in matrix + ledger
    assert cells_of(matrix, "loss-identity")[0].count("✓ holds") == 1  # one measurement, one cell
    assert matrix.count('<td colspan="2" class="holds">') == 1
    assert (
        "- **holds** on the lab, DDIM: 6.9 (95 %: 6.8 to 7; 18 prompts, 10 seeds, 51 states)"
        in ledger
    )
    table = pd.read_csv(tmp_path / "stage/_static/results.csv")
    assert list(table.claim) == ["loss-identity", *["grows-with-guidance"] * 3]
    assert table.value.eq(6.9).all()
    assert table.versions.eq("torch 2").all()


def test_a_column_is_of_one_checkpoint_and_precision(tmp_path):
    """Named by what was loaded, not by what was typed; two of one name are never one column."""
    rows = [
        row(model="sd14", fingerprint=f"{SD14}@{'a' * 40}", precision="float16"),
        row(model="stable-diffusion-v1-4", sampler="ddpm", fingerprint=f"{SD14}@{'a' * 40}",
            precision="float16", verdict="not decided"),
        row(model="sd14", fingerprint=f"{SD14}@{'b' * 40} vae some/vae@{'d' * 40}", value=5.0),
        row(model="realvis", fingerprint=f"{REALVIS}@{'c' * 40} {FILE} vae {'e' * 12}",
            verdict="does not hold"),
    ]  # fmt: skip
    matrix, ledger = ledger_of(tmp_path, rows)
    heads = re.findall(r'<th colspan="2">([^<]*)(?:<br><small[^>]*>([^<]*))?', matrix)
    assert heads == [
        ("the lab", ""),
        ("SD v1.4", "@aaaaaaaa, float16"),
        ("SD v1.4", "@bbbbbbbb, VAE @dddddddd, float32"),
        ("Realistic Vision V1.4", "@cccccccc, VAE eeeeeeeeeeee, float32"),
    ]
    assert cells_of(matrix, "grows-with-guidance") == [
        ["not run", "✓ holds", "? not decided", "✓ holds", "not run", "✗ does not hold", "not run"]
    ]
    assert f"- SD v1.4: `{SD14}@{'a' * 40}` float16" in matrix
    assert f"{REALVIS}@{'c' * 40} {FILE} vae" in matrix
    assert "Not run yet: SD v2.1, SD v2.1-base, Realistic Vision V2.0.\n" in matrix
    assert "on SD v1.4 (@bbbbbbbb, VAE @dddddddd, float32), DDIM: 5 " in ledger
    table = pd.read_csv(tmp_path / "stage/_static/results.csv")
    assert table.checkpoint.to_list() == ["Realistic Vision V1.4", "SD v1.4", "SD v1.4", "SD v1.4"]
    assert f"{SD14}@{'b' * 40} vae some/vae@{'d' * 40}" in set(table.fingerprint)
    assert list(table.precision) == ["float32", "float16", "float32", "float16"]


def test_two_labs_are_told_apart(tmp_path):
    matrix, _ = ledger_of(tmp_path, [row(), row(fingerprint="e" * 12, sampler="ddpm")])
    assert "ffffffff, float32" in matrix
    assert "eeeeeeee, float32" in matrix
    assert "Not run yet: SD v1.4" in matrix
    assert cells_of(matrix, "grows-with-guidance") == [["✓ holds", "not run", "not run", "✓ holds"]]


def test_a_line_of_the_matrix_is_of_one_score(tmp_path):
    rows = [row("d1-severity"), row(), row("d1-severity", verdict="not decided", value=0.4,
            measure="sscd-large288")]  # fmt: skip
    matrix, ledger = ledger_of(tmp_path, rows)
    assert cells_of(matrix, "d1-severity") == [["✓ holds", "not run"], ["? not decided", "not run"]]
    assert "(above 0.5; score: sscd)" in matrix
    assert "(above 0.5; score: sscd-large288)" in matrix
    assert "- **holds** on the lab, DDIM, scored by sscd, weaker evidence: 6.9" in ledger
    assert "on the lab, DDIM, scored by sscd-large288, weaker evidence: 0.4" in ledger
    assert "on the lab, DDIM: 6.9" in ledger  # this one does not depend on it
    table = pd.read_csv(tmp_path / "stage/_static/results.csv", keep_default_na=False)
    assert list(table.measure) == ["", "sscd", "sscd-large288"]


def test_of_two_rows_of_one_cell_the_later_is_shown(tmp_path):
    """As when a model is run by its old name, then by the new one."""
    same = {"fingerprint": f"{REALVIS}@{'c' * 40}"}
    ledger_of(tmp_path, [row(model="realvis14", **same), row(model="realvis", value=3.0, **same)])
    files = sorted((tmp_path / "results").rglob("*.json"))
    for newest in range(2):
        for number, file in enumerate(files):
            os.utime(file, (number == newest, number == newest))
        ledger.write_pages(tmp_path / "results", tmp_path / "stage")
        matrix = (tmp_path / "stage/_matrix.md").read_text()
        shown = "3" if "realvis/" in str(files[newest]) else "6.9"
        assert re.findall(r"<small>([\d.]+)</small>", matrix) == [shown]
