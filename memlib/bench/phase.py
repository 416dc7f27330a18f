"""What is copied, by number of copies, guidance scale and training time: the phase diagram's data.

    python -m memlib.bench.phase     # ten minutes on a core; goes on where it was stopped

Writes `data/phase.csv`: one row for each picture, with both measures of severity.
"""

from __future__ import annotations

import json

import pandas as pd

from memlib import load, load_pairs, reverse_trace, training_step
from memlib.hub.files import whole
from memlib.paths import LAB, ROOT
from memlib.trace import score

FILE = ROOT / "data/phase.csv"
SCALES = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0)
SEEDS, STEPS = 2, 20


def read(model) -> pd.DataFrame | None:
    """The rows, if they are of this model; None of another one, but of the lab they must be.

    Columns: training_step, guidance_scale, prompt_id, kind, copies, seed, ncc, sscd.
    """
    table = pd.read_csv(FILE, dtype={"fingerprint": str})
    if (table.fingerprint == model.fingerprint[:12]).all():
        return table.drop(columns="fingerprint")
    if model.source == "lab":
        raise ValueError("data/phase.csv is of another lab: run python -m memlib.bench.phase")
    return None


def main() -> None:
    """Sample what is missing, a scale of a checkpoint at a time, and write all rows."""
    lab = load("lab")
    steps = json.loads((LAB / "training.json").read_text())["unet_steps"]
    models = {
        int(folder.name.removeprefix("step-")): training_step(lab, folder)
        for folder in sorted((LAB / "checkpoints").glob("step-*"))
    } | {steps: lab}
    pairs = load_pairs("lab").query("kind in ('planted', 'named')")
    partial = ROOT / "_build/phase.csv"
    done = pd.read_csv(partial, dtype={"fingerprint": str}) if partial.exists() else pd.DataFrame()
    if len(done) and (done.fingerprint != lab.fingerprint[:12]).any():
        done = pd.DataFrame()
    for step, model in models.items():
        for scale in SCALES:
            if len(done) and ((done.training_step == step) & (done.guidance_scale == scale)).any():
                continue
            print(f"training step {step}, guidance scale {scale:g}", flush=True)
            trace = reverse_trace(
                model, pairs, range(SEEDS), guidance_scale=scale, steps=STEPS, similarity="ncc"
            )
            found = {m: score(trace, pairs, m).severity.values for m in ("ncc", "sscd")}
            rows = [
                {
                    "training_step": step, "guidance_scale": scale, "prompt_id": pair.prompt_id,
                    "kind": pair.kind, "copies": pair.multiplicity, "seed": seed,
                    **{m: round(float(v[p, seed]), 4) for m, v in found.items()},
                    "fingerprint": lab.fingerprint[:12],
                }
                for p, pair in enumerate(pairs.itertuples()) for seed in range(SEEDS)
            ]  # fmt: skip
            done = pd.concat([done, pd.DataFrame(rows)], ignore_index=True)
            partial.parent.mkdir(exist_ok=True)
            with whole(partial) as file:
                done.to_csv(file, index=False)
    with whole(FILE) as file:
        done.to_csv(file, index=False)


if __name__ == "__main__":
    main()
