"""The search app over real sockets: what it finds, what it refuses, and that nothing of an upload stays."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
import wave
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from support.media import tone
from support.served import Served, served

from mmcl.model import MultimodalModel
from mmcl.search import Index, search
from mmcl.serve.app import allowed_hosts, build_app
from mmcl.serve.library import Library
from mmcl.serve.uploads import Limits, decoded
from mmcl.types import ConfigError, SampleError, VideoSpec

pytestmark = pytest.mark.slow
_ = served


def ask(
    served: Served, method: str, path: str, body: bytes | str | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON (or bytes), headers."""
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        kind = answer.headers.get("content-type", "")
        return answer.status, json.loads(content) if "json" in kind else content, dict(answer.headers)
    finally:
        connection.close()


def left_behind(served: Served) -> list[Path]:
    return [path for path in served.uploads.rglob("*") if path.is_file() and "mmcl-serve-" in str(path)]


def test_a_text_finds_what_search_finds(served: Served) -> None:
    wanted = search(Index.open(served.index), "a red clip", top=5)
    status, found, headers = ask(
        served, "POST", "/search/text?top=5", json.dumps({"text": "a red clip"}), Content_Type="application/json"
    )
    assert status == 200
    assert [hit["item"]["key"] for hit in found["hits"]] == [hit.key for hit in wanted]
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in wanted], abs=1e-5)
    assert "default-src 'none'" in headers["content-security-policy"]


def test_an_upload_finds_itself_and_is_gone(served: Served, shards_folder: Path, media_folder: Path) -> None:
    clip = sorted(media_folder.rglob("*.mp4"))[0]
    model, index = MultimodalModel.from_pretrained(served.model), Index.open(served.index)
    wanted = [hit.key for hit in index.query(model.encode_video(clip), 5)[0]]
    status, found, _ = ask(served, "POST", "/search/file?top=5&modality=video", clip.read_bytes())
    assert status == 200 and [hit["item"]["key"] for hit in found["hits"]] == wanted
    assert not left_behind(served)


def test_pictures_and_sounds_are_shown(served: Served) -> None:
    _, found, _ = ask(served, "POST", "/search/text", json.dumps({"text": "x"}), Content_Type="application/json")
    item = found["hits"][0]["item"]
    types = {"poster": "image/jpeg", "clip": "image/webp", "waveform": "image/svg+xml", "sound": "audio/webm"}
    for kind, wanted in types.items():
        status, content, headers = ask(served, "GET", "/" + item[kind])
        assert (status, headers["content-type"]) == (200, wanted) and len(content) > 100
    assert ask(served, "GET", "/media/0/999999/poster")[0] == 404
    assert ask(served, "GET", "/media/0/0/../../../../etc/passwd")[0] == 404
    assert ask(served, "GET", "/assets/..%2fapp.py")[0] == 404


def test_a_picture_and_a_sound_are_taken(served: Served, tmp_path: Path) -> None:
    Image.fromarray(np.full((80, 90, 3), (200, 30, 30), np.uint8)).save(tmp_path / "red.png")
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((32767 * tone(440, 1.0, 16_000)).astype("<i2").tobytes())
    for name in ("red.png", "tone.wav"):
        status, found, _ = ask(served, "POST", "/search/file", (tmp_path / name).read_bytes())
        assert status == 200 and found["hits"], name


HOSTILE = {
    "nothing": b"",
    "a page": b"<html><script>alert(1)</script></html>",
    "a playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "a list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:1/"/></svg>',
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/taken'\ntR.",
    "a bomb": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x01\x86\xa0\x00\x01\x86\xa0\x08\x02\x00\x00\x00" + b"\x00" * 99,
    "noise": os.urandom(4096),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_media_is_one_line(served: Served, kind: str) -> None:
    status, found, _ = ask(served, "POST", "/search/file", HOSTILE[kind], Content_Type="video/mp4")
    assert status == 415 and len(found["error"]) < 200 and "/" not in found["error"]
    assert not left_behind(served) and ask(served, "GET", "/about")[0] == 200


def test_too_much_is_refused_before_it_is_read(served: Served) -> None:
    limit = ask(served, "GET", "/about")[1]["upload_bytes"]
    with socket.create_connection(urlsplit(served.url).netloc.split(":")) as told:
        told.sendall(f"POST /search/file HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {limit + 1}\r\n\r\n".encode())
        assert b" 413 " in told.recv(1000).split(b"\r\n")[0]
    with socket.create_connection(urlsplit(served.url).netloc.split(":")) as untold:  # chunks, whose sum nobody says
        untold.sendall(b"POST /search/file HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b"\x00" * (1 << 20) + b"\r\n"
        sent, answer = 0, b""
        untold.settimeout(20)
        try:
            while sent <= limit + (4 << 20):
                untold.sendall(chunk)
                sent += 1 << 20
        except ConnectionError:
            pass  # it has hung up
        try:
            answer = untold.recv(1000)
        except ConnectionError:
            answer = b"HTTP/1.1 413 closed"
        assert b" 413 " in answer.split(b"\r\n")[0]
    assert not left_behind(served)
    status, found, _ = ask(
        served, "POST", "/search/text", json.dumps({"text": "x" * 5000}), Content_Type="application/json"
    )
    assert status == 413 and "5000 letters" in found["error"]


def test_other_sites_and_names_are_refused(served: Served) -> None:
    body, kind = json.dumps({"text": "x"}), {"Content_Type": "application/json"}
    assert ask(served, "POST", "/search/text", body, **kind, Origin="http://evil.example")[0] == 403
    assert ask(served, "GET", "/about", Host="rebound.example")[0] == 400
    assert ask(served, "POST", "/search/text?modality=vidoe", body, **kind)[0] == 400
    assert ask(served, "POST", "/search/text", "{", **kind)[0] == 422


def test_a_sender_that_stalls_is_sent_away_and_others_are_served(served: Served, shards_folder: Path) -> None:
    """An app of its own, with less patience."""
    import uvicorn

    library = Library.open(served.model, served.index, None)
    limits = Limits(request_seconds=1.0, at_once=1)
    server = uvicorn.Server(uvicorn.Config(build_app(library, limits, hosts=["127.0.0.1"]), log_level="error"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        impatient = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", served.model, served.index, served.uploads)
        with socket.create_connection(listener.getsockname()) as slow:
            slow.sendall(b"POST /search/file HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nabc")
            while (status := ask(impatient, "POST", "/search/file", b"x")[0]) != 503:
                assert status == 415  # before the slow one had its turn
            assert ask(impatient, "GET", "/about")[0] == 200
            slow.settimeout(20)
            assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]
        assert ask(impatient, "POST", "/search/file", b"x")[0] == 415
    finally:
        server.should_exit = True
        thread.join()


def test_a_file_that_takes_too_long_is_named(media_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(sorted(media_folder.rglob("*.mp4"))[0].read_bytes())
    with pytest.raises(SampleError, match="timeout"):
        decoded(path, {"video": VideoSpec()}, 0.0)
    with pytest.raises(SampleError, match="no_tower: the file holds video"):
        decoded(path, {}, 30.0)


def test_what_does_not_belong_together_is_one_line(served: Served, shards_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no .*, of which"):
        Library.open(served.model, served.index, str(shards_folder / "test"))
    assert Library.open(served.model, served.index, None).shards is not None
    assert allowed_hosts("0.0.0.0") == ["*"]
