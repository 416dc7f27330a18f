"""Downloads from a server that misbehaves: every fault is named, and nothing else is kept."""

import gzip
import hashlib
import io
import os
import re
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from memlib.hub import fetch

HERE = "127.0.0.1"
QUICK = {
    "timeout": 0.4, "total": 1.0, "retries": 1, "delay": 0, "backoff": 0.02,
    "max_bytes": 200_000,
}  # fmt: skip


def picture(side=80, kind="PNG", colour=None, **options):
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    if colour is not None:
        pixels[:] = colour
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def bomb(side):
    """A valid PNG header of side x side pixels, and 1 kB of them."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def drawing(pixels, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


GOOD, JPEG = picture(), picture(120, "JPEG")
INK = np.zeros((80, 80, 4), np.uint8)  # black, on a transparent ground
INK[20:60, 30:50, 3] = 255
PAGE = b"<!DOCTYPE html>\n<html><body>This picture has moved</body></html>"
BODIES = {  # served with status 200
    "/good.png": GOOD,
    "/good.jpg": JPEG,
    "/good.gif": picture(kind="GIF"),
    "/good.webp": picture(kind="WEBP"),
    "/good.bmp": picture(kind="BMP"),
    "/good.tif": picture(kind="TIFF"),
    "/good.avif": picture(kind="AVIF"),
    "/good.jp2": picture(kind="JPEG2000"),
    "/good.ppm": picture(kind="PPM"),
    "/good-ink.png": drawing(INK),
    "/clear.png": drawing(np.uint8([90, 90, 90, 0]) + np.zeros_like(INK)),
    "/float.tif": drawing(np.linspace(0, 1, 6400, dtype=np.float32).reshape(80, 80), "TIFF"),
    "/page": PAGE,
    "/empty": b"",
    "/text": b"gone",
    "/cut.jpg": JPEG[: len(JPEG) // 2],
    "/cut.png": GOOD[: len(GOOD) // 2],
    "/harmed.png": GOOD[:20] + b"\xff\xff\xff\xff" + GOOD[24:],
    "/tiny.gif": picture(1, "GIF"),
    "/low.png": picture(40),
    "/black.jpg": picture(kind="JPEG", colour=0),
    "/grey.png": picture(colour=(40, 50, 60)),
    "/bomb.png": bomb(10_000),
    "/bigger-bomb.png": bomb(30_000),
}
HEADS = {"/good.png": "text/html", "/page": "image/jpeg"}  # a header may lie


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__((HERE, 0), Handler)
        self.lock, self.seen, self.heads, self.hosts = threading.Lock(), Counter(), {}, []
        self.busy, self.most = 0, 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        pass  # clients that hang up

    def url(self, path):
        return f"http://{HERE}:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        server, path = self.server, unquote(self.path)
        with server.lock:
            server.seen[path] += 1
            server.heads[path] = self.headers
            server.hosts.append(self.headers["Host"])
        self.route(path.partition("?")[0], server.seen[path] == 1)

    def route(self, path, first):
        if path in BODIES:
            self.answer(BODIES[path], Content_Type=HEADS.get(path, "image/png"))
        elif path.startswith("/many/"):
            with self.server.lock:
                self.server.busy += 1
                self.server.most = max(self.server.most, self.server.busy)
            time.sleep(0.1)
            with self.server.lock:
                self.server.busy -= 1
            self.answer(GOOD + path.encode())  # a picture of its own
        elif path.startswith("/gone/"):
            self.answer(BODIES["/good.gif"])
        elif path == "/drip":
            self.answer(GOOD[:100], Content_Length=len(GOOD))
            for byte in GOOD[100:200]:
                time.sleep(0.05)
                self.wfile.write(bytes([byte]))
        elif path == "/drip-head":
            for byte in b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n" * 20:
                time.sleep(0.05)
                self.wfile.write(bytes([byte]))
        elif path == "/drip-no-length":
            self.answer(GOOD, Content_Length=None)
            for _ in range(100):
                time.sleep(0.05)
                self.wfile.write(b"\0")
        elif path == "/hang":
            time.sleep(5)
        elif path == "/endless":
            self.answer(Content_Length=None)
            while True:
                self.wfile.write(bytes(10_000))
        elif path == "/long":
            self.answer(GOOD, Content_Length=10**9)
        elif path == "/more":  # than comes
            self.answer(GOOD, Content_Length=len(GOOD) + 10)
        elif path == "/chunks":
            self.answer(
                b"8\r\n12345678\r\n8\r\n1234", Content_Length=None, Transfer_Encoding="chunked"
            )
        elif path == "/gzip":
            self.answer(gzip.compress(bytes(5_000_000)), Content_Encoding="gzip")
        elif path == "/500-once":
            self.answer(GOOD, 500 if first else 200)
        elif path == "/429-once":
            self.answer(GOOD, 429 if first else 200, Retry_After=1)
        elif path.startswith("/429-long"):
            self.answer(b"", 429, Retry_After=86400)
        elif path.isascii() and path[1:].isdecimal():
            self.answer(b"", int(path[1:]))
        elif path == "/loop":
            self.answer(b"", 302, Location="/loop")
        elif path == "/moved":
            self.answer(b"", 302, Location="/img/NoImage_200x200.png")
        elif path == "/nowhere":
            self.answer(b"", 302)
        elif path.startswith("/to/"):
            self.answer(b"", 301, Location=path[4:])
        else:
            self.answer(b"", 404)


IS_PUBLIC = fetch.is_public


@pytest.fixture
def server(monkeypatch):
    """A server on this machine, the only private address that may be asked."""
    monkeypatch.setattr(fetch, "is_public", lambda address: address == HERE or IS_PUBLIC(address))
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


def get(urls, folder, **options):
    """Download a list of addresses as items 0, 1, ...; the report."""
    items = pd.DataFrame({"prompt_id": [str(n) for n in range(len(urls))], "url": urls})
    return fetch.download(items, folder, **QUICK | options)


def stored(folder):
    return sorted(f.name for f in folder.iterdir() if f.is_file() and f.suffix != ".csv"
                  and f.name != ".lock")  # fmt: skip


FAULTS = [  # path, status, reason, requests, kept in set-aside
    ("/drip", "failed", "took more than 1 s", 1, ""),
    ("/drip-head", "failed", "took more than 1 s", 1, ""),
    ("/drip-no-length", "failed", "took more than 1 s", 1, ""),
    ("/hang", "failed", "Timeout on reading data", 2, ""),
    ("/endless", "failed", "more than 200000 bytes", 1, ""),
    ("/long", "failed", "more than 200000 bytes", 1, ""),
    ("/more", "failed", r"received (\d+) of \d+ bytes", 2, ""),
    ("/chunks", "failed", "Not enough data", 2, ""),
    ("/gzip", "set aside", "not an image of a kind", 1, ""),
    ("/page", "set aside", "an HTML page, not an image", 1, ""),
    ("/empty", "set aside", "empty", 1, ""),
    ("/text", "set aside", "not an image of a kind", 1, ""),
    ("/cut.jpg", "set aside", "truncated", 1, ""),
    ("/cut.png", "set aside", "truncated", 1, ""),
    ("/harmed.png", "set aside", "a PNG that cannot be decoded", 1, ""),
    ("/tiny.gif", "set aside", "tiny: 1 x 1 pixels, a side below 64", 1, "0.gif"),
    ("/low.png", "set aside", "tiny: 40 x 40", 1, "0.png"),
    ("/black.jpg", "set aside", r"a single colour \(0, 0, 0\)", 1, "0.jpg"),
    ("/grey.png", "set aside", r"a single colour \(40, 50, 60\)", 1, "0.png"),
    ("/bomb.png", "set aside", "Image size .100000000 pixels.* decompression bomb", 1, ""),
    ("/bigger-bomb.png", "set aside", "Image size .* decompression bomb", 1, ""),
    ("/clear.png", "set aside", "fully transparent: a placeholder", 1, "0.png"),
    ("/float.tif", "set aside", "32 bits a pixel, whose range is not known", 1, "0.tif"),
    ("/moved", "set aside", "redirected to .*/NoImage_200x200.png", 1, ""),
    ("/404", "failed", "^HTTP 404$", 1, ""),
    ("/410", "failed", "^HTTP 410$", 1, ""),
    ("/403", "failed", "^HTTP 403$", 1, ""),
    ("/503", "failed", "^HTTP 503$", 2, ""),
    ("/204", "failed", "^HTTP 204$", 1, ""),
    ("/429-long", "failed", "86400 s of rest", 1, ""),
    ("/loop", "failed", "TooManyRedirects", 5, ""),
    ("/nowhere", "failed", "^HTTP 302$", 1, ""),
    ("/to/file:///etc/hostname", "failed", "NonHttpUrl.*file:///etc/hostname", 1, ""),
    ("/to/ftp://127.0.0.1/a.png", "failed", "NonHttpUrl", 1, ""),
    ("/to/http://10.0.0.1/a.png", "failed", "10.0.0.1 is not a public address", 1, ""),
    ("/to/http://169.254.169.254/latest", "failed", "169.254.169.254 is not a public", 1, ""),
    ("/to/http://[::1]/a.png", "failed", "::1 is not a public address", 1, ""),
    ("/to/http://[::ffff:127.0.0.1]/a.png", "failed", "not a public address", 1, ""),
    ("/to/http://2130706433/a.png", "failed", "not a canonical IPv4 address", 1, ""),
    ("/to/http://[half/a.png", "failed", "InvalidUrl", 1, ""),
]


@pytest.mark.parametrize(("path", "status", "reason", "requests", "aside"), FAULTS)
def test_a_fault_is_named_and_nothing_is_kept(
    server, tmp_path, path, status, reason, requests, aside
):
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = get([server.url(path)], tmp_path).iloc[0]
    assert time.monotonic() - start < 4
    assert (row.status, row.file) == (status, "")
    assert re.search(reason, row.reason), row.reason
    assert "\n" not in row.reason
    assert server.seen[path] == requests
    assert stored(tmp_path) == []
    assert [f.name for f in tmp_path.glob("set-aside/*")] == [aside] * bool(aside)


@pytest.mark.parametrize(
    ("path", "file"),
    [(p, "0" + Path(p).suffix) for p in BODIES if p.startswith("/good")]
    + [("/to/good.png?a b=é", "0.png"), ("/500-once", "0.png"), ("/429-once", "0.png")],
)
def test_what_is_an_image_is_kept(server, tmp_path, path, file):
    path = path.replace("/to/", "/to//")
    start = time.monotonic()
    row = get([server.url(path)], tmp_path).iloc[0]
    assert (row.status, row.reason, row.file) == ("ok", "", file)
    assert stored(tmp_path) == [file]
    content = (tmp_path / file).read_bytes()
    assert row.sha256 == hashlib.sha256(content).hexdigest()
    assert (row.bytes, row.width, row.height) == (len(content), *Image.open(tmp_path / file).size)
    assert path != "/429-once" or time.monotonic() - start >= 1  # Retry-After: 1


def test_requests_say_who_asks_and_want_no_compression(server, tmp_path):
    get([server.url("/good.png")], tmp_path)
    heads = server.heads["/good.png"]
    assert re.match(r"memlib/\d.*\(research; executable book", heads["User-Agent"])
    assert heads["Accept-Encoding"] == "identity"
    assert heads["Host"] == f"{HERE}:{server.server_port}"


def test_a_host_that_asks_for_a_long_pause_is_left_alone(server, tmp_path):
    report = get([server.url(f"/429-long{n}") for n in range(5)], tmp_path, per_host=1)
    assert sum(server.seen.values()) == 1
    assert report.reason.str.contains("86400 s of rest: try it later").sum() >= 4


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True),
        ("64:ff9b::808:808", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
        ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("240.0.0.1", False),
        ("255.255.255.255", False), ("192.0.2.1", False), ("::", False), ("::1", False),
        ("fe80::1%eth0", False), ("fc00::1", False), ("ff0e::1", False),
        ("::ffff:10.0.0.1", False), ("::127.0.0.1", False), ("64:ff9b::7f00:1", False),
        ("2001:db8::1", False),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert fetch.is_public(address) == public


def resolve(monkeypatch, *answers):
    """Have every name resolve to these lists of addresses in turn; the names asked for."""
    asked = []

    def getaddrinfo(host, port, *_, **__):
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        family = [socket.AF_INET6 if ":" in a else socket.AF_INET for a in found]
        return [
            (f, socket.SOCK_STREAM, 6, "", (a, port, 0, 0)[: 4 if ":" in a else 2])
            for f, a in zip(family, found, strict=True)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize("found", [["10.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["fd00::1"]])
def test_only_public_addresses_are_connected_to(server, tmp_path, monkeypatch, found):
    """A name server that says something else the second time (rebinding) gains nothing."""
    asked = resolve(monkeypatch, found, ["10.0.0.2"])
    connected = []

    def connect(_, address):
        connected.append(address[0])
        raise ConnectionRefusedError("refused by the test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(fetch, "is_public", IS_PUBLIC)
    row = get([f"http://photos.example:{server.server_port}/good.png"], tmp_path, retries=0).iloc[0]
    assert (connected, asked) == ([a for a in found if a == "8.8.8.8"], ["photos.example"])
    assert f"{found[-1]} is not a public address" in row.reason


def test_the_host_stays_the_name(server, tmp_path, monkeypatch):
    resolve(monkeypatch, [HERE])
    row = get([f"http://Photos.Example.:{server.server_port}/good.png"], tmp_path).iloc[0]
    assert row.status == "ok"
    assert server.heads["/good.png"]["Host"] == f"photos.example:{server.server_port}"


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("photos.example", "ok", ""),
        ("other.example", "failed", "SSLCertVerificationError: .* Hostname mismatch"),
    ],
)
def test_certificates_are_those_of_the_name(server, tmp_path, monkeypatch, name, status, reason):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
               "-nodes", "-days", "2", "-subj", "/CN=test", "-addext",
               "subjectAltName=DNS:photos.example", "-keyout", key, "-out", cert]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl command to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    names = []
    context.sni_callback = lambda _, sni, __: names.append(sni)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    resolve(monkeypatch, [HERE])
    row = get([f"https://{name}:{server.server_port}/good.png"], tmp_path / "images").iloc[0]
    assert row.status == status, row.reason
    assert re.match(reason, row.reason), row.reason
    assert names == [name]


def test_proxies_of_the_environment_are_not_used(server, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get([server.url("/good.png")], tmp_path).status[0] == "ok"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/hostname", "NonHttpUrlClientError"),
        ("http://", "InvalidUrl"),
        ("http://127.0.0.1:99999/", "InvalidUrl"),
        ("http://[::1/", "InvalidUrl"),
        (f"http://{'a' * 70}.example/", "label empty or too long"),
        ("photo.jpg", "InvalidUrlClientError: photo.jpg"),
        ("http://a\0b/", "gaierror|null"),
        ([], "no address"),
    ],
)
def test_addresses_that_are_none(tmp_path, url, reason):
    row = get([url], tmp_path).iloc[0]
    assert row.status == "failed"
    assert re.search(reason, row.reason), row.reason


def test_nothing_listens(server, tmp_path):
    with socket.socket() as free:
        free.bind((HERE, 0))
        port = free.getsockname()[1]
        row = get([f"http://{HERE}:{port}/a.png"], tmp_path).iloc[0]
    assert row.status == "failed"
    assert "refused" in row.reason.lower()


@pytest.mark.parametrize(
    "stem", ["../out", "a/b", "/etc/a", "..", ".", ".hidden", "", "a\\b", "a\0b", "a\n", "x" * 201]
)
def test_a_prompt_id_cannot_leave_the_folder(tmp_path, stem):
    items = pd.DataFrame({"prompt_id": ["fine", stem], "url": ["http://127.0.0.1:9/"] * 2})
    with pytest.raises(ValueError, match="is no file name") as error:
        fetch.download(items, tmp_path / "images", **QUICK)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_ids_that_some_disks_take_for_one(tmp_path):
    with pytest.raises(ValueError, match="'A' is no file name, or is dup"):
        fetch.download(pd.DataFrame({"prompt_id": ["a", "A"], "url": ["b", "c"]}), tmp_path)


@pytest.mark.parametrize(
    ("paths", "status", "used", "requests"),
    [
        (["/404", "/page", "/good.jpg", "/good.png"], "ok", 2, 3),
        (["/good.png", "/good.jpg"], "ok", 0, 1),
        (["/404", "/black.jpg"], "set aside", 1, 2),
        (["/black.jpg", "/404"], "set aside", 0, 2),
        (["/404", "/503", "/page"], "failed", 1, 4),
    ],
)
def test_alternative_addresses(server, tmp_path, paths, status, used, requests):
    urls = [server.url(p) for p in paths]
    row = get([np.array(urls)], tmp_path).iloc[0]
    assert (row.status, row.url) == (status, urls[used])
    assert sum(server.seen.values()) == requests


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [
        ("no_image_available.png", True), ("noimage.gif", True), ("No-Photo-300x200.jpg", True),
        ("image-not-found.png", True), ("imagenotfound.png", True), ("removed.png", True),
        ("photo_unavailable.jpg", True), ("placeholder-large.png", True), ("404.jpg", True),
        ("default-image.png", True), ("ImageMissing.gif", True), ("comingsoon.jpg", True),
        ("nopic.jpg", True), ("casino-images.jpg", False), ("img_404.jpg", False),
        ("12.jpg", False), ("", False),
    ],
)  # fmt: skip
def test_names_of_placeholders(name, stand_in):
    assert bool(fetch.STAND_IN.search(name)) == stand_in


def test_an_address_that_is_called_so_itself_is_trusted(server, tmp_path, monkeypatch):
    monkeypatch.setitem(BODIES, "/missing.png", GOOD)
    straight = server.url("/missing.png")
    for n, url in enumerate((straight, server.url(f"/to/{straight}"))):  # has the same name
        assert get([url], tmp_path / str(n)).status[0] == "ok"


def test_one_picture_for_many_addresses_is_a_placeholder(server, tmp_path):
    """Also when it takes three runs."""
    urls = [server.url(f"/gone/{n}.gif") for n in range(3)] + [server.url("/good.png")]
    report = get(urls, tmp_path / "once")
    assert list(report.status) == ["set aside"] * 3 + ["ok"]
    assert list(report.file) == ["", "", "", "3.png"]
    assert report.reason[0] == "a placeholder: the same picture came for 1, 2"
    assert stored(tmp_path / "once") == ["3.png"]
    assert {f.name for f in (tmp_path / "once/set-aside").iterdir()} == {"0.gif", "1.gif", "2.gif"}
    for n in (1, 2, 3):
        report = get(urls[:n], tmp_path / "thrice")
    assert list(report.status) == ["set aside"] * 3
    assert stored(tmp_path / "thrice") == []
    server.seen.clear()
    report = get([*urls, server.url("/gone/4.gif")], tmp_path / "thrice")
    assert list(report.status) == ["set aside"] * 3 + ["ok", "set aside"]
    assert "the same picture came for 0, 1, 2" in report.reason[4]
    assert server.seen == {"/good.png": 1, "/gone/4.gif": 1}
    saved = pd.read_csv(tmp_path / "thrice/report.csv", keep_default_na=False)
    assert list(saved.sort_values("prompt_id").reason) == list(report.reason)


@pytest.mark.parametrize(
    ("paths", "groups", "status"),
    [
        (["/gone/1", "/gone/2"], None, "set aside"),
        (["/gone/1", "/gone/2"], [5, 7], "set aside"),
        (["/gone/1", "/gone/2", "/gone/3"], [5, 5, 5], "ok"),  # near-duplicates
        (["/gone/1", "/gone/1", "/gone/1#top"], None, "ok"),  # one address
        (["/gone/1", "/gone/1"], [5, 7], "ok"),
    ],
)
def test_one_picture_may_be_of_several_prompts(server, tmp_path, paths, groups, status):
    items = pd.DataFrame({
        "prompt_id": [str(n) for n in range(len(paths))], "url": [server.url(p) for p in paths],
    })  # fmt: skip
    if groups:
        items["group"] = groups
    for _ in range(2):
        report = fetch.download(items, tmp_path, **QUICK)
        assert set(report.status) <= {status, "kept" if status == "ok" else status}
        assert report.reason.str.contains("the same picture").all() == (status == "set aside")


def test_behind_a_placeholder_the_next_address_is_tried(server, tmp_path):
    others = [["/good.png"], ["/404"], []]
    urls = [[server.url(p) for p in (f"/gone/{n}", *more)] for n, more in enumerate(others)]
    for _ in range(2):
        report = get(urls, tmp_path)
        assert [s in ("ok", "kept") for s in report.status] == [True, False, False]
        assert list(report.url) == [urls[0][1], urls[1][0], urls[2][0]]
        assert list(report.status[1:]) == ["set aside"] * 2
    assert server.seen["/gone/0"] == 1
    assert stored(tmp_path) == ["0.png"]


def test_messages_are_short(server, tmp_path):
    long = server.url("/404?" + "x" * 2000)
    with pytest.raises(fetch.FetchError) as error:
        fetch.file(long, tmp_path / "list", "md5", SUMS["md5"], **QUICK)
    assert len(str(error.value)) <= 300
    assert str(error.value).endswith("HTTP 404")


def test_the_report(server, tmp_path):
    urls = [server.url(p) for p in ("/good.png", "/404", "/black.jpg", "/500")]
    report = get(urls, tmp_path)
    read = pd.read_csv(tmp_path / "report.csv", dtype={"prompt_id": str}, keep_default_na=False)
    read = read.set_index("prompt_id").loc[report.prompt_id].reset_index()
    pd.testing.assert_frame_equal(read, report, check_dtype=False)
    assert list(report.columns) == list(fetch.ROW)
    assert list(report.prompt_id) == ["0", "1", "2", "3"]
    assert list(report.status) == ["ok", "failed", "set aside", "failed"]
    assert list(report.url) == urls
    assert not (tmp_path / "report.csv.partial").exists()


def test_a_second_run_asks_only_for_what_may_have_changed(server, tmp_path):
    urls = [server.url(p) for p in ("/good.png", "/404", "/black.jpg", "/503", "/good.jpg")]
    get(urls, tmp_path)
    (tmp_path / "4.jpg").write_bytes(JPEG[:-500])  # damaged since
    server.seen.clear()
    report = get(urls, tmp_path)
    assert list(report.status) == ["kept", "failed", "set aside", "failed", "ok"]
    assert server.seen == {"/503": 2, "/good.jpg": 1}
    server.seen.clear()
    report = get(urls, tmp_path, retry_failed=True)
    assert list(report.status) == ["kept", "failed", "set aside", "failed", "kept"]
    assert server.seen == {"/404": 1, "/black.jpg": 1, "/503": 2}
    get(urls[:1], tmp_path)  # a run of fewer items forgets nothing
    assert len(pd.read_csv(tmp_path / "report.csv")) == 5
    server.seen.clear()
    (tmp_path / "0.png").unlink()
    assert get(urls[:1], tmp_path).status[0] == "ok"
    other = get([server.url("/good.gif")], tmp_path).iloc[0]
    assert (other.status, other.url) == ("kept", urls[0])


KILLED = """
import sys, types
package = types.ModuleType("memlib")
package.__path__ = [sys.argv[1]]
sys.modules["memlib"] = package  # without torch
import pandas as pd
from memlib.hub import fetch
urls = [sys.argv[3] + f"/many/{n}" for n in range(40)]
items = pd.DataFrame({"prompt_id": [str(n) for n in range(40)], "url": urls})
fetch.is_public = lambda address: address == "127.0.0.1"
fetch.download(items, sys.argv[2], workers=2, delay=0)
"""


def test_a_killed_run_goes_on(server, tmp_path):
    package = str(Path(fetch.__file__).parents[1])
    command = [sys.executable, "-c", KILLED, package, str(tmp_path), server.url("")]
    process = subprocess.Popen(command)
    limit = time.monotonic() + 30
    while len(list(tmp_path.glob("*.png"))) < 12 and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.2)  # the server ends what it had begun
    done = {f.stem for f in tmp_path.glob("*.png")}
    assert 12 <= len(done) < 40
    for file in tmp_path.glob("*.png"):
        assert file.read_bytes() == GOOD + f"/many/{file.stem}".encode()
    assert (tmp_path / "report.csv").exists()
    before = server.seen.copy()
    report = get([server.url(f"/many/{n}") for n in range(40)], tmp_path, workers=8, per_host=8)
    assert set(report.prompt_id[report.status == "kept"]) == done
    assert set(report.status) == {"ok", "kept"}
    again = server.seen - before
    assert again == {f"/many/{n}": 1 for n in set(range(40)) - set(map(int, done))}
    assert sorted(stored(tmp_path)) == sorted(f"{n}.png" for n in range(40))


def test_an_interrupted_run_ends_at_once(server, tmp_path):
    when = []

    def interrupt():
        while not (tmp_path / "0.png").exists() or not server.seen["/hang"]:
            time.sleep(0.05)
        time.sleep(0.4)
        when.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        get([server.url("/good.png"), server.url("/hang")], tmp_path, timeout=30, total=30)
    assert time.monotonic() - when[0] < 3
    assert stored(tmp_path) == ["0.png"]
    assert len(pd.read_csv(tmp_path / "report.csv")) == 1


@pytest.mark.parametrize("per_host", [1, 3])
def test_a_host_gets_few_requests_at_a_time(server, tmp_path, per_host):
    urls = [server.url(f"/many/{n}") for n in range(9)]
    report = get(urls, tmp_path, per_host=per_host, workers=6)
    assert (report.status == "ok").all()
    assert server.most == per_host


def test_a_host_gets_a_pause_between_requests(server, tmp_path):
    start = time.monotonic()
    get([server.url(f"/good.png?{n}") for n in range(5)], tmp_path, delay=0.2, per_host=4)
    assert time.monotonic() - start >= 4 * 0.2


def test_each_retry_waits_longer(server, tmp_path):
    start = time.monotonic()
    get([server.url("/503")], tmp_path, backoff=0.2, retries=2)
    assert time.monotonic() - start >= 0.2 + 0.4


def test_hosts_take_turns(server, tmp_path, monkeypatch):
    resolve(monkeypatch, [HERE])
    names = ["a.example"] * 4 + ["b.example"] * 4
    get([f"http://{n}:{server.server_port}/good.png" for n in names], tmp_path, workers=1)
    assert [h.partition(":")[0] for h in server.hosts] == names[2:6] + names[2:6]


@pytest.mark.parametrize("harm", ["file", "locked", "full", "busy"])
def test_a_folder_that_cannot_be_written(server, tmp_path, harm):
    folder, pattern = tmp_path / "images", "Permission denied|File exists|File too large"
    folder.write_bytes(b"") if harm == "file" else folder.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if harm == "locked":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        folder.chmod(0o500)
    if harm == "full":  # as a full disk: writing beyond 5 kB fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    lock = fetch.FileLock(folder / ".lock") if harm == "busy" else None
    if lock:
        lock.acquire()
        pattern = "another download into .* is running"
    try:
        with pytest.raises(OSError, match=pattern) as error:
            get([server.url("/good.png")], folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        folder.chmod(0o700)
        if lock:
            lock.release()
    assert "\n" not in str(error.value)
    assert harm == "file" or stored(folder) == []
    assert server.seen["/good.png"] == (harm == "full")


SUMS = {"md5": hashlib.md5(GOOD).hexdigest(), "sha256": hashlib.sha256(GOOD).hexdigest()}


@pytest.mark.parametrize("name", SUMS)
def test_a_file_with_its_checksum(server, tmp_path, name):
    target = tmp_path / "deep" / "list"
    ask = partial(fetch.file, server.url("/good.png"), target, name, SUMS[name], **QUICK)
    for _ in range(2):  # the second time it is there
        assert ask().read_bytes() == GOOD
    assert server.seen["/good.png"] == 1
    target.write_bytes(b"damaged")
    assert ask().read_bytes() == GOOD


@pytest.mark.parametrize("name", SUMS)
def test_a_wrong_checksum(server, tmp_path, name):
    target = tmp_path / "list"
    target.write_bytes(b"older")
    wrong = SUMS[name][::-1]
    with pytest.raises(fetch.FetchError) as error:
        fetch.file(server.url("/good.png"), target, name, wrong, **QUICK)
    message = str(error.value)
    assert SUMS[name] in message
    assert wrong in message
    assert "\n" not in message
    assert target.read_bytes() == b"older"  # never replaced by what is not right
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("/404", "HTTP 404"),
        ("/endless", "more than 200000 bytes"),
        ("/more", "Not enough data"),
        ("/drip", "took more than 1 s"),
        ("/to/http://10.0.0.1/", "not a public address"),
    ],
)
def test_a_file_has_the_same_guards(server, tmp_path, path, pattern):
    with pytest.raises(fetch.FetchError, match=pattern):
        fetch.file(server.url(path), tmp_path / "list", "md5", SUMS["md5"], **QUICK)
    assert [f.name for f in tmp_path.iterdir()] in ([], ["list.lock"])
