"""Sound lies where the file's clock puts it, to the sample, at any rate, codec, container and window."""

from __future__ import annotations

import numpy as np
import pytest
from support.media import encode, numbered_picture, tone, write_clip, write_flash

from mmcl.media.audio import read_audio
from mmcl.media.clip import read_clip
from mmcl.media.windows import Window
from mmcl.types import AudioSpec, SampleError, VideoSpec

RATE = 16_000


def wave_of(seconds: float, rate: int = RATE) -> np.ndarray:
    """A sweep with a changing loudness: it is like itself at no other time."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (150 * t + 60 * t**2)) * (0.6 + 0.4 * np.sin(5 * t))).astype(np.float32)


def read(data, start, end, **options):
    return read_audio(data, start_seconds=start, end_seconds=end, sample_rate_hz=RATE, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("b.mp4", {"b_frames": 2}),
        ("a.mkv", {"audio_codec": "libopus", "sample_rate_hz": 48_000}),
        ("b.mkv", {"audio_codec": "flac"}),
        ("c.mkv", {"audio_codec": "aac", "sample_rate_hz": 44_100}),
        ("a.avi", {"codec": "mjpeg", "audio_codec": "pcm_s16le"}),
        ("a.mov", {"codec": "mjpeg", "audio_codec": "pcm_s16le"}),
        ("a.ts", {"b_frames": 2}),
        ("late.mkv", {"audio_codec": "flac", "clock_starts_seconds": 7.0}),
    ],
)
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_the_beep_is_at_the_flash(tmp_path, name, options, decoder):
    path = write_flash(tmp_path / name, flash_seconds=2.4, **options)
    for start in (1.0, 1.53, 2.3):
        clip = read_clip(
            "k",
            window=Window(start, start + 2.0),
            video=path.read_bytes(),
            video_spec=VideoSpec(frames=50, size=16, fps=25),
            audio_spec=AudioSpec(seconds=2.0),
            decoder=decoder,
        )
        brightness = clip.video.mean(axis=(1, 2, 3))
        flash = clip.frame_times_seconds[np.argmax(brightness > 128)]
        beep = clip.audio_start_seconds + np.argmax(np.abs(clip.audio) > 0.2) / RATE
        assert abs(clip.audio[round((2.5 - start) * RATE) :]).max() > 0.2 and brightness.max() > 128
        assert abs(flash - beep) <= 0.5 / 25 + 0.5 / 25 + 1e-3  # sampled in the middle of 1/25 s, shown for 1/25 s
        if not name.endswith(".ts"):  # whose clock starts with the encoder's delay
            assert beep == pytest.approx(2.4, abs=2e-3)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("start", [0.0, 0.7311, 3.0, "packet"])
def test_lossless_sound_is_exact(tmp_path, rate, start):
    if start == "packet":  # just after one begins, so that the filter's left side is in the one before
        start = 16_384 / rate + 1e-4
    path = encode(tmp_path / "a.wav", None, wave_of(5.0, rate), audio_codec="pcm_s16le", sample_rate_hz=rate)
    wave = read(path, start, start + 1.5)
    # wave_of(t) at the very instants that the samples stand for
    t = start + np.arange(len(wave)) / RATE
    truth = 0.5 * np.sin(2 * np.pi * (150 * t + 60 * t**2)) * (0.6 + 0.4 * np.sin(5 * t))
    assert wave.dtype == np.float32 and wave.shape == (24_000,)
    inner = slice(200 if start == 0 else 0, None)  # where the file begins there is nothing to the left to filter
    half_a_sample = 0.5 * 2 * np.pi * (150 + 120 * t[-1]) / RATE / 2
    assert np.abs(wave - truth)[inner].max() < 2e-3 + half_a_sample


def test_lossy_sound_does_not_depend_on_where_reading_starts(tmp_path):
    path = encode(tmp_path / "a.mp4", None, wave_of(6.0))
    whole = read(path, 0.0, 6.0)
    for start in (0.25, 1.0, 3.333, 4.9):
        part = read(path, start, start + 1.0)
        first = round(start * RATE)
        assert np.abs(part - whole[first : first + RATE]).max() < 1e-4


def test_the_number_of_samples_is_exact(tmp_path):
    data = encode(tmp_path / "a.mp4", None, wave_of(3.0)).read_bytes()
    for seconds in (0.1, 0.9999, 1 / 3, 2.0):
        assert len(read(data, 0.5, 0.5 + seconds)) == round(seconds * RATE)


@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_u8", "pcm_s32le", "pcm_f32le", "flac"])
def test_sample_formats_have_one_scale(tmp_path, codec):
    path = encode(tmp_path / "a.mkv", None, tone(440, 1.0, RATE, amplitude=0.5), audio_codec=codec)
    assert np.abs(read(path, 0.2, 0.8)).max() == pytest.approx(0.5, abs=0.01)


def test_channels_are_averaged(tmp_path):
    left = tone(440, 1.0, RATE, amplitude=0.8)
    path = encode(tmp_path / "a.wav", None, np.stack([left, np.zeros_like(left)]), audio_codec="pcm_s16le")
    assert np.abs(read(path, 0.2, 0.8)).max() == pytest.approx(0.4, abs=0.01)
    path = encode(tmp_path / "b.wav", None, np.stack([left, left]), audio_codec="pcm_s16le")
    assert np.abs(read(path, 0.2, 0.8)).max() == pytest.approx(0.8, abs=0.01)


def test_no_sound_where_the_file_has_none(tmp_path, damaged_media):
    assert read(damaged_media["video_only"], 0.0, 1.0) is None
    pictures = [numbered_picture(i) for i in range(48)]
    late = encode(tmp_path / "late.mkv", pictures, tone(440, 1.0, RATE), audio_codec="flac", audio_start_seconds=2.0)
    wave = read(late, 1.5, 3.5)
    assert np.abs(wave[: RATE // 2 - 50]).max() == 0 and np.abs(wave[RATE // 2 + 50 : 3 * RATE // 2 - 50]).max() > 0.3
    assert np.abs(wave[3 * RATE // 2 + 50 :]).max() == 0
    assert np.abs(read(late, 3.2, 3.9)).max() == 0


def test_short_sources_loop_or_fall_silent(tmp_path):
    path = encode(tmp_path / "a.wav", None, wave_of(1.5), audio_codec="pcm_s16le")
    once = read(path, 0.0, 1.5)
    looped = read(path, 0.0, 4.0, duration_seconds=1.5)
    assert np.abs(looped - np.concatenate([once, once, once])[: 4 * RATE]).max() < 1e-6
    assert np.abs(read(path, 1.0, 2.0, duration_seconds=1.5) - np.roll(once, RATE // 2)[:RATE]).max() < 1e-6
    held = read(path, 1.0, 2.0, duration_seconds=1.5, short="hold")
    assert np.abs(held[: RATE // 2] - once[RATE:]).max() < 1e-6 and np.abs(held[RATE // 2 :]).max() == 0
    unfolded = read(path, 1.0, 2.0)
    assert np.array_equal(unfolded, held)


def test_values_stay_in_range(tmp_path):
    wild = np.array([np.nan, np.inf, -np.inf, 7.0, -7.0] * 4000, np.float32)
    path = encode(tmp_path / "a.wav", None, wild, audio_codec="pcm_f32le")
    wave = read(path, 0.0, 1.0)
    assert np.isfinite(wave).all() and np.abs(wave).max() <= 1.0


@pytest.mark.parametrize(
    ("name", "reasons"),
    [("truncated", "not_media"), ("bit_flipped", "decode"), ("zeroed_range", "decode"), ("empty", "empty")],
)
def test_damaged_files_raise_one_clear_line(damaged_media, name, reasons):
    with pytest.raises(SampleError) as caught:
        read(damaged_media[name], 0.0, 4.0)
    assert caught.value.reason in reasons and "\n" not in str(caught.value)


def test_a_sound_track_that_was_cut_off_is_not_silence(tmp_path):
    path = write_clip(tmp_path / "a.mp4", colour="red", seconds=4.0, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    with pytest.raises(SampleError, match=r"truncated|decode"):
        read(data[: len(data) // 2], 2.0, 4.0)


def test_nonsense_is_a_programming_error(tmp_path):
    path = encode(tmp_path / "a.wav", None, wave_of(1.0), audio_codec="pcm_s16le")
    with pytest.raises(ValueError):
        read(path, 1.0, 1.0)
    with pytest.raises(SampleError, match="too_large"):
        read(path, 0.0, 1e6)
