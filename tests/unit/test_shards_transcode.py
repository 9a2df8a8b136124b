"""What is encoded shows and sounds what the source did at those instants; half a file is refused, not half used."""

from __future__ import annotations

import io
from contextlib import closing

import av
import numpy as np
import pytest
from PIL import Image
from support.media import encode, numbered_picture, read_number, tone, write_clip, write_flash

from mmcl.media.audio import read_audio
from mmcl.media.probe import probe
from mmcl.media.video import open_video
from mmcl.shards import MakeOptions, ShardReader, load_manifest, make_shards, parse_sample
from mmcl.shards.transcode import MediaOptions, transcode
from mmcl.types import ConfigError, SampleError


def frames_of(data: bytes) -> list[tuple[float, np.ndarray]]:
    with av.open(io.BytesIO(data)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


@pytest.mark.parametrize(("start", "end"), [(None, None), (1.0, 4.0), (1.52, 3.9)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_beep_at_the_flash(tmp_path, start, end, suffix):
    path = write_flash(tmp_path / f"flash.{suffix}", flash_seconds=2.0)
    made = transcode(path, MediaOptions(), start_seconds=start, end_seconds=end)
    wanted = 2.0 - (start or 0.0)
    flash = next(time for time, picture in frames_of(made.data) if picture.mean() > 120)
    wave = read_audio(made.data, start_seconds=0, end_seconds=made.duration_seconds, sample_rate_hz=32_000)
    beep = np.argmax(np.abs(wave) > 0.2) / 32_000
    assert abs(flash - wanted) <= 0.5 / 25 + 1e-6 and abs(beep - wanted) < 0.005
    assert made.duration_seconds == pytest.approx((end or 4.0) - (start or 0.0), abs=0.5 / 25 + 1e-6)
    assert made.audio["samples"] == pytest.approx(made.duration_seconds * 32_000, abs=1024)


@pytest.mark.parametrize(
    ("options", "start", "end", "wanted"),
    [(MediaOptions(), 1, 2, 1), (MediaOptions(fps=0.3), None, None, 4.98), (MediaOptions(codec="mjpeg"), 2, 3, 1)],
)
def test_a_frame_that_lasts_for_seconds_ends_with_the_stretch(tmp_path, options, start, end, wanted):
    pictures = [numbered_picture(i) for i in range(3)]
    path = encode(tmp_path / "slides.mp4", pictures, tone(440, 5.0, 16_000), times=[0.0, 2.5, 4.9])
    made = transcode(path, options, start_seconds=start, end_seconds=end)
    assert made.duration_seconds == pytest.approx(wanted, abs=0.01)
    with closing(open_video(made.data, decoder="pyav")) as reader:
        assert reader.duration_seconds == pytest.approx(wanted, abs=0.01)


def test_frames_keep_their_order_and_count(tmp_path):
    path = encode(tmp_path / "n.mp4", [numbered_picture(i) for i in range(50)], None, fps=25, b_frames=2)
    made = transcode(path, MediaOptions())
    assert [read_number(picture.transpose(2, 0, 1)) for _, picture in frames_of(made.data)] == list(range(50))
    assert made.video == {"width": 80, "height": 64, "fps": 25.0, "frames": 50} and made.audio is None
    cut = transcode(path, MediaOptions(), start_seconds=0.8, end_seconds=1.2)
    assert [read_number(picture.transpose(2, 0, 1)) for _, picture in frames_of(cut.data)] == list(range(20, 30))
    half = transcode(path, MediaOptions(fps=12.5))
    numbers = [read_number(picture.transpose(2, 0, 1)) for _, picture in frames_of(half.data)]
    assert len(numbers) == 25 and max(abs(number - 2 * i) for i, number in enumerate(numbers)) <= 1


def test_variable_frame_rate_becomes_constant(tmp_path):
    times = [0.0, 0.1, 0.2, 0.4, 0.5, 0.7]
    path = encode(tmp_path / "v.mp4", [numbered_picture(i) for i in range(6)], None, fps=10, times=times)
    made = transcode(path, MediaOptions(fps=10))
    shown = [(time, read_number(picture.transpose(2, 0, 1))) for time, picture in frames_of(made.data)]
    assert made.video["fps"] == 10 and [number for _, number in shown][:8] == [0, 1, 2, 2, 3, 4, 4, 5]
    assert [time for time, _ in shown] == pytest.approx([i / 10 for i in range(len(shown))])


@pytest.mark.parametrize(("size", "wanted"), [((96, 160), (64, 106)), ((160, 96), (106, 64)), ((48, 64), (48, 64))])
def test_the_short_side_shrinks_and_never_grows(tmp_path, size, wanted):
    path = write_clip(tmp_path / "c.mp4", colour="red", seconds=0.5, size=size, audio=False)
    made = transcode(path, MediaOptions(short_side=64))
    assert (made.video["height"], made.video["width"]) == wanted
    assert frames_of(made.data)[0][1].shape[:2] == wanted


def test_rotation_is_baked_in(tmp_path):
    path = write_clip(tmp_path / "r.mp4", colour="red", seconds=0.5, audio=False, rotation=90)
    made = transcode(path, MediaOptions())
    assert (made.video["height"], made.video["width"]) == (64, 48)
    assert probe(made.data).video.rotation_degrees == 0


def test_key_frames_come_often_and_nothing_is_decoded_ahead(tmp_path):
    path = write_clip(tmp_path / "c.mp4", colour="blue", seconds=5, audio=False, b_frames=2, gop=250)
    with av.open(io.BytesIO(transcode(path, MediaOptions(gop=8)).data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
    assert all(packet.pts == packet.dts for packet in packets)
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    assert max(np.diff([*keys, len(packets)])) <= 8


def test_equal_input_makes_equal_bytes_without_the_library_version(tmp_path):
    path = write_clip(tmp_path / "c.mp4", colour="green", seconds=1)
    first, second = (transcode(path, MediaOptions()).data for _ in range(2))
    assert first == second and b"Lavf" not in first and b"Lavc" not in first


@pytest.mark.parametrize(("rate", "wanted"), [(30_720, 32_000), (16_000, 16_000), (44_100, 32_000), (17_000, 22_050)])
def test_audio_takes_a_standard_rate(tmp_path, rate, wanted):
    path = encode(tmp_path / "a.wav", None, tone(440, 1.0, rate), sample_rate_hz=rate, audio_codec="pcm_s16le")
    made = transcode(path, MediaOptions())
    assert made.extension == "m4a" and made.video is None
    assert made.audio == {"sample_rate_hz": wanted, "channels": 1, "samples": wanted}
    wave = read_audio(made.data, start_seconds=0, end_seconds=1, sample_rate_hz=wanted)
    assert abs(np.argmax(np.abs(np.fft.rfft(wave))) - 440) <= 1


def test_a_picture_becomes_a_jpeg(tmp_path):
    Image.new("RGBA", (300, 200), (255, 0, 0, 255)).save(tmp_path / "p.png")
    made = transcode(tmp_path / "p.png", MediaOptions(short_side=100))
    assert made.extension == "jpg" and Image.open(io.BytesIO(made.data)).size == (150, 100)


def test_damaged_files_are_refused_by_reason(damaged_media):
    def outcome(path):
        try:
            return transcode(path, MediaOptions()).extension
        except SampleError as error:
            return error.reason

    reasons = {name: outcome(path) for name, path in damaged_media.items()}
    assert reasons.pop("bit_flipped") in ("decode", "mp4")  # concealed damage cannot be seen
    assert reasons == {
        "truncated": "not_media",
        "damaged_moov": "no_streams",
        "zeroed_range": "decode",
        "empty": "empty",
        "text_file": "not_media",
        "audio_only": "m4a",
        "video_only": "mp4",
    }


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "m4a"])
def test_a_file_that_breaks_off_is_refused(tmp_path, suffix):
    path = tmp_path / f"c.{suffix}"
    options = {"container_options": {"movflags": "faststart"}}
    if suffix == "m4a":
        encode(path, None, tone(440, 6.0, 16_000), **options)
    else:
        write_clip(path, colour="red", seconds=6, **options)
    assert transcode(path, MediaOptions()).duration_seconds == pytest.approx(6, abs=0.2)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(SampleError) as caught:
        transcode(path, MediaOptions())
    assert caught.value.reason in ("truncated", "decode")


def test_a_long_video_stays_whole_with_its_length(tmp_path):
    """Objectives that pair moments a minute apart need the whole source in one sample."""
    pictures = [numbered_picture(i // 10) for i in range(900)]
    encode(tmp_path / "in/long.mp4", pictures, tone(440, 90.0, 8_000), fps=10, sample_rate_hz=8_000)
    make_shards(tmp_path / "in", tmp_path / "out", MakeOptions(MediaOptions(short_side=32), workers=1))
    reader = ShardReader(load_manifest(tmp_path / "out"))
    assert len(reader) == 1
    sample = parse_sample(reader.read(0, 0))
    assert sample.duration_seconds == sample.metadata["duration_seconds"] == pytest.approx(90.0, abs=0.06)
    assert sample.metadata["audio"]["samples"] == pytest.approx(90 * 8_000, abs=1024)
    with closing(open_video(sample.video, size=32, fit="squash")) as video:
        assert [read_number(picture) for picture in video.read([0, 455, 899])] == [0, 45, 89]


def test_a_stretch_outside_of_the_file_is_named(tmp_path):
    path = write_clip(tmp_path / "c.mp4", colour="red", seconds=1)
    with pytest.raises(SampleError, match="window_outside"):
        transcode(path, MediaOptions(), start_seconds=5)
    assert transcode(path, MediaOptions(), start_seconds=0.5, end_seconds=9).duration_seconds == 0.5


@pytest.mark.parametrize("options", [{"short_side": 1}, {"fps": 0}, {"gop": 0}, {"crf": 99}, {"audio_rate_hz": 30_720}])
def test_impossible_settings_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        MediaOptions(**options)
