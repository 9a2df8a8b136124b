"""How blocks run changes what they cost, not what they give: activation checkpointing and compilation."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from support.objectives import tower_batch
from support.recipes import tiny_config
from torch import Tensor

from mmcl.encoders.base import Encoder
from mmcl.encoders.build import build_encoder
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.text import TinyTextOptions
from mmcl.encoders.video import TinyVideoOptions
from mmcl.model import MultimodalModel
from mmcl.training.momentum import advance

PICTURES = torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(1, 60, (4, 48), generator=torch.Generator().manual_seed(1))


def two(options: TowerCommon, **changes: object) -> tuple[Encoder, Encoder]:
    """The same weights in a tower and in one with other options."""
    torch.manual_seed(0)
    plain, other = build_encoder(options), build_encoder(options.model_copy(update=changes))
    other.load_state_dict(plain.state_dict())
    return plain.train(), other.train()


def gradients(encoder: Encoder, x: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Pooled features, all gradients, and the bytes that the forward keeps for the backward, weights left out."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pooled = encoder(x).pooled
    torch.autograd.backward((pooled * torch.linspace(-1, 1, pooled.shape[1])).sum())
    grads = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(encoder.parameters()))
    return pooled.detach(), grads, sum(kept.values())


@pytest.mark.parametrize(
    ("options", "x"),
    [
        (TinyVideoOptions(width=32, channels=16), PICTURES),
        (TinyTextOptions(width=32, depth=6, dropout=0.3, drop_path=0.5), IDS),
    ],
    ids=["video", "text with drop-path"],
)
def test_checkpointing_keeps_less_and_gives_the_same_gradients(options: TowerCommon, x: Tensor) -> None:
    plain, cheap = two(options, checkpoint_activations=True)
    pooled, wanted, bytes_whole = gradients(plain, x)
    same, found, bytes_cheap = gradients(cheap, x)
    assert torch.equal(pooled, same)
    for name, gradient in wanted.items():
        assert torch.equal(gradient, found[name]), name
    assert bytes_cheap < 0.75 * bytes_whole, (bytes_cheap, bytes_whole)
    with torch.no_grad():
        torch.testing.assert_close(cheap.eval()(x).pooled, plain.eval()(x).pooled)


def test_a_momentum_copy_of_a_checkpointed_tower_runs_its_own_weights() -> None:
    config = tiny_config("model.towers.text.checkpoint_activations=true", "model.towers.text.drop_path=0.5")
    model = MultimodalModel(config.model).eval()
    model.add_momentum("text")
    with torch.no_grad():
        for parameter in model.towers["text"].parameters():
            parameter.mul_(1.5)
    batch = tower_batch(model)
    view = next(view for view in batch.views if view.modality == "text")
    online, copied = (
        model.encode_view("text", batch.views[view], ["pooled"], k)["pooled"] for k in ("online", "momentum")
    )
    assert not torch.allclose(online, copied)
    advance(model.ema_pairs(), 0.0)
    torch.testing.assert_close(model.encode_view("text", batch.views[view], ["pooled"], "momentum")["pooled"], online)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_and_a_momentum_copy_runs() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is none")
    from torch._dynamo.utils import counters

    plain, fast = two(TinyTextOptions(width=16, depth=1), compile=True, checkpoint_activations=True)
    counters.clear()
    pooled, wanted, _ = gradients(plain, IDS)
    assert not counters["stats"]["unique_graphs"]
    same, found, _ = gradients(fast, IDS)
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    torch.testing.assert_close(same, pooled)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        copied = copy.deepcopy(fast).requires_grad_(False)
        copied.load_state_dict({name: 2 * value for name, value in fast.state_dict().items()})
        assert not torch.allclose(copied(IDS).pooled, pooled)
