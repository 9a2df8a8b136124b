"""Indexing shards where they lie, and reading from an S3 API: the same files, and the same stream, as locally."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.http_server import serve
from test_remote_stream import FAST, change, rows_of, stream, take, write_samples
from test_unindexed import names_of, write_tar
from typer.testing import CliRunner

from mmcl.cli import app
from mmcl.shards import load_manifest, remote_file
from mmcl.shards.index import index_shards
from mmcl.shards.remote import ChangedError, fetch
from mmcl.types import ConfigError, RunError


def index_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".json", ".members")
    }


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.tar", "b.tar", "more/c.tar")):
        write_tar(folder / name, names_of("abc"[number], 30))
    return folder


def test_a_server_is_indexed_as_a_folder_is(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces smaller than a member and larger; over a server that fails now and then."""
    with serve(tars) as server:
        with pytest.raises(ConfigError, match="--out FOLDER"):
            index_shards(server.url)
        report = index_shards(f"{server.url}/{{a,b,more/c}}.tar", out=tmp_path / "remote")
        assert report.manifest.num_samples == 90 and not report.problems
        server.fault = lambda path, span, count: "reset" if count == 1 and path.endswith(".tar") else ""
        for piece in (1_000, 7_000):
            monkeypatch.setattr(remote_file, "PIECE_BYTES", piece)
            index_shards(server.url, out=tmp_path / f"listed-{piece}")
        (tars / "b.tar").write_bytes((tars / "b.tar").read_bytes()[:20_000])
        broken = index_shards(f"{server.url}/b.tar", out=tmp_path / "broken")
        assert "b.tar: damaged" in broken.problems[0]
        server.fault = lambda path, span, count: "404" if path == "a.tar" else ""
        with pytest.raises(RunError, match=r"a\.tar is missing"):
            index_shards(f"{server.url}/a.tar", out=tmp_path / "missing")
    listed = index_files(tmp_path / "listed-1000")
    assert listed == index_files(tmp_path / "listed-7000") and len(listed) == 4, "one page of links is followed"
    write_tar(tars / "b.tar", names_of("b", 30))
    remote = index_files(tmp_path / "remote")
    local = index_shards(tars)
    assert remote == index_files(tars) and local.manifest.num_samples == 90
    assert {name: remote[name] for name in ("a.members", "b.members")}.items() <= listed.items()


def test_the_command_takes_urls(tars: Path, tmp_path: Path) -> None:
    with serve(tars) as server:
        pattern = f"{server.url}/{{a,b}}.tar"
        done = CliRunner().invoke(app, ["shards", "index", pattern, "--out", str(tmp_path / "out")])
        assert done.exit_code == 0 and "60 samples in 2 shards" in done.output and "beside the tars" in done.output
        assert load_manifest(tmp_path / "out").num_samples == 60


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty bucket of an S3 API in a process of its own."""
    import fsspec

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log, start_new_session=True
    )
    names = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{names['AWS_ENDPOINT_URL']}/moto-api/", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
        filesystem.mkdir("shards")
        yield "s3://shards"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@pytest.mark.slow
def test_an_s3_bucket_is_indexed_and_read_as_a_folder_is(bucket: str, tmp_path: Path) -> None:
    """Bitwise; in a process that starts with a session of its own as well; a changed object stops the run."""
    import fsspec

    write_samples(tmp_path)
    index_shards(tmp_path)
    filesystem = fsspec.filesystem("s3")
    for tar in tmp_path.glob("*.tar"):
        filesystem.put_file(str(tar), f"{bucket}/train/{tar.name}")
    report = index_shards(f"{bucket}/train")
    assert report.manifest.fingerprint == load_manifest(tmp_path).fingerprint
    for name, content in index_files(tmp_path).items():
        assert filesystem.cat_file(f"{bucket}/train/{name}") == content
    local = rows_of(take(stream(tmp_path), 9))
    assert rows_of(take(stream(f"{bucket}/train"), 9)) == local
    second = stream(f"{bucket}/train")
    second.load_state_dict({**stream(tmp_path).state_dict(), "draws": 24})
    assert rows_of(take(second, 4)) == local[3:7]
    cached = stream(f"{bucket}/train", remote=FAST.__class__(cache_dir=str(tmp_path / "cache")))
    assert rows_of(take(cached, 9)) == local
    code = (
        "import sys, itertools; from mmcl.data import ClipStream; from mmcl.shards import load_manifest\n"
        "from mmcl.media.text import ByteTokenizer; from mmcl.types import TextSpec, View\n"
        "if __name__ == '__main__':\n"
        "    s = ClipStream(load_manifest(sys.argv[1]), (View(TextSpec(ByteTokenizer(32))),), global_batch=8, seed=3,"
        " workers=2)\n"
        "    print(','.join(key for batch in itertools.islice(iter(s), 9) for key in batch.keys))\n"
    )
    script = tmp_path / "read.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), f"{bucket}/train"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip().split(",") == [key for keys, *_ in local for key in keys]
    batches = iter(stream(f"{bucket}/train"))
    next(batches)
    for tar in tmp_path.glob("*.tar"):
        filesystem.pipe_file(f"{bucket}/train/{tar.name}", tar.read_bytes()[:-512])
    with pytest.raises(RunError, match=r"shard-00000\d.tar holds"):
        take(stream(f"{bucket}/train"), 6)
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_an_object_that_changes_while_it_is_read_stops_the_run(bucket: str, tmp_path: Path) -> None:
    """Other bytes in the same layout, known by the ETag that comes with each answer; also without an index."""
    import fsspec
    from test_unindexed import expand
    from test_unindexed import stream as sequential

    write_samples(tmp_path)
    filesystem = fsspec.filesystem("s3")
    for file in tmp_path.iterdir():
        filesystem.put_file(str(file), f"{bucket}/changing/{file.name}")
    with pytest.raises(ChangedError, match="ends before byte"):
        fetch(f"{bucket}/changing/shard-000000.tar", 10**9, 10**9 + 5)
    source = iter(stream(f"{bucket}/changing"))
    next(source)
    for tar in tmp_path.glob("*.tar"):
        change(tar, "other bytes")
        filesystem.pipe_file(f"{bucket}/changing/{tar.name}", tar.read_bytes())
    with pytest.raises(RunError, match=r"shard-00000\d.tar changed while it was read \(ETag"):
        take(source, 12)  # type: ignore[arg-type]
    filesystem.rm(f"{bucket}/changing/shard-000000.tar")
    with pytest.raises(RunError, match=r"shard-000000.tar is missing"):
        take(stream(f"{bucket}/changing"), 6)
    with pytest.raises(RunError, match=r"gone.tar is missing"):
        take(sequential(expand(f"{bucket}/changing/gone.tar")), 1)


@pytest.mark.slow
def test_tars_of_a_bucket_without_an_index(bucket: str, tars: Path) -> None:
    import fsspec
    from test_unindexed import expand
    from test_unindexed import stream as sequential

    fsspec.filesystem("s3").put_file(str(tars / "a.tar"), f"{bucket}/plain/a.tar")
    found = take(sequential(expand(f"{bucket}/plain/a.tar")), 6)
    assert rows_of(found) == rows_of(take(sequential(expand(str(tars / "a.tar"))), 6))
    with pytest.raises(ConfigError, match=r"holds no \*\.tar"):
        index_shards(f"{bucket}/nothing")
