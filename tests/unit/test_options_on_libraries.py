"""Shared options reach the blocks of library towers: each block is called once, checkpointed or locked alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcl.config import Options, build
from mmcl.encoders.base import Encoder
from mmcl.encoders.build import TowerOptions, build_encoder
from mmcl.types import ConfigError, TextSpec, VideoSpec

# libraries take seconds to import
pytestmark = pytest.mark.slow

BERT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
VIT = {"layers": 3, "width": 64, "patch_size": 16, "image_size": 32}
VIDEO = {**BERT, "image_size": 32, "num_frames": 4}
TEXT = {"layers": 3, "width": 64, "heads": 2, "vocab_size": 49408}
CASES: dict[str, dict[str, Any]] = {
    "open_clip vit": {"name": "open_clip:ViT-B-32", "frames": 2, "config": VIT},
    "open_clip resnet": {
        "name": "open_clip:RN50", "frames": 2, "norm": "rank",
        "config": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
    },
    "open_clip text": {"name": "open_clip:ViT-B-32", "modality": "text", "config": TEXT},
    "timm": {"name": "timm:resnet18", "size": 32, "frames": 2, "norm": "rank", "config": {"layers": [1, 1, 1, 1]}},
    "torchvision": {"name": "torchvision:r3d_18", "size": 32, "frames": 4, "norm": "rank"},
    "slow": {"name": "slow_r50", "size": 32, "frames": 4, "depth": [1, 1, 1, 1], "channels": 8},
    "bert": {"name": "hf:bert", "config": BERT},
    "videomae": {"name": "hf:videomae", "config": VIDEO},
}  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES)


class _Holder(Options):
    tower: TowerOptions


def tower(case: str, **options: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(build(_Holder, {"tower": {**CASES[case], **options}}).tower).train()


def rows(encoder: Encoder) -> Tensor:
    spec, random = encoder.spec, torch.Generator().manual_seed(1)
    if isinstance(spec, TextSpec):
        return spec.tokenizer(["a dog barks in the rain", "nothing"])[0]
    assert isinstance(spec, VideoSpec)
    shape = (2, spec.frames, 3, spec.size, spec.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


def pull(encoder: Encoder) -> tuple[Tensor, dict[str, Tensor]]:
    features = encoder(rows(encoder))
    torch.autograd.backward((features.pooled @ torch.linspace(-1, 1, encoder.width)).sum())
    return features.pooled.detach(), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}


@EACH
def test_each_block_is_called_once(case: str) -> None:
    encoder, calls = tower(case), []
    for number, block in enumerate(encoder.blocks()):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    encoder(rows(encoder))
    assert calls == list(range(len(encoder.blocks())))


@EACH
def test_checkpointed_blocks_give_the_same_gradients(case: str) -> None:
    whole, again = tower(case), tower(case, checkpoint_activations=True)
    (plain, wanted), (same, found) = pull(whole), pull(again)
    torch.testing.assert_close(same, plain)
    for name, value in whole.named_buffers():  # statistics moved once, though their forward ran twice
        torch.testing.assert_close(again.get_buffer(name), value, msg=name)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name, rtol=1e-4, atol=1e-5)


@EACH
@pytest.mark.parametrize("lock", ["all", 1])
def test_locked_blocks_stay_bitwise(case: str, lock: str | int) -> None:
    """Five steps of an optimizer that holds every weight; batch norms take statistics where nothing locks them."""
    encoder = tower(case, lock=lock)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1)
    for _ in range(5):
        pooled = encoder.train()(rows(encoder)).pooled
        if pooled.requires_grad:
            torch.autograd.backward((pooled @ torch.linspace(-1, 1, encoder.width)).sum())
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    free: set[int] = {id(p) for p in encoder.blocks()[-1].parameters()}
    inside = {name for name, p in encoder.named_parameters() if id(p) in free}
    if lock == "all":
        assert not moved
    else:
        assert inside <= moved
        earlier = [part for block in encoder.blocks()[:-1] for part in block.modules()]
        assert not any(part.training for part in earlier)
        fixed = {id(t) for block in encoder.blocks()[:-1] for t in block.state_dict(keep_vars=True).values()}
        assert not {n for n, t in encoder.state_dict(keep_vars=True).items() if id(t) in fixed} & moved


@EACH
def test_paths_drop_or_the_option_is_refused(case: str) -> None:
    encoder, whole = tower(case, drop_path=0.9), tower(case)
    x = rows(encoder)
    try:
        dropped = encoder(x).pooled
    except ConfigError as error:
        assert "drop_path: no block of this tower gives out the shape that it reads" in str(error)
        return
    assert not torch.allclose(dropped, whole(x).pooled)
    for module in (encoder, whole):
        module.load_state_dict(tower(case).state_dict())
        module.eval()
    torch.testing.assert_close(encoder(x).pooled, whole(x).pooled)
    assert isinstance(encoder, nn.Module)
