"""Verification finds what a run would stumble over, names it once, survives it, and repairs into a new folder only."""

from __future__ import annotations

import json
import os
import signal
import struct
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from support.media import encode, moving_pattern, tone, write_clip
from support.shards import read_shards, write_shards
from typer.testing import CliRunner

from mmcl.shards import load_manifest
from mmcl.shards.check import check_files
from mmcl.shards.commands import app
from mmcl.shards.index import index_shards
from mmcl.shards.pool import Lost
from mmcl.shards.reader import RawSample
from mmcl.shards.scan import choose_places, scan
from mmcl.shards.verify import VerifyOptions, repair_shards, verify_shards, write_quarantine
from mmcl.types import ConfigError, Source

TWO = VerifyOptions(workers=2)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    return write_clip(tmp_path_factory.mktemp("good") / "good.mp4", colour="red", seconds=2.0).read_bytes()


def without_some_sound(clip: bytes) -> bytes:
    """A piece of the sound track is said to lie far outside of the file: decord 0.6 dies of it, PyAV reads on."""
    data = bytearray(clip)
    table = data.rindex(b"stco")
    (pieces,) = struct.unpack_from(">I", data, table + 8)
    struct.pack_into(">I", data, table + 12 + 4 * (pieces - 5), 0x0C99813A)
    return bytes(data)


@pytest.fixture(scope="module")
def mixed(damaged_media, good, tmp_path_factory) -> Path:
    """Two shards of three samples and one of four: three are good, one has no sound and one no picture."""
    folder = tmp_path_factory.mktemp("mixed")
    facts = json.dumps({"duration_seconds": 2.0, "video": {"width": 64, "height": 48}}).encode()
    samples = {"good0": {"mp4": good, "txt": b"a clip", "json": facts}}
    samples |= {name: {"mp4": path.read_bytes(), "txt": b"x"} for name, path in damaged_media.items()}
    samples |= {"good1": {"mp4": good}, "good2": {"mp4": good}}
    write_shards(folder, samples, max_count=3)
    return folder


def test_every_damaged_file_is_named_once(mixed):
    report = verify_shards(mixed, TWO)
    reasons = {finding.key: finding.reason for finding in report.findings}
    assert reasons == {
        "truncated": "not_media",
        "bit_flipped": "decode",
        "damaged_moov": "no_streams",
        "zeroed_range": "decode",
        "empty": "empty",
        "text_file": "not_media",
    }
    assert len(report.findings) == 6 and report.samples == 11 and report.shards == 4
    assert str(report.findings[0]).startswith("shard-000000.tar:1 truncated.mp4: not_media (")


def test_a_decoder_that_dies_is_one_finding_and_nothing_else_is_lost(good, tmp_path):
    if metadata.version("decord") != "0.6.0":
        pytest.skip("another decord may survive this file")
    write_shards(tmp_path, {"a": {"mp4": good}, "killer": {"mp4": without_some_sound(good)}, "z": {"mp4": good}})
    report = verify_shards(tmp_path, VerifyOptions(workers=1, decoder="decord"))
    assert [(finding.key, finding.reason) for finding in report.findings] == [("killer", "worker_died")]
    assert "SIGSEGV" in report.findings[0].detail and report.samples == 3
    assert verify_shards(tmp_path, VerifyOptions(workers=1, decoder="pyav")).ok


def die_or_hang(reader, shard: int, index: int) -> str:
    key = reader.key(shard, index)
    if key == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if key == "hangs":
        time.sleep(60)
    return key


def test_scan_names_the_sample_that_died_or_hung(tmp_path):
    manifest = write_shards(tmp_path, {key: {"txt": b"x"} for key in ("a", "dies", "b", "hangs", "c")}, max_count=2)
    found = dict(scan(manifest, die_or_hang, choose_places(manifest), workers=2, timeout_seconds=1.0))
    lost = {place: result.reason for place, result in found.items() if isinstance(result, Lost)}
    assert lost == {(0, 1): "worker_died", (1, 1): "timeout"}
    assert [result for result in found.values() if not isinstance(result, Lost)] == ["a", "b", "c"]


def test_places_are_all_or_some_drawn_by_a_seed(tmp_path):
    manifest = write_shards(tmp_path, {f"k{i}": {"txt": b"x"} for i in range(10)}, max_count=3)
    everything = choose_places(manifest)
    assert everything == [(i // 3, i % 3) for i in range(10)] == choose_places(manifest, 99)
    some = choose_places(manifest, 4, seed=1)
    assert some == sorted(set(some)) and len(some) == 4 and set(some) <= set(everything)
    assert some == choose_places(manifest, 4, seed=1) != choose_places(manifest, 4, seed=2)


def problems_of(**members: bytes) -> list[str]:
    return [problem.reason for problem in check_files(RawSample("k", members, Source(0, 0)), decoder="pyav")]


def test_lengths_sizes_and_streams_must_agree(good, tmp_path):
    wave = tone(440, 4.0, 16_000)
    longer = encode(tmp_path / "a.mp4", moving_pattern((200, 0, 0), 24, (48, 64)), wave).read_bytes()
    assert problems_of(mp4=good) == []
    assert problems_of(mp4=longer) == ["durations_differ"]
    wav = encode(tmp_path / "a.wav", None, wave, audio_codec="pcm_s16le").read_bytes()
    assert problems_of(mp4=good, wav=wav) == ["durations_differ"] and problems_of(wav=wav) == []
    silent = write_clip(tmp_path / "b.mp4", colour="red", seconds=2.0, audio=False).read_bytes()
    assert problems_of(mp4=silent, wav=silent) == ["no_audio_stream"] and problems_of(mp4=silent) == []

    def stated(**facts) -> bytes:
        return json.dumps(facts).encode()

    size = {"width": 64, "height": 48}
    assert problems_of(mp4=good, json=stated(duration_seconds=2.3, video=size)) == []
    assert problems_of(mp4=good, json=stated(duration_seconds=9.0)) == ["wrong_duration"]
    assert problems_of(mp4=good, json=stated(video={"width": 640, "height": 480})) == ["wrong_size"]
    assert problems_of(mp4=silent, json=stated(video=size, audio={"channels": 1})) == ["no_audio_stream"]


@pytest.mark.parametrize("rotation", [0, 90])
def test_the_size_is_the_displayed_one(rotation, tmp_path):
    clip = write_clip(tmp_path / "a.mp4", colour="red", seconds=0.5, audio=False, rotation=rotation).read_bytes()
    width, height = (48, 64) if rotation else (64, 48)
    assert problems_of(mp4=clip, json=json.dumps({"video": {"width": width, "height": height}}).encode()) == []


@pytest.mark.parametrize(
    ("members", "reasons"),
    [
        ({"txt": b"\xff\xfe"}, ["caption_not_utf8"]),
        ({"txt": b" \n"}, ["caption_empty"]),
        ({"json": b"{"}, ["bad_json"]),
        ({"json": b'{"caption": "x"}', "txt": b"\xff"}, ["caption_not_utf8"]),
        ({"txt": b"x" * 300_000}, ["too_large"]),
    ],
)
def test_captions_must_be_readable(good, members, reasons):
    assert problems_of(mp4=good, **members) == reasons


def test_every_member_is_decoded_not_only_the_first(good):
    assert problems_of(mp4=good, **{"cam1.mp4": good[: len(good) // 2]}) == ["not_media"]
    assert problems_of(jpg=b"\xff\xd8\xff no picture", txt=b"x") == ["not_an_image"]


def test_tars_are_held_against_manifest_and_index(good, tmp_path):
    write_shards(tmp_path, {f"k{i}": {"mp4": good, "txt": b"word"} for i in range(4)}, max_count=1)
    first, second, third = (tmp_path / f"shard-00000{i}.tar" for i in range(3))
    data = first.read_bytes()
    first.write_bytes(data.replace(b"word", b"bird"))  # as long as before, decodes as before
    second.write_bytes(second.read_bytes()[:-512])
    third.unlink()
    report = verify_shards(tmp_path, TWO)
    assert [(finding.shard, finding.reason) for finding in report.findings] == [
        (first.name, "checksum"),
        (second.name, "unreadable_shard"),
        (third.name, "unreadable_shard"),
    ]
    assert report.samples == 2 and all(finding.index == -1 for finding in report.findings)
    assert [finding.reason for finding in verify_shards(tmp_path, VerifyOptions(sample=4, workers=1)).findings] == [
        "unreadable_shard",
        "unreadable_shard",
    ]
    with_checksum = VerifyOptions(sample=4, checksums=True, workers=1)
    assert "checksum" in {finding.reason for finding in verify_shards(tmp_path, with_checksum).findings}
    repaired = repair_shards(report, tmp_path / "new")
    assert repaired.num_samples == 2 and load_manifest(tmp_path / "new").shard_name(0) == first.name


def test_an_index_of_another_tar_is_noticed(tmp_path):
    write_shards(tmp_path / "a", {"a": {"txt": b"x"}, "b": {"txt": b"y"}})
    write_shards(tmp_path / "b", {"a": {"txt": b"x"}, "c": {"txt": b"y"}})
    side = "shard-000000.members"
    (tmp_path / "a" / side).write_bytes((tmp_path / "b" / side).read_bytes())
    assert [finding.reason for finding in verify_shards(tmp_path / "a", TWO).findings] == ["index_differs"]


def test_what_make_and_index_wrote_is_good(shards_folder, tmp_path):
    report = verify_shards(shards_folder / "train", TWO)
    assert report.ok and report.samples == report.total == 16, report.lines()
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    write_shards(tmp_path / "more", {"k": {"txt": b"x"}})
    index_shards(tmp_path)
    assert verify_shards(tmp_path, TWO).ok


def test_the_command_lists_quarantines_repairs_and_exits_3(mixed, tmp_path):
    listed, fixed = tmp_path / "lists/quarantine.jsonl", tmp_path / "fixed"
    done = run("verify", mixed, "--workers", 2, "--quarantine", listed, "--repair", fixed)
    assert done.exit_code == 3, done.output
    assert "shard-000000.tar:2 bit_flipped.mp4: decode (" in done.output and "6 bad samples" in done.output
    keys = [json.loads(line)["key"] for line in listed.read_text().splitlines()]
    assert keys == ["truncated", "bit_flipped", "damaged_moov", "zeroed_range", "empty", "text_file"]
    kept = read_shards(mixed)
    assert read_shards(fixed) == {key: members for key, members in kept.items() if key not in keys}
    assert load_manifest(fixed).sizes.tolist() == [1, 2, 2]  # of the second shard nothing was left
    again = run("verify", fixed, "--workers", 2, "--quarantine", listed)
    assert again.exit_code == 0 and "all good" in again.output and "0 keys added" in again.output
    assert len(listed.read_text().splitlines()) == 6
    assert write_quarantine(listed, verify_shards(mixed, TWO)) == 0  # they are named already


def test_repair_is_refused_before_the_work_where_it_would_harm(mixed, tmp_path):
    assert isinstance(run("verify", mixed, "--repair", mixed).exception, ConfigError)
    assert isinstance(run("verify", mixed, "--repair", tmp_path / "o", "--sample", 2).exception, ConfigError)
    report = verify_shards(mixed, VerifyOptions(sample=2, workers=1))
    with pytest.raises(ConfigError, match="--sample"):
        repair_shards(report, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").write_text("not a list\n")
    with pytest.raises(ConfigError, match="no list"):
        write_quarantine(tmp_path / "notes.txt", report)
    for wrong in ({"decoder": "x"}, {"sample": 0}, {"workers": 0}, {"timeout_seconds": 0}, {"tolerance_seconds": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            VerifyOptions(**wrong)


def test_a_hostile_key_cannot_write_to_the_terminal(tmp_path):
    write_shards(tmp_path, {"k\x1b[2J\u202e": {"mp4": b"no"}})
    lines = verify_shards(tmp_path, VerifyOptions(workers=1)).lines()
    assert all(line.isprintable() for line in lines) and "\\x1b[2J\\u202e.mp4: not_media" in "".join(lines)


def test_damage_that_a_decoder_hides_is_found(tmp_path):
    """FFmpeg paints over four lost bytes and goes on."""
    data = bytearray(write_clip(tmp_path / "a.mp4", colour="cyan", seconds=2.0, audio=False).read_bytes())
    start, end = data.index(b"mdat") + 8, data.index(b"moov")
    place = start + (end - start) * 7 // 10
    data[place : place + 4] = b"\xaa" * 4
    (problem,) = check_files(RawSample("k", {"mp4": bytes(data)}, Source(0, 0)), decoder="pyav")
    assert problem.reason == "decode" and problem.detail.startswith("a damaged frame at")


def test_frames_after_the_first_are_decoded_too(tmp_path):
    """Damage in the last tenth of a long clip, where no window would look first."""
    clip = write_clip(tmp_path / "a.mp4", colour="cyan", seconds=6.0, audio=False, gop=200).read_bytes()
    data = np.frombuffer(clip, np.uint8).copy()
    start, end = clip.index(b"mdat") + 8, clip.index(b"moov")
    data[end - (end - start) // 10 : end - 10] = 255
    assert problems_of(mp4=data.tobytes()) == ["decode"]
