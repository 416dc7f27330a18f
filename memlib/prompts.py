"""Prompts: their groups, and the pictures they were trained on."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image, ImageOps, features

from memlib.errors import first_line, nearest, short

# Still pictures that Pillow reads and a training set may hold (no icons, no drawings of an editor):
# how their content begins, and their endings, the first of which we give.
FORMATS = {
    "JPEG": (rb"\xff\xd8\xff", (".jpg", ".jpeg", ".jpe", ".jfif")),
    "PNG": (rb"\x89PNG\r\n\x1a\n", (".png", ".apng")),
    "WEBP": (rb"RIFF....WEBP", (".webp",)),
    "GIF": (rb"GIF8[79]a", (".gif",)),
    "BMP": (rb"BM", (".bmp", ".dib")),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", (".tif", ".tiff")),
    "AVIF": (rb"....ftyp(....){0,12}?avi[fs]", (".avif",)),
    "JPEG2000": (
        rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
        (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
    ),
    "PPM": (rb"P[1-6]\s", (".ppm", ".pgm", ".pbm", ".pnm")),
}

MEMORIZED = ("planted, ≥ 32 copies", "memorized")  # the groups that claims are about
KINDS = ("planted", "named", "memorized", "template", "control", "normal", "held-out")
POPULATION = ("planted", "named", "memorized", "template", "control")


class PairsError(ValueError):
    """A manifest or an image that cannot be used; the message says which and why."""

    def __init__(self, message: str):
        super().__init__(short(message, 300))


def group_of(kind: Iterable, multiplicity: Iterable) -> np.ndarray:
    """The figure group of each prompt: planted pairs by copies, the others by kind.

    Raises
    ------
    ValueError
        A kind that no figure knows, or a planted prompt whose copies are not known.
    """
    kind, multiplicity = np.asarray(kind), np.asarray(multiplicity)
    for name in dict.fromkeys(kind):
        if name not in KINDS:
            raise ValueError(f"unknown kind {name!r} of a prompt{nearest(name, KINDS)}")
    if pd.isna(multiplicity[kind == "planted"]).any():
        raise ValueError("planted prompts need their multiplicity; else call them memorized")
    planted = np.select(
        [multiplicity >= 32, multiplicity >= 8],
        ["planted, ≥ 32 copies", "planted, 8-16 copies"],
        "planted, 1-4 copies",
    )
    return np.where(kind == "planted", planted, kind)


def copies(prompts: pd.DataFrame | xr.Dataset) -> np.ndarray:
    """How often each picture stands in an epoch, NaN where the list does not say."""
    if "multiplicity" not in prompts:
        return np.full(len(prompts["kind"]), np.nan)
    return np.asarray(prompts["multiplicity"])


def groups(prompts: pd.DataFrame | xr.Dataset) -> np.ndarray:
    """`group_of` each prompt."""
    if "kind" not in prompts:
        raise ValueError(f"the list of prompts needs a column 'kind', of {', '.join(KINDS)}")
    return group_of(prompts["kind"], copies(prompts))


def by_memorization(
    prompts: pd.DataFrame | xr.Dataset,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which prompts are memorized, which are in between, and which are controls.

    Memorized means planted with 32 copies or more, in between with 8 and 16. In a list without
    planted prompts they are the kinds memorized and template. The last two may be empty.
    """
    group = groups(prompts)
    memorized = np.isin(group, MEMORIZED)
    if not memorized.any():
        raise ValueError("no prompt is planted with 32 copies or more, or of kind 'memorized'")
    planted = "planted" in np.asarray(prompts["kind"])
    return (
        memorized,
        group == ("planted, 8-16 copies" if planted else "template"),
        group == "control",
    )


def most_copied(prompts: pd.DataFrame | xr.Dataset) -> np.ndarray:
    """Which prompts were planted with the most copies; without planted ones, the memorized."""
    planted = np.asarray(prompts["kind"]) == "planted"
    if not planted.any():
        return by_memorization(prompts)[0]
    return planted & (copies(prompts) == copies(prompts)[planted].max())


def least_copied(prompts: pd.DataFrame | xr.Dataset) -> np.ndarray:
    """Which prompts to compare memorized ones with: in training as well, but hardly repeated.

    Those planted with the fewest copies; in a list without planted ones, the controls.
    """
    planted = np.asarray(prompts["kind"]) == "planted"
    if not planted.any():
        return by_memorization(prompts)[2]
    return planted & (copies(prompts) == copies(prompts)[planted].min())


def to_correlate(prompts: pd.DataFrame | xr.Dataset) -> np.ndarray:
    """Which prompts to correlate over, as they span never to always copied: `POPULATION`.

    The kinds of Webster's lists, and what stands for them in the lab.
    """
    return np.isin(np.asarray(prompts["kind"]), POPULATION)


def copies_or_kind(prompts: pd.DataFrame | xr.Dataset) -> tuple[np.ndarray, list[str]]:
    """A label for each prompt, its copies if it was planted, else its kind; all labels in order."""
    kind, multiplicity = np.asarray(prompts["kind"]), copies(prompts)
    planted = kind == "planted"
    label = np.where(planted, [f"{m:g}" for m in multiplicity], kind)
    counts = [f"{m:g}" for m in np.unique(multiplicity[planted])]
    return label, [*counts, *(name for name in KINDS[1:] if name in kind)]


def image_files(pairs: pd.DataFrame) -> list[str]:
    """The image of each prompt, "" where there is none."""
    return list(pairs["image"]) if "image" in pairs else [""] * len(pairs)


@functools.cache
def readable() -> tuple[str, ...]:
    """Those of `lists.FORMATS` that Pillow reads as it is installed here."""
    needs = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow does not know the word
        return tuple(k for k in FORMATS if k not in needs or features.check(needs[k]))


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture's first frame, upright, as 8-bit RGB, as a training set has it.

    Transparency is laid on white, as img2dataset does, which made the LAION training files. Grey of
    16 bits is scaled: 65535 is white. `image` itself is turned upright.

    Raises
    ------
    PairsError
        It is fully transparent, or its numbers have no known range (32 bits, floats).
    """
    ImageOps.exif_transpose(image, in_place=True)
    image.load()
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        deep = np.asarray(image)
        seen = None if clear is None else Image.fromarray(np.uint8(255) * (deep != clear))
        image = Image.fromarray(((deep.astype(np.uint32) + 128) // 257).astype(np.uint8))
        if seen is not None:
            image = Image.merge("LA", (image, seen))
    elif image.mode in ("I", "F"):
        raise PairsError("of 32 bits a pixel, whose range is not known: save it with 8 or 16")
    elif isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits; the pixels have 8 now
        image.info["transparency"] = tuple(v >> 8 for v in clear)
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    layered = image.mode in ("LA", "PA", "RGBA", "RGBa") or palette == "RGBA"
    if not layered and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if not image.getchannel("A").getextrema()[1]:
        raise PairsError("fully transparent: a placeholder, not a training image")
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=image)
    return ground


def read_image(file: str | Path, size: int | None) -> np.ndarray:
    """An image as uint8 [y, x, rgb]: see `to_rgb`; short side to `size`, centre crop.

    Raises
    ------
    PairsError
        The file is missing, cannot be decoded, or is all black or transparent (a placeholder).
    """
    name = short(file, 120)
    try:
        with Image.open(file, formats=readable()) as opened:
            image = to_rgb(opened)
    except FileNotFoundError as error:
        raise PairsError(f"image {name} is missing") from error
    except PairsError as error:
        raise PairsError(f"image {name} is {error}") from error
    except Exception as error:  # damaged files raise nearly anything
        reason = getattr(error, "strerror", None) or short(first_line(error))
        raise PairsError(f"image {name} cannot be decoded: {reason}") from error
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    picture = np.array(image)
    if picture.max() == 0:
        raise PairsError(f"image {name} is all black: a placeholder, not a training image")
    return picture
