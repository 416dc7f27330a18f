"""The claims ledger: what is claimed, by which number it is judged, and what the runs said.

The claims stand in `claims.toml`, with the threshold that each number has to pass. A chapter calls
`judge`, which computes the number, its bootstrap interval over prompts and the verdict, and keeps
them as one small file for each claim, model, sampler and, where the number depends on it, copy
score. `memlib.site.book` puts them on the pages.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from memlib.errors import nearest

CLAIMS: dict[str, dict] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
Numbers = np.ndarray | xr.DataArray | pd.Series
RESULTS = Path("results")  # of the folder a chapter runs in


def ratio(first: np.ndarray, second: np.ndarray, axis: int = -1):
    """Ratio of two groups' medians."""
    return np.median(first, axis) / np.median(second, axis)


def difference(first: np.ndarray, second: np.ndarray, axis: int = -1):
    """Difference of two groups' medians."""
    return np.median(first, axis) - np.median(second, axis)


def pearson(x: np.ndarray, y: np.ndarray, axis: int = -1):
    """Pearson's correlation."""
    return stats.pearsonr(x, y, axis=axis).statistic


def spearman(x: np.ndarray, y: np.ndarray, axis: int = -1):
    """Spearman's rank correlation."""
    return pearson(stats.rankdata(x, axis=axis), stats.rankdata(y, axis=axis), axis)


def interval(
    statistic: Callable, *groups: Numbers, paired: bool = False, resamples: int = 20_000
) -> tuple[float, float, float]:
    """A statistic and its central 95 % when prompts and seeds are drawn again.

    Prompts are drawn with replacement within their levels, the kinds and numbers of copies that
    were designed, from each level of n prompts n - 1 (Rao and Wu 1988). Near-duplicates count as
    one prompt, their mean. Seeds are drawn too, the same for all prompts, as a seed is the same
    noise for each (Owen 2007); that errs on the wide side. The ends lie three of their own
    standard errors further out, so that no verdict hangs on what was drawn.

    Parameters
    ----------
    statistic : takes the groups, one number a prompt each, and `axis`.
    groups : numbers [prompt] or [prompt, seed]. Kinds, copies and near-duplicates are read off a
        DataArray's coordinates; other arrays have one level. Each group is drawn on its own; with
        `paired`, the same prompts of all, by the first one's coordinates.

    Returns
    -------
    value, low, high. The interval is NaN where a resample has no statistic, as a correlation of
    equal numbers.
    """
    units = [_units(group, groups[0] if paired else group) for group in groups]
    rng, found, widths = np.random.default_rng(0), [], sorted({x.shape[1] for x, _ in units})
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there is no statistic, it shows as NaN
        value = float(statistic(*(x.mean(1) for x, _ in units), axis=-1))
        if min(len(x) for x, _ in units) < 2:
            return value, np.nan, np.nan
        for start in range(0, resamples, 500):
            count = min(500, resamples - start)
            seeds = {n: rng.multinomial(n, np.full(n, 1 / n), count) / n for n in widths}
            picks = [_draw(level, count, rng) for _, level in units[: 1 if paired else None]]
            drawn = [
                np.take_along_axis(seeds[x.shape[1]] @ x.T, picks[0 if paired else i], 1)
                for i, (x, _) in enumerate(units)
            ]
            found.append(statistic(*drawn, axis=-1))
    outside = 0.025 - 3 * np.sqrt(0.025 * 0.975 / resamples)
    return value, *map(float, np.quantile(np.concatenate(found), [outside, 1 - outside]))


def _units(values: Numbers, like: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [prompt, seed] with near-duplicates averaged, and the level of each prompt."""
    known = getattr(like, "coords", {})
    own = pd.Series([f"row {n}" for n in range(len(like))])
    labels = {n: pd.Series(known[n]) for n in ("kind", "multiplicity", "group") if n in known}
    group = labels.pop("group", own)
    group = group.astype(str).where(group.notna(), own)
    level = sum((label.astype(str) + " " for label in labels.values()), start=own.map(lambda _: ""))
    unit = level + group
    x = pd.DataFrame(np.asarray(values, dtype=float).reshape(len(like), -1))
    x, level = x.groupby(unit.values).mean(), level.groupby(unit.values).first()
    if level.value_counts().min() < 2:  # a level of one prompt could not vary
        level = level.map(lambda _: "")
    return x.values, level.to_numpy(str)


def _draw(level: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places of `count` resamples, [resample, prompt]: n - 1 of each level's n."""
    places = [np.flatnonzero(level == name) for name in np.unique(level)]
    return np.hstack([p[rng.integers(len(p), size=(count, len(p) - 1))] for p in places])


def verdict(name: str, low: float, high: float) -> str:
    """Whether the whole interval lies on the claim's side of its threshold."""
    claim = CLAIMS[name]
    if "above" in claim:
        holds, fails = low > claim["above"], high <= claim["above"]
    else:
        holds, fails = high < claim["below"], low >= claim["below"]
    return "holds" if holds else "does not hold" if fails else "not decided"


def judge(
    name: str,
    trace: xr.Dataset,
    statistic: Callable,
    *groups: Numbers,
    paired: bool = False,
    **sizes: int,
) -> dict | None:
    """Judge one claim by `interval(statistic, *groups)` and keep the row in the results folder.

    `trace` says which model and sampler the numbers are of. A forward trace and the first state
    have no sampler: their row stands for all. A claim with `score` has one row for each measure of
    severity. `sizes` (seed, draw, step) say what the numbers are of where that is not the whole
    trace. Where a group has no prompts there is no row, and none from an earlier run.
    """
    if name not in CLAIMS:
        raise KeyError(f"unknown claim {name!r}{nearest(name, CLAIMS)}")
    attrs, origin = trace.attrs, trace.attrs["fingerprint"]
    model = attrs["model"]
    if model != f"./{Path(model).name}":  # that is a folder called like a model of ours
        model = Path(model).name
    alike = attrs["direction"] == "forward" or CLAIMS[name].get("first")
    sampler = "any" if alike else attrs["sampler"]
    score = trace.severity.attrs if CLAIMS[name].get("score") else {}
    measure = score.get("measure", "")
    other = f".{measure}" if measure not in ("", "sscd") else ""
    file = RESULTS / model.replace("/", "_") / sampler / f"{name}{other}.json"
    if min(len(group) for group in groups) == 0:
        file.unlink(missing_ok=True)
        return None
    value, low, high = interval(statistic, *groups, paired=paired)
    drawn = [_units(group, group) for group in groups[: 1 if paired else None]]
    row = {
        "claim": name,
        "model": model,
        "sampler": sampler,
        "measure": measure,
        "measure_sha256": score.get("sha256", "")[:12],  # of an official SSCD file
        "value": value,
        "low": low,
        "high": high,
        "verdict": verdict(name, low, high),
        "prompts": [len(x) for x, _ in drawn],
        "levels": [len(np.unique(level)) for _, level in drawn],
        "guidance": attrs.get("guidance"),
        "sizes": {d: trace.sizes[d] for d in ("seed", "draw", "step") if d in trace.sizes} | sizes,
        # repository@commit, or a hash; of file and configuration, and of a VAE of its own
        "fingerprint": re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", origin),
        "precision": attrs.get("dtype", ""),
        "versions": json.loads(attrs["versions"]),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(row, indent=1))
    os.replace(partial, file)
    return row


def needed(claim: dict) -> str:
    """Where a claim's number has to lie for it to hold."""
    side = "above" if "above" in claim else "below"
    return f"{side} {claim[side]:g}"


def said(row: dict) -> str:
    """What a row found, as a sentence with its number."""
    claim = CLAIMS[row["claim"]]
    text = "“{title}” is not decided: {value:.3g} (95 %: {low:.3g} to {high:.3g}; needed: "
    text += needed(claim) + ")."
    text = {"holds": claim["holds"], "does not hold": claim["fails"]}.get(row["verdict"], text)
    return text.format(**claim | row).replace(" -", " −").replace("(-", "(−")


def table(rows: list[dict | None]) -> pd.DataFrame:
    """Rows as a reader sees them: claim, what the number is, score if it matters, verdict."""
    shown = pd.DataFrame({
        "claim": CLAIMS[row["claim"]]["title"], "verdict": row["verdict"],
        "sampler": row["sampler"], "score": row["measure"], "number": f"{row['value']:.3g}",
        "95 %": f"{row['low']:.3g} to {row['high']:.3g}", "needed": needed(CLAIMS[row["claim"]]),
        "what is judged": CLAIMS[row["claim"]]["statistic"],
    } for row in rows if row)  # fmt: skip
    shown = shown.drop(columns="score") if len(shown) and not any(shown.score) else shown
    return shown.set_index("claim") if len(shown) else shown
