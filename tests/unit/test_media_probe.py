"""A file is described by what it holds, and every kind of bad file has its own reason."""

from __future__ import annotations

import pytest
from support.media import encode, numbered_picture, tone, write_clip

from mmcl.media.probe import probe
from mmcl.types import SampleError


def test_video_and_audio_are_described(tmp_path):
    path = write_clip(tmp_path / "a.mp4", colour="red", seconds=2.0, size=(48, 64), fps=12)
    for source in (path, str(path), path.read_bytes(), memoryview(path.read_bytes())):
        info = probe(source)
        assert info.duration_seconds == pytest.approx(2.0, abs=0.1)
        assert info.video is not None and info.audio is not None
        assert (info.video.codec, info.video.width, info.video.height, info.video.frames) == ("h264", 64, 48, 24)
        assert info.video.fps == pytest.approx(12) and info.video.displayed_size == (48, 64)
        assert (info.audio.codec, info.audio.sample_rate_hz, info.audio.channels) == ("aac", 16_000, 1)


def test_rotation_turns_the_displayed_size(tmp_path):
    path = encode(tmp_path / "a.mp4", [numbered_picture(i) for i in range(5)], None, rotation=90)
    video = probe(path).video
    assert video is not None and video.rotation_degrees == 90 and video.displayed_size == (80, 64)


def test_one_stream_alone(tmp_path, damaged_media):
    assert probe(damaged_media["audio_only"]).video is None
    assert probe(damaged_media["video_only"]).audio is None
    wav = encode(tmp_path / "a.wav", None, tone(440, 1.5, 16_000), audio_codec="pcm_s16le")
    assert probe(wav).duration_seconds == pytest.approx(1.5)


def reason(source) -> str:
    with pytest.raises(SampleError) as caught:
        probe(source)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_bad_files_have_reasons(tmp_path, damaged_media):
    assert reason(tmp_path / "none.mp4") == "missing_file"
    assert reason(tmp_path) == "unreadable"
    assert reason(damaged_media["empty"]) == "empty"
    assert reason(b"") == "empty"
    assert reason(damaged_media["text_file"]) == "not_media"
    assert reason(damaged_media["truncated"]) == "not_media"
    assert reason(damaged_media["damaged_moov"]) == "no_streams"


def test_playlists_and_addresses_are_not_followed(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.ts", colour="red", seconds=1.0)
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.0,\na.ts\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile a.ts\n")
    assert reason(tmp_path / "list.m3u8") == reason(tmp_path / "list.ffconcat") == "not_media"
    assert reason((tmp_path / "list.ffconcat").read_bytes()) == "not_media"
    assert reason(f"concat:{path}|{path}") == "missing_file"
    path.rename(tmp_path / "concat:a.ts")
    monkeypatch.chdir(tmp_path)
    assert probe("concat:a.ts").video is not None  # the file of that name
