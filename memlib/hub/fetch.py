"""Files from addresses that nobody vouches for: training images, and lists with a checksum.

Only http and https. Every host, after every redirect too, must have public addresses only, and the
connection goes to the very address that was checked. Proxies of the environment are not used: a
proxy would look the name up itself, past that check. Certificates are checked against the system's
list (or the one that SSL_CERT_FILE names). A body is taken as sent, never decompressed.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import ipaddress
import math
import os
import re
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from memlib import files
from memlib.errors import first_line, nearest, short
from memlib.hub.pictures import SET_ASIDE, SHARED, Look, look_at, one_for_many, shared_note
from memlib.prompts import FORMATS

COLUMNS = ["prompt_id", "url", "status", "reason", "file", "bytes", "width", "height", "sha256"]
HEADERS = {
    "User-Agent": f"memlib/{version('memlib')} (research; executable book on memorization)",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
}
REDIRECTS = 5
LONGEST_WAIT = 60  # seconds; a host that asks for more is left alone for the rest of the run
GONE = ("HTTP 404", "HTTP 410")
SAFE = "%/:=&?~+!$,;'@()*[]"  # not quoted again
# What a server calls the picture that it gives in place of one that is gone.
STAND_IN = re.compile(
    r"\bno ?(?:image|img|photo|picture|thumb|pic\b)|(?:not|un) ?(?:found|available)|place ?holder|"
    r"coming ?soon|hot ?link|(?:image|img|photo|picture|file|content|item|product) ?"
    r"(?:removed|deleted|missing|expired|gone|error)\b|"
    r"^(?:removed|deleted|missing|expired|error|blank|default|spacer|404)"
    r"(?: (?:image|img|photo|picture|large|small|medium|thumb|[\dx]+))*$"
)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
Seconds = int | float


class FetchError(OSError):
    """A file that cannot be had or kept; the message says which and why."""

    def __init__(self, message: str):
        super().__init__(short(message, 300))


class _Failed(Exception):  # noqa: N818
    """One address's failure; `wait`: the seconds before another attempt makes sense, or None."""

    def __init__(self, reason: str, wait: Seconds | None = None, host: str = ""):
        super().__init__(reason)
        self.wait, self.host = wait, host


class _StandIn(_Failed):
    """An address that leads to a placeholder."""


def download(
    items: pd.DataFrame,
    folder: str | Path,
    workers: int = 8,
    timeout: Seconds = 20,
    max_bytes: int = 30_000_000,
    max_pixels: int = 80_000_000,
    min_side: int = 64,
    retries: int = 2,
    per_host: int = 2,
    delay: Seconds = 0.5,
    progress: bool = True,
    *,
    total: Seconds = 120,
    backoff: Seconds = 1,
    retry_failed: bool = False,
    allow_private: Collection[str] = frozenset(),
) -> pd.DataFrame:
    """Download one image an item, each to `folder`/prompt_id.suffix; a killed run can go on.

    Parameters
    ----------
    items : columns `prompt_id`, and `url`: an address, or a list of them, tried in order; and
        `group`, where it is known: the same for near-duplicate captions (`lists.near_duplicates`).
    timeout, total : seconds for a connection or a read, and for one attempt at an address.
    retries, backoff : attempts after the first where another can help, and the seconds before.
    per_host, delay : simultaneous requests to a host, and seconds between their starts.
    retry_failed : try again what an earlier run found gone (404, 410) or set aside.
    allow_private : exact host names whose addresses need not be public.

    Returns
    -------
    A row an item: prompt_id, url (the one used), status, reason, file, bytes, width, height,
    sha256. The status is ``ok``, ``kept`` (already there), ``set aside`` (not a usable image;
    placeholders go to `folder`/set-aside) or ``failed``. `folder`/report.csv holds the same rows,
    and those of earlier runs with other items. One picture that different addresses gave is set
    aside by the rule of `lists.one_for_many`, with all that lies in `folder`/set-aside; where it is
    kept, its reason names the others. Then an item's next addresses are tried.

    Raises
    ------
    FetchError
        The folder cannot be written, or another download into it is running.
    ValueError
        No such column, or a prompt_id that is no file name or stands twice.
    """
    folder = Path(folder)
    todo = _check_items(items)
    client = _Client(timeout, total, max_bytes, per_host, delay, backoff, allow_private)
    groups = dict(zip(todo, items["group"], strict=True)) if "group" in items else {}
    pending: dict[str, deque] = {}
    results: SimpleQueue = SimpleQueue()

    def work() -> None:
        try:
            while (stem := client.next(pending)) is not None:
                old = rows.get(stem)
                results.put(_item(client, folder, stem, wanted[stem], old, retries, retry_failed,
                                  min_side, max_pixels, refused))  # fmt: skip
        except BaseException as error:
            results.put(error)  # raised by the thread that called

    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            rows = _read_report(folder)
            _write_report(folder, rows)  # a folder that cannot be written fails here, not later
            saved = time.monotonic()
            wanted, threads = todo, []
            try:
                while wanted:
                    refused = _refused(folder)
                    for stem, urls in wanted.items():
                        pending.setdefault(_host(urls), deque()).append(stem)
                    count = min(workers, len(wanted))
                    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
                    for thread in threads:
                        thread.start()
                    for _ in tqdm(wanted, desc="images", disable=None if progress else True):
                        row = results.get()
                        if isinstance(row, BaseException):
                            raise row
                        stem = row["prompt_id"]
                        if wanted is not todo and row["status"] != "ok":
                            row = max(rows[stem], row, key=_rank)  # its other addresses
                        rows[stem] = row
                        if time.monotonic() - saved > 1:
                            _write_report(folder, rows)
                            saved = time.monotonic()
                    wanted = _one_for_many(folder, rows, todo, groups)
            finally:
                client.stop()
                for thread in threads:
                    thread.join()
                _write_report(folder, rows)
    return pd.DataFrame([rows[stem] for stem in todo], columns=COLUMNS)


def file(
    url: str,
    target: str | Path,
    md5: str | None = None,
    sha256: str | None = None,
    max_bytes: int = 4_000_000_000,
    timeout: Seconds = 20,
    total: Seconds = 3600,
    retries: int = 2,
    progress: bool = True,
    *,
    backoff: Seconds = 1,
    allow_private: Collection[str] = frozenset(),
) -> Path:
    """Download one file to `target`, unless it is there; it appears once its checksum is right.

    Raises
    ------
    FetchError
        It cannot be had or written, or its checksum is another one.
    """
    wanted = {name: value.lower() for name, value in (("md5", md5), ("sha256", sha256)) if value}
    if not wanted:
        raise ValueError("a file needs a checksum: give md5 or sha256")
    target = Path(target)
    client = _Client(timeout, total, max_bytes, 1, 0, backoff, allow_private)
    partial = target.with_name(f"{target.name}.partial")
    name = f"{target.name} from {short(url)}"
    with _disk(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            if target.is_file() and not _differs(target, wanted):
                return target
            bar = tqdm(
                desc=target.name, unit="B", unit_scale=True, disable=None if progress else True
            )
            try:
                with bar:
                    client.save(url, partial, retries, bar)
                if difference := _differs(partial, wanted):
                    raise FetchError(f"{name}: {difference}; it was removed")
                os.replace(partial, target)
            except _Failed as error:
                raise FetchError(f"{name}: {error}") from error
            finally:
                partial.unlink(missing_ok=True)
    return target


def is_public(address: str) -> bool:
    """Whether an IP address, and an IPv4 address inside it, is one of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip in NAT64:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    inward = ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_private
    return ip.is_global and not inward and not getattr(ip, "is_site_local", False)


def _item(
    client: _Client, folder: Path, stem: str, urls: list[str], old: dict | None, retries: int,
    retry_failed: bool, min_side: int, max_pixels: int, refused: dict[str, str],
) -> dict:  # fmt: skip
    """One item's row: the file that is there, the earlier verdict, or its first usable address."""
    finals = [folder / f"{stem}{endings[0]}" for _, endings in FORMATS.values()]
    partial = folder / f"{stem}.partial"
    partial.unlink(missing_ok=True)
    for final in finals:
        if final.is_file() and (look := look_at(final, min_side, max_pixels)).reason is None:
            url = (old or {}).get("url") or (urls[0] if len(urls) == 1 else "")
            row = _row(stem, url, "kept", "", final, look)
            if url and url not in urls:
                row["reason"] = "it came from another address: delete it to fetch it anew"
            return row
    settled = old and (old["status"] == "set aside" or old["reason"] in GONE)
    if settled and old["url"] in urls and not retry_failed:
        return old
    rows = []
    for url in urls:
        try:
            client.save(url, partial, retries)
            look = look_at(partial, min_side, max_pixels)
            row = _row(stem, url, "set aside" if look.reason else "ok", look.reason, partial, look)
            if row["status"] == "ok" and (same := refused.get(row["sha256"])):
                look = look._replace(reason=shared_note([same]))
                row |= {"status": "set aside", "reason": look.reason}
            if look.reason is None:
                final = folder / f"{stem}{look.suffix}"
                os.replace(partial, final)
                for other in finals:
                    if other != final:
                        other.unlink(missing_ok=True)
                return row | {"file": final.name}
            if look.decoded:
                (folder / SET_ASIDE).mkdir(exist_ok=True)
                os.replace(partial, folder / SET_ASIDE / f"{stem}{look.suffix}")
            rows.append(row | {"file": ""})
        except _Failed as error:
            status = "set aside" if isinstance(error, _StandIn) else "failed"
            rows.append(_row(stem, url, status, str(error)))
        finally:
            partial.unlink(missing_ok=True)
    return max(rows, key=_rank, default=_row(stem, "", "failed", "no address"))


def _refused(folder: Path) -> dict[str, str]:
    """Checksums of the pictures that were set aside: no other prompt's picture is one of them."""
    found = sorted((folder / SET_ASIDE).glob("*.*"))
    return {files.sha256(file): f"{SET_ASIDE}/{file.name}" for file in reversed(found)}


def _one_for_many(
    folder: Path, rows: dict[str, dict], todo: dict[str, list[str]], groups: dict
) -> dict[str, list[str]]:
    """Set aside one picture that came for many items; the addresses that are left to try."""
    seen = {}
    for stem in [*todo, *(stem for stem in rows if stem not in todo)]:
        row, address = rows[stem], (todo.get(stem) or [stem])[0]
        if row["sha256"] and (row["file"] or row["reason"].startswith(SHARED)):
            seen[stem] = (row["sha256"], row["url"] or address, groups.get(stem))
    left = {}
    for stem, (others, placeholder) in one_for_many(seen).items():
        row = rows[stem]
        if not placeholder:
            row["reason"] = row["reason"] or shared_note(others).removeprefix("a placeholder: ")
        elif row["file"]:
            (folder / SET_ASIDE).mkdir(exist_ok=True)
            os.replace(folder / row["file"], folder / SET_ASIDE / row["file"])
            row |= {"status": "set aside", "reason": shared_note(others), "file": ""}
            urls = todo.get(stem, [])
            if after := urls[urls.index(row["url"]) + 1 if row["url"] in urls else 0 :]:
                left[stem] = after
    return left


def _rank(row: dict) -> int:
    """Of several addresses' rows the one that says most: 2 is worth another run, 0 is gone."""
    return 0 if row["reason"] in GONE else 2 if row["status"] == "failed" else 1


def _row(
    stem: str, url: str, status: str, reason: str | None, path: Path | None = None,
    look: Look | None = None,
) -> dict:  # fmt: skip
    size, digest = (path.stat().st_size, files.sha256(path)) if path else (0, "")
    width, height = look.size if look else (0, 0)
    reason = "".join(c if c.isprintable() else " " for c in reason or "")[:200]
    values = (stem, url, status, reason, path.name if path else "", size, width, height, digest)
    return dict(zip(COLUMNS, values, strict=True))


def _check_items(items: pd.DataFrame) -> dict[str, list[str]]:
    for column in ("prompt_id", "url"):
        if column not in items:
            known = short(nearest(column, items.columns), 200)
            raise ValueError(f"items have no column {column!r}{known}")
    todo: dict[str, list[str]] = {}
    seen = set()  # some disks take A and a for one file
    for stem, urls in zip(items.prompt_id.astype(str), items.url, strict=True):
        if not re.fullmatch(r"\w[\w.-]*", stem) or len(stem.encode()) > 200:
            raise ValueError(f"prompt_id {stem[:80]!r} is no file name: use letters, digits, _ - .")
        if stem.casefold() in seen:
            raise ValueError(f"prompt_id {short(stem)!r} stands twice")
        seen.add(stem.casefold())
        urls = [urls] if isinstance(urls, str) else urls if np.iterable(urls) else []
        todo[stem] = [url.strip() for url in urls if isinstance(url, str) and url.strip()]
    return todo


def _read_report(folder: Path) -> dict[str, dict]:
    path = folder / "report.csv"
    if not path.exists():
        return {}
    texts = dict.fromkeys(set(COLUMNS) - {"bytes", "width", "height"}, str)
    try:
        report = pd.read_csv(path, dtype=texts, keep_default_na=False)
    except ValueError:
        report = pd.DataFrame()
    if list(report.columns) != COLUMNS:
        raise FetchError(f"{path} is not a download's report: move it away")
    return {row["prompt_id"]: row for row in report.to_dict("records")}


def _write_report(folder: Path, rows: dict[str, dict]) -> None:
    partial = folder / "report.csv.partial"
    pd.DataFrame(list(rows.values()), columns=COLUMNS).to_csv(partial, index=False)
    os.replace(partial, folder / "report.csv")


def _differs(path: Path, wanted: dict[str, str]) -> str:
    for name, value in wanted.items():
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, name).hexdigest()
        if found != value:
            return f"its {name} is {found}, not {value}"
    return ""


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except FetchError:
        raise
    except Timeout as error:
        raise FetchError(f"another download into {folder} is running") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise FetchError(f"{folder} cannot be written: {reason}") from error


def _split(url: str) -> tuple[SplitResult, str, int]:
    """An address's parts, host and port, where it is one that may be asked for."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").encode("idna").decode()
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise _Failed(f"not an address: {first_line(error)}") from error
    if parts.scheme not in ("http", "https"):
        raise _Failed(f"refused: {parts.scheme!r} is neither http nor https")
    if parts.username is not None or parts.password is not None:
        raise _Failed("refused: an address with a user name or password")
    if not host:
        raise _Failed("not an address: no host")
    return parts, host, port


def _name(url: str) -> str:
    """The words of a file's name in an address: NoImage_200x200.png is ``no image 200x200``."""
    with suppress(ValueError):
        stem = Path(unquote(urlsplit(url).path)).stem
        words = re.sub(r"(?<=[a-z])(?=[A-Z\d])|[\W_]+", " ", stem)
        return " ".join(words.lower().split())
    return ""


def _host(urls: list[str]) -> str:
    with suppress(_Failed, IndexError):
        return _split(urls[0])[1]
    return ""


def _retry_after(value: str | None) -> float:
    if value and value.strip().isdecimal():
        return float(value)
    with suppress(TypeError, ValueError, OverflowError, IndexError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _cut(sock: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # wakes the thread that reads


class _Client:
    """Requests to many hosts: who may be asked, when, and how much is taken."""

    def __init__(
        self, timeout: Seconds, total: Seconds, max_bytes: int, per_host: int, delay: Seconds,
        backoff: Seconds, allow_private: Collection[str],
    ):  # fmt: skip
        self.timeout, self.total, self.max_bytes = timeout, total, max_bytes
        self.per_host, self.delay, self.backoff = per_host, delay, backoff
        self.allow_private = allow_private
        self.tls = ssl.create_default_context()
        self.changed = threading.Condition()
        self.active: Counter[str] = Counter()
        self.ready: dict[str, float] = {}  # when a host may be asked again
        self.closed: dict[str, str] = {}  # hosts not to be asked again, and why
        self.live: set[socket.socket] = set()
        self.stopped = False

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            for sock in self.live:
                _cut(sock)
            self.changed.notify_all()

    def _wait(self, host: str) -> float:
        if host in self.closed:
            return 0.0
        due = self.ready.get(host, 0.0) - time.monotonic()
        return math.inf if self.active[host] >= self.per_host else max(due, 0.0)

    def next(self, pending: dict[str, deque]) -> str | None:
        """Take an item of a host that is free; hosts take turns."""
        with self.changed:
            while pending and not self.stopped:
                host = min(pending, key=self._wait)  # the first of equals
                if (wait := self._wait(host)) == 0:
                    queue = pending.pop(host)
                    stem = queue.popleft()
                    if queue:
                        pending[host] = queue  # now the last
                    return stem
                self.changed.wait(min(wait, LONGEST_WAIT))
        return None

    @contextmanager
    def turn(self, host: str) -> Iterator[None]:
        """Wait until the host may be asked."""
        with self.changed:
            while not self.stopped and (wait := self._wait(host)) > 0:
                self.changed.wait(min(wait, LONGEST_WAIT))
            if self.stopped or host in self.closed:
                raise _Failed(self.closed.get(host, "stopped"))
            self.active[host] += 1
            self.ready[host] = time.monotonic() + self.delay
        try:
            yield
        except _Failed as error:
            if error.wait:
                self.pause(host, error.wait)  # before anyone else's turn
            raise
        finally:
            with self.changed:
                self.active[host] -= 1
                self.changed.notify_all()

    def pause(self, host: str, seconds: Seconds) -> None:
        with self.changed:
            if seconds > LONGEST_WAIT:
                self.closed[host] = f"the host asks for a pause of {seconds:.0f} s: run again later"
            self.ready[host] = max(self.ready.get(host, 0), time.monotonic() + seconds)
            self.changed.notify_all()

    def save(self, url: str, partial: Path, retries: int, bar: tqdm | None = None) -> None:
        """Write a body to `partial`, from the start at every attempt."""
        for attempt in range(retries + 1):
            if bar is not None:
                bar.reset()
            try:
                with closing(self.stream(url)) as chunks, partial.open("wb") as handle:
                    for chunk in chunks:
                        handle.write(chunk)
                        if bar is not None:
                            bar.update(len(chunk))
                return
            except _Failed as error:
                if error.wait is None:
                    raise
                self.pause(error.host, min(self.backoff * 2**attempt, 30))
                if attempt == retries:
                    raise

    def stream(self, url: str) -> Iterator[bytes]:
        left = self.total
        for _ in range(REDIRECTS + 1):
            parts, host, port = _split(url)
            with self.turn(host):
                start = time.monotonic()
                try:
                    location = yield from self._hop(parts, host, port, start + left)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    if time.monotonic() >= start + left:
                        raise _Failed(f"it took more than {self.total:g} s") from error
                    if isinstance(error, ssl.SSLCertVerificationError):
                        raise _Failed(f"certificate refused: {error.verify_message}") from error
                    late = isinstance(error, TimeoutError)
                    reason = f"no answer in {self.timeout:g} s" if late else first_line(error)
                    raise _Failed(reason, 0, host) from error
            left -= time.monotonic() - start
            if location is None:
                return
            before = _name(url)
            try:
                url = urljoin(url, location)
            except ValueError as error:
                raise _Failed("redirected to no address") from error
            if (name := _name(url)) != before and STAND_IN.search(name):
                raise _StandIn(f"redirected to {short(url)}: a placeholder")
        raise _Failed(f"more than {REDIRECTS} redirects")

    def _hop(
        self, parts: SplitResult, host: str, port: int, deadline: float
    ) -> Iterator[bytes]:  # and returns where it is redirected to
        tls = parts.scheme == "https"
        if tls:
            connection = http.client.HTTPSConnection(host, port, context=self.tls)
        else:
            connection = http.client.HTTPConnection(host, port)
        path = quote((parts.path or "/") + (parts.query and f"?{parts.query}"), SAFE)
        with closing(connection):
            connection.sock = sock = self._connect(host, port, tls, deadline)
            timer = threading.Timer(deadline - time.monotonic(), _cut, (sock,))
            timer.daemon = True
            timer.start()
            with self.changed:
                self.live.add(sock)
            try:
                connection.request("GET", path, headers=HEADERS)
                with connection.getresponse() as response:
                    if response.status in (301, 302, 303, 307, 308):
                        return response.getheader("Location") or "no:address"
                    self._check_head(response, host)
                    expected, received = response.length, 0
                    while chunk := response.read(65536):
                        received += len(chunk)
                        if received > self.max_bytes:
                            raise _Failed(f"more than {self.max_bytes} bytes")
                        yield chunk
                    if time.monotonic() >= deadline or received < (expected or 0):
                        raise OSError(f"truncated: {received} of {expected} bytes")
            finally:
                timer.cancel()
                with self.changed:
                    self.live.discard(sock)
        return None

    def _check_head(self, response: http.client.HTTPResponse, host: str) -> None:
        status, encoding = response.status, response.getheader("Content-Encoding", "identity")
        if status == 429 or status >= 500:
            raise _Failed(f"HTTP {status}", _retry_after(response.getheader("Retry-After")), host)
        if status != 200:
            raise _Failed(f"HTTP {status}")
        if encoding.strip().lower() not in ("", "identity"):
            raise _Failed("refused: sent compressed, which was not asked for")
        if (response.length or 0) > self.max_bytes:
            raise _Failed(f"{response.length} bytes, more than {self.max_bytes}")

    def _connect(self, host: str, port: int, tls: bool, deadline: float) -> socket.socket:
        """Look the host up once, check all its addresses and connect to one of just these."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            again = 0 if getattr(error, "errno", None) == socket.EAI_AGAIN else None
            raise _Failed(f"no such host: {host}", again, host) from error
        for *_, address in found:
            if host not in self.allow_private and not is_public(address[0]):
                raise _Failed(f"refused: {host} is at {address[0]}, not a public address")
        failure: OSError = OSError("no address")
        for family, *_, address in found[:4]:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(max(min(self.timeout, deadline - time.monotonic()), 0.01))
                sock.connect(address)
                return self.tls.wrap_socket(sock, server_hostname=host) if tls else sock
            except OSError as error:
                sock.close()
                failure = error
        raise failure
