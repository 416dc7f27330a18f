"""The official SSCD networks: Meta's files, which a user brings, as measures of similarity.

Importing the hub adds them to `memlib.measures.MEASURES`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from memlib.errors import first_line
from memlib.hub.files import sha256
from memlib.measures import MEASURES, Measure, similarity  # noqa: F401, with these measures
from memlib.paths import data_folder

OFFICIAL_BATCH = 16  # pictures that the official networks see at once on a GPU


@dataclass(frozen=True)
class Network:
    """One of Meta's TorchScript files of SSCD (MIT licence). Meta publishes no checksums."""

    name: str  # for `memlib fetch`
    file: str
    variable: str  # of the environment: another path; with _SHA256 behind it, another checksum
    sha256: str = ""
    size: int = 4_000_000_000  # bytes, at most
    note: str = ""

    @property
    def url(self) -> str:
        return f"https://dl.fbaipublicfiles.com/sscd-copy-detection/{self.file}"

    @property
    def path(self) -> Path:
        """Where the environment says that the file lies, or where `memlib fetch` puts it."""
        return Path(os.environ.get(self.variable) or data_folder(self.file))

    @property
    def trusted(self) -> str:
        """The checksum to have: the environment's, or one given to `memlib fetch`, or our own."""
        if named := os.environ.get(f"{self.variable}_SHA256"):
            return named.lower()
        given = data_folder(f"{self.file}.sha256")
        if given.is_file() and not os.environ.get(self.variable):
            return given.read_text().strip()
        return self.sha256

    def read(self) -> bytes:
        """The file's bytes, if its checksum is the trusted one: TorchScript runs code.

        Raises
        ------
        FileNotFoundError
            It is not here.
        ValueError
            It is another file, or nothing says which file it should be.
        """
        if not self.path.is_file():
            option = "" if self.sha256 else " --sha256 ..."
            raise FileNotFoundError(
                f"{self.file} is not here: memlib fetch {self.name}{option} brings it, or set "
                f"{self.variable} to its path; similarity='sscd' needs no download"
            )
        data = self.path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != self.trusted:
            wanted = f"not {self.trusted}" if self.trusted else "and no published one is known"
            raise ValueError(
                f"{self.path} has the sha256 {found}, {wanted}; such a file runs code: if you "
                f"trust it, set {self.variable}_SHA256 to that"
            )
        return data


OFFICIAL = {
    network.name: network
    for network in (
        # This checksum is stated in at least eight public code bases.
        Network(
            "sscd", "sscd_disc_mixup.torchscript.pt", "MEMLIB_SSCD",
            "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56", 98_791_638,
        ),
        # None was found of this one: code that uses it keeps whatever it is given.
        Network(
            "sscd-large", "sscd_disc_large.torchscript.pt", "MEMLIB_SSCD_LARGE",
            note="the score of the authors' current code",
        ),
    )
}  # fmt: skip
PREPROCESSING = {  # of the official networks: measure → network, what is done to a picture
    "sscd-small288": ("sscd", "small_288"),
    "sscd-skew320": ("sscd", "skew_320"),
    "sscd-large288": ("sscd-large", "skew_288"),
}


def official_input(image: np.ndarray, preprocessing: str) -> np.ndarray:
    """A picture as SSCD's authors feed it: float32 [rgb, y, x], ImageNet's normalisation.

    ``small_288``: the short side to 288, the shape kept. ``skew_320``: 320 x 320 whatever the
    shape; ``skew_288`` alike. All bilinear, as torchvision's `Resize` on a PIL image.
    """
    height, width = image.shape[:2]
    kind, side = preprocessing.split("_")
    size = (int(side), int(side))
    if kind == "small":
        size = tuple(int(int(side) * n / min(height, width)) for n in (width, height))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    x = np.asarray(resized, np.float32) / 255
    x = (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return np.ascontiguousarray(x.transpose(2, 0, 1))


def _official(measure: str, device: str) -> Callable:
    """An official TorchScript SSCD, [image, 512 or 1024] of unit length (Pizzi et al. 2022)."""
    import torch

    name, preprocessing = PREPROCESSING[measure]
    data, file = OFFICIAL[name].read(), OFFICIAL[name].path
    try:
        network = torch.jit.load(io.BytesIO(data), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is no TorchScript file: {first_line(error)}") from error

    def describe(images: np.ndarray) -> np.ndarray:
        rows, together = [], 1 if device == "cpu" else OFFICIAL_BATCH
        for n in range(0, len(images), together):
            x = np.stack([official_input(i, preprocessing) for i in images[n : n + together]])
            with torch.inference_mode():
                rows += network(torch.from_numpy(x).to(device)).double().cpu()
        rows = np.stack(rows)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return describe


def _note(measure: str, _size: int, device: str) -> dict:
    network, preprocessing = PREPROCESSING[measure]
    note = {"preprocessing": preprocessing, "sha256": OFFICIAL[network].trusted}
    note["sscd_side"] = int(preprocessing.split("_")[1])
    return note | ({} if device == "cpu" else {"device": device.partition(":")[0]})


def available() -> list[str]:
    """The measures that can be used here: not the official ones whose file is not here."""
    here = {n for n, o in OFFICIAL.items() if o.path.is_file() and sha256(o.path) == o.trusted}
    return [m for m in MEASURES if m not in PREPROCESSING or PREPROCESSING[m][0] in here]


for _name in PREPROCESSING:
    MEASURES[_name] = Measure(
        lambda _, device, name=_name: _official(name, device), partial(_note, _name), on_device=True
    )
