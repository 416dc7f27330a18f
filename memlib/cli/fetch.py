"""``memlib fetch``: published lists with their images, a model's weights, the official SSCD."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from memlib.errors import nearest
from memlib.hub import checkpoints, lists, pictures
from memlib.hub import fetch as downloads
from memlib.hub.manifests import load_pairs
from memlib.hub.names import CHECKPOINTS, checkpoint
from memlib.hub.sscd import OFFICIAL, Network
from memlib.paths import data_folder


def fetch(options) -> None:
    """Bring what is asked for by its name to this machine."""
    if checkpoint(options.what):
        import torch  # a list needs none

        half = options.dtype != "float32" if options.dtype else torch.cuda.is_available()
        for path in checkpoints.download(options.what, options.revision, half):
            print(path)
    elif options.what in OFFICIAL:
        print(fetch_sscd(OFFICIAL[options.what], options.sha256))
    elif options.what in lists.LISTS:
        fetch_list(options)
    else:
        valid = (*lists.LISTS, *CHECKPOINTS, *OFFICIAL)
        raise ValueError(f"no such name as {options.what!r}{nearest(options.what, valid)}")


def fetch_list(options) -> None:
    """A list by its published checksum, and its images: from a folder, an archive, or the web."""
    known, file = lists.LISTS[options.what], lists.list_file(options.what)
    downloads.file(known.url, file, "md5", known.md5, max_bytes=200_000_000)
    folder = file.parent / "images"
    if options.images and not options.images.exists():
        raise ValueError(f"no folder or archive {str(options.images)!r}")
    if options.images and options.images.is_dir():
        pictures.copy_pictures(options.images, folder)
    elif options.images:
        pictures.unpack(options.images, folder)
    elif not options.list_only:
        report = downloads.download(addresses(file), folder, retry_failed=options.retry)
        for status, part in report.groupby("status"):
            print(f"{len(part):5} {status}")
        print(f"each with its reason: {folder / 'report.csv'}")
    pairs = load_pairs(options.what)
    print(f"{options.what}: {len(pairs)} prompts, {(pairs.image != '').sum()} with an image")
    notes = pairs.image_note[pairs.image == ""].value_counts()
    for note, count in notes.head(8).items():
        print(f"{count:5} without: {note}")


def addresses(file: Path) -> pd.DataFrame:
    """The addresses of a list's images: the row's own, then those that were retrieved for it."""
    table = lists.standard(pd.read_parquet(file))
    urls = []
    for row in table.itertuples():
        more = getattr(row, "retrieved_urls", None)
        more = [] if more is None or isinstance(more, float | str) else list(more)
        texts = [url.strip() for url in (row.url, *more) if isinstance(url, str)]
        urls.append([url for url in dict.fromkeys(texts) if url])
    return table.assign(url=urls)[["prompt_id", "url", "group"]]


def fetch_sscd(network: Network, given: str | None) -> Path:
    """Bring an official SSCD; a checksum that was given is kept, to be asked for at each use."""
    wanted = (given or network.sha256).lower()
    if not wanted:
        raise ValueError(
            f"Meta publishes no checksum of {network.file}, and no one else was found to: give the "
            f"one you trust with --sha256, or download {network.url} yourself and set "
            f"{network.variable} and {network.variable}_SHA256"
        )
    file = downloads.file(network.url, network.path, "sha256", wanted, max_bytes=network.size)
    note = data_folder(f"{network.file}.sha256")
    if wanted == network.sha256:
        note.unlink(missing_ok=True)
    else:
        note.write_text(wanted)
    return file
