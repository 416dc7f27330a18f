"""The chapters on a list of prompts that does not count copies, as those of Stable Diffusion.

Its stand-in is made of the lab's prompts: the kinds are memorized, template and control, there is
no multiplicity, and some prompts have no image.
"""

import json
import os
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from test_prompts import LIST

import memlib
from memlib import claims, prompts
from memlib.paths import ROOT
from memlib.site import chapters, forked, ledger, page, run

pytestmark = pytest.mark.slow
SIZES = "every=1 steps=4 seeds=2 ddpm_seeds=2 draws=1 timesteps=(940,) unguided_seeds=1 "
SIZES += "checkpoint_draws=1 scales=(3,) sweep_every=2 sweep_seeds=1 uncaptioned=2 many=4 "
SIZES += "many_seeds=3 many_every=1 many_steps=4 few_steps=(2,) few_seeds=1 "
SIZES += "first_steps=4 treated_steps=4 rare_seeds=2 blank=12 causes.every=2 mitigation.every=3"
CORE = (
    "overestimated conditional-aligned unconditional-not-aligned converge-earlier image-ahead "
    "noise-behind d1-severity d2-severity almost-perfect guided-error conditional-loss"
).split()


def stand_in() -> pd.DataFrame:
    """Six memorized, two template and four control prompts; one of each end has no image."""
    pairs = memlib.load_pairs("lab")
    kinds = {"memorized": pairs[pairs.multiplicity >= 64].query("kind == 'planted'").iloc[::2]}
    kinds |= {kind: pairs[pairs.kind == kind] for kind in ("template", "control")}
    few = {
        kind: kinds[kind].head(n) for kind, n in (("memorized", 6), ("template", 2), ("control", 4))
    }
    rows = pd.concat([part.assign(kind=kind) for kind, part in few.items()], ignore_index=True)
    rows.loc[[0, 11], "image"] = ""
    return rows[["prompt_id", "caption", "kind", "image"]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Where the chapters ran, and what each of them glued."""
    folder = tmp_path_factory.mktemp("list")
    stand_in().to_csv(folder / "pairs.csv", index=False)
    read = chapters.read(ROOT)
    defaults = {name: chapters.parameters(name, notebook) for name, notebook in read.items()}
    assignments = f"{SIZES} pairs={folder / 'pairs.csv'}"
    chosen = chapters.choose(defaults, "smoke", {"smoke": {}}, assignments, "")
    glued = {}
    kernels = forked.python(os.environ | run.of_kernels())
    with pytest.MonkeyPatch.context() as patch, kernels as python:
        patch.setenv("MEMLIB_CACHE", str(folder / "traces"))
        for name in (name for name in read if name != "lab"):
            own = chosen[name] if "pairs" in defaults[name] else {}  # else it has no list
            made = run.execute(name, read[name], own, folder, python=python)
            outputs = [out for cell in json.loads(made)["cells"] for out in cell.get("outputs", [])]
            glued[name] = {
                out["metadata"]["scrapbook"]["name"]: "".join(
                    out["data"]["application/papermill.record/text/plain"]
                )
                for out in outputs
                if "scrapbook" in out.get("metadata", {})
            }
    return folder, glued


def test_the_chapters_settle_their_claims_on_a_list(ran):
    folder, _ = ran
    rows = ledger.read(folder / "work/results")
    assert set(CORE) <= set(rows.claim)
    # few seeds and updates, no twin that never saw some of the pictures, no copies
    unsettled = {"decided-early", "conditional-memory-needed", "feedback-goes-on", "near-optimum"}
    unsettled |= {"more-than-copies", "guidance-by-overestimation", "detail-is-memory"}
    unsettled |= {"smoothed-keeps", "smoothed-transfers"}  # no judge of other pictures, no twin
    assert set(claims.CLAIMS) - set(rows.claim) == unsettled
    core = rows[rows.claim.isin(CORE)]
    assert np.isfinite(core[["value", "low", "high"]].to_numpy()).all()
    # five memorized prompts, two of a template and three controls are left
    prompts = {row.claim: row.prompts for row in rows.itertuples()}
    assert prompts["overestimated"] == [5, 3]
    assert prompts["converge-earlier"] == [5]
    assert prompts["d1-severity"] == [10]


def test_prompts_without_an_image_are_left_out_and_counted(ran):
    _, glued = ran
    for name, found in glued.items():
        if name in ("stable-diffusion", "scale", "live"):  # they have no list of prompts
            continue
        assert "left out (2 of 12)" in found["left_out_says"], name


def test_no_text_speaks_of_copies_that_are_not_known(ran):
    _, glued = ran
    for name, found in glued.items():
        for text in found.values() if name != "live" else ():  # that one is of the lab, always
            assert not re.search(r"\d copies|planted", text), (name, text)


def test_numbers_of_any_library_are_glued_as_plain_ones(monkeypatch):
    shown = {}

    def display(data, metadata, raw):
        shown[metadata["scrapbook"]["name"]] = data["application/papermill.record/text/plain"]

    monkeypatch.setattr("IPython.display.display", display)
    page.glue(a=3, b=np.int64(3), c=np.float32(0.5), d=xr.DataArray(0.25), e="words")
    assert shown == {"a": "3", "b": "3", "c": "0.5", "d": "0.25", "e": "'words'"}
    shown.clear()
    each = np.array([True, False, False, False])
    setting = page.Setting(None, LIST, prompts.groups(LIST), each, ~each, ~each, ~each)
    setting.glue_groups(x=[[1, 2], [3, 4], [5, 6], [7, 8]])
    assert shown == {"x_memorized": "1.5", "x_middle": "5.5", "x_rare": "5.5", "x_control": "5.5"}
