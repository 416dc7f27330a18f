"""Files from addresses that nobody vouches for: training images, and lists with a checksum.

Only http and https, and only public addresses, after every redirect too; proxies of the environment
are not used. Certificates are checked against the system's list (or the one that SSL_CERT_FILE
names). A body is taken as sent, never decompressed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiohttp
import numpy as np
import pandas as pd
from anyio.from_thread import start_blocking_portal
from filelock import FileLock, Timeout
from tqdm import tqdm

from memlib.errors import first_line, short
from memlib.hub.files import digest, sha256, whole
from memlib.hub.pictures import SET_ASIDE, SHARED, Look, look_at, one_for_many, shared_note
from memlib.prompts import FORMATS

UNSEEN = Look("")
ROW = dict.fromkeys(("prompt_id", "url", "status", "reason", "file"), "")
ROW |= {"bytes": 0, "width": 0, "height": 0, "sha256": ""}
AGENT = f"memlib/{version('memlib')} (research; executable book on memorization)"
LONGEST_WAIT = 60  # seconds; a host that asks for more is left alone for the rest of the run
GONE = ("HTTP 404", "HTTP 410")
# What a server calls the picture that it gives in place of one that is gone.
STAND_IN = re.compile(
    r"\bno ?(?:image|img|photo|picture|thumb|pic\b)|(?:not|un) ?(?:found|available)|place ?holder|"
    r"coming ?soon|hot ?link|(?:image|img|photo|picture|file|content|item|product) ?"
    r"(?:removed|deleted|missing|expired|gone|error)\b|"
    r"^(?:removed|deleted|missing|expired|error|blank|default|spacer|404)"
    r"(?: (?:image|img|photo|picture|large|small|medium|thumb|[\dx]+))*$"
)
# After these another attempt would not help.
FINAL = (
    PermissionError, socket.gaierror, ValueError, aiohttp.ClientResponseError,
    aiohttp.NonHttpUrlClientError,
)  # fmt: skip
NAT64 = ipaddress.ip_network("64:ff9b::/96")
Seconds = int | float


class FetchError(OSError):
    """What cannot be had, and why; `wait`: seconds before another attempt can help, or None."""

    def __init__(self, message: str, wait: Seconds | None = None, status: str = "failed"):
        super().__init__(short(message, 300))
        self.wait, self.status = wait, status


def download(
    items: pd.DataFrame, folder: str | Path, retry_failed: bool = False, progress: bool = True,
    **limits,
) -> pd.DataFrame:  # fmt: skip
    """Download one image an item, each to `folder`/prompt_id.suffix; a killed run can go on.

    Parameters
    ----------
    items : columns `prompt_id`, and `url`: an address, or a list of them, tried in order; and
        `group`, where it is known: the same for near-duplicate captions (`lists.near_duplicates`).
    retry_failed : try again what an earlier run found gone (404, 410) or set aside.
    limits : of `Client`.

    Returns
    -------
    A row an item: prompt_id, url (the one used), status, reason, file, bytes, width, height,
    sha256. The status is ``ok``, ``kept`` (already there), ``set aside`` (not a usable image;
    placeholders go to `folder`/set-aside) or ``failed``. `folder`/report.csv holds the same rows,
    and those of earlier runs with other items. One picture that different addresses gave is set
    aside by the rule of `pictures.one_for_many`, and an item's next addresses are tried; where it
    is kept, its reason names the others.

    Raises
    ------
    OSError
        The folder cannot be written, or another download into it is running.
    ValueError
        A prompt_id is no file name, or is duplicated.
    """
    folder, todo = Path(folder), _check_items(items)
    groups = dict(zip(todo, items["group"], strict=True)) if "group" in items else {}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            rows = _read_report(folder)
            if retry_failed:
                rows = {stem: r for stem, r in rows.items() if r["file"] or stem not in todo}
            _write_report(folder, rows)  # a folder that cannot be written fails here, not later
            try:
                _run(lambda client: _download(client, folder, rows, todo, groups, progress), limits)
            finally:
                _write_report(folder, rows)
    except Timeout as error:
        raise FetchError(f"another download into {folder} is running") from error
    return pd.DataFrame([rows[stem] for stem in todo], columns=list(ROW))


def file(
    url: str, target: str | Path, md5: str = "", sha256: str = "", progress: bool = True, **limits
) -> Path:
    """Download one file to `target`, unless it is there; it appears once its checksum is right.

    Raises
    ------
    OSError
        It cannot be had or written, or its checksum is another one.
    """
    target, name, wanted = Path(target), "md5" if md5 else "sha256", (md5 or sha256).lower()
    if not wanted:
        raise ValueError("a file needs a checksum: give md5 or sha256")
    if target.is_file() and digest(target, name) == wanted:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    limits = {"total": 3600, "max_bytes": 4_000_000_000} | limits
    bar = tqdm(desc=target.name, unit="B", unit_scale=True, disable=None if progress else True)
    with bar, whole(target) as partial:
        try:
            _run(lambda client: client.save(url, partial, bar), limits)
            if (found := digest(partial, name)) != wanted:
                raise FetchError(f"its {name} is {found}, not {wanted}; it was removed")
        except FetchError as error:
            raise FetchError(f"{target.name} from {short(url)}: {error}") from error
    return target


def is_public(address: str) -> bool:
    """Whether an IP address, or the IPv4 address inside it, is one of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip in NAT64:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _run(work: Callable, limits: dict) -> None:
    """Await ``work(client)``, in a notebook too; an interruption ends it at once."""

    async def run():
        client = Client(**limits)
        async with client.session:
            await work(client)

    with start_blocking_portal() as portal:
        portal.call(run)


async def _download(
    client: Client, folder: Path, rows: dict[str, dict], todo: dict[str, list[str]], groups: dict,
    progress: bool,
) -> None:  # fmt: skip
    """Bring the items' rows up to date; all at once, as far as the client lets them."""
    wanted = todo
    while wanted:
        tasks = [
            asyncio.ensure_future(_item(client, folder, stem, urls, rows.get(stem, ROW)))
            for stem, urls in wanted.items()
        ]
        every = asyncio.as_completed(tasks)
        bar = tqdm(every, "images", len(tasks), disable=None if progress else True)
        try:
            for n, task in enumerate(bar):
                row = await task
                rows[row["prompt_id"]] = row
                if n % 100 == 99:
                    _write_report(folder, rows)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        wanted = _one_for_many(folder, rows, todo, groups)


async def _item(client: Client, folder: Path, stem: str, urls: list[str], old: dict) -> dict:
    """One item's row: the file that is there, the earlier verdict, or its first usable address."""
    partial = folder / f"{stem}.partial"
    for _, endings in FORMATS.values():
        final = folder / f"{stem}{endings[0]}"
        if final.is_file() and (look := look_at(final)).reason is None:
            url = old["url"] or (urls[0] if len(urls) == 1 else "")
            other = "it came from another address: delete it to fetch it anew"
            reason = other if url and url not in urls else ""
            return _row(stem, url, "kept", reason, final, look) | {"file": final.name}
    aside = old["status"] == "set aside"
    if (aside or old["reason"] in GONE) and old["url"] in urls:
        return old
    rows = [old] if aside and old["url"] not in urls else []
    for url in urls:
        try:
            await client.save(url, partial, tqdm(disable=True))
            look = look_at(partial)
            name = f"{stem}{look.suffix}"
            rows.append(_row(stem, url, "set aside", look.reason or "", partial, look))
            if look.reason is None:
                partial.replace(folder / name)
                return rows[-1] | {"status": "ok", "file": name}
            if look.decoded:
                (folder / SET_ASIDE).mkdir(exist_ok=True)
                partial.replace(folder / SET_ASIDE / name)
        except FetchError as error:
            rows.append(_row(stem, url, error.status, str(error)))
        finally:
            partial.unlink(missing_ok=True)
    none = _row(stem, "", "failed", "no address")  # else the row that is most worth another run
    return max(rows, key=lambda r: (r["reason"] not in GONE, r["status"] == "failed"), default=none)


def _row(
    stem: str, url: str, status: str, reason: str, path: Path | None = None, look: Look = UNSEEN
) -> dict:
    row = ROW | {"prompt_id": stem, "url": url, "status": status, "reason": reason}
    row["width"], row["height"] = look.size
    return row | ({"bytes": path.stat().st_size, "sha256": sha256(path)} if path else {})


def _one_for_many(
    folder: Path, rows: dict[str, dict], todo: dict[str, list[str]], groups: dict
) -> dict[str, list[str]]:
    """Set aside one picture that came for many items; the addresses that are left to try."""
    seen, left = {}, {}
    for stem, row in ({stem: rows[stem] for stem in todo} | rows).items():
        if row["sha256"] and (row["file"] or row["reason"].startswith(SHARED)):
            address = row["url"] or (todo.get(stem) or [stem])[0]
            seen[stem] = (row["sha256"], address, groups.get(stem))
    for stem, (others, placeholder) in one_for_many(seen).items():
        row, urls = rows[stem], todo.get(stem, [])
        if not placeholder:
            row["reason"] = row["reason"] or shared_note(others).removeprefix("a placeholder: ")
        elif row["file"]:
            (folder / SET_ASIDE).mkdir(exist_ok=True)
            (folder / row["file"]).replace(folder / SET_ASIDE / row["file"])
            row |= {"status": "set aside", "reason": shared_note(others), "file": ""}
            if after := urls[urls.index(row["url"]) + 1 if row["url"] in urls else 0 :]:
                left[stem] = after
    return left


def _check_items(items: pd.DataFrame) -> dict[str, list[str]]:
    stems = items["prompt_id"].astype(str)
    for stem in stems:
        if not re.fullmatch(r"\w[\w.-]{0,199}", stem):
            raise ValueError(f"prompt_id {stem[:80]!r} is no file name: use letters, digits, _ - .")
    if (twice := stems.str.casefold().duplicated()).any():  # some disks take A and a for one file
        raise ValueError(f"prompt_id {short(stems[twice].iloc[0])!r} is duplicated")
    urls = ([u] if isinstance(u, str) else u if np.iterable(u) else [] for u in items["url"])
    urls = ([u.strip() for u in own if isinstance(u, str) and u.strip()] for own in urls)
    return dict(zip(stems, urls, strict=True))


def _read_report(folder: Path) -> dict[str, dict]:
    path = folder / "report.csv"
    if not path.exists():
        return {}
    texts = {name: str for name, empty in ROW.items() if empty == ""}
    report = pd.read_csv(path, dtype=texts, keep_default_na=False)
    if list(report.columns) != list(ROW):
        raise FetchError(f"{path} is not a download's report: move it away")
    return {row["prompt_id"]: row for row in report.to_dict("records")}


def _write_report(folder: Path, rows: dict[str, dict]) -> None:
    with whole(folder / "report.csv") as partial:
        pd.DataFrame(list(rows.values()), columns=list(ROW)).to_csv(partial, index=False)


def _name(url: str) -> str:
    """The words of a file's name in an address: NoImage_200x200.png is ``no image 200x200``."""
    stem = Path(unquote(urlsplit(url).path)).stem
    words = re.sub(r"(?<=[a-z])(?=[A-Z\d])|[\W_]+", " ", stem)
    return " ".join(words.lower().split())


def _retry_after(value: str) -> float:
    """Seconds, as a number or up to a date; 0 for what is neither."""
    with suppress(ValueError):
        return float(value)
    with suppress(ValueError, OverflowError):
        return parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0


@dataclass
class Client:
    """Requests to many hosts: who may be asked, when, and how much is taken.

    Parameters
    ----------
    timeout, total : seconds for a connection or a read, and for one answer, redirects included.
    max_bytes : of one body.
    retries, backoff : attempts after the first where another can help, and seconds before the
        second; they double.
    workers, per_host, delay : simultaneous requests, those to one host, and seconds between the
        starts of the latter.
    allow_private : IP addresses that need not be public.
    """

    timeout: Seconds = 20
    total: Seconds = 120
    max_bytes: int = 30_000_000
    retries: int = 2
    backoff: Seconds = 1
    workers: int = 8
    per_host: int = 2
    delay: Seconds = 0.5
    allow_private: Collection[str] = frozenset()

    def __post_init__(self):
        self.free = asyncio.Semaphore(self.workers)
        self.slots = defaultdict(lambda: asyncio.Semaphore(self.per_host))
        self.ready = defaultdict(float)  # when a host may be asked again
        self.session = aiohttp.ClientSession(
            headers={"User-Agent": AGENT, "Accept-Encoding": "identity"},
            auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                self.total, sock_connect=self.timeout, sock_read=self.timeout
            ),
            connector=aiohttp.TCPConnector(
                limit_per_host=self.per_host, force_close=True, ssl=ssl.create_default_context(),
                socket_factory=self._socket,
            ),
        )  # fmt: skip

    def _socket(self, info: tuple) -> socket.socket:
        """A socket for the address that a connection is about to be made to."""
        family, kind, protocol, _, (address, *_) = info
        if address not in self.allow_private and not is_public(address):
            raise PermissionError(f"{address} is not a public address")
        return socket.socket(family, kind, protocol)

    async def save(self, url: str, partial: Path, bar: tqdm) -> None:
        """Write a body to `partial`, from the start at every attempt."""
        host = url.partition("//")[2].partition("/")[0].lower()
        for attempt in range(self.retries + 1):
            try:
                async with self.slots[host], self.free:
                    while (wait := self.ready[host] - time.monotonic()) > 0:
                        if wait > LONGEST_WAIT:
                            raise FetchError(f"the host wants {wait:.0f} s of rest: try it later")
                        await asyncio.sleep(wait)
                    self.ready[host] = time.monotonic() + self.delay
                    return await self._get(url, partial, bar)
            except FetchError as error:
                if error.wait is None:
                    raise
                wait = max(error.wait, min(self.backoff * 2**attempt, 30))
                self.ready[host] = max(self.ready[host], time.monotonic() + wait)
                if attempt == self.retries:
                    raise

    async def _get(self, url: str, partial: Path, bar: tqdm) -> None:
        size = 0
        try:
            async with self.session.get(url, max_redirects=5) as answer:
                name = _name(str(answer.url))
                if name != _name(url) and STAND_IN.search(name):
                    where = f"redirected to {short(answer.url)}: a placeholder"
                    raise FetchError(where, status="set aside")
                if answer.status == 429 or answer.status >= 500:
                    wait = _retry_after(answer.headers.get("Retry-After", ""))
                    raise FetchError(f"HTTP {answer.status}", wait)
                if answer.status != 200:
                    raise FetchError(f"HTTP {answer.status}")
                with partial.open("wb") as out:
                    async for chunk in answer.content.iter_any():
                        size += len(chunk)
                        if max(size, answer.content_length or 0) > self.max_bytes:
                            raise FetchError(f"more than {self.max_bytes} bytes")
                        out.write(chunk)
                        bar.update(size - bar.n)
        except (aiohttp.ClientError, ValueError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            wait = None if isinstance(cause, FINAL) else 0
            raise FetchError(f"{type(cause).__name__}: {first_line(cause)}", wait) from error
        except TimeoutError as error:
            raise FetchError(f"it took more than {self.total:g} s") from error
