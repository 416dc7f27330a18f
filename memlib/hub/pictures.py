"""Training images as files: which belongs to which prompt, and which are placeholders."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import Image

from memlib.errors import first_line, short
from memlib.hub.files import sha256
from memlib.hub.lists import index_text, near_duplicates
from memlib.prompts import FORMATS, PairsError, readable, to_rgb

ENDINGS = tuple(ending for _, endings in FORMATS.values() for ending in endings)
PACKS = (".tar", ".tar.gz", ".tgz", ".zip", ".parquet")
SET_ASIDE = "set-aside"  # a folder of placeholders beside downloaded pictures
MIN_SIDE = 64  # pixels


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
    own, images, notes = list(table.get("image", [""] * len(table))), [], []
    urls = [url if isinstance(url, str) else "" for url in table.get("url", [""] * len(table))]
    for image, (files, none) in zip(own, _belonging(table, urls, folder), strict=True):
        reasons = {} if image else {file: look_at(file).reason for file in files}
        whole = (str(file.resolve()) for file, reason in reasons.items() if reason is None)
        images.append(image or next(whole, ""))
        notes.append("" if images[-1] else next(iter(reasons.values()), none))
    names = [name or f"row {n + 1}" for n, name in enumerate(table.prompt_id)]
    places = [url or name for url, name in zip(urls, names, strict=True)]
    every = zip(names, images, places, near_duplicates(table), strict=True)
    rows = {name: (sha256(Path(image)), *rest) for name, image, *rest in every if image}
    shared = one_for_many(rows)
    for n, name in enumerate(names):
        if name in shared and not own[n]:
            images[n], notes[n] = "", shared[name]
    return table.assign(image=images, image_note=notes)


def _belonging(table: pd.DataFrame, urls: list[str], folder: Path) -> Iterator[tuple]:
    """For each row the files that may be its picture, and why it has none where there are none."""
    captions = {caption.strip(): caption for caption in table.caption}
    told = {file: _sidecar(file, captions) for file in pictures_below(folder)}
    named, plain, of_url, of_caption = (defaultdict(list) for _ in range(4))
    for file, (url, caption) in told.items():
        place = file.relative_to(folder)
        for name in {place.stem, place.name, place.with_suffix("").as_posix(), place.as_posix()}:
            named[name].append(file)
        plain[_plain_number(file.stem)].append(file)
        of_url[url].append(file)
        of_caption[caption].append(file)
    of_url[""].clear()
    none = "no picture" if told else f"no picture{_archives(folder)}"
    ids = table.prompt_id
    numbers = table["index"].map(index_text) if "index" in table else ids
    numbers = numbers.where(~numbers.duplicated(keep=False), ids)
    if (ids == "").all():
        counted = {int(name) for name in plain if name.isdecimal()}
        if 0 in counted or max(counted, default=0) == len(table):
            start = 0 if 0 in counted else 1
            ids = [str(start + n) for n in range(len(table))]
        elif counted:
            none = f"no picture: are they counted from 0 or from 1? None is 0 or {len(table)}"
        numbers = ids
    taken = {*ids, *numbers}
    for url, caption, *names in zip(urls, table.caption, ids, numbers, strict=True):
        found = of_url[url] + [f for f in of_caption[caption] if not (url and told[f][0])]
        note = none
        for name in filter(None, names):
            padded = [f for f in plain[_plain_number(name)] if f.stem not in taken]
            for file in named.get(name, padded):
                said = [(a, b) for a, b in zip(told[file], (url, caption), strict=True) if a and b]
                if not said or any(a == b for a, b in said):
                    found.append(file)
                else:
                    note = "no picture: the JSON or text beside the one of its name is of another"
        yield dict.fromkeys(found), note


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
    with suppress(OSError, ValueError, AttributeError):  # there is none, or one of another tool
        told = json.loads(file.with_suffix(".json").read_bytes())
        if told.get("url") or told.get("caption"):
            return str(told.get("url") or ""), str(told.get("caption") or "")
    with suppress(OSError, ValueError):
        text = file.with_suffix(".txt").read_text("utf-8-sig")
        return "", captions.get(text.strip(), "")
    return "", ""


def one_for_many(rows: dict[str, tuple[str, str, Hashable]]) -> dict[str, str]:
    """What to say of pictures that are placeholders, for they are those of other prompts, too.

    `rows` gives for each name the picture's checksum, address, and group of near-duplicates.
    A server that lost its pictures answers every address with the same one, "not available". But
    memorized pictures are found in many places, too, and lists repeat prompts. So one picture is a
    placeholder where different addresses (but for scheme and fragment) gave it *and* it came for
    prompts whose captions differ by more than case and punctuation (`near_duplicates`). This rather
    loses a picture, which the report names, than keeps a placeholder, with which every result of
    its prompt is wrong, and nobody sees it.
    """
    same, found = defaultdict(list), {}
    for name, (digest, *_) in rows.items():
        same[digest].append(name)
    for names in map(sorted, same.values()):
        places = {re.sub(r"^https?:|#.*$", "", rows[name][1], flags=re.I) for name in names}
        groups = {rows[name][2] for name in names}
        if len(places) > 1 and len(groups) > 1:
            for name in names:
                others = short(", ".join(other for other in names if other != name), 120)
                found[name] = f"a placeholder: the same picture came for {others}"
    return found


def copy_pictures(source: Path, folder: Path) -> None:
    """Copy the pictures in a folder and below it, and what is said beside them."""
    found = pictures_below(source)
    if not found and (archives := _archives(source)):
        raise ValueError(f"no picture in {short(source)}{archives}")
    for file in found:
        for part in (file, file.with_suffix(".json"), file.with_suffix(".txt")):
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
        except Exception as error:  # damaged archives raise nearly anything
            reason = short(first_line(error), 120)
            raise ValueError(f"archive {short(archive)} cannot be unpacked: {reason}") from error
        copy_pictures(Path(place), folder)


class Look(NamedTuple):
    """What a file is: why it is no training image, or None; its ending and size once decoded."""

    reason: str | None
    suffix: str = ""
    size: tuple[int, int] = (0, 0)


def look_at(path: Path) -> Look:
    """What a file is, by its content and never by its name."""
    if not path.is_file():
        return Look("no such file")
    with path.open("rb") as handle:
        head = handle.read(1024)
    kind = next((k for k in readable() if re.match(FORMATS[k][0], head, re.DOTALL)), None)
    if kind is None:
        if re.search(rb"<html|<!doctype html", head, re.I):
            return Look("an HTML page, not an image")
        known = f"not an image of a kind that Pillow reads here ({', '.join(readable())})"
        return Look(known if head else "empty")
    suffix, reason = FORMATS[kind][1][0], None
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=[kind]) as image:
                picture = to_rgb(image)
    except PairsError as error:
        return Look(str(error), suffix, image.size)
    except Exception as error:  # damaged files raise nearly anything
        return Look(f"a {kind} that cannot be decoded: {short(first_line(error), 120)}")
    (width, height), extrema = picture.size, picture.getextrema()
    if min(width, height) < MIN_SIDE:
        reason = f"tiny: {width} x {height} pixels, a side below {MIN_SIDE}"
    elif all(low == high for low, high in extrema):
        reason = f"a single colour {tuple(high for _, high in extrema)}: a placeholder"
    return Look(reason, suffix, picture.size)
