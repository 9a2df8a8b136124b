"""What a user hands in: one item or many, files or arrays, any length, the same rows in any batch."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.recipes import tiny_config

import mmcl.progress
from mmcl.media.inputs import MAX_WINDOWS
from mmcl.media.windows import place_windows
from mmcl.model import MultimodalModel
from mmcl.recipe import build_model
from mmcl.types import ConfigError

RATE = 16_000


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(0)
    return build_model(tiny_config())[0].eval()


def tone(seconds: float, hz: float = 440.0, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path: Path, wave: np.ndarray) -> Path:
    import wave as wav

    with wav.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((wave * 32767).round().astype("<i2").tobytes())
    return path


def frames_of(path: Path) -> tuple[np.ndarray, float]:
    """uint8 ``(T, 3, H, W)`` and frames per second."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in file.decode(stream)]
        return np.stack(frames), float(stream.average_rate)


def test_one_item_is_one_row(model: MultimodalModel, media_folder: Path) -> None:
    path = sorted(media_folder.glob("*.mp4"))[0]
    one = model.encode_video([path])
    for item in (path, str(path), path.read_bytes()):
        assert torch.equal(model.encode_video(item), one)
    assert torch.equal(model.encode_text("a red clip"), model.encode_text(["a red clip"]))
    picture = np.full((3, 40, 40), 99, np.uint8)
    clip = np.repeat(picture[None], 4, 0)
    for item in (picture, clip, torch.from_numpy(picture), [clip]):
        torch.testing.assert_close(model.encode_video(item), model.encode_video(picture))
    assert model.encode_audio(tone(0.5), sample_rate_hz=RATE).shape == (1, 32)
    assert model.encode_video([]).shape == (0, 32)


def test_arrays_are_heard_and_seen_as_their_files(model: MultimodalModel, media_folder: Path, tmp_path: Path) -> None:
    wave = tone(1.7) * np.linspace(0.1, 1, round(1.7 * RATE), dtype=np.float32)
    file = model.encode_audio(write_wav(tmp_path / "tone.wav", wave))
    array = model.encode_audio(wave, sample_rate_hz=RATE)
    torch.testing.assert_close(file, array, atol=2e-3, rtol=0)
    assert torch.equal(array, model.encode_audio(torch.from_numpy(wave), sample_rate_hz=RATE))
    assert torch.equal(array, model.encode_audio(np.stack([wave, wave]), sample_rate_hz=RATE))  # two channels
    assert (file - model.encode_audio(tone(1.7, 3000.0), sample_rate_hz=RATE)).abs().max() > 0.02
    other = tone(1.7, rate=44_100) * np.linspace(0.1, 1, round(1.7 * 44_100), dtype=np.float32)
    torch.testing.assert_close(model.encode_audio(other, sample_rate_hz=44_100), array, atol=5e-3, rtol=0)
    for path in sorted(media_folder.glob("*.mp4"))[:3]:
        frames, fps = frames_of(path)
        torch.testing.assert_close(model.encode_video(frames, fps=fps), model.encode_video(path), atol=5e-3, rtol=0)


def test_long_items_are_the_mean_of_their_windows(model: MultimodalModel) -> None:
    wave = np.concatenate([tone(2.0, 300.0 * (1 + n)) for n in range(5)])
    spec = model.tower("audio").spec
    for windows, count in ((None, MAX_WINDOWS), (3, 3), (1, 1)):
        starts = [w.start_seconds for w in place_windows(10.0, spec.seconds, count, rule="even")]
        cuts = [wave[round(start * RATE) :][: spec.samples] for start in starts]
        rows = model.encode_audio(cuts, sample_rate_hz=RATE)
        wanted = F.normalize(rows.mean(0), dim=0)
        torch.testing.assert_close(model.encode_audio(wave, sample_rate_hz=RATE, windows=windows)[0], wanted)
    short = model.encode_audio(tone(0.1), sample_rate_hz=RATE)  # played again until the window is full
    torch.testing.assert_close(short, model.encode_audio(np.tile(tone(0.1), 5), sample_rate_hz=RATE))
    frames = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), np.uint8)
    assert (model.encode_video(frames, fps=4.0) - model.encode_video(frames, fps=4.0, windows=1)).abs().max() > 1e-3


def test_rows_do_not_depend_on_the_batch(model: MultimodalModel) -> None:
    items = [tone(seconds, 200 + 900 * seconds) for seconds in (0.3, 4.0, 0.5, 2.2, 0.9)]
    alone = torch.cat([model.encode_audio(item, sample_rate_hz=RATE) for item in items])
    for batch in (1, 3, 100):
        together = model.encode_audio(items, sample_rate_hz=RATE, batch=batch)
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(5))
    texts = ["a", "a much longer caption of a red clip", "b"]
    torch.testing.assert_close(model.encode_text(texts, batch=1), model.encode_text(texts))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_video(np.zeros((4, 32, 32, 3), np.uint8)), r"\(4, 32, 32, 3\); permute the channels"),
        (lambda m: m.encode_video(np.zeros((4, 3, 32, 32), np.float32)), r"must be uint8 \(T, 3, H, W\).*float32"),
        (lambda m: m.encode_video(np.zeros((0, 3, 32, 32), np.uint8)), r"must be uint8"),
        (lambda m: m.encode_video(np.zeros((4, 3, 32, 32), np.uint8), fps=0), "fps must be greater than 0"),
        (lambda m: m.encode_audio(tone(1.0)), "sample_rate_hz: arrays of sound need their rate"),
        (lambda m: m.encode_audio(np.zeros(100, np.int16), sample_rate_hz=RATE), r"must be float \(S,\).*int16"),
        (lambda m: m.encode_audio(np.full(100, np.nan, np.float32), sample_rate_hz=RATE), "finite"),
    ],
)
def test_wrong_arrays_are_one_line(model: MultimodalModel, call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_dropout_is_off_and_training_goes_on() -> None:
    model = build_model(tiny_config("model.towers.text.dropout=0.5"))[0].train()
    assert torch.equal(model.encode_text(["a red clip"]), model.encode_text(["a red clip"]))
    assert model.training and model.towers["text"].training


def test_a_bar_is_shown_on_a_terminal_alone(
    model: MultimodalModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a", "b", "c"]
    model.encode_text(texts, batch=1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(mmcl.progress, "on_terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    model.encode_text(texts, batch=1)
    assert "encoding" in capsys.readouterr().err
    for arguments in ({"progress": False, "batch": 1}, {"batch": 3}):
        model.encode_text(texts, **arguments)
        assert capsys.readouterr().err == ""
