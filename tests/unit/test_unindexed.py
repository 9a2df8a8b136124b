"""Tars without an index: read to their end in order, resumed by skipping; halves and breaks are named."""

from __future__ import annotations

import io
import itertools
import json
import shlex
import tarfile
from pathlib import Path

import pytest
from support.http_server import serve
from test_remote_stream import FAST, TEXT, rows_of, take

from mmcl.config import build
from mmcl.data import ClipStream
from mmcl.data.options import DataOptions
from mmcl.shards.sequential import TarList, describe_order, expand_tars, is_tar_list, open_shards
from mmcl.types import Batch, ConfigError, RunError, SampleError


def write_tar(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            content = f"content of {name}".encode() * 40
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def names_of(prefix: str, count: int = 6) -> list[str]:
    return [f"{prefix}{number}.{extension}" for number in range(count) for extension in ("txt", "bin")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        write_tar(tmp_path / f"s-{number}.tar", names_of("abcd"[number]))
    return tmp_path


def stream(tars: TarList, **options: object) -> ClipStream:
    options = {"global_batch": 4, "in_process": True, "seed": 3, "remote": FAST, **options}
    return ClipStream(tars, (TEXT,), **options)  # type: ignore[arg-type]


def keys_of(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def expand(shards: object, *, allow_pipe: bool = False) -> TarList:
    return expand_tars(shards, allow_pipe=allow_pipe, remote=FAST)  # type: ignore[arg-type]


def test_files_urls_and_commands_give_the_same(folder: Path) -> None:
    whole = [f"{letter}{number}" for letter in "abcd" for number in range(6)]
    local = take(stream(expand(f"{folder}/s-{{0..3}}.tar")), 12)
    assert keys_of(local) == whole * 2 and not any(batch.skipped for batch in local)
    with serve(folder) as server:
        assert rows_of(take(stream(expand(f"{server.url}/s-{{0..3}}.tar")), 12)) == rows_of(local)
        server.fault = lambda path, span, count: "reset" if count == 1 else ""
        listed = [f"{server.url}/s-{number}.tar" for number in range(4)]
        assert rows_of(take(stream(expand(listed)), 12)) == rows_of(local)
    command = [f"pipe:cat {shlex.quote(str(folder))}/s-{{0..3}}.tar"]
    assert rows_of(take(stream(expand(command, allow_pipe=True)), 12)) == rows_of(local)


def test_it_goes_on_where_it_stopped_on_equal_workers_alone(folder: Path) -> None:
    """In the second pass; every sample comes once in a pass of its worker, on any number of them."""
    tars = expand(f"{folder}/s-{{0..3}}.tar")
    whole = take(stream(tars), 14)
    first = stream(tars)
    take(first, 9)
    second = stream(tars)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert rows_of(take(second, 5)) == rows_of(whole[9:])
    with pytest.raises(ConfigError, match=r"ranks × workers: 1 then, 2 now"):
        stream(tars, world_size=2).load_state_dict(first.state_dict())
    for world in (2, 8):  # with tars of their own, and with fewer tars than readers
        keys = [
            key
            for rank in range(world)
            for key in keys_of(take(stream(tars, global_batch=8, rank=rank, world_size=world), 3))
        ]
        assert sorted(keys) == sorted(keys_of(whole[:6]))


def test_breaks_and_halves_are_named(folder: Path, tmp_path: Path) -> None:
    def cut(name: str, keep: int) -> Path:
        path = tmp_path / name
        path.write_bytes((folder / "s-0.tar").read_bytes()[:keep])
        return path

    member = 512 + 1024  # a header, and 17 × 40 bytes of content
    in_content = cut("content.tar", 5 * member + 700)
    in_header = cut("header.tar", 4 * member + 100)
    no_end = cut("end.tar", 12 * member)
    damaged = bytearray((folder / "s-0.tar").read_bytes())
    damaged[4 * member : 4 * member + 512] = b"\xff" * 512
    (tmp_path / "damaged.tar").write_bytes(damaged)
    scattered = write_tar(tmp_path / "scattered.tar", ["x.txt", "y.txt", "x.bin", "z.txt"])
    packed = tmp_path / "packed.tar"
    packed.write_bytes(b"\x1f\x8b" + bytes(1000))
    cases = {
        in_content: (["a0", "a1"], "truncated_tar"),
        in_header: (["a0"], "truncated_tar"),
        no_end: ([f"a{n}" for n in range(5)], "truncated_tar"),
        tmp_path / "damaged.tar": (["a0"], "truncated_tar"),
        scattered: (["x", "y", "z"], "scattered"),
        packed: ([], "compressed"),
    }
    for path, (good, reason) in cases.items():
        tars = expand([str(path), str(folder / "s-1.tar")])
        items = [item for _, item in itertools.islice(tars.items(0, 1), len(good) + 7)]
        assert [item.key for item in items if not hasattr(item, "error")] == [*good, *(f"b{n}" for n in range(6))]
        (problem,) = [item for item in items if hasattr(item, "error")]
        assert problem.error.reason == reason and str(path) in problem.error.detail
    batches = take(stream(expand([str(in_content), str(folder / "s-1.tar")])), 2)
    assert [skip[1:3] for batch in batches for skip in batch.skipped] == [("a2", "truncated_tar")]


def test_commands_that_fail_or_stand_still_are_named(folder: Path) -> None:
    good = str(folder / "s-1.tar")
    for command, reason in (
        (f"cat {shlex.quote(str(folder / 's-0.tar'))}; exit 3", "exit code 3"),
        (f"head -c 2000 {shlex.quote(str(folder / 's-0.tar'))}; sleep 60", "no byte in 0.3 s"),
    ):
        items = [
            item for _, item in itertools.islice(expand([f"pipe:{command}", good], allow_pipe=True).items(0, 1), 7)
        ]
        problems = [item for item in items if hasattr(item, "error")]
        assert len(problems) == 1 and reason in str(problems[0].error)
        assert any(item.key == "b0" for item in items) or len(items) == 7
    with pytest.raises(RunError, match="no sample in 1 tries"):
        list(itertools.islice(expand(["pipe:true"], allow_pipe=True).items(0, 1), 2))


def test_a_member_that_states_a_terabyte_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmcl.shards import sequential

    monkeypatch.setattr(sequential, "MAX_SAMPLE_BYTES", 10_000)
    write_tar(tmp_path / "a.tar", ["a.txt"])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        info = tarfile.TarInfo("b.bin")
        info.size = 200_000
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    items = [item for _, item in itertools.islice(expand([str(tmp_path / "a.tar")]).items(0, 1), 1)]
    assert isinstance(items[0].error, SampleError) and items[0].error.reason == "too_large"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("pipe:cat x.tar", "allow_pipe"),
        (["a.tar", "pipe:cat x.tar"], "allow_pipe"),
        ("zip::https://host/a.tar", "read from"),
        ("file:///etc/a.tar", "read from"),
        ("ftp://host/a.tar", "read from"),
        (["a.txt"], "must end with .tar"),
        ([], "empty"),
        ("/nowhere/{0..3}.tar", "/nowhere/0.tar is not there"),
    ],
)
def test_what_is_not_read(shards: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_shards(shards)  # type: ignore[arg-type]


def test_a_run_names_the_command_that_indexes(folder: Path) -> None:
    tars = expand(f"{folder}/s-{{0..3}}.tar")
    assert f"`mmcl shards index {folder}`" in describe_order(tars) and "number of workers" in describe_order(tars)
    with pytest.raises(ConfigError, match=r"read in order, once; .*mmcl shards index"):
        stream(tars, shuffle=False)
    with pytest.raises(ConfigError, match="mixed"):
        ClipStream([(tars, 1), (tars, 2)], (TEXT,), global_batch=4)
    assert not is_tar_list(str(folder)) and not is_tar_list(folder) and is_tar_list("s3://b/{0..9}.tar")
    data = build(DataOptions, {"shards": [f"{folder}/s-0.tar", "b.tar"]})
    assert data.weighted == (((f"{folder}/s-0.tar", "b.tar"), 1),) and not data.allow_pipe
