"""Published lists of prompts that Stable Diffusion memorized, and their training images.

The lists and the images are other people's work: none is shipped. `memlib fetch webster-sd14`
downloads one list, and from the addresses in it what is left of its images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from memlib.hub.names import ALIASES, CHECKPOINTS
from memlib.paths import data_folder

HUB = "https://huggingface.co/datasets/fraisdufour/templates-verbs/resolve/main"
KINDS = {"MV": "memorized", "RV": "memorized", "TV": "template", "N": "control"}


@dataclass(frozen=True)
class PromptList:
    """One of Webster's three lists (2023), 500 rows each: caption, index, url, overfit_type."""

    file: str
    md5: str

    @property
    def url(self) -> str:
        return f"{HUB}/groundtruth_parquets/{self.file}"


LISTS = {
    f"webster-{model}": PromptList(f"{name}_edge_groundtruth.parquet", md5)
    for model, name, md5 in (
        ("sd14", "sdv1_bb", "72c2dded275dda496de9c3f7c33c4f3d"),
        ("sd21", "sdv2_bb", "c700ae1d156a9330940d339a24740ed1"),
        ("realvis", "realistic_vision_sdv1", "d4ce3781e41efb78289c936d87a79edf"),
    )
}


def list_file(name: str) -> Path:
    """Where a named list lies once it is fetched; its images lie in ``images`` beside it."""
    return data_folder(name) / LISTS[name].file


def standard(table: pd.DataFrame) -> pd.DataFrame:
    """A list's rows in the columns of a manifest.

    `prompt_id` is the list's `index` as text ("" where it is missing); rows with a duplicated index
    are kept apart by a number of their own. `kind` follows `overfit_type`: MV (matching
    verbatim) and RV (retrieved verbatim) are memorized, TV template, N control; a word of another
    list stays as it is, for it means something else. `group` is the same number for
    near-duplicates.
    """
    table = table.reset_index(drop=True)
    if "index" in table:
        table["index"] = table["index"].map(index_text)
    if "prompt_id" not in table and "index" in table:
        table.insert(0, "prompt_id", numbered(table["index"]))
    if "kind" not in table and "overfit_type" in table:
        types = table.overfit_type.astype(str)
        table["kind"] = types.map(KINDS).fillna(types)
    table["group"] = near_duplicates(table)
    return table


def numbered(names: pd.Series) -> pd.Series:
    """Names of which none but "" occurs twice: those that did end in -2, -3, ..."""
    turn = names.groupby(names).cumcount()
    again = (turn > 0) & (names != "")
    return names.mask(again, names + "-" + (turn + 1).astype(str))


def index_text(value: object) -> str:
    """A list's index as text: 12 for 12.0, as it reads where another row has none; "" for none."""
    if not isinstance(value, str) and pd.isna(value):
        return ""
    return re.sub(r"(?<=\d)\.0+$", "", str(value).strip())


def near_duplicates(table: pd.DataFrame) -> np.ndarray:
    """One number for all rows that share an address, or a caption but for case and punctuation.

    Such rows are no independent evidence: a bootstrap should draw whole groups.
    """
    keys = [
        table.caption.astype(str).str.lower().str.replace(r"[\W_]+", " ", regex=True).str.strip()
    ]
    if "url" in table:
        keys.append(table.url.where(table.url.notna() & (table.url != "")))
    size, links = len(table), []
    for key in keys:
        code = pd.factorize(key)[0]  # -1 is missing
        first = pd.Series(np.arange(size)).groupby(code).transform("first")
        links.append(np.stack([np.arange(size), first])[:, code >= 0])
    links = np.hstack(links)
    graph = coo_array((np.ones(links.shape[1]), links), (size, size))
    return pd.factorize(connected_components(graph)[1])[0]


def webster(model: str) -> str:
    """The list that goes with a named model, '' if none: one for both SD v2.1, one for realvis*."""
    named = model in CHECKPOINTS or model in ALIASES
    return next((n for n in LISTS if named and model.startswith(n.removeprefix("webster-"))), "")
