"""Prompts and their training images: the manifest as a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from memlib.checksums import digest, verify
from memlib.errors import first_line, nearest
from memlib.lists import LISTS, find_images, list_file, standard

LAB_PAIRS = Path(__file__).resolve().parents[1] / "data" / "lab" / "pairs.csv"
READERS = {
    ".csv": lambda f: pd.read_csv(
        f, dtype=dict.fromkeys(("caption", "prompt_id", "image"), str), keep_default_na=False,
        skip_blank_lines=False,
    ),
    ".jsonl": lambda f: pd.read_json(f, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}  # fmt: skip


class PairsError(ValueError):
    """A manifest or an image that cannot be used; the message says which and why."""


def load_pairs(source: str | Path = "lab", images: str | Path | None = None) -> pd.DataFrame:
    """The prompts of a manifest, one row each, in its order.

    Parameters
    ----------
    source : ``lab``; ``webster-sd14``, ``webster-sd21`` or ``webster-realvis`` (Webster 2023, once
        ``memlib fetch`` has brought it); or a CSV, JSON lines or parquet file with a column
        `caption`. Optional columns: `prompt_id` or `index`, `kind` or Webster's `overfit_type`,
        `multiplicity`, and `image`, a path relative to the manifest.
    images : a folder of training images named after `prompt_id` or `index`. For a named list by
        default where ``memlib fetch`` puts them. What is missing, broken or a placeholder is set
        aside: `image` is "" and `image_note` says why.

    Returns
    -------
    DataFrame with at least prompt_id (str), caption (str), image (absolute path or "").

    Raises
    ------
    PairsError
        No such manifest, no caption column, empty or duplicate captions, text that is not UTF-8,
        a checksum that is not the published one; where the manifest itself names images, one that
        is missing, unreadable or all black.
    """
    file = LAB_PAIRS if source == "lab" else list_file(source) if source in LISTS else Path(source)
    if not file.is_file():
        if source in LISTS:
            raise PairsError(f"the list {source} is not here: memlib fetch {source} brings it")
        hint = nearest(str(source), ("lab", *LISTS)) if not file.suffix else ""
        raise PairsError(f"no manifest {str(source)!r}{hint}")
    if file.suffix not in READERS:
        raise PairsError(f"{file.name}: a manifest is one of {', '.join(READERS)}")
    if source in LISTS and digest(file, "md5") != LISTS[source].md5:
        raise PairsError(f"{file} is not the published list (its md5 differs): delete it and fetch")
    try:
        pairs = READERS[file.suffix](file)
    except UnicodeDecodeError as error:
        raise PairsError(
            f"{file.name} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from error
    except (ValueError, OSError) as error:
        raise PairsError(f"{file.name} cannot be read: {first_line(error)}") from error
    if source == "lab":
        try:
            verify(file.parent, lambda name: name.startswith("pairs"))
        except ValueError as error:
            raise PairsError(str(error)) from error
    if "index" in pairs or "overfit_type" in pairs:
        pairs = standard(pairs)
    pairs = check_pairs(pairs, file)
    if source in LISTS and images is None:
        images = file.parent / "images"
    elif images is not None and not Path(images).is_dir():
        raise PairsError(f"no folder {str(images)!r} of training images")
    return pairs if images is None else find_images(pairs, Path(images))


def check_pairs(pairs: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Validate a manifest's rows and images; see `load_pairs`."""
    where = file.name
    if file.suffix == ".csv" and not isinstance(pairs.index, pd.RangeIndex):
        raise PairsError(f"{where} has more fields than columns: quote captions that hold a comma")
    if "caption" not in pairs:
        near = nearest("caption", pairs.columns)
        raise PairsError(f"{where} has no column 'caption'{near}")
    if pairs.empty:
        raise PairsError(f"{where} has no rows")
    pairs = pairs.reset_index(drop=True)
    blank = pairs.caption.isna() | (pairs.caption.astype(str).str.strip() == "")
    if blank.any():
        raise PairsError(f"{where}, row {blank.idxmax() + 1}: the caption is empty")
    if "prompt_id" not in pairs:
        pairs.insert(0, "prompt_id", [f"{i:04d}" for i in range(len(pairs))])
    for column in ("prompt_id", "caption"):
        pairs[column] = pairs[column].astype(str)
        twice = pairs[column].duplicated()
        if column == "caption" and "group" in pairs:
            continue  # a published list: its duplicates are kept, and marked
        if twice.any():
            n = twice.idxmax()
            raise PairsError(f"{where}, row {n + 1}: {column} {pairs[column][n]!r} stands twice")
    if "multiplicity" in pairs:
        numbers = pd.to_numeric(pairs.multiplicity, errors="coerce")
        wrong = numbers.isna() & pairs.multiplicity.notna() & (pairs.multiplicity != "")
        if wrong.any():
            n = wrong.idxmax()
            raise PairsError(
                f"{where}, row {n + 1}: multiplicity {pairs.multiplicity[n]!r} is not a number"
            )
        pairs["multiplicity"] = numbers
    names = pairs["image"] if "image" in pairs else [""] * len(pairs)
    pairs["image"] = [
        str((file.parent / str(name)).resolve()) if pd.notna(name) and name != "" else ""
        for name in names
    ]
    for name in filter(None, pairs.image):
        read_image(name, None)
    return pairs


def read_image(file: str | Path, size: int | None) -> np.ndarray:
    """An image as uint8 [y, x, rgb]: EXIF orientation, RGB, short side to `size`, centre crop.

    Raises
    ------
    PairsError
        The file is missing, cannot be decoded, or is all black (a known placeholder).
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        raise PairsError(f"image {file} is missing") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PairsError(f"image {file} cannot be decoded: {first_line(error)}") from error
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    picture = np.array(image)
    if picture.max() == 0:
        raise PairsError(f"image {file} is all black: a placeholder, not a training image")
    return picture
