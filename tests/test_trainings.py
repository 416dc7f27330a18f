"""Verdicts of other trainings of the lab: taken over once, judged by today's claims, shown."""

import json

import pandas as pd
import pytest
from test_claims import ledger_of, row

from memlib.bench import trainings
from memlib.claims import CLAIMS
from memlib.site import ledger


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A function: a clone with a training and its rows; the table goes to a folder of its own."""
    file = tmp_path / "trainings.csv"
    file.write_text(",".join(trainings.COLUMNS) + "\n")
    monkeypatch.setattr(trainings, "TRAININGS", file)
    monkeypatch.setattr(ledger, "TRAININGS", file)

    def made(seed: int, low: float, claim: str = "grows-with-guidance"):
        folder = tmp_path / f"clone{seed}"
        (folder / "data/lab").mkdir(parents=True, exist_ok=True)
        (folder / "data/lab/training.json").write_text(json.dumps({"seed": seed}))
        site = folder / "_build/html/_static"
        site.mkdir(parents=True, exist_ok=True)
        line = {"claim": claim, "model": "lab", "sampler": "ddim", "measure": "", "value": 0.5,
                "low": low, "high": 1, "prompts": "18", "fingerprint": "0123"}  # fmt: skip
        rows = [line, line | {"model": "other"}]
        pd.DataFrame(rows).to_csv(site / "results.csv", index=False)
        return folder

    return made


def test_rows_of_a_training_are_taken_over_once(clone):
    assert ledger.trainings(ledger.TRAININGS).empty
    for seed, low in ((1, 0.1), (2, -0.1), (1, 0.2)):
        trainings.main(clone(seed, low))
    rows = ledger.trainings(ledger.TRAININGS).set_index("training")
    assert dict(rows.low) == {1: 0.2, 2: -0.1}
    assert dict(rows.verdict) == {1: "holds", 2: "not decided"}
    assert list(rows.fingerprint) == ["0123", "0123"]


def test_rows_of_a_number_that_is_no_more_are_left_out(clone, monkeypatch):
    trainings.main(clone(1, 0.1))
    monkeypatch.setitem(CLAIMS["grows-with-guidance"], "statistic", "another")
    assert ledger.trainings(ledger.TRAININGS).empty
    trainings.main(clone(2, 0.1, "no-more"))
    assert ledger.trainings(ledger.TRAININGS).empty


def test_the_ledger_says_what_other_trainings_found(clone, tmp_path):
    trainings.main(clone(1, 0.1))
    trainings.main(clone(2, -0.1))
    _, page = ledger_of(tmp_path, [row()])
    assert "training 1: holds, 0.5 (0.1 to 1); training 2: not decided" in page
    assert "Of 1 verdicts 0 are the same in all trainings" in page
    title = CLAIMS["grows-with-guidance"]["title"]
    assert f"not the same: [{title}](#grows-with-guidance) (ddim)" in page


def test_the_table_that_ships_names_claims_and_trainings():
    rows = ledger.trainings(ledger.TRAININGS)
    assert set(rows.claim) <= set(CLAIMS)
    assert 0 not in set(rows.training)
    assert not rows.duplicated(["training", "claim", "sampler", "measure"]).any()
