"""Mixing: who meets whom is a function of seed and draws; absent rows are as good as deleted; equal on any ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mmcl.distributed import Comm
from mmcl.media.augmentation import AudioAugmentation, Augmentation, MixOptions, VideoAugmentation
from mmcl.media.augmentation_draws import draw_params
from mmcl.media.mixing import mix, ring
from mmcl.types import AudioSpec, Batch, VideoSpec, View, ViewBatch

VIDEO = View(VideoSpec(frames=2, size=4), augmentation="mix")
AUDIO = View(AudioSpec(8000, 0.01), augmentation="mix")
ABSENT = (3, 7)


def options(scope: str, probability: float = 1.0) -> Augmentation:
    both = MixOptions(scope=scope, probability=probability)  # type: ignore[arg-type]
    return Augmentation(video=VideoAugmentation(mix=both), audio=AudioAugmentation(mix=both))


def batch_of(draws: list[int], augmentation: Augmentation) -> Batch:
    """Rows whose content, presence and parameters follow from their draw alone."""
    views = {}
    for view, shape in ((VIDEO, (2, 3, 4, 4)), (AUDIO, (80,))):
        rows = []
        for draw in draws:
            uniform = torch.rand(shape, generator=torch.Generator().manual_seed(draw))
            rows.append((uniform * 255).byte() if view is VIDEO else uniform * 2 - 1)
        present = torch.tensor([draw not in ABSENT for draw in draws])
        drawn = [draw_params(augmentation, view, (1, 2, draw)) for draw in draws]
        params = {name: torch.from_numpy(np.stack([row[name] for row in drawn])) for name in drawn[0]}
        data = torch.stack(rows)
        data[~present] = 0
        views[view] = ViewBatch(data, present, params=params)
    count = len(draws)
    return Batch(
        views=views,
        keys=tuple(map(str, draws)),
        draws=torch.tensor(draws),
        groups=torch.full((count, 3), -1),
        labels=torch.full((count,), -1),
    )


def mixed(draws: list[int], augmentation: Augmentation, seed: int = 0) -> dict[tuple[View, int], ViewBatch]:
    out = mix(batch_of(draws, augmentation), seed=seed, exchange=Comm())
    picked = {}
    for view, values in out.views.items():
        for row, draw in enumerate(draws):
            picked[view, draw] = values.map(lambda tensor, row=row: tensor[row])
    return picked


def test_every_row_meets_another_in_its_share() -> None:
    draws = list(range(10))
    before = batch_of(draws, options("rank"))
    for (view, draw), row in mixed(draws, options("rank")).items():
        original = before.views[view]
        if draw in ABSENT:
            assert not row.data.any()
            continue
        partner, share = int(row.params["mix_draw"]), float(original.params["rank_mix_share"][draw])
        assert partner not in (draw, *ABSENT) and 0 <= share <= 0.5
        wanted = (1 - share) * original.data[draw].double() + share * original.data[partner].double()
        assert (row.data.double() - wanted).abs().max() <= (0.5001 if view is VIDEO else 1e-6)
    partners = {
        int(row.params["mix_draw"])
        for (view, draw), row in mixed(draws, options("rank")).items()
        if view is VIDEO and draw not in ABSENT
    }
    assert partners == set(draws) - set(ABSENT), "a ring: everybody is laid over somebody once"


def same(a: dict[tuple[View, int], ViewBatch], b: dict[tuple[View, int], ViewBatch]) -> bool:
    return all(torch.equal(row.data, b[name].data) for name, row in a.items() if name[1] not in ABSENT)


def test_order_and_absent_rows_change_nothing() -> None:
    draws = list(range(10))
    whole = mixed(draws, options("rank"))
    assert same(whole, mixed([9, 4, 3, 0, 2, 8, 7, 6, 5, 1], options("rank")))
    present = [draw for draw in draws if draw not in ABSENT]
    assert same(mixed(present, options("rank")), whole)
    assert not same(whole, mixed(draws, options("rank"), seed=1))


def test_alone_off_and_none_present() -> None:
    cases = [([5], options("rank")), (list(range(6)), options("rank", 0.0)), ([3, 7], options("global"))]
    for draws, augmentation in cases:
        before = batch_of(draws, augmentation)
        after = mix(before, seed=0, exchange=Comm())
        assert all(torch.equal(after.views[view].data, before.views[view].data) for view in before.views)
    assert ring(torch.arange(3), torch.zeros(3, dtype=torch.bool), 0).tolist() == [0, 1, 2]


def global_rows(rank: int, world: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    comm = Comm.current()
    draws = list(range(12))[rank::world]
    out = mix(batch_of(draws, options("global")), seed=0, exchange=comm)
    return {d: (out.views[VIDEO].data[i], out.views[AUDIO].data[i]) for i, d in enumerate(draws)}


def test_the_global_ring_is_the_same_on_any_ranks(gloo: Any) -> None:
    alone = global_rows(0, 1)
    for world in (2, 3):
        for rows in gloo(world, global_rows):
            for draw, (video, audio) in rows.items():
                assert torch.equal(video, alone[draw][0]) and torch.equal(audio, alone[draw][1])


def test_what_does_not_ask_is_left_alone() -> None:
    batch = batch_of([0, 1, 2], Augmentation())
    assert mix(batch, seed=0, exchange=Comm()).views == batch.views
