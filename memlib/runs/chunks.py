"""Arrays of Zarr format 2, as far as a run needs them: every chunk is a file of its own.

`zarr` and `xarray.open_zarr` read the same files. A run has many small ones, for each of which
they take about a millisecond; `Array` takes a tenth of it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numcodecs import Zstd, get_codec
from numcodecs.abc import Codec

# In order F the same number of all seeds and steps lies together, so the symmetric half, zeros
# and what never changes cost next to nothing; zstd adds a checksum of its own.
COMPRESSOR = Zstd(level=6, checksum=True)
DIMS = "_ARRAY_DIMENSIONS"  # where xarray looks for them


@dataclass(frozen=True)
class Array:
    """Name, shape and layout of an array in a group; chunks are padded to their full size."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    order: str = "F"
    attrs: dict = field(default_factory=dict)
    compressor: Codec = field(default_factory=lambda: COMPRESSOR)

    @classmethod
    def known(cls, name: str, metadata: dict) -> Array:
        """An array from the consolidated metadata of its group."""
        layout, attrs = metadata[f"{name}/.zarray"], dict(metadata[f"{name}/.zattrs"])
        dims, shape, chunks = attrs.pop(DIMS), layout["shape"], layout["chunks"]
        dtype, codec = np.dtype(layout["dtype"]), get_codec(layout["compressor"])
        sizes = tuple(dims), tuple(shape), tuple(chunks)
        return cls(name, *sizes, dtype, layout["order"], attrs, codec)

    def metadata(self) -> dict[str, dict]:
        """What stands in its two files of metadata."""
        layout = {
            "zarr_format": 2, "shape": self.shape, "chunks": self.chunks, "dtype": self.dtype.str,
            "fill_value": "NaN" if self.dtype.kind == "f" else None, "order": self.order,
            "filters": None, "compressor": self.compressor.get_config(), "dimension_separator": ".",
        }  # fmt: skip
        attrs = {DIMS: self.dims, **self.attrs}
        return {f"{self.name}/.zarray": layout, f"{self.name}/.zattrs": attrs}

    def empty(self, shape: Iterable[int]) -> np.ndarray:
        """NaN, or zeros where the type has none: what is read where no file is.

        In memory as in the files, one prompt after the other: chunks are copied in one go.
        """
        values = self._room(shape)
        values[...] = self._nothing
        return values

    @property
    def _nothing(self):
        return np.nan if self.dtype.kind == "f" else np.zeros((), self.dtype)

    def _room(self, shape: Iterable[int]) -> np.ndarray:
        first, *rest = tuple(shape) or (1,)
        if self.order == "C" or not rest:
            return np.empty(tuple(shape), self.dtype)
        turned = np.empty((first, *rest[::-1]), self.dtype)
        return turned.transpose(0, *range(len(rest), 0, -1))

    def encode(self, block: np.ndarray) -> bytes:
        """A chunk as it lies in its file."""
        return self.compressor.encode(block.reshape(-1, order=self.order))

    def decode(self, data: bytes) -> np.ndarray:
        """The chunk of a file; ValueError where it is not one."""
        try:
            values = np.frombuffer(self.compressor.decode(data), self.dtype)
            return values.reshape(self.chunks, order=self.order)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.name} cannot be read: {error}") from error

    def parts(self, at: dict[str, Iterable[int]]) -> Iterator[tuple[str, tuple, tuple]]:
        """The files that hold these positions (of a dim that is not named: all).

        Each with the index of its part in the file's chunk, and in the array of all positions.
        """
        each = []
        for dim, size, chunk in zip(self.dims, self.shape, self.chunks, strict=True):
            positions = np.asarray(at.get(dim, range(size)), int)
            numbers = positions // chunk
            if chunk == 1:
                each.append([(p, slice(0, 1), slice(n, n + 1)) for n, p in enumerate(positions)])
                continue
            order = np.argsort(numbers, kind="stable")
            groups = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
            each.append([(numbers[g[0]], _span(positions[g] % chunk), _span(g)) for g in groups])
        for part in itertools.product(*each):
            numbers, inside, outside = zip(*part, strict=True) if part else ((), (), ())
            key = f"{self.name}/{'.'.join(map(str, numbers)) or 0}"
            yield key, _index(inside), _index(outside)

    def write(self, values: np.ndarray, at: dict, old: Callable[[str], bytes | None]) -> dict:
        """The files after `values` were put at these positions; `old` gives those before."""
        files = {}
        for key, inside, outside in self.parts(at):
            block, data = self.empty(self.chunks), old(key)
            if data is not None:
                # what cannot be read has neighbours that are redone, too: their checksums say so
                with contextlib.suppress(ValueError):
                    block = np.array(self.decode(data), order=self.order)
            block[inside] = values[outside]
            files[key] = self.encode(block)
        return files

    def read(self, at: dict, data: Callable[[str], bytes | None]) -> np.ndarray:
        """The values at these positions; `data` gives the content of a file."""
        shape = [len(at.get(d, range(n))) for d, n in zip(self.dims, self.shape, strict=True)]
        values = self._room(shape)
        for key, inside, outside in self.parts(at):
            found = data(key)
            values[outside] = self._nothing if found is None else self.decode(found)[inside]
        return values


def _span(positions: np.ndarray) -> slice | np.ndarray:
    """A slice where positions follow each other: it is faster."""
    if (np.diff(positions) == 1).all():
        return slice(int(positions[0]), int(positions[-1]) + 1)
    return positions


def _index(spans: tuple) -> tuple:
    """An index along every dim on its own, as zarr's `oindex`."""
    if all(isinstance(s, slice) for s in spans):
        return spans
    return np.ix_(*(np.r_[s] for s in spans))


def group(arrays: Iterable[Array], attrs: dict) -> dict[str, bytes]:
    """The files of a group's metadata; the last promises readers all the others."""
    metadata = {".zgroup": {"zarr_format": 2}, ".zattrs": attrs}
    for array in arrays:
        metadata |= array.metadata()
    whole = {"zarr_consolidated_format": 1, "metadata": metadata}
    files = metadata | {".zmetadata": whole}
    return {key: json.dumps(value, default=_plain).encode() for key, value in files.items()}


def _plain(value):
    return np.asarray(value).tolist()
