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
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import aiohttp
import pandas as pd
from anyio.from_thread import start_blocking_portal
from filelock import FileLock, Timeout
from tqdm import tqdm

from memlib.errors import first_line, short
from memlib.hub.files import digest, sha256, whole
from memlib.hub.pictures import SET_ASIDE, Look, look_at, one_for_many
from memlib.prompts import FORMATS

ROW = dict.fromkeys(("prompt_id", "url", "status", "reason", "file"), "")
ROW |= {"bytes": 0, "width": 0, "height": 0, "sha256": ""}
AGENT = f"memlib/{version('memlib')} (research; executable book on memorization)"
LONGEST_WAIT = 60  # seconds; a host that asks for more is left alone for the rest of the run
GONE = ("HTTP 404", "HTTP 410")
# Words in the name of a picture that servers give in place of one that is gone.
STAND_IN = re.compile(
    r"(?<![a-z])no[\W_]?(image|img|photo|pic|thumb)|(not|un)[\W_]?(found|available)|"
    r"place[\W_]?holder|coming[\W_]?soon|hot[\W_]?link|removed|deleted|missing|expired|error|"
    r"default|blank|spacer|^404",
    re.I,
)
# After these another attempt would not help.
FINAL = (
    PermissionError, ValueError, socket.gaierror, aiohttp.ClientResponseError,
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
    items: pd.DataFrame, folder: str | Path, retry_failed: bool = False, **limits
) -> pd.DataFrame:
    """Download one image an item, each to `folder`/prompt_id.suffix; a killed run can go on.

    Parameters
    ----------
    items : columns `prompt_id`, `url` (an address, or a list of them, tried in order) and, where
        there are near-duplicate captions, `group` (the same for these: `lists.near_duplicates`).
    retry_failed : try again what an earlier run found gone (404, 410) or set aside.
    limits : of `Client`.

    Returns
    -------
    A row an item: prompt_id, url (the one used), status, reason, file, bytes, width, height,
    sha256. The status is ``ok``, ``kept`` (already there), ``set aside`` (not a usable image;
    placeholders go to `folder`/set-aside) or ``failed``. `folder`/report.csv holds the same rows,
    and those of earlier runs with other items. A placeholder that came for several prompts is set
    aside by the rule of `pictures.one_for_many`, and an item's next addresses are tried.

    Raises
    ------
    OSError
        The folder cannot be written, or another download into it is running.
    ValueError
        A prompt_id is no file name, or is duplicated; `folder`/report.csv is something else.
    """
    folder, todo = Path(folder), _check_items(items)
    groups = dict(zip(todo, items.get("group", todo), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            rows = _read_report(folder)
            if retry_failed:
                rows = {stem: r for stem, r in rows.items() if r["file"] or stem not in todo}
            _write_report(folder, rows)  # a folder that cannot be written fails here, not later
            try:
                _run(lambda client: _download(client, folder, rows, todo, groups), limits)
            finally:
                _write_report(folder, rows)
    except Timeout as error:
        raise FetchError(f"another download into {folder} is running") from error
    return pd.DataFrame([rows[stem] for stem in todo], columns=list(ROW))


def file(url: str, target: Path, algorithm: str, checksum: str, **limits) -> Path:
    """Download one file to `target`, unless it is there; it appears once its checksum is right.

    Raises
    ------
    OSError
        It cannot be had or written, or its checksum (``md5`` or ``sha256``) is another one.
    """
    if target.is_file() and digest(target, algorithm) == checksum:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(desc=target.name, unit="B", unit_scale=True, disable=None)
    with bar, whole(target) as partial:
        try:
            _run(lambda client: client.save(url, partial, bar), {"total": 3600} | limits)
            if (found := digest(partial, algorithm)) != checksum:
                raise FetchError(f"its {algorithm} is {found}, not {checksum}; it was removed")
        except FetchError as error:
            raise FetchError(f"{target.name} from {short(url)}: {error}") from error
    return target


def is_public(address: str) -> bool:
    """Whether an IP address, or the IPv4 address inside it, is one of the public internet."""
    ip = ipaddress.ip_address(address)
    if ip in NAT64:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
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
    client: Client, folder: Path, rows: dict[str, dict], todo: dict[str, list[str]], groups: dict
) -> None:
    """Bring the items' rows up to date; all at once, as far as the client lets them."""
    wanted = todo
    while wanted:
        tasks = [
            asyncio.ensure_future(_item(client, folder, stem, urls, rows.get(stem, ROW)))
            for stem, urls in wanted.items()
        ]
        try:
            every = tqdm(asyncio.as_completed(tasks), "images", len(tasks), disable=None)
            for n, task in enumerate(every):
                row = await task
                rows[row["prompt_id"]] = row
                if n % 100 == 99:
                    _write_report(folder, rows)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        wanted = _set_aside_shared(folder, rows, todo, groups)


async def _item(client: Client, folder: Path, stem: str, urls: list[str], old: dict) -> dict:
    """One item's row: the file that is there, the earlier verdict, or its first usable address."""
    new, partial = ROW | {"prompt_id": stem}, folder / f"{stem}.partial"
    for _, endings in FORMATS.values():
        file = folder / f"{stem}{endings[0]}"
        if file.is_file() and (look := look_at(file)).reason is None:
            url = old["url"] or (urls[0] if len(urls) == 1 else "")
            return new | {"url": url, "status": "kept", "file": file.name} | _facts(file, look)
    aside = old["status"] == "set aside"
    if (aside or old["reason"] in GONE) and old["url"] in urls:
        return old
    rows = [old] if aside else []
    for url in urls:
        try:
            await client.save(url, partial, tqdm(disable=True))
            look = look_at(partial)
            row, name = new | {"url": url} | _facts(partial, look), f"{stem}{look.suffix}"
            if look.reason is None:
                partial.replace(folder / name)
                return row | {"status": "ok", "file": name}
            if look.suffix:
                _set_aside(partial, name)
            rows.append(row | {"status": "set aside", "reason": look.reason})
        except FetchError as error:
            rows.append(new | {"url": url, "status": error.status, "reason": str(error)})
        finally:
            partial.unlink(missing_ok=True)
    none = new | {"status": "failed", "reason": "no address"}
    # else the row that is most worth another run
    return max(rows, key=lambda r: (r["reason"] not in GONE, r["status"] == "failed"), default=none)


def _facts(file: Path, look: Look) -> dict:
    sizes = dict(zip(("width", "height"), look.size, strict=True))
    return sizes | {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _set_aside(file: Path, name: str) -> None:
    (file.parent / SET_ASIDE).mkdir(exist_ok=True)
    file.replace(file.parent / SET_ASIDE / name)


def _set_aside_shared(
    folder: Path, rows: dict[str, dict], todo: dict[str, list[str]], groups: dict
) -> dict[str, list[str]]:
    """Set aside one picture that came for many items; the addresses that are left to try."""
    seen = {
        stem: (row["sha256"], row["url"] or stem, groups.get(stem, stem))
        for stem, row in rows.items() if row["sha256"]
    }  # fmt: skip
    left = {}
    for stem, note in one_for_many(seen).items():
        row, urls = rows[stem], todo.get(stem, [])
        if row["file"]:
            _set_aside(folder / row["file"], row["file"])
            row |= {"status": "set aside", "reason": note, "file": ""}
            left[stem] = urls[urls.index(row["url"]) + 1 :] if row["url"] in urls else urls
    return left


def _check_items(items: pd.DataFrame) -> dict[str, list[str]]:
    todo, seen = {}, set()
    for stem, urls in zip(items["prompt_id"].astype(str), items["url"], strict=True):
        if not re.fullmatch(r"\w[\w.-]{0,199}", stem) or stem.casefold() in seen:
            raise ValueError(f"prompt_id {short(stem)!r} is no file name, or is duplicated")
        seen.add(stem.casefold())  # some disks take A and a for one file
        todo[stem] = [urls] if isinstance(urls, str) else list(urls)
    return todo


def _read_report(folder: Path) -> dict[str, dict]:
    path, kinds = folder / "report.csv", {name: type(empty) for name, empty in ROW.items()}
    if not path.exists():
        return {}
    report = pd.read_csv(path, usecols=list(ROW), dtype=kinds, keep_default_na=False)
    return {row["prompt_id"]: row for row in report.to_dict("records")}


def _write_report(folder: Path, rows: dict[str, dict]) -> None:
    with whole(folder / "report.csv") as partial:
        pd.DataFrame(list(rows.values()), columns=list(ROW)).to_csv(partial, index=False)


@dataclass
class Client:
    """Requests to many hosts: who may be asked, when, and how much is taken."""

    timeout: Seconds = 20  # for a connection, or a read
    total: Seconds = 120  # for one answer, redirects included
    max_bytes: int = 30_000_000  # of one body
    retries: int = 2  # after the first attempt, where another can help
    backoff: Seconds = 1  # before the second attempt; it doubles
    workers: int = 8  # simultaneous requests
    per_host: int = 2  # those to one host
    delay: Seconds = 0.5  # between the starts of the latter

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
        if not is_public(address):
            raise PermissionError(f"{address} is not a public address")
        return socket.socket(family, kind, protocol)

    async def save(self, url: str, partial: Path, bar: tqdm) -> None:
        """Write a body to `partial`, from the start at every attempt."""
        host = url.partition("//")[2].partition("/")[0].lower()
        for attempt in range(self.retries + 1):
            async with self.slots[host], self.free:
                while (wait := self.ready[host] - time.monotonic()) > 0:
                    if wait > LONGEST_WAIT:
                        raise FetchError(f"the host wants {wait:.0f} s of rest: try it later")
                    await asyncio.sleep(wait)
                self.ready[host] = time.monotonic() + self.delay
                try:
                    return await self._get(url, partial, bar)
                except FetchError as error:
                    if error.wait is None or attempt == self.retries:
                        raise
                    wait = max(error.wait, self.backoff * 2**attempt)
                    self.ready[host] = max(self.ready[host], time.monotonic() + wait)

    async def _get(self, url: str, partial: Path, bar: tqdm) -> None:
        size = 0
        try:
            async with self.session.get(url, max_redirects=5) as answer:
                names = [step.url.name for step in (*answer.history, answer)]
                if names[0] != names[-1] and STAND_IN.search(names[-1]):
                    where = f"redirected to {short(answer.url)}: a placeholder"
                    raise FetchError(where, status="set aside")
                if answer.status != 200:
                    after = answer.headers.get("Retry-After", "")
                    wait = float(after) if after.isdecimal() else 0
                    again = answer.status == 429 or answer.status >= 500
                    raise FetchError(f"HTTP {answer.status}", wait if again else None)
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
