"""What servers answer, and what is made of it: never other bytes than were asked for, no read without an end."""

from __future__ import annotations

import base64
import gzip
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.raw_server import CONTENT, partial, raw_server, wanted

from mmcl.shards import http_range
from mmcl.shards.files import read_bytes
from mmcl.shards.remote import ChangedError, RemoteOptions, fetch, stat
from mmcl.types import ConfigError, MmclError, RunError, SampleError, redact

SLOW = pytest.mark.slow
ONCE = RemoteOptions(retries=0, retry_seconds=5.0, stall_seconds=0.3)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy of the machine's own; nothing remembered of a port that an earlier server had."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    http_range.uses_proxy.cache_clear()
    http_range._odd_hosts.clear()
    yield
    http_range.uses_proxy.cache_clear()


def chunked(head: str) -> bytes:
    start, stop = wanted(head)
    place = f"Content-Range: bytes {start}-{stop - 1}/{len(CONTENT)}"
    top = f"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n{place}\r\n\r\n".encode()
    return top + b"%x\r\n%s\r\n0\r\n\r\n" % (stop - start, CONTENT[start:stop])


def packed(head: str) -> bytes:
    body = gzip.compress(CONTENT)
    top = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    return top.encode() + body


GOOD = {
    "plain": lambda head: partial(head, 'ETag: "a"'),
    "other case and spaces": lambda head: partial(head).replace(b"Content-Length: ", b"CONTENT-length:\t"),
    "in pieces": lambda head: [partial(head)[:9], partial(head)[9:40], partial(head)[40:]],
    "one at a time": lambda head: partial(head, "Connection: close"),
    "chunked": chunked,
    "all of a small file": lambda head: f"HTTP/1.1 200 OK\r\nContent-Length: {len(CONTENT)}\r\n\r\n".encode() + CONTENT,
}


@pytest.mark.parametrize("kind", GOOD)
def test_answers_that_are_right(kind: str) -> None:
    span = (0, len(CONTENT)) if "all" in kind else (300, 1_000)
    with raw_server(GOOD[kind]) as server:
        for _ in range(2):  # on a kept connection, or by what was learnt of the host
            assert bytes(fetch(f"{server.url}/a.tar", *span, options=ONCE).content) == CONTENT[slice(*span)]
        assert all("accept-encoding: identity" in head.lower() for head in server.heads)


BAD = {
    "another place": (lambda head: partial(head, shift=7), SampleError, "bytes from 307 on came, 300 was asked for"),
    "no place": (lambda head: partial(head, place=False), SampleError, "without Content-Range"),
    "more than asked": (lambda head: partial(head, length=10**12), SampleError, "1000000000000 bytes are announced"),
    "less than asked": (
        lambda head: partial(head, length=10),
        SampleError,
        "than the 10 bytes|10 bytes came, 700",
    ),
    "less than announced": (lambda head: partial(head)[:-5] + b"", SampleError, "no byte in|closed after"),
    "chunks elsewhere": (lambda head: chunked(head).replace(b"bytes 300", b"bytes 301"), SampleError, "bytes from 301"),
    "packed": (packed, RunError, "Content-Encoding: gzip"),
    "packed range": (lambda head: partial(head, "Content-Encoding: br"), RunError, "Content-Encoding: br"),
    "no ranges": (lambda head: b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", RunError, "range of bytes"),
    "nothing of HTTP": (lambda head: b"SSH-2.0-OpenSSH_9.6\r\n\r\n", SampleError, "BadStatusLine"),
    "a head without end": (lambda head: b"HTTP/1.1 206 OK\r\nX: " + b"y" * 200_000, SampleError, "bytes of headers"),
    "past the end": (lambda head: b"HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n", ChangedError, "ends before"),
}


@pytest.mark.parametrize("kind", BAD)
def test_answers_that_are_wrong(kind: str) -> None:
    """Each in one line and in no more time than a stall may take; two requests at most, one of them of fsspec."""
    answer, error, text = BAD[kind]
    began = time.monotonic()
    with raw_server(answer) as server:
        with pytest.raises(error, match=text) as caught:
            fetch(f"{server.url}/a.tar", 300, 1_000, options=ONCE)
        assert "\n" not in str(caught.value) and len(server.heads) <= 2
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("where", [*(pytest.param(part, marks=SLOW) for part in ("body", "chunks")), "head", "whole"])
def test_bytes_that_drip_for_ever_end(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte each 50 ms: never a stall, and never done."""

    def answer(head: str) -> list[bytes]:
        if where == "head":
            return [b"HTTP/1.1 206 OK\r\n"] + [b"X: y\r\n"] * 400
        if where == "body":
            return [partial(head)[:-690]] + [b"x"] * 400
        if where == "chunks":
            return [chunked(head)[:-690]] + [b"x"] * 400
        return [b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n"] + [b"x"] * 400

    began = time.monotonic()
    with raw_server(answer) as server, pytest.raises((SampleError, RunError), match="Timeout"):
        if where == "whole":
            fetch(f"{server.url}/index.json", options=ONCE)
        else:
            fetch(f"{server.url}/a.tar", 300, 1_000, options=ONCE)
    assert time.monotonic() - began < 4


def test_passwords_and_signatures_are_in_no_message() -> None:
    """They are sent, and shown nowhere."""
    with raw_server(lambda head: partial(head) if "ok.tar" in head else b"HTTP/1.1 403 No\r\n\r\n") as server:
        url = server.url.replace("//", "//me:se:cret%40@")
        assert bytes(fetch(f"{url}/ok.tar?sig=abc", 0, 9, options=ONCE).content) == CONTENT[:9]
        sent = f"Authorization: Basic {base64.b64encode(b'me:se:cret@').decode()}"
        assert sent in server.heads[-1] and "me:" not in server.heads[-1]
        assert "sig=abc" in server.heads[-1]
        for read in (lambda path: fetch(path, 0, 9, options=ONCE), lambda path: stat(path), read_bytes):
            with pytest.raises((SampleError, RunError)) as caught:
                read(f"{url}/no.tar?X-Amz-Signature=abcdef&x=1")
            text = f"{caught.value} {caught.value!r} {caught.value.args}"
            assert "cret" not in text and "abcdef" not in text and "…@127.0.0.1" in text and "x=1" in text
    assert redact("s3://bucket/a@b.tar") == "s3://bucket/a@b.tar"
    for kind in (ConfigError, RunError, MmclError):
        assert str(kind("https://u:p@h/x")) == "https://…@h/x"


def test_ipv6_and_ports() -> None:
    with raw_server(partial, host="::1") as server:
        url = f"http://[::1]:{server.port}/a.tar"
        assert bytes(fetch(url, 5, 50, options=ONCE).content) == CONTENT[5:50]
        assert f"Host: [::1]:{server.port}" in server.heads[-1]
    for port in ("99999", "x"):
        with pytest.raises(ConfigError, match=rf"http://127\.0\.0\.1:{port}"):
            fetch(f"http://127.0.0.1:{port}/a.tar", 0, 5, options=ONCE)


def test_a_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server(partial) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "localhost")
        assert bytes(fetch("http://nowhere.invalid/a.tar", 5, 50, options=ONCE).content) == CONTENT[5:50]
        assert proxy.heads[-1].startswith("GET http://nowhere.invalid/a.tar ")
        assert fetch("http://nowhere.invalid/a.tar", options=ONCE).content
        count = len(proxy.heads)
        with raw_server(partial) as server:
            assert fetch(f"http://localhost:{server.port}/a.tar", 5, 50, options=ONCE).content
        assert len(proxy.heads) == count


def test_a_login_of_netrc_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    login = f"Basic {base64.b64encode(b'me:secret').decode()}"
    closed = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
    with raw_server(lambda head: partial(head) if login in head else closed) as server:
        for _ in range(3):
            assert bytes(fetch(f"{server.url}/a.tar", 5, 50, options=ONCE).content) == CONTENT[5:50]
        assert len(server.heads) == 4, "what the host wants is known after the first"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of its own signature, for localhost."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost -keyout {path}.key -out {path}.crt".split(),
        check=True,
        capture_output=True,
    )
    path.write_bytes(Path(f"{path}.key").read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


READ = """
import sys
from mmcl.shards.remote import RemoteOptions, fetch
for url, span in [(url, span) for url in sys.argv[1:] for span in ((5, 50), (60, 90), (0, None))]:
    try:
        print(len(fetch(url, *span, options=RemoteOptions(retries=3, stall_seconds=5.0)).content))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_tls_is_verified(certificate: Path) -> None:
    """Trusted through SSL_CERT_FILE, for its own name alone; else refused at once, by both clients, nothing sent."""

    def read(*hosts: str, **environment: str) -> list[str]:
        names = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"} | environment
        urls = [f"https://{host}:{server.port}/a.tar" for host in hosts]
        command = [sys.executable, "-c", READ, *urls]
        done = subprocess.run(command, capture_output=True, text=True, env=names, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with raw_server(partial, certificate=certificate) as server:
        refused = read("localhost")
        assert len(refused) == 3 and not server.heads
        good = read("localhost", "127.0.0.1", SSL_CERT_FILE=f"{certificate}.crt")
        assert good[:3] == ["45", "30", str(len(CONTENT))] and len(good) == 6 and len(server.heads) == 3
        for line in refused + good[3:]:
            assert line.startswith("SampleError unreadable") and "1 try" in line and "CERTIFICATE" in line.upper()
