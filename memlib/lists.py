"""Published lists of prompts that Stable Diffusion memorized, and their training images.

The lists and the images are other people's work: none is shipped. `memlib fetch webster-sd14`
downloads one list, and from the addresses in it what is left of its images.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from memlib.errors import first_line

ROOT = Path(__file__).resolve().parents[1]
HUB = "https://huggingface.co/datasets/fraisdufour/templates-verbs/resolve/main"
KINDS = {"MV": "memorized", "RV": "memorized", "TV": "template", "N": "control"}
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class PromptList:
    """One of Webster's three lists (2023), 500 rows each: caption, index, url, overfit_type."""

    file: str
    md5: str

    @property
    def url(self) -> str:
        return f"{HUB}/groundtruth_parquets/{self.file}"


LISTS = {
    "webster-sd14": PromptList(
        "sdv1_bb_edge_groundtruth.parquet", "72c2dded275dda496de9c3f7c33c4f3d"
    ),
    "webster-sd21": PromptList(
        "sdv2_bb_edge_groundtruth.parquet", "c700ae1d156a9330940d339a24740ed1"
    ),
    "webster-realvis": PromptList(
        "realistic_vision_sdv1_edge_groundtruth.parquet", "d4ce3781e41efb78289c936d87a79edf"
    ),
}  # fmt: skip


def data_folder(name: str = "") -> Path:
    """``$MEMLIB_DATA``, or ``_build/data`` in a checkout, or ``~/.cache/memlib/data``."""
    if "MEMLIB_DATA" in os.environ:
        folder = Path(os.environ["MEMLIB_DATA"])
    elif (ROOT / "pyproject.toml").exists():
        folder = ROOT / "_build" / "data"
    else:
        folder = Path.home() / ".cache" / "memlib" / "data"
    return folder / name


def list_file(name: str) -> Path:
    """Where a named list lies once it is fetched; its images lie in ``images`` beside it."""
    return data_folder(name) / LISTS[name].file


def standard(table: pd.DataFrame) -> pd.DataFrame:
    """A list's rows in the columns of a manifest.

    `prompt_id` is the list's `index`; a row whose index stands twice is kept apart under a number
    of its own. `kind` follows `overfit_type`: MV (matching verbatim) and RV (retrieved verbatim)
    are memorized, TV template, N control. `group` is the same number for near-duplicates.
    """
    table = table.reset_index(drop=True)
    if "prompt_id" not in table and "index" in table:
        names, turn = table["index"].astype(str), table.groupby("index").cumcount()
        table.insert(0, "prompt_id", names.where(turn == 0, names + "-" + (turn + 1).astype(str)))
    if "kind" not in table and "overfit_type" in table:
        types = table.overfit_type.astype(str)
        table["kind"] = types.map(KINDS).fillna(types)
    if "caption" in table:
        table["group"] = near_duplicates(table)
    return table


def near_duplicates(table: pd.DataFrame) -> np.ndarray:
    """One number for all rows that share an address, or a caption but for case and punctuation.

    Such rows are no independent evidence: a bootstrap should draw whole groups.
    """
    keys = [
        table.caption.astype(str).str.lower().str.replace(r"[\W_]+", " ", regex=True).str.strip()
    ]
    if "url" in table:
        keys.append(table.url.where(table.url.notna() & (table.url != "")))
    parent = list(range(len(table)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for key in keys:
        first: dict[str, int] = {}
        for i, value in enumerate(key):
            if pd.notna(value):
                a, b = root(i), root(first.setdefault(value, i))
                parent[max(a, b)] = min(a, b)
    roots = [root(i) for i in range(len(table))]
    return pd.factorize(np.array(roots))[0]


def reconcile(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Two lists side by side: rows are the same where index, caption and url are.

    Returns
    -------
    The rows of both, with the column `list`: ``both``, ``first`` or ``second``. A row that stands
    n times in one list and m in the other is ``both`` min(n, m) times; nothing is merged away.
    """
    keys = ["index", "caption", "url"]
    a, b = (t[keys].astype(str) for t in (first, second))  # a missing address is one, too
    a, b = (t.assign(turn=t.groupby(keys).cumcount()) for t in (a, b))
    merged = a.merge(b, how="outer", on=[*keys, "turn"], indicator="list")
    names = {"left_only": "first", "right_only": "second", "both": "both"}
    merged["list"] = merged["list"].map(names).astype(str)
    return merged.drop(columns="turn")


def find_images(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Give each row the picture in `folder` that is named after it, if it is one.

    A picture is named by `prompt_id`, or by an `index` that stands once, plain or with leading
    zeros. What is broken, tiny, a page of HTML or a placeholder is set aside: `image` is "" and
    `image_note` says why.
    """
    from memlib.fetch import check_image

    files = {}
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in ENDINGS:
                files.setdefault(re.sub(r"^0+(?=\d)", "", file.stem), file)
    images, notes = [], []
    numbers = table["index"].astype(str) if "index" in table else table.prompt_id
    numbers = numbers.where(~numbers.duplicated(keep=False), table.prompt_id)
    for names in zip(table.prompt_id, numbers, strict=True):
        found = [files[k] for n in names if (k := re.sub(r"^0+(?=\d)", "", str(n))) in files]
        note = check_image(found[0]) if found else "no picture"
        images.append("" if note else str(found[0].resolve()))
        notes.append(note or "")
    return table.assign(image=images, image_note=notes)


def unpack(archive: Path, folder: Path, max_bytes: int = 30_000_000) -> int:
    """Copy the pictures of a zip or tar archive into one flat folder; return how many.

    Only regular files with a picture's ending and of at most `max_bytes` are taken, by their bare
    names: no path of the archive is followed.

    Raises
    ------
    ValueError
        The file is no zip or tar archive, or it is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0

    def keep(name: str, size: int, handle) -> None:
        nonlocal count
        name = PurePosixPath(name).name
        if handle is None or size > max_bytes or not name.lower().endswith(ENDINGS):
            return
        partial = folder / f"{name}.partial"
        with partial.open("wb") as out:
            shutil.copyfileobj(handle, out)
        partial.replace(folder / name)
        count += 1

    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as pack:
                for item in pack.infolist():
                    if not item.is_dir():
                        with pack.open(item) as handle:
                            keep(item.filename, item.file_size, handle)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as pack:
                for item in pack:
                    if item.isfile():
                        keep(item.name, item.size, pack.extractfile(item))
        else:
            raise ValueError("it is neither zip nor tar")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError, RuntimeError) as error:
        raise ValueError(f"archive {archive} cannot be unpacked: {first_line(error)}") from error
    return count
