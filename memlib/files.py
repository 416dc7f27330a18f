"""Shipped files against their list of checksums."""

import hashlib
from collections.abc import Callable
from pathlib import Path


def digest(file: Path, algorithm: str) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


def sha256(file: Path) -> str:
    return digest(file, "sha256")


def verify(folder: Path, wanted: Callable[[str], bool]) -> None:
    """Compare the `wanted` files of a folder's SHA256SUMS with the list.

    Raises
    ------
    ValueError
        A file is missing or differs; the message names the first one.
    """
    listing = folder / "SHA256SUMS"
    if not listing.is_file():
        raise ValueError(f"{listing} is missing: restore it with git checkout -- {listing}")
    for line in listing.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if not wanted(name):
            continue
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: restore it with git checkout -- {file}")
        if sha256(file) != expected:
            raise ValueError(
                f"{file} is damaged: its checksum is not the one in {folder.name}/SHA256SUMS; "
                f"restore it with git checkout -- {file}, or retrain with make lab"
            )
