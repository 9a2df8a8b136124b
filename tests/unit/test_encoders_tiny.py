"""Tiny towers: shapes, no statistics over rows, padding and absence change nothing, all weights are trained."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from mmcl.encoders.audio import TinyAudio, TinyAudioOptions
from mmcl.encoders.base import Encoder
from mmcl.encoders.text import TinyText, TinyTextOptions
from mmcl.encoders.video import TinyVideo, TinyVideoOptions


def _video(**options: object) -> TinyVideo:
    torch.manual_seed(0)
    return TinyVideo(TinyVideoOptions(width=32, channels=8, size=32, **options))


def _audio(**options: object) -> TinyAudio:
    torch.manual_seed(0)
    return TinyAudio(TinyAudioOptions(width=32, channels=8, seconds=1.0, **options))


def _text(**options: object) -> TinyText:
    torch.manual_seed(0)
    return TinyText(TinyTextOptions(width=32, **options))


def _example(tower: Encoder, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(1)
    if isinstance(tower, TinyVideo):
        return torch.randint(0, 256, (rows, 3, 3, 32, 32), dtype=torch.uint8), None
    if isinstance(tower, TinyAudio):
        return torch.rand(rows, tower.spec.samples) * 2 - 1, None
    return tower.spec.tokenizer(["space invaders", "e", "", "pong"][:rows])


TOWERS = pytest.mark.parametrize("make", [_video, _audio, _text], ids=["video", "audio", "text"])


@TOWERS
def test_shapes(make):
    tower = make()
    x, mask = _example(tower, 3)
    features = tower(x, mask)
    assert features.pooled.shape == (3, tower.width) == (3, 32)
    assert features.tokens.shape[0] == 3 and features.tokens.shape[2] == 32
    if features.grid is not None:
        assert torch.tensor(features.grid).prod() == features.tokens.shape[1]
    assert features.pooled.isfinite().all()


def test_video_grid_and_audio_grid_unfold_in_order():
    assert _video()(torch.zeros(1, 5, 3, 32, 32, dtype=torch.uint8)).grid == (5, 2, 2)
    frames = torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8)
    frames[:, 1, :, 16:, :16] = 255  # the middle frame's lower left corner
    base, changed = (_video()(x).tokens.view(3, 2, 2, -1) for x in (torch.zeros_like(frames), frames))
    assert (base - changed).norm(dim=-1).flatten().argmax() == 1 * 4 + 1 * 2 + 0
    tower = _audio()
    click = torch.zeros(1, 16_000)
    click[:, -1600:] = torch.sin(torch.arange(1600) * 2 * torch.pi * 6000 / 16_000)  # late and high
    steps, bands = tower(click).grid
    change = (tower(click).tokens - tower(torch.zeros(1, 16_000)).tokens).norm(dim=-1).view(steps, bands)
    assert divmod(int(change.argmax()), bands) >= (steps - 2, 0) and int(change.argmax()) % bands >= bands - 2


def test_a_picture_is_a_video_of_one_frame():
    tower = _video()
    features = tower(torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8))
    assert features.pooled.shape == (2, 32) and features.grid == (1, 2, 2)


@TOWERS
def test_rows_do_not_feel_each_other(make):
    """No statistics of a batch: alone, in a batch, in training or not, a row comes out the same."""
    tower = make().double()
    x, mask = _example(tower, 3)
    x = x.double() if x.is_floating_point() else x
    together = tower.train()(x, mask).pooled
    for row in range(3):
        alone = tower(x[row : row + 1], None if mask is None else mask[row : row + 1]).pooled
        torch.testing.assert_close(alone[0], together[row], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(tower.eval()(x, mask).pooled, together, rtol=0, atol=0)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in tower.modules())


def test_padding_changes_nothing():
    tower = _text().double()
    ids, mask = tower.spec.tokenizer(["pong"])
    short = tower(ids, mask)
    longer = tower(nn.functional.pad(ids, (0, 9), value=77), nn.functional.pad(mask, (0, 9)))
    torch.testing.assert_close(longer.pooled, short.pooled, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(longer.tokens[:, :4], short.tokens, rtol=1e-12, atol=1e-12)
    assert (longer.tokens[:, 4:] == 0).all()


def test_an_empty_text_keeps_one_token():
    tower = _text()
    ids, mask = tower.spec.tokenizer(["", "pong"])
    features = tower(ids, mask)
    assert features.token_mask.sum(1).tolist() == [1, 4]
    assert features.pooled.isfinite().all() and features.pooled[0].norm() > 0


def test_silence_is_finite():
    features = _audio()(torch.zeros(2, 16_000))
    assert features.pooled.isfinite().all()


def test_word_order_matters():
    tower = _text()
    ids, mask = tower.spec.tokenizer(["abc", "cba"])
    pooled = tower(ids, mask).pooled
    assert (pooled[0] - pooled[1]).norm() > 1e-3


@TOWERS
def test_every_weight_gets_a_gradient(make):
    tower = make()
    x, mask = _example(tower, 3)
    weights = torch.linspace(-1, 1, 32)  # a plain sum through a LayerNorm would have none
    (tower(x, mask).pooled @ weights).pow(2).sum().backward()
    missing = [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@TOWERS
def test_weights_depend_on_the_random_state_alone(make):
    first, second = make().state_dict(), make().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@TOWERS
def test_dropout_works_in_training_alone(make):
    tower = make(dropout=0.5)
    x, mask = _example(tower, 3)
    assert not torch.equal(tower.train()(x, mask).pooled, tower(x, mask).pooled)
    assert torch.equal(tower.eval()(x, mask).pooled, tower(x, mask).pooled)


def test_parameter_counts():
    """A change of architecture is a decision: checkpoints of before do not load."""
    counts = {
        "video": sum(p.numel() for p in TinyVideo(TinyVideoOptions()).parameters()),
        "audio": sum(p.numel() for p in TinyAudio(TinyAudioOptions()).parameters()),
        "text": sum(p.numel() for p in TinyText(TinyTextOptions()).parameters()),
    }
    assert counts == {"video": 286_912, "audio": 302_016, "text": 197_760}


@TOWERS
def test_specs_travel_to_workers(make):
    spec = make().spec
    assert pickle.loads(pickle.dumps(spec)) == spec and hash(spec) == hash(make().spec)


def test_specs_say_what_the_options_say():
    video = TinyVideo(TinyVideoOptions(size=48, frames=3, fps=1.5, fit="crop")).spec
    assert (video.size, video.frames, video.seconds, video.fit) == (48, 3, 2.0, "crop")
    audio = TinyAudio(TinyAudioOptions(sample_rate_hz=8000, seconds=0.75)).spec
    assert audio.samples == 6000
    assert TinyText(TinyTextOptions(max_tokens=5)).spec.tokenizer.max_tokens == 5


def test_a_window_too_short_is_refused():
    with pytest.raises(ValueError, match="at least"):
        TinyAudioOptions(seconds=0.2)
    shortest = TinyAudioOptions(seconds=0.3)
    assert TinyAudio(shortest)(torch.zeros(1, 4800)).grid == (1, 4)
