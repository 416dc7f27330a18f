"""Training images as files: which belongs to which prompt, and which are placeholders."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable
from contextlib import suppress
from pathlib import Path
from tarfile import TarError
from typing import NamedTuple
from zipfile import BadZipFile

import pandas as pd
from PIL import Image

from memlib.errors import first_line, short
from memlib.hub.files import sha256
from memlib.hub.lists import index_text, near_duplicates
from memlib.prompts import FORMATS, PairsError, readable, to_rgb

ENDINGS = tuple(ending for _, endings in FORMATS.values() for ending in endings)
BESIDE = (".json", ".txt")  # of these endings is what says whose a picture is
PACKS = (".tar", ".tar.gz", ".tgz", ".zip", ".parquet")
SET_ASIDE = "set-aside"  # a folder of placeholders beside downloaded pictures
SHARED = "a placeholder: the same picture came for "


def pictures_below(folder: Path) -> list[Path]:
    """The pictures in a folder and below it by their endings, the highest first.

    What is hidden, as the resource forks ``._12.jpg`` of macOS, and what was set aside are not.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f != SET_ASIDE]
        found += [Path(parent, n) for n in names if n[0] != "." and n.lower().endswith(ENDINGS)]
    return sorted(found, key=lambda file: (len(file.parts), file))


def find_images(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Give each row the picture in `folder`, or below it, that is named after it, if it is one.

    A row that has an `image` keeps it. A picture is named by `prompt_id`, or by an `index` that
    occurs once: as it is, with or without its ending and folder, or else with leading zeros; in a
    list that has neither, by the row's number from 0, or from 1 where the highest is the last
    row's and there is no 0. Where img2dataset left a ``12.json`` beside ``12.jpg``, the address or
    caption in it says whose the picture is: there 12 is a row of the list that was downloaded. So
    does a ``12.txt`` that holds a caption of this list. Of several files the first whole one is
    taken. What is broken, tiny, a page of HTML or a placeholder is set aside: `image` is "" and
    `image_note` says why. One picture for several prompts is judged by `one_for_many`; to use it
    all the same, name it in the manifest's column `image`.
    """
    captions = {caption.strip(): caption for caption in table.caption}
    files, plain, of_url, of_caption = (defaultdict(list) for _ in range(4))
    told = {file: _sidecar(file, captions) for file in pictures_below(folder)}
    for file, (url, caption) in told.items():
        place = file.relative_to(folder)
        for name in {place.stem, place.name, place.with_suffix("").as_posix(), place.as_posix()}:
            files[name].append(file)
        plain[_plain_number(file.stem)].append(file)
        of_url[url].append(file)
        of_caption[caption].append(file)
    of_url[""].clear()
    none = "no picture" if told else f"no picture{_archives(folder)}"
    ids = table.prompt_id
    numbers = table["index"].map(index_text) if "index" in table else ids
    numbers = numbers.where(~numbers.duplicated(keep=False), ids)
    if (ids == "").all():
        start = _first_number([file.stem for file in told if not any(told[file])], len(table))
        if start is None:
            none = f"no picture: are they counted from 0 or from 1? None is 0 or {len(table)}"
        else:
            ids = pd.Series([str(start + n) for n in range(len(table))], table.index)
        numbers = ids
    taken = {*ids, *numbers}
    blank = [""] * len(table)
    urls = [url if isinstance(url, str) else "" for url in table.get("url", blank)]
    own = list(table.get("image", blank))
    images, notes = own.copy(), blank.copy()
    every = zip(own, urls, table.caption, ids, numbers, strict=True)
    for n, (image, url, caption, *names) in enumerate(every):
        if image:
            continue
        found, note = [f for f in of_caption[caption] if not (url and told[f][0])], none
        for name in filter(None, names):
            padded = [f for f in plain[_plain_number(name)] if f.stem not in taken]
            for file in files.get(name, padded):
                said = [(a, b) for a, b in zip(told[file], (url, caption), strict=True) if a and b]
                if not said or any(a == b for a, b in said):
                    found.append(file)
                else:
                    note = "no picture: the JSON or text beside the one of its name is of another"
        reasons = {file: check_image(file) for file in dict.fromkeys(of_url[url] + found)}
        whole = [str(file.resolve()) for file, reason in reasons.items() if reason is None]
        images[n] = next(iter(whole), "")
        notes[n] = "" if whole else next(iter(reasons.values()), note)
    groups = near_duplicates(table)
    rows = {
        n: (sha256(Path(image)), url or f"row {n}", groups[n])
        for n, (image, url) in enumerate(zip(images, urls, strict=True)) if image
    }  # fmt: skip
    labels = [name or f"row {n + 1}" for n, name in enumerate(table.prompt_id)]
    for n, (others, placeholder) in one_for_many(rows).items():
        if placeholder and not own[n]:
            images[n], notes[n] = "", shared_note(labels[other] for other in others)
    return table.assign(image=images, image_note=notes)


def _first_number(stems: Iterable[str], rows: int) -> int | None:
    """What the first of a list's pictures is numbered; None where that cannot be told."""
    numbers = {int(n) for n in map(_plain_number, stems) if n.isdecimal()}
    if not numbers or 0 in numbers:
        return 0
    return 1 if max(numbers) == rows else None


def _archives(folder: Path) -> str:
    """What to do with the archives in a folder, as img2dataset leaves them; "" if it has none."""
    names = [f.name for f in folder.rglob("*") if f.name.lower().endswith(PACKS)]
    hint = "unpack them, or take them into a published list by memlib fetch LIST --images ARCHIVE"
    return f": the folder holds archives ({short(min(names), 40)}); {hint}" if names else ""


def _plain_number(name: object) -> str:
    """A name without leading zeros, and without the ``.0`` of a number that was read as a float."""
    number = re.fullmatch(r"0*(\d+)(\.0)?", str(name))
    return number[1] if number else str(name)


def _sidecar(file: Path, captions: dict[str, str]) -> tuple[str, str]:
    """A picture's address and caption by img2dataset's JSON file, or its caption by a text file.

    The text of a text file counts only where it is one of `captions`.
    """
    told, text = None, ""
    with suppress(OSError, ValueError):
        told = json.loads(file.with_suffix(".json").read_bytes())
    with suppress(OSError, ValueError):
        text = file.with_suffix(".txt").read_text("utf-8-sig").strip()
    told = told if isinstance(told, dict) else {}
    url, caption = (v if isinstance(v := told.get(k), str) else "" for k in ("url", "caption"))
    return (url, caption) if url or caption else ("", captions.get(text, ""))


def one_for_many(
    rows: dict[Hashable, tuple[str, str, Hashable | None]],
) -> dict[Hashable, tuple[list, bool]]:
    """Which pictures are byte for byte those of other prompts, and whether as a placeholder.

    A server that lost its pictures answers every address with the same one, "not available". But
    memorized pictures are found in many places, too, and lists repeat prompts. So one picture is a
    placeholder where different addresses (but for scheme and fragment) gave it *and* it came for

    - two prompts whose captions differ by more than case and punctuation (`near_duplicates`), or
    - where the captions are not known, three addresses.

    The rule would rather lose a picture, which the report names, than keep a placeholder, with
    which every result of its prompt is wrong, and nobody sees it.

    Parameters
    ----------
    rows : for each name the picture's checksum, address, and group of near-duplicates or None.

    Returns
    -------
    For each name whose picture other addresses gave, too: the others, and the verdict.
    """
    same, found = defaultdict(list), {}
    for name, (digest, *_) in rows.items():
        same[digest].append(name)
    for names in same.values():
        places = {name: re.sub(r"^https?:|#.*$", "", rows[name][1], flags=re.I) for name in names}
        if len(set(places.values())) == 1:
            continue
        groups = {rows[name][2] for name in names} - {None}
        unknown = {places[name] for name in names if rows[name][2] is None}
        placeholder = len(groups) > 1 or len(groups) + len(unknown) > 2
        for name in names:
            found[name] = ([other for other in names if other != name], placeholder)
    return found


def shared_note(others: Iterable[str]) -> str:
    """Why a picture is set aside that came for other prompts, too."""
    others = list(others)
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"{SHARED}{', '.join(short(o, 40) for o in others[:3])}{more}"


def copy_pictures(source: Path, folder: Path) -> None:
    """Copy the pictures in a folder and below it, and what is said beside them."""
    if folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"the images are to be copied to {folder}, which is in {source} itself")
    found = pictures_below(source)
    if not found and (archives := _archives(source)):
        raise ValueError(f"no picture in {short(source)}{archives}")
    for file in found:
        for part in (file, *map(file.with_suffix, BESIDE)):
            if part.is_file():
                target = folder / part.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(part, target)


def unpack(archive: Path, folder: Path) -> None:
    """Copy the pictures of a zip or tar archive, and what is said beside them; else a ValueError.

    Nothing is written outside `folder`, whatever paths and links the archive holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        try:
            safe = None if archive.suffix == ".zip" else "data"  # a zip is always read so
            shutil.unpack_archive(archive, place, filter=safe)
        except (OSError, EOFError, RuntimeError, BadZipFile, TarError, zlib.error) as error:
            reason = short(first_line(error), 120)
            raise ValueError(f"archive {short(archive)} cannot be unpacked: {reason}") from error
        copy_pictures(Path(place), folder)


def check_image(path: str | Path, min_side: int = 64) -> str | None:
    """Why a file is not used as a training image, in one line; None where it can be."""
    return look_at(Path(path), min_side).reason


class Look(NamedTuple):
    reason: str | None
    suffix: str = ""
    size: tuple[int, int] = (0, 0)
    decoded: bool = False


def look_at(path: Path, min_side: int = 64) -> Look:
    """What a file is, by its content and never by its name."""
    if not path.is_file():
        return Look("no such file")
    with path.open("rb") as handle:
        head = handle.read(1024)
    kind = next((k for k, (m, _) in FORMATS.items() if re.match(m, head, re.DOTALL)), None)
    if kind is None:
        return Look(_what(head))
    if kind not in readable():
        return Look(f"an {kind} picture, which this Pillow cannot read: it needs a newer one")
    suffix, size = FORMATS[kind][1][0], (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=[kind]) as image:
                size = image.size
                picture = to_rgb(image)
                size, extrema = picture.size, picture.getextrema()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            return Look(f"a decompression bomb: {first_line(error)}", suffix, size)
        except PairsError as error:
            return Look(str(error), suffix, size, True)
        except Exception as error:  # damaged files raise nearly anything
            reason = f"a damaged {kind}, it cannot be decoded: {short(first_line(error), 120)}"
            return Look("truncated" if "truncated" in reason else reason, suffix, size)
    reason = None
    if min(size) < min_side:
        reason = f"tiny: {size[0]} x {size[1]} pixels, a side below {min_side}"
    elif not any(high for _, high in extrema):
        reason = "all black: a placeholder"
    elif all(low == high for low, high in extrema):
        reason = f"a single colour {tuple(high for _, high in extrema)}: a placeholder"
    return Look(reason, suffix, size, True)


def _what(head: bytes) -> str:
    head = head.lower()
    if not head:
        return "empty"
    if b"<html" in head or b"<!doctype html" in head:
        return "an HTML page, not an image"
    if re.match(rb"....ftyp(hei|hev|mif1|msf1)", head, re.DOTALL):
        return "a HEIF picture, which Pillow does not read: convert it to PNG"
    if b"<svg" in head:
        return "an SVG drawing, not a photograph"
    return f"not an image of a known kind ({', '.join(FORMATS)})"
