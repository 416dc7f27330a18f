"""Prompts and their training images: the manifest as a table."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

import numpy as np
import pandas as pd

from memlib.errors import first_line, nearest, short
from memlib.hub.files import digest, sha256, verify, whole
from memlib.hub.lists import LISTS, index_text, list_file, standard
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
        pairs = _rename(_read(file), short(file.name))
    except PairsError:
        raise
    except (ValueError, OSError, csv.Error) as error:
        reason = short(first_line(error), 150)
        raise PairsError(f"{short(file.name)} cannot be read: {reason}") from error
    if source == "lab":
        try:
            verify(file.parent, lambda name: name.startswith("pairs"))
        except ValueError as error:
            raise PairsError(str(error)) from error
    pairs = check_pairs(pairs, file)
    if source in LISTS and images is None:
        images = file.parent / "images"
    elif images is not None and not Path(images).is_dir():
        raise PairsError(f"no folder {short(images, 120)!r} of training images")
    return name_rows(pairs if images is None else find_images(pairs, Path(images)))


def _read(file: Path) -> pd.DataFrame:
    """A manifest's table as it is, but for its columns' case; see `load_pairs`."""
    where, suffix = short(file.name), file.suffix.lower()
    if suffix == ".parquet":
        table = pd.read_parquet(file)
        if named := [n for n in table.index.names if n is not None and n not in table]:
            table = table.reset_index(level=named)  # as set_index("index") leaves it
        return table
    data = file.read_bytes()
    text = data.decode("utf-16" if data[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig")
    if suffix in (".csv", ".tsv"):
        return _delimited(text, "\t" if suffix == ".tsv" else ",", where)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        if text.lstrip()[:1] == "[":
            raise
        rows = [_object(line) for line in text.split("\n") if line.strip()]
    if isinstance(rows, dict):  # by columns, as pandas' to_json writes it, or one row
        numbers = {tuple(v) if isinstance(v, dict) else ("",) for v in rows.values()}
        if len(numbers) == 1 and all(number.isdecimal() for number in numbers.copy().pop()):
            rows = pd.DataFrame(rows, dtype=object).to_dict("records")
    rows = rows if isinstance(rows, list) else [rows]
    for n, row in enumerate(rows):
        if not isinstance(row, dict):
            raise PairsError(f"{where}, row {n + 1} is no JSON object with a caption")
        if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise PairsError(f"{where}, row {n + 1} holds half a character (a lone surrogate)")
    table = pd.DataFrame(rows, dtype=object)  # an index stays whole where another row has none
    others = [c for c in table if c.strip().lower() not in TEXTS]
    table[others] = table[others].infer_objects()
    return table


def _object(line: str):
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line)


def _delimited(text: str, default: str, where: str) -> pd.DataFrame:
    """The table of a CSV file, whose rows have as many fields as the header has names, or fewer.

    Row numbers before the caption that have no name (as R writes them), an empty field at the end
    of every row, and blank rows at the end of the file are left out.
    """
    if "\n" not in text:
        text = text.replace("\r", "\n")  # as old Macs end their lines
    if told := re.match(r"sep=(.)(?=[\r\n])", text, re.I):  # a line for Excel
        text, default = text[told.end() :], told[1]
    separator = default if told else _separator(text, default)
    csv.field_size_limit(2**31 - 1)  # a list may hold pictures as text in a column of its own
    reader = csv.reader(io.StringIO(f"{text}\nend"), delimiter=separator)
    read = [(reader.line_num, row) for row in reader]
    if read.pop()[1] != ["end"]:
        line = read[-1][0] + 1 if read else 1
        raise PairsError(f"{where} has a quote that is not closed, in the row from line {line} on")
    while read and not any(read[-1][1]):
        read.pop()
    while read and not read[0][1]:
        read.pop(0)
    header = read.pop(0)[1] if read else []
    rows = [row for _, row in read]
    names, width = [name.strip().lower() for name in header], len(header)
    count = [row[0] for row in rows if len(row) == width + 1]
    if names[:1] == ["caption"] and count in [[*map(str, range(k, len(rows) + k))] for k in (0, 1)]:
        rows = [row[1:] for row in rows]
    if all(len(row) > width and not any(row[width:]) for row in rows):
        rows = [row[:width] for row in rows]
    for (line, _), row in zip(read, rows, strict=True):
        if len(row) > width:
            hint = f"quote captions that hold {separator!r}"
            raise PairsError(f"{where} has more fields than columns in line {line}: {hint}")
    plain = io.StringIO(newline="")
    csv.writer(plain).writerows([header, *rows])
    plain.seek(0)
    return pd.read_csv(
        plain, keep_default_na=False, skip_blank_lines=False, index_col=False,
        dtype={c: str for c, name in zip(header, names, strict=True) if name in TEXTS},
        na_values={c: ["NA"] for c, name in zip(header, names, strict=True) if name in MAY_LACK},
    )  # fmt: skip


def _separator(text: str, default: str) -> str:
    """What separates the header's columns: what leaves a column `caption`, then most columns."""

    def fits(separator: str) -> tuple[bool, int]:
        header = next(filter(None, csv.reader(io.StringIO(text), delimiter=separator)), [])
        return "caption" in [name.strip().lower() for name in header], len(header)

    return max(dict.fromkeys((default, ",", ";", "\t")), key=fits)  # the first of equals


def _rename(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """The columns that mean something by their names in small letters."""
    table = table.reset_index(drop=True)
    names = {}
    for column in map(str, table.columns):
        plain = column.strip().lower()
        if plain in NAMES and plain not in table:
            if plain in names.values():
                raise PairsError(f"{where} has the column {plain!r} twice, in other letters")
            names[column] = plain
    return table.rename(columns=names)


def check_pairs(pairs: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Validate a manifest's rows and images; see `load_pairs`. A missing prompt_id is ""."""
    where = short(file.name)
    if "caption" not in pairs:
        hint = short(nearest("caption", pairs.columns), 160)
        raise PairsError(f"{where} has no column 'caption'{hint}")
    if pairs.empty:
        raise PairsError(f"{where} has no rows")
    pairs = pairs.reset_index(drop=True)
    for column in [c for c in NAMES if c in pairs and c not in ("image", "retrieved_urls")]:
        for n, value in enumerate(pairs[column]):
            if column == "caption" and isinstance(value, list | np.ndarray) and len(value) == 1:
                pairs.loc[n, column] = value = value[0]
            if isinstance(value, NO_TEXT):
                kind = type(value).__name__
                raise PairsError(f"{where}, row {n + 1}: the {column} is no text but {kind}")
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
    values = pairs["image"] if "image" in pairs else [""] * len(pairs)
    images = []
    for n, value in enumerate(values):
        try:
            images.append(_image(value, file))
            if images[n]:
                read_image(images[n], None)
        except PairsError as error:
            raise PairsError(f"{where}, row {n + 1}: {error}") from error
    return pairs.assign(image=images)


def _refuse(where: str, values: pd.Series, wrong: pd.Series, why: str) -> None:
    if wrong.any():
        n = wrong.idxmax()
        raise PairsError(f"{where}, row {n + 1}: {values.name} {short(values[n])!r} {why}")


def _image(value, file: Path) -> str:
    """The path of a row's picture: relative to the manifest, or where its bytes are kept."""
    if isinstance(value, dict) and not isinstance(value.get("bytes"), str):
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
    if isinstance(value, NO_TEXT) or "\0" in str(value):
        raise PairsError(f"the image is no path but {type(value).__name__}")
    return "" if pd.isna(value) or value == "" else str((file.parent / str(value)).resolve())


def name_rows(pairs: pd.DataFrame) -> pd.DataFrame:
    """Give each row that has no prompt_id one that is made of what is recorded of it.

    That is its caption, kind, multiplicity, group and picture: ``two-blue-cars-1f0c9a77``. So the
    id depends neither on the row's place nor on the list's name, two lists may be recorded into one
    run, and a row that was corrected is another prompt.
    """
    missing = pairs.prompt_id == ""
    if not missing.any():
        return pairs
    columns = [c for c in ("caption", "kind", "multiplicity", "group") if c in pairs]
    names = []
    for row, image in zip(
        pairs[missing][columns].itertuples(index=False), pairs.image[missing], strict=True
    ):
        words = re.findall(r"[a-z0-9]+", row.caption.lower())
        known = [row.caption, *map(index_text, row[1:]), sha256(Path(image)) if image else ""]
        mark = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]
        names.append("-".join([*words[:3], mark])[-40:].lstrip("-"))
    names = pd.Series(names, pairs.index[missing])
    turn = names.groupby(names).cumcount()  # a published list may hold a row twice
    ids = pairs.prompt_id.copy()
    ids[missing] = names.where(turn == 0, names + "-" + (turn + 1).astype(str))
    return pairs.assign(prompt_id=ids)
