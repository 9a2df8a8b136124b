"""Recorded games: ordinary videos with their sound, the same for a seed, never lost to a game that ends its process."""

from __future__ import annotations

import csv
import json

import av
import numpy as np
import pytest

from mmcl.demo.record import (
    AUDIO_HZ,
    HELD_OUT,
    PICTURES_HZ,
    _record,
    _Take,
    caption_of,
    list_games,
    play,
    record_games,
    write_mp4,
)
from mmcl.hashing import text_hash
from mmcl.types import ConfigError, RunError

pytest.importorskip("ale_py")

ENDING = {"combat", "joust", "maze_craze", "warlords"}
GAMES = ["pong", "combat", "elevator_action", "berzerk"]  # with sound, ends its process, silent, held out


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("games")
    calls: list[tuple[int, int, str]] = []
    recordings = record_games(
        out, games=GAMES, train_seconds=2, test_seconds=1, workers=2, progress=lambda *call: calls.append(call)
    )
    return out, {recording.game: recording for recording in recordings}, calls


def _decode(path):
    with av.open(str(path)) as container:
        pictures = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    sound = np.zeros(0, dtype=np.float32)
    with av.open(str(path)) as container:
        if container.streams.audio:
            sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return np.array([time for time, _ in pictures]), np.stack([picture for _, picture in pictures]), sound


def test_files_are_ordinary_videos(recorded):
    _, recordings, _ = recorded
    with av.open(str(recordings["pong"].train)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", 32_000, 1)
        assert video.average_rate == PICTURES_HZ
        assert container.duration / 1e6 == pytest.approx(2, abs=0.1)
    times, pictures, sound = _decode(recordings["pong"].train)
    np.testing.assert_allclose(times, np.arange(40) / 20, atol=1e-3)
    assert pictures.shape == (40, 210, 160, 3)
    assert len(sound) == pytest.approx(64_000, abs=2048) and sound.std() > 0.01


def test_a_game_that_ends_its_process_is_named_and_left_out(recorded):
    out, recordings, _ = recorded
    assert "ended its process" in recordings["combat"].skipped and recordings["combat"].failed
    assert recordings["combat"].train is None and not list(out.rglob("*combat*"))


def test_a_silent_game_has_no_audio_stream(recorded):
    _, recordings, _ = recorded
    silent, loud = recordings["elevator_action"], recordings["pong"]
    assert silent.silent and not silent.train_has_sound and not silent.test_has_sound
    assert not loud.silent and loud.train_has_sound and loud.test_has_sound
    with av.open(str(silent.test)) as container:
        assert len(container.streams.audio) == 0 and len(container.streams.video) == 1


def test_the_table_lists_what_is_there(recorded):
    out, _, calls = recorded
    with (out / "clips.csv").open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("train/pong.mp4", "pong", "train", "pong", "known"),
        ("test/pong.mp4", "pong", "test", "pong", "known"),
        ("train/elevator_action.mp4", "elevator action", "train", "elevator_action", "known"),
        ("test/elevator_action.mp4", "elevator action", "test", "elevator_action", "known"),
        ("test/berzerk.mp4", "berzerk", "test", "berzerk", "zero_shot"),
    ]
    assert all((out / row[0]).is_file() for row in rows)
    assert not list(out.rglob("*.part"))
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)] and {call[2] for call in calls} == {*GAMES}


def test_going_on_keeps_what_is_there(recorded):
    out, recordings, _ = recorded
    lost = recordings["pong"].test
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4") if path != lost}
    pixels = _decode(lost)[1]
    lost.unlink()
    lost.with_name(".pong.mp4.part").write_bytes(b"half a file of an interrupted run")
    calls: list[str] = []
    again = record_games(
        out, games=GAMES, train_seconds=2, test_seconds=1, progress=lambda done, total, game: calls.append(game)
    )
    assert sorted(calls) == ["combat", "pong"]  # what ended its process is tried again: it leaves no file
    assert again == list(recordings.values())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    np.testing.assert_array_equal(_decode(lost)[1], pixels)
    assert not list(out.rglob("*.part"))


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first, second = (play("pong", seed=3, split="train", frames=240) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape == (80, 210, 160, 3) and first[1].shape == (240 * 512,)
    for other in (play("pong", seed=4, split="train", frames=240), play("pong", seed=3, split="test", frames=240)):
        assert not np.array_equal(first[0], other[0])


def test_picture_and_sound_stay_together(tmp_path):
    """A beep at the flash, through the encoders and the resampling."""
    pictures = np.zeros((40, 64, 64, 3), dtype=np.uint8)
    pictures[20:24] = 255
    wave = np.zeros(2 * AUDIO_HZ, dtype=np.float32)
    beep = np.sin(np.arange(AUDIO_HZ // 5) * 2 * np.pi * 1000 / AUDIO_HZ).astype(np.float32)
    wave[AUDIO_HZ : AUDIO_HZ + len(beep)] = 0.5 * beep
    write_mp4(tmp_path / "beep.mp4", pictures, wave)
    times, shown, sound = _decode(tmp_path / "beep.mp4")
    flash = times[shown.mean((1, 2, 3)) > 128]
    heard = np.flatnonzero(np.abs(sound) > 0.1) / 32_000
    assert flash[0] == pytest.approx(1.0, abs=1e-3) and len(flash) == 4
    assert heard[0] == pytest.approx(1.0, abs=0.04) and heard[-1] == pytest.approx(1.2, abs=0.04)


def test_the_games_held_out_are_a_fixed_choice():
    ranked = sorted(set(list_games()) - ENDING, key=lambda game: text_hash(f"held out {game}"))
    assert sorted(ranked[:12]) == list(HELD_OUT)


def test_captions_are_readable_and_tell_games_apart():
    captions = [caption_of(game) for game in list_games()]
    assert len(set(captions)) == len(captions)
    assert not any("_" in caption for caption in captions)
    assert caption_of("space_invaders") == "space invaders" and caption_of("yars_revenge") == "yars' revenge"


def test_wrong_use_is_refused_in_one_line(recorded, tmp_path):
    out, _, _ = recorded
    with pytest.raises(ConfigError, match="unknown game 'pongg'"):
        record_games(tmp_path, games=["pongg"])
    with pytest.raises(ConfigError, match="no games"):
        record_games(tmp_path, games=[])
    with pytest.raises(ConfigError, match=r"'seed': 0.*another folder"):
        record_games(out, games=["pong"], seed=1, train_seconds=2, test_seconds=1)
    with pytest.raises(ConfigError, match="one second"):
        record_games(tmp_path, games=["pong"], test_seconds=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        record_games(tmp_path / "file", games=["pong"])
    with pytest.raises(RunError, match=r"no game could be recorded; combat: .*ended its process"):
        record_games(tmp_path / "only", games=["combat"])


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError):
            _record(_Take("pong", "test", tmp_path / "pong.mp4", seed=0, frames=120))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_ends_the_call(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / ".berzerk.mp4.part").mkdir()  # the file cannot be opened for writing
    with pytest.raises(RunError, match="cannot record: Is a directory"):
        record_games(tmp_path, games=["berzerk"], test_seconds=1)
    assert json.loads((tmp_path / "recording.json").read_text())["test_seconds"] == 1
    assert not (tmp_path / "clips.csv").exists()
