"""open_clip's ``ClipLoss``, with each of its ways to gather, beside ours: what reaches an encoder on 2 processes.

    python tools/bench/clip_table.py

Every row trains the same two linear encoders on the same global batch, gradients averaged over ranks as DDP does, and
is held against one process: the mean value over ranks, the length and direction (cosine) of the encoders' gradient, and
the gradient of the temperature.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, WIDTH = 32, 6
WAYS = {
    "open_clip, default flags": (False, False),
    "open_clip, gather_with_grad": (False, True),
    "open_clip, local_loss": (True, False),
    "open_clip, local_loss + gather_with_grad": (True, True),
}
OURS = "mmcl"
PURE = "the formula"


def gradients(way: str, rank: int = 0, world: int = 1) -> tuple[float, Tensor, float]:
    """Value, the encoders' flat gradient and the temperature's, averaged over the ranks."""
    torch.manual_seed(0)
    encoders = nn.ModuleList([nn.Linear(WIDTH, 4) for _ in range(2)]).double()
    log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    inputs = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)[:, rank::world]
    a, b = (F.normalize(encoder(x), dim=1) for encoder, x in zip(encoders, inputs, strict=True))
    loss = _loss(way, rank, world)(a, b, log_scale.exp())
    found = torch.autograd.grad(loss, [*encoders.parameters(), log_scale])
    flat = torch.cat([loss.detach()[None], *(x.flatten() for x in found)])
    if world > 1:
        dist.all_reduce(flat)
    flat = flat / world
    return float(flat[0]), flat[1:-1], float(flat[-1])


def _loss(way: str, rank: int, world: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if way == PURE:
        from mmcl.losses import clip

        return lambda a, b, scale: clip(a, b, scale=scale)
    if way == OURS:
        from mmcl.distributed import Comm, contrastive

        return lambda a, b, scale: contrastive(a, b, scale=scale, comm=Comm.current())
    from open_clip.loss import ClipLoss

    local_loss, gather_with_grad = WAYS[way]
    return ClipLoss(local_loss=local_loss, gather_with_grad=gather_with_grad, rank=rank, world_size=world)


def table(rank: int, world: int) -> dict[str, dict[str, float]]:
    """One row for each way, on every rank."""
    value, whole, of_scale = gradients(PURE)
    rows = {}
    for way in (*WAYS, OURS):
        found, gradient, scale_gradient = gradients(way, rank, world)
        rows[way] = {
            "value_ratio": found / value,
            "encoder_gradient_ratio": float(gradient.norm() / whole.norm()),
            "encoder_gradient_cosine": float(F.cosine_similarity(gradient, whole, dim=0)),
            "temperature_gradient_ratio": scale_gradient / of_scale,
        }
    return rows


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = table(rank, world)
    if rank == 0:
        Path(folder, "table.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(world: int) -> dict[str, dict[str, float]]:
    """The table on ``world`` gloo processes, rounded."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder), world)
        rows = json.loads(Path(folder, "table.json").read_text())
    return {way: {name: round(value, 4) for name, value in row.items()} for way, row in rows.items()}


def as_text(rows: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(rows.values())))
    head = f"{'to one process':42}" + "".join(f"{name.replace('_', ' '):>28}" for name in names)
    lines = [f"{way:42}" + "".join(f"{row[name]:28.3f}" for name in names) for way, row in rows.items()]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    print(as_text(measure(2)))
