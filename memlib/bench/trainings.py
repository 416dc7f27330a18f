"""What the ledger's verdicts are on other trainings of the lab.

    python -m memlib.lab.train --keep-vae --seed 1 --out FOLDER    # hours; then, in a clone whose
    python -m memlib.bench.phase && make book                      # data/lab is that folder:
    python -m memlib.bench.trainings CLONE                         # takes its rows

Writes `data/trainings.csv`: one row for each verdict of each training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from memlib.claims import CLAIMS
from memlib.hub.files import whole
from memlib.paths import TRAININGS

COLUMNS = "training claim sampler measure value low high prompts fingerprint statistic".split()


def main(clone: Path) -> None:
    """Replace this training's rows with those that its clone's book has."""
    seed = json.loads((clone / "data/lab/training.json").read_text())["seed"]
    site = clone / "_build/html/_static"
    rows, known = (
        pd.read_csv(file, dtype={"fingerprint": str}, keep_default_na=False)
        for file in (site / "results.csv", TRAININGS)
    )
    rows = rows[rows.model == "lab"].assign(training=seed)
    rows["statistic"] = rows.claim.map(lambda name: CLAIMS.get(name, {}).get("statistic", ""))
    with whole(TRAININGS) as file:
        pd.concat([known[known.training != seed], rows])[COLUMNS].to_csv(file, index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path, help="where the book of the other training was built")
    clone = parser.parse_args().clone
    if not (clone / "_build/html/_static/results.csv").exists():
        parser.error(f"{clone} has no book: run make book there")
    main(clone)
