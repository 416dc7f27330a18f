"""Files: written as a whole or not at all, compared with checksums, and code by what it does."""

import ast
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved there at the end; an error leaves what was there."""
    path = Path(path)
    partial = path.with_name(f".{path.name[:100]}.{uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def code(path: str | Path) -> str:
    """A module as its syntax tree: what it does, without comments, docstrings and layout."""
    tree = ast.parse(Path(path).read_text())
    for node in ast.walk(tree):
        for first in node.body[:1] if isinstance(getattr(node, "body", None), list) else ():
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]  # a docstring
    return ast.dump(tree)


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
