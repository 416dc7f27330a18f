"""Files: written as a whole or not at all, compared with checksums, and code by what it does."""

import ast
import functools
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
    return _code(Path(path), Path(path).stat().st_mtime_ns)


@functools.lru_cache
def _code(path: Path, _changed: int) -> str:
    tree = ast.parse(path.read_text())
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
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        expected, _, name = line.partition("  ")
        file = folder / name
        if wanted(name) and not (file.is_file() and sha256(file) == expected):
            raise ValueError(
                f"{file} is missing or damaged, by the checksum in {folder.name}/SHA256SUMS; "
                f"restore it with git checkout -- {file}, or retrain with make lab"
            )
