"""Prompts and their training images: the manifest as a table."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import warnings
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

import numpy as np
import pandas as pd

from memlib.errors import first_line, nearest, short
from memlib.hub.files import digest, sha256, verify, whole
from memlib.hub.lists import LISTS, index_text, list_file, numbered, standard
from memlib.hub.pictures import find_images
from memlib.paths import LAB, data_folder
from memlib.prompts import PairsError, read_image

LAB_PAIRS = LAB / "pairs.csv"
# Columns that mean something here, in whatever case a list has them; the first are text.
TEXTS = ("caption", "prompt_id", "image", "index", "url")
NAMES = (*TEXTS, "kind", "overfit_type", "multiplicity", "group", "retrieved_urls")
MAY_LACK = ("prompt_id", "index", "multiplicity", "group", "image", "url")  # R's NA: not there
NO_TEXT = (bytes, dict, list, tuple, np.ndarray)
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def load_pairs(source: str | Path = "lab", images: str | Path | None = None) -> pd.DataFrame:
    """The prompts of a manifest, one row each, in its order.

    Parameters
    ----------
    source : ``lab``; ``webster-sd14``, ``webster-sd21`` or ``webster-realvis`` (Webster 2023, once
        ``memlib fetch`` has brought it); or a CSV (with commas, semicolons or tabs), JSON, JSON
        lines or parquet file with a column `caption`, one caption a row. Optional columns, in any
        case: `prompt_id` or `index`, `kind` or Webster's `overfit_type`, `multiplicity`, and
        `image`, a path relative to the manifest, or in parquet the picture itself, as in data sets
        of the Hub (it is kept in the data folder by its checksum). A row without an id gets one
        (`name_rows`).
    images : a folder of training images named after `prompt_id` or `index`, see
        `pictures.find_images`; a row that names its picture keeps it. For a named list by default
        where ``memlib fetch`` puts them. What is missing, broken or a placeholder is set aside:
        `image` is "" and `image_note` says why.

    Returns
    -------
    DataFrame with at least prompt_id (str), caption (str), image (absolute path or "").

    Raises
    ------
    PairsError
        No such manifest, no caption column, empty or duplicate captions, text that is not UTF-8, a
        checksum that is not the published one; where the manifest itself names images, one that is
        missing, unreadable or all black.
    """
    file = LAB_PAIRS if source == "lab" else list_file(source) if source in LISTS else Path(source)
    if not file.is_file():
        if source in LISTS:
            raise PairsError(f"the list {source} is not here: memlib fetch {source} brings it")
        hint = nearest(str(source), ("lab", *LISTS)) if not file.suffix else ""
        raise PairsError(f"no manifest {short(source, 120)!r}{hint}")
    if file.suffix.lower() not in SUFFIXES:
        raise PairsError(f"{short(file.name)}: a manifest is one of {', '.join(SUFFIXES)}")
    if source in LISTS and digest(file, "md5") != LISTS[source].md5:
        raise PairsError(f"{file} is not the published list (its md5 differs): delete it and fetch")
    try:
        if source == "lab":
            verify(file.parent, lambda name: name.startswith("pairs"))
        pairs = _rename(_read(file))
    except (ValueError, OSError, csv.Error) as error:
        raise PairsError(f"{short(file.name)} cannot be read: {first_line(error)}") from error
    pairs = check_pairs(pairs, file)
    if source in LISTS and images is None:
        images = file.parent / "images"
    elif images is not None and not Path(images).is_dir():
        raise PairsError(f"no folder {short(images, 120)!r} of training images")
    return name_rows(pairs if images is None else find_images(pairs, Path(images)))


def _read(file: Path) -> pd.DataFrame:
    """A manifest's table as it is, but for its columns' case; see `load_pairs`."""
    if file.suffix.lower() == ".parquet":
        table = pd.read_parquet(file)
        return table.reset_index() if any(table.index.names) else table  # set_index("index")
    data = file.read_bytes()
    text = data.decode("utf-16" if data[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig")
    if file.suffix.lower() in (".csv", ".tsv"):
        return _delimited(text, "\t" if file.suffix.lower() == ".tsv" else ",")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:  # JSON lines; an error in them names the line
        rows = json.loads("[" + ",\n".join(filter(str.strip, text.split("\n"))) + "]")
    if isinstance(rows, dict) and all(isinstance(column, dict) for column in rows.values()):
        rows = pd.DataFrame(rows, dtype=object).to_dict("records")  # as pandas' to_json writes it
    rows = rows if isinstance(rows, list) else [rows]
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {n} is no JSON object with a caption")
    table = pd.DataFrame(rows, dtype=object)  # an index stays whole where another row has none
    others = [c for c in table if c.strip().lower() not in TEXTS]
    table[others] = table[others].infer_objects()
    return table


def _delimited(text: str, default: str) -> pd.DataFrame:
    """The table of a CSV file; rows without content, as spreadsheets leave them, are left out."""
    line = next(filter(str.strip, text.splitlines()), "")
    headers = {s: next(csv.reader([line], delimiter=s), []) for s in (default, ",", ";", "\t")}

    def fits(separator: str) -> tuple[bool, int]:
        names = [name.strip().lower() for name in headers[separator]]
        return "caption" in names, len(names)

    separator = max(headers, key=fits)  # the first of equals
    plain = {name: name.strip().lower() for name in headers[separator]}
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            table = pd.read_csv(
                io.StringIO(text), sep=separator, keep_default_na=False, index_col=False,
                dtype={column: str for column, name in plain.items() if name in TEXTS},
                na_values={column: ["NA"] for column, name in plain.items() if name in MAY_LACK},
            )  # fmt: skip
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        which = first_line(error).partition("C error: ")[2] or "the first row"
        raise ValueError(
            f"more fields in a row than columns, or a quote that is not closed ({which}): "
            f"quote captions that hold {separator!r}"
        ) from error
    return table[~table.isin(["", np.nan]).all(axis=1)]


def _rename(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that mean something by their names in small letters."""
    names = {}
    for column in map(str, table.columns):
        plain = column.strip().lower()
        if plain in NAMES and plain not in (*table, *names.values()):
            names[column] = plain
    return table.rename(columns=names).reset_index(drop=True)


def check_pairs(pairs: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Validate a manifest's rows and images; see `load_pairs`. A missing prompt_id is ""."""
    where = short(file.name)
    if "caption" not in pairs:
        hint = short(nearest("caption", pairs.columns), 160)
        raise PairsError(f"{where} has no column 'caption'{hint}")
    if pairs.empty:
        raise PairsError(f"{where} has no rows")
    for column in [c for c in NAMES if c in pairs and c not in ("image", "retrieved_urls")]:
        wrong = pd.Series([isinstance(value, NO_TEXT) for value in pairs[column]])
        _refuse(where, pairs[column], wrong, "is no text")
    pairs["caption"] = ["" if pd.isna(value) else str(value) for value in pairs.caption]
    _refuse(where, pairs.caption, pairs.caption.str.strip() == "", "is empty")
    if "index" in pairs or "overfit_type" in pairs:
        pairs = standard(pairs)
    if "prompt_id" not in pairs:
        pairs.insert(0, "prompt_id", "")
    pairs["prompt_id"] = [v if isinstance(v, str) else index_text(v) for v in pairs.prompt_id]
    twice = pairs.prompt_id.duplicated() & (pairs.prompt_id != "")
    _refuse(where, pairs.prompt_id, twice, "is duplicated")
    if "group" not in pairs:  # a published list's duplicates are kept, and marked
        _refuse(where, pairs.caption, pairs.caption.duplicated(), "is duplicated")
    if "multiplicity" in pairs:
        given = pairs.multiplicity
        pairs["multiplicity"] = numbers = pd.to_numeric(given, errors="coerce")
        _refuse(where, given, numbers.isna() & given.notna() & (given != ""), "is not a number")
    images = []
    for n, value in enumerate(pairs.get("image", [""] * len(pairs)), 1):
        try:
            images.append(image := _image(value, file))
            if image:
                read_image(image, None)
        except PairsError as error:
            raise PairsError(f"{where}, row {n}: {error}") from error
    return pairs.assign(image=images)


def _refuse(where: str, values: pd.Series, wrong: pd.Series, why: str) -> None:
    if wrong.any():
        n = wrong.idxmax()
        raise PairsError(f"{where}, row {n + 1}: {values.name} {short(values[n])!r} {why}")


def _image(value, file: Path) -> str:
    """The path of a row's picture: relative to the manifest, or where its bytes are kept."""
    if isinstance(value, dict):
        keys = ("bytes", "path", "url", "src")  # as in data sets of the Hub and its viewer
        value = next(filter(None, map(value.get, keys)), None)
    if isinstance(value, str) and re.match(r"\s*(\w\w+://|data:)", value):
        raise PairsError(
            f"the image is an address, {short(value)!r}: download it and name its file, "
            "or call the column 'url' and give the folder of the pictures (images=, by id)"
        )
    if isinstance(value, bytes):
        kept = data_folder("pictures") / hashlib.sha256(value).hexdigest()
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            with whole(kept) as partial:
                partial.write_bytes(value)
        return str(kept.resolve())
    if isinstance(value, NO_TEXT):
        raise PairsError(f"the image is no path but {type(value).__name__}")
    return "" if pd.isna(value) or value == "" else str((file.parent / str(value)).resolve())


def name_rows(pairs: pd.DataFrame) -> pd.DataFrame:
    """Give each row that has no prompt_id one that is made of what is recorded of it.

    That is its caption, kind, multiplicity, group and picture: ``two-blue-cars-1f0c9a77``. So the
    id depends neither on the row's place nor on the list's name, two lists may be recorded into one
    run, and a row that was corrected is another prompt.
    """
    missing = pairs.prompt_id == ""
    columns = [c for c in ("kind", "multiplicity", "group") if c in pairs]
    names = []
    for row in pairs[missing].to_dict("records"):
        words = re.findall(r"[a-z0-9]+", row["caption"].lower())
        picture = sha256(Path(row["image"])) if row["image"] else ""
        known = [row["caption"], *(index_text(row[c]) for c in columns), picture]
        mark = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]
        names.append("-".join([*words[:3], mark])[-40:].lstrip("-"))
    ids = pairs.prompt_id.copy()
    ids[missing] = numbered(pd.Series(names, ids.index[missing], dtype=str))
    return pairs.assign(prompt_id=ids)
