"""Commands on the URL of shards: what they do on a folder, or one line that says why not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.http_server import FileServer, serve
from support.recipes import tiny_config
from support.shards import read_shards
from test_remote_stream import write_samples
from typer.testing import CliRunner

from mmcl.cli import app
from mmcl.recipe import build_model
from mmcl.shards.verify import VerifyOptions, verify_shards


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    text = done.output + str(done.exception or "")
    assert (1 if isinstance(done.exception, Exception) else done.exit_code) == code, text
    return text


@pytest.fixture
def server(shards_folder: Path) -> Iterator[FileServer]:
    with serve(shards_folder / "train") as server:
        yield server


@pytest.mark.slow
def test_whole_tars_are_checked_through_a_server_that_fails(tmp_path: Path) -> None:
    """Checksums and members, of each tar in one pass, after requests that failed; then of a tar that changed."""
    write_samples(tmp_path, 12, 200)
    options = VerifyOptions(workers=1, sample=1, checksums=True)
    with serve(tmp_path) as server:
        server.fault = lambda path, span, count: ["", "500", "truncate"][min(count, 2)] if count < 3 else ""
        report = verify_shards(server.url, options)
        assert not [finding for finding in report.findings if finding.index < 0]
        server.fault = lambda path, span, count: ""
        tar = next(tmp_path.glob("*.tar"))
        content = bytearray(tar.read_bytes())
        content[600] ^= 1
        tar.write_bytes(content)
        server.clear()
        report = verify_shards(server.url, options)
        assert [finding.reason for finding in report.findings if finding.index < 0] == ["checksum"]
        assert sum(stop - start for start, stop in server.spans()) < 1.5 * len(content), "read once, and one sample"


@pytest.mark.slow
def test_stats_preview_verify_and_reshard_of_a_url(server: FileServer, tmp_path: Path) -> None:
    local = server.root
    assert "16 samples decoded, 4 shards checked: all good" in run("shards", "verify", server.url, "--workers", 2)
    for name, place in (("here", local), ("there", server.url)):
        run("shards", "stats", place, "--out", tmp_path / name, "--workers", 2)
        run("shards", "preview", place, "--out", tmp_path / name / "page.html", "--count", 4, "--workers", 2)
        run("shards", "reshard", place, "--out", tmp_path / name / "new", "--max-count", 3, "--shuffle", 1)
    documents = [json.loads((tmp_path / name / "stats.json").read_text()) for name in ("here", "there")]
    assert documents[0] == documents[1]
    pages = [(tmp_path / name / "page.html").read_text() for name in ("here", "there")]
    assert re.sub(r"https?://[^<\s]+|/[^<\s]+train", "", pages[0]) == re.sub(
        r"https?://[^<\s]+|/[^<\s]+train", "", pages[1]
    )
    assert read_shards(tmp_path / "here" / "new") == read_shards(tmp_path / "there" / "new")


@pytest.mark.slow
def test_embed_and_evaluate_on_a_url(server: FileServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config())[0].export(tmp_path / "model")
    for name, place in (("here", server.root), ("there", server.url)):
        run("embed", model, place, "--out", tmp_path / name, "--workers", 1)
        run("evaluate", "retrieval", model, place, "--out", tmp_path / f"{name}-report", "--workers", 1)
    files = sorted(path.name for path in (tmp_path / "here").glob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()


def test_what_has_to_be_local_says_so(tmp_path: Path) -> None:
    """Input and output of ``make``, new folders, and media in a table: one line, and no folder with a strange name."""
    (tmp_path / "rows.csv").write_text("path,caption\nhttps://host/a.mp4,x\n")
    for line in (
        run("shards", "make", "https://host/{000..009}.tar", "--out", tmp_path / "out", code=1),
        run("shards", "make", "s3://bucket/media", "--out", tmp_path / "out", "--dry-run", code=1),
        run("shards", "make", tmp_path / "rows.csv", "--out", "s3://bucket/out", code=1),
        run("shards", "reshard", tmp_path, "--out", "s3://bucket/out", code=1),
        run("shards", "index", tmp_path, "--out", "s3://bucket/out", code=1),
    ):
        assert "local" in line and "\n" not in line.strip()
    report = run("shards", "make", tmp_path / "rows.csv", "--out", tmp_path / "out", "--workers", 1, code=1)
    assert "URL" in report
    assert not Path("s3:").exists()
