"""One window of a sample: its members tied together on one clock, and what is missing stays missing."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from PIL import Image
from support.media import COLOURS, encode, numbered_picture, read_number, tone, write_clip

from mmcl.media import audio, video_decord, video_pyav
from mmcl.media import clip as clip_module
from mmcl.media.audio import AudioReader
from mmcl.media.clip import MediaReader, read_clip
from mmcl.media.probe import open_container
from mmcl.media.windows import Window
from mmcl.types import AudioSpec, SampleError, VideoSpec

VIDEO = VideoSpec(frames=8, size=32, fps=4.0)
SQUASHED = VideoSpec(frames=8, size=32, fps=4.0, fit="squash")  # shows all bars of a numbered picture
AUDIO = AudioSpec(sample_rate_hz=16_000, seconds=2.0)


def loudest_hz(wave: np.ndarray, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(wave * np.hanning(len(wave))))) * rate / len(wave))


def test_colour_is_word_is_tone(media_folder):
    with (media_folder / "clips.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and len({row["caption"] for row in rows}) == 8
    assert sum(row["split"] == "test" for row in rows) == 8
    silent = 0
    for row in rows[::2] + rows[3:4]:
        data = (media_folder / row["path"]).read_bytes()
        clip = read_clip(
            row["path"], window=Window(0.5, 2.5), video=data, video_spec=VIDEO, audio_spec=AUDIO, text=row["caption"]
        )
        rgb, _, hertz = COLOURS[row["group"]]
        assert clip.video.shape == (8, 3, 32, 32) and clip.text == row["caption"]
        shown = clip.video.mean(axis=(0, 2, 3))
        assert np.linalg.norm(shown / np.linalg.norm(shown) - rgb / np.linalg.norm(rgb)) < 0.1
        assert np.abs(np.diff(clip.video.astype(int), axis=0)).mean() > 1  # it moves
        if clip.audio is None:
            silent += 1
            assert clip.sample_rate_hz is None
        else:
            assert clip.audio.shape == (32_000,)
            assert loudest_hz(clip.audio, 16_000) == pytest.approx(hertz, abs=5)
    assert 0 < silent <= 2


def test_frames_are_those_of_the_window(tmp_path):
    path = encode(tmp_path / "a.mp4", [numbered_picture(i) for i in range(80)], None, fps=20)
    clip = read_clip("k", window=Window(1.0, 3.0), video=path, video_spec=SQUASHED, decoder="pyav")
    assert clip.frame_times_seconds.tolist() == [1.125, 1.375, 1.625, 1.875, 2.125, 2.375, 2.625, 2.875]
    assert [read_number(frame) for frame in clip.video] == [22, 27, 32, 37, 42, 47, 52, 57]
    assert clip.audio is None


def test_a_spec_of_another_length_is_taken_round_the_centre(tmp_path):
    path = write_clip(tmp_path / "a.mp4", colour="red", seconds=4.0)
    clip = read_clip(
        "k", window=Window(1.0, 3.0), video=path, video_spec=VideoSpec(4, 32, 4.0), audio_spec=AudioSpec(8000, 3.0)
    )
    assert clip.frame_times_seconds[0] == 1.625 and clip.audio_start_seconds == 0.5 and clip.audio.shape == (24_000,)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_short_source_is_folded_with_its_sound(tmp_path, decoder):
    pictures = [numbered_picture(i) for i in range(20)]
    wave = np.concatenate([tone(500, 0.5, 16_000), tone(2000, 0.5, 16_000)])
    path = encode(tmp_path / "a.mkv", pictures, wave, fps=20, audio_codec="flac")
    options = {"window": Window(0.0, 2.0), "video": path, "decoder": decoder}
    clip = read_clip("k", video_spec=SQUASHED, audio_spec=AUDIO, **options)
    assert [read_number(frame) for frame in clip.video] == [2, 7, 12, 17] * 2
    assert (np.diff(clip.frame_times_seconds) > 0).all()
    assert loudest_hz(clip.audio[16_500:23_500], 16_000) == pytest.approx(500, abs=5)
    assert loudest_hz(clip.audio[24_500:31_500], 16_000) == pytest.approx(2000, abs=5)
    held = read_clip("k", video_spec=SQUASHED, audio_spec=AUDIO, short="hold", **options)
    assert [read_number(frame) for frame in held.video] == [2, 7, 12, 17, 19, 19, 19, 19]
    assert np.abs(held.audio[16_100:]).max() == 0


def test_a_picture_is_a_video_of_one_frame_and_an_audio_member_its_sound(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (50, 40), (10, 200, 30)).save(file, "PNG")
    sound = encode(tmp_path / "a.wav", None, tone(700, 3.0, 16_000), audio_codec="pcm_s16le").read_bytes()
    clip = read_clip(
        "k", window=Window(0.0, 2.0), image=file.getvalue(), audio=sound, video_spec=VIDEO, audio_spec=AUDIO
    )
    assert clip.video.shape == (8, 3, 32, 32) and (clip.video == clip.video[:1]).all()
    assert clip.video[0, :, 5, 5].tolist() == [10, 200, 30]
    assert loudest_hz(clip.audio, 16_000) == pytest.approx(700, abs=5)


def test_a_separate_audio_member_replaces_the_sound_track(tmp_path):
    video = write_clip(tmp_path / "a.mp4", colour="red", seconds=3.0, tone_hz=300)
    sound = encode(tmp_path / "a.wav", None, tone(900, 3.0, 16_000), audio_codec="pcm_s16le")
    clip = read_clip("k", window=Window(0.0, 2.0), video=video, audio=sound, audio_spec=AUDIO)
    assert clip.video is None and loudest_hz(clip.audio, 16_000) == pytest.approx(900, abs=5)


def test_duration_is_that_of_the_picture(tmp_path, damaged_media):
    path = encode(tmp_path / "a.mp4", [numbered_picture(i) for i in range(20)], tone(440, 3.0, 16_000), fps=20)
    with MediaReader(video=path) as media:
        assert media.duration_seconds == pytest.approx(1.0, abs=1e-3)
    with MediaReader(video=path) as media:  # the same where a reader is open already
        media.read_video(Window(0, 1), VIDEO)
        assert media.duration_seconds == pytest.approx(1.0, abs=1e-3)
    with MediaReader(video=damaged_media["audio_only"]) as media:
        assert media.duration_seconds == pytest.approx(2.0, abs=0.1)
    with MediaReader(audio=damaged_media["audio_only"], duration_seconds=1.25) as media:
        assert media.duration_seconds == 1.25


def reason(**options) -> str:
    with pytest.raises(SampleError) as caught:
        read_clip("k", window=Window(0.0, 2.0), decoder="pyav", **options)
    return caught.value.reason


def test_what_is_missing_or_damaged(damaged_media):
    both = {"video_spec": VIDEO, "audio_spec": AUDIO}
    assert read_clip("k", window=Window(0, 2), video=damaged_media["video_only"], **both).audio is None
    assert read_clip("k", window=Window(0, 2), video=damaged_media["video_only"], audio_spec=AUDIO).audio is None
    assert read_clip("k", window=Window(0, 2), video=damaged_media["audio_only"], audio_spec=AUDIO).audio is not None
    assert reason(video=damaged_media["audio_only"], **both) == "no_video_stream"
    assert reason(audio=damaged_media["video_only"], audio_spec=AUDIO) == "no_audio_stream"
    assert reason(video=b"", **both) == "empty"
    for name in ("truncated", "bit_flipped", "damaged_moov", "zeroed_range", "text_file"):
        reason(video=damaged_media[name], **both)
    nothing = read_clip("k", window=Window(0, 2), **both)
    assert nothing.video is None and nothing.audio is None


WINDOWS = [Window(0.0, 2.0), Window(1.0, 3.0), Window(2.2, 4.2), Window(5.0, 7.0), Window(6.5, 8.5)]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """8 s, 20 frames a second that show their number, with a tone that rises; lossless sound."""
    times = np.arange(8 * 16_000) / 16_000
    sweep = (0.4 * np.sin(2 * np.pi * (200 + 100 * times) * times)).astype(np.float32)
    pictures = [numbered_picture(i) for i in range(160)]
    return encode(
        tmp_path_factory.mktemp("numbered") / "a.mp4", pictures, sweep, fps=20, gop=20, b_frames=2, audio_codec="flac"
    ).read_bytes()


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("short", ["loop", "hold"])
def test_views_read_together_are_those_read_one_by_one(numbered, decoder, short):
    """Windows that overlap, are near, far, equal, in any order, and past the end; sound at two rates."""
    specs = [SQUASHED, AUDIO, AudioSpec(sample_rate_hz=8_000, seconds=1.0), VideoSpec(3, 32, 2.0, fit="squash")]
    wanted = [(WINDOWS[i], spec) for i in (3, 0, 4, 1, 2, 0) for spec in specs]
    with MediaReader(video=numbered, decoder=decoder, short=short, specs=specs) as media:
        together = media.read_all(wanted)
    for (window, spec), found in zip(wanted, together, strict=True):
        with MediaReader(video=numbered, decoder=decoder, short=short) as media:
            alone = media.read(window, spec)
        assert found.dtype == alone.dtype and np.array_equal(found, alone)
    assert [read_number(frame) for frame in together[4]] == [2, 7, 12, 17, 22, 27, 32, 37]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_several_sizes_come_from_one_pass(numbered, decoder, monkeypatch):
    specs = [SQUASHED, VideoSpec(8, 48, 4.0), VideoSpec(4, 24, 4.0, fit="squash")]
    wanted = [(window, spec) for window in WINDOWS[:3] for spec in specs]
    opened, decoded = [], []
    real = video_pyav.open_container
    monkeypatch.setattr(video_pyav, "open_container", lambda data: opened.append(1) or real(data))
    picture = video_pyav.PyAVReader._decode
    monkeypatch.setattr(
        video_pyav.PyAVReader, "_decode", lambda self, pts, *a, **k: decoded.append(pts) or picture(self, pts, *a, **k)
    )
    with MediaReader(video=numbered, decoder=decoder, specs=specs) as media:
        assert media.duration_seconds == pytest.approx(8.0, abs=0.05)
        together = media.read_all(wanted)
    assert len(opened) == 1
    assert len(decoded) == len(set(map(tuple, decoded))) <= 5, "each group of frames once"
    for (window, spec), found in zip(wanted, together, strict=True):
        with MediaReader(video=numbered, decoder=decoder) as media:
            alone = media.read(window, spec)
        assert found.shape == alone.shape
        assert np.abs(found.astype(int) - alone.astype(int)).max() <= (0 if decoder == "pyav" else 2)


def test_one_open_and_one_pass_for_a_sample(numbered, monkeypatch):
    """Clips in picture and sound: the file opened once, one sound track, decoded as far as it is near."""
    videos, sounds, passes, opened = [], [], [], []
    for module in (video_pyav, video_decord, audio):
        monkeypatch.setattr(module, "open_container", lambda data: opened.append(1) or open_container(data))
    open_video, open_audio, decode = clip_module.open_video, clip_module.open_audio, AudioReader._decode
    monkeypatch.setattr(clip_module, "open_video", lambda *a, **k: videos.append(1) or open_video(*a, **k))
    monkeypatch.setattr(clip_module, "open_audio", lambda *a, **k: sounds.append(1) or open_audio(*a, **k))
    monkeypatch.setattr(
        AudioReader, "_decode", lambda self, start, end: passes.append((start, end)) or decode(self, start, end)
    )
    with MediaReader(video=numbered, decoder="pyav", specs=[SQUASHED, AUDIO]) as media:
        assert media.duration_seconds == pytest.approx(8.0, abs=0.05)
        media.read_all([(window, spec) for window in WINDOWS for spec in (SQUASHED, AUDIO)])
    assert len(videos) == len(sounds) == len(opened) == 1
    assert [round(start) for start, _ in passes] == [0, 5], "near windows, and what folds to the start, in one pass"


def test_sound_that_is_all_there_is(damaged_media):
    with MediaReader(video=damaged_media["audio_only"], decoder="pyav", specs=[VIDEO, AUDIO]) as media:
        assert media.duration_seconds == pytest.approx(2.0, abs=0.1)
        frames, wave = media.read_all([(Window(0, 2), VIDEO), (Window(0, 2), AUDIO)])
    assert frames is None and np.abs(wave).max() > 0.1
    with MediaReader(video=damaged_media["video_only"], specs=[VIDEO, AUDIO]) as media:
        frames, wave = media.read_all([(Window(0, 2), VIDEO), (Window(0, 2), AUDIO)])
    assert wave is None and frames.shape == (8, 3, 32, 32)
