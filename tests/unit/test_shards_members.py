"""Files of a sample are sorted by our own table; JSON and captions of strangers are bounded; nothing is unpickled."""

from __future__ import annotations

import json
import pickle

import pytest

from mmcl.shards.members import MAX_JSON_BYTES, MAX_TEXT_BYTES, parse_sample
from mmcl.shards.reader import RawSample
from mmcl.types import SampleError, Source


def parse(**members):
    files = {name.replace("__", "."): data for name, data in members.items()}
    return parse_sample(RawSample("k", files, Source(1, 2)))


def facts(**values):
    return json.dumps(values).encode()


def test_our_own_sample():
    sample = parse(
        mp4=b"v",
        txt=b"first",
        json=facts(
            captions=["first", " second "],
            group="film",
            label=3,
            duration_seconds=2.5,
            video={"height": 48, "width": 64},
            mood="blue",
        ),
    )
    assert sample.video == b"v" and sample.captions == ("first", "second")
    assert (sample.group, sample.label, sample.duration_seconds, sample.video_size) == ("film", 3, 2.5, (48, 64))
    assert sample.metadata["mood"] == "blue" and sample.source == Source(1, 2) and sample.key == "k"


def test_video2dataset_and_open_clip():
    probed = {"streams": [{"width": 640, "height": 360, "duration": "9.5"}]}
    sample = parse(
        mp4=b"v", txt=b"a dog", json=facts(caption="a dog", url="http://x/1", clips=[[0, 9]], video_metadata=probed)
    )
    assert sample.captions == ("a dog",) and sample.group == "http://x/1"
    assert sample.duration_seconds == 9.5 and sample.video_size == (360, 640)
    sample = parse(jpg=b"i", txt="\ufeffa café\n".encode(), json=facts(caption=None, width=10, height=20, url=None))
    assert sample.image == b"i" and sample.captions == ("a café",) and sample.video_size == (20, 10)
    assert sample.group is None
    assert parse(jpg=b"i", cls=b"7").label == 7


def test_what_the_table_does_not_name_is_ignored_and_counted():
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    evil = pickle.dumps(Evil())
    sample = parse(mp4=b"v", pyd=evil, pickle=evil, pth=evil, npy=b"", cam0__mp4=b"other")
    assert sample.video == b"v" and sorted(sample.ignored) == ["npy", "pickle", "pth", "pyd"]


def test_a_window_is_the_length_of_its_sample():
    sample = parse(mp4=b"v", json=facts(window_seconds=[1.5, 4], duration_seconds=60.0))
    assert sample.window_seconds == (1.5, 4.0) and sample.duration_seconds == 2.5
    assert parse(mp4=b"v", json=facts(window_seconds=[0, 4])).window_seconds == (0.0, 4.0)
    for wrong in ([4, 1.5], [-1, 4], [1], "1:4", [1, 1e300], [True, 4], [1, None], {"1": 4}):
        sample = parse(mp4=b"v", json=facts(window_seconds=wrong, duration_seconds=60.0))
        assert sample.window_seconds is None and sample.duration_seconds == 60.0


def test_empty_captions_are_no_captions():
    assert parse(mp4=b"v", txt=b" \n").captions == ()
    assert parse(mp4=b"v", json=facts(captions=["", " "], caption="x")).captions == ("x",)
    assert parse(mp4=b"v", json=facts(captions=[1, None, "x"])).captions == ("x",)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"mp4": b"v", "txt": b"\xff\xfe"}, "caption_not_utf8"),
        ({"mp4": b"v", "json": b'{"caption": "\\ud800"}'}, "caption_not_utf8"),
        ({"mp4": b"v", "txt": b"x" * (MAX_TEXT_BYTES + 1)}, "too_large"),
        ({"mp4": b"v", "json": b" " * (MAX_JSON_BYTES + 1)}, "too_large"),
        ({"mp4": b"v", "json": facts(captions=["x"] * 20_000)}, "too_large"),
        ({"mp4": b"v", "json": b"[1]"}, "bad_json"),
        ({"mp4": b"v", "json": b'{"a": NaN}'}, "bad_json"),
        ({"mp4": b"v", "json": b'{"a": ' + b"9" * 5000 + b"}"}, "bad_json"),
        ({"mp4": b"v", "json": b'{"a":' * 100_000}, "bad_json"),
        ({"mp4": b"v", "json": b'{"a":' * 40 + b"1" + b"}" * 40}, "bad_json"),
        ({"mp4": b"v", "json": b"\xff"}, "bad_json"),
        ({"pyd": b""}, "no_media_and_no_caption"),
        ({}, "no_media_and_no_caption"),
    ],
)
def test_hostile_text_is_refused_by_name(members, reason):
    with pytest.raises(SampleError) as caught:
        parse(**members)
    assert caught.value.reason == reason


@pytest.mark.parametrize("label", [True, -1, 1.5, "x", None, [1], 2**80])
def test_only_class_numbers_are_labels(label):
    assert parse(mp4=b"v", json=facts(label=label)).label is None


@pytest.mark.parametrize("duration", [0, -1, True, "inf", "nan", 1e300, [1], None])
def test_only_positive_seconds_are_durations(duration):
    assert parse(mp4=b"v", json=facts(duration_seconds=duration)).duration_seconds is None
