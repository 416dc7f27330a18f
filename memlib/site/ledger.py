"""The ledger's pages: what the chapters left in their results folder, as matrix, list and CSV."""

import json
import re
from collections import namedtuple
from html import escape
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from memlib.claims import CLAIMS, RESULTS, needed, said, verdict
from memlib.hub.names import ALIASES, CHECKPOINTS, SHIPPED
from memlib.paths import ROOT, TRAININGS

TITLES = {"lab": "the lab", "lab-flow": "the flow lab"} | {
    name: c.title for name, c in CHECKPOINTS.items()
}
EULER = "flow-euler"  # the one sampler of a flow model
PAPER = ("sd14", "sd21", "sd21-base", "realvis14", "realvis20")  # what the paper may mean
FINDINGS = (  # on the landing page
    "overestimated", "guidance-needed", "overestimation-needed", "overestimation-raises",
    "overestimation-suffices", "detail-detects", "smoothed-stops", "smoothed-transfers",
)  # fmt: skip
Build = namedtuple("Build", "title origin precision")
COLUMNS = (
    "claim model checkpoint fingerprint precision sampler measure measure_sha256 value low high "
    "verdict prompts levels seeds draws states guidance versions"
).split()


def read_rows(folder: str | Path = RESULTS) -> list[dict]:
    """All rows of a results folder, the oldest first; what earlier versions left out filled in."""
    files = sorted(Path(folder).glob("*/*/*.json"), key=lambda f: (f.stat().st_mtime_ns, f))
    rows = [row for file in files if is_judged(row := json.loads(file.read_text()))]
    for row in rows:
        if "@" in row["fingerprint"].split()[0]:  # of the Hub, and no folder that is called so
            row["model"] = ALIASES.get(row["model"], row["model"])
        row.setdefault("measure", "sscd" if CLAIMS[row["claim"]].get("score") else "")
        row.setdefault("measure_sha256", "")
        row.setdefault("precision", "")
        row.setdefault("levels", [])
    return rows


def is_judged(row: dict) -> bool:
    """Whether a row is still one of the ledger's: an earlier version judged other things, too."""
    claim = CLAIMS.get(row["claim"])
    if claim is None:
        return False
    samplers = ["any"] if claim.get("first") else claim.get("samplers", [row["sampler"]])
    return row["sampler"] in samplers or (row["sampler"] == EULER and "ddim" in samplers)


def in_order(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: (list(CLAIMS).index(row["claim"]), row["model"]))


def read(folder: str | Path = RESULTS) -> pd.DataFrame:
    """All rows that runs have left in a results folder, in the order of the ledger."""
    return pd.DataFrame(in_order(read_rows(folder)))


def trainings(file: Path) -> pd.DataFrame:
    """Rows of the lab's other trainings whose number is still the same, by today's thresholds."""
    if not file.exists():
        return pd.DataFrame(columns=["claim"])
    rows = pd.read_csv(file, dtype={"fingerprint": str}, keep_default_na=False)
    today = rows.claim.map(lambda name: CLAIMS.get(name, {}).get("statistic"))
    rows = rows[rows.statistic == today]
    return rows.assign(
        verdict=[verdict(r.claim, float(r.low), float(r.high)) for r in rows.itertuples()]
    )


def build_of(row: dict) -> Build:
    """Which model a row is of, exactly.

    The title follows the repository, whatever name a row was recorded under; a folder has its own.
    """
    origin, name = row["fingerprint"], row["model"]
    of = (c for c in CHECKPOINTS.values() if origin.startswith(f"{c.repository}@"))
    titles = [c.title for c in of if c.t5 == (" t5" in origin)]
    if not titles and (name in SHIPPED or "@" in origin.split()[0]):
        titles = [TITLES.get(name, name)]
    return Build((titles or [name])[0], origin, row["precision"])


def note_on(build: Build, titles: list[str]) -> str:
    """What tells a build from others of its title: commit, VAE, precision; '' if none has to."""
    if "@" not in build.origin and titles.count(build.title) < 2:
        return ""
    text = re.sub(r" [^@]*\.safetensors config \w+", "", build.origin)
    text = re.sub(r"[\w./-]+@([\w.-]{1,8})[\w.@-]*", r"@\1", text).replace(" vae ", ", VAE ")
    return f"{text}, {build.precision}" if build.precision else text


def write_pages(results: Path, folder: Path, compared: Path | None = None) -> None:
    """Write the rows of a results folder as ``_matrix.md``, ``_ledger.md`` and ``results.csv``.

    A column of the matrix is of one model, to the commit, the VAE and the precision; a line is of
    one claim and, where the number depends on it, of one score. The latest row is shown. `compared`
    is what came of sampling recorded traces again (`memlib.bench.traces`).
    """
    rows, rank = read_rows(results), {title: n for n, title in enumerate(TITLES.values())}
    builds = dict.fromkeys(map(build_of, rows))
    if not any(build.title == TITLES["lab"] for build in builds):
        builds[Build(TITLES["lab"], "", "")] = None
    builds = sorted(builds, key=lambda build: rank.get(build.title, len(rank)))
    titles = [build.title for build in builds]
    notes = {build: note_on(build, titles) for build in builds}
    latest = {(r["claim"], r["measure"], build_of(r), r["sampler"]): r for r in rows}
    scores = {
        name: sorted({row["measure"] for row in rows if row["claim"] == name})
        or ["sscd" if claim.get("score") else ""]
        for name, claim in CLAIMS.items()
    }

    def pair(*cell) -> list[dict | None]:
        """Rows of both samplers; one without a sampler, or a flow's, stands for both."""
        alone = latest.get((*cell, "any"), latest.get((*cell, EULER)))
        return [latest.get((*cell, s), alone) for s in ("ddim", "ddpm")]

    def found(name: str) -> list[tuple[dict, Build]]:
        every = [(r, b) for s in scores[name] for b in builds for r in pair(name, s, b) if r]
        return list({id(row): (row, build) for row, build in every}.values())

    others = {}  # the lab's rows in its other trainings, by claim, measure and sampler
    for r in trainings(TRAININGS).itertuples():
        others.setdefault((r.claim, r.measure, r.sampler), []).append(r)
    shipped = {(r["claim"], r["measure"], r["sampler"]): r for r in rows if r["model"] == "lab"}
    differ = [
        f"[{CLAIMS[key[0]]['title']}](#{key[0]}){f' ({of})' if of else ''}"
        for key, row in shipped.items()
        if any(r.verdict != row["verdict"] for r in others.get(key, []))
        for of in [", ".join(k for k in key[:0:-1] if k not in ("", "any"))]
    ]
    agree = (len(others.keys() & shipped.keys()), differ)

    headings = {
        name: re.search(r"^# (.*)", (ROOT / f"book/{name}.md").read_text(), re.M)[1]
        for name in {claim["chapter"] for claim in CLAIMS.values()}
    }
    templates = Environment(
        loader=FileSystemLoader(ROOT / "book/_ext"), trim_blocks=True, keep_trailing_newline=True
    )
    templates.filters["e"] = escape
    missing = [TITLES[name] for name in PAPER if TITLES[name] not in titles]
    own = [r for r in rows if r["model"] == "lab" and r["sampler"] != "ddpm"]
    own = [r for r in in_order(own) if r["measure"] in ("", "ncc")]
    for name in ("matrix", "ledger", "findings", "forest"):
        text = templates.get_template(f"{name}.md").render(
            claims=CLAIMS, notes=notes, scores=scores, pair=pair, found=found, missing=missing,
            others=others, agree=agree, headings=headings, weak=weak, needed=needed,
            said={row["claim"]: (row["verdict"], said(row)) for row in own},
            findings=[said(row) for row in own if row["claim"] in FINDINGS],
            bars=[bar for row in own if (bar := bar_of(row))],
            flows={build_of(row) for row in rows if row["sampler"] == EULER},
            again=json.loads(compared.read_text()) if compared and compared.exists() else None,
        )  # fmt: skip
        (folder / f"_{name}.md").write_text(text)
    (folder / "_static").mkdir(exist_ok=True)
    table = pd.DataFrame(map(flat, in_order(rows)), columns=COLUMNS)
    table.to_csv(folder / "_static/results.csv", index=False, lineterminator="\n")


def bar_of(row: dict) -> dict | None:
    """A claim's interval as places of a drawing: the threshold at 560, the claim's side right."""
    claim, (low, value, high) = CLAIMS[row["claim"]], (row[n] for n in ("low", "value", "high"))
    if claim.get("identity") or not high > low:
        return None
    sign, threshold = (1, claim["above"]) if "above" in claim else (-1, claim["below"])
    places = [sign * (v - threshold) / (high - low) for v in (low, value, high)]
    low, value, high = (round(560 + 50 * min(3.8, max(-3.8, v)), 1) for v in places)
    return {
        "claim": row["claim"], "title": claim["title"], "verdict": row["verdict"],
        "low": min(low, high), "high": max(low, high), "value": value,
    }  # fmt: skip


def weak(row: dict) -> bool:
    """Whether a row is of the lab, by the measure that tells copies less well there."""
    return row["model"] == "lab" and row["measure"].startswith("sscd")


def flat(row: dict) -> dict:
    """A row of the CSV file: no lists, no commas."""
    sizes, versions = row["sizes"], row["versions"].items()
    return row | {key: f"{row[key]:.6g}" for key in ("value", "low", "high")} | {
        "checkpoint": build_of(row).title, "prompts": "+".join(map(str, row["prompts"])),
        "levels": "+".join(map(str, row["levels"])),
        "seeds": sizes.get("seed", ""), "draws": sizes.get("draw", ""),
        "states": sizes.get("step", ""), "guidance": json.dumps(row["guidance"]).replace(",", " "),
        "versions": "; ".join(f"{name} {version}" for name, version in versions),
    }  # fmt: skip
