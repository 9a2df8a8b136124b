"""The gradient cache leaves the whole batch's loss, gradients and state: micro-batches, processes, dropout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial

import pytest
import torch
from support.exactness import Record, assert_same, learned_fusions, mix_parts, pick_rows, times_and_labels
from support.gloo import GlooPool
from support.objective_cases import CASES
from support.tcl import make as make_tcl
from support.view_methods import make
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmcl.encoders.audio import TinyAudioOptions
from mmcl.encoders.shared import SharedOptions
from mmcl.encoders.text import TinyTextOptions
from mmcl.encoders.video import TinyVideoOptions
from mmcl.model import HeadOptions, ModelOptions, MultimodalModel
from mmcl.objectives import cross_modal
from mmcl.objectives.base import ObjectiveMix
from mmcl.training.grad_cache import cached_backward, check_cacheable, inner, rows_of
from mmcl.training.momentum import advance
from mmcl.training.step import CachePass, TrainStep
from mmcl.types import Batch, ConfigError, View, ViewBatch

ROWS = 12


def build_everything(taught: bool, dropout: float = 0.0) -> TrainStep:
    """Every case of the table in one mix; the teachers of a student are frozen, that of sound sees what it sees."""
    torch.manual_seed(3)
    video = TinyVideoOptions(width=8, channels=8, size=16, frames=2, dropout=dropout)
    small = {"sample_rate_hz": 1000, "seconds": 0.25, "mels": 16, "window_samples": 64, "hop_samples": 16}
    towers = {
        "video": video,
        "audio": video if taught else TinyAudioOptions(width=8, channels=8, dropout=dropout, **small),
        "text": TinyTextOptions(width=8, depth=1, dropout=dropout),
    }
    for name in ("audio", "text") if taught else ():
        towers[name] = towers[name].model_copy(update={"lock": "with_head"})
    options = ModelOptions(towers=towers, joint_width=6, head=HeadOptions(layers=2, hidden=8))
    model = MultimodalModel(options)
    infos = model.tower_infos()
    objectives = {
        name.replace(": ", "_").replace(" ", "_"): case.build(infos)
        for name, case in CASES.items()
        # towers of a prefix are causal, these are not; nor are there questions and motion in these batches
        if case.taught == taught
        and case.options.get("layout") != "prefix"
        and case.objective not in ("video_qa", "motion_decoupling")
    }
    mix = ObjectiveMix(objectives, dict.fromkeys(objectives, 1.0))
    model.add_scales(mix.scales)
    model.add_fusions(mix.fusions)
    for name, fusion in learned_fusions(mix.fusions).items():
        model.fusions[name] = fusion
    model.serve(mix.needs)
    return TrainStep(model, mix).double()


def build_step(dropout: float = 0.0) -> TrainStep:
    """A few of them, for every run of the tests."""
    torch.manual_seed(3)
    towers = {
        "video": TinyVideoOptions(width=8, channels=8, size=16, frames=2, dropout=dropout),
        "text": TinyTextOptions(width=16, depth=1),
    }
    model = MultimodalModel(ModelOptions(towers=towers, joint_width=6, head=HeadOptions(layers=2, hidden=8)))
    infos = model.tower_infos()
    objectives = {
        "cross_modal": cross_modal.build(cross_modal.CrossModalOptions(), infos),
        "dcl": make("intra_modal", "dcl", {"norm": "batch"}, infos),
        "moco": make("intra_modal", "moco", {}, infos, tower="text"),
        "byol": make("persistency", "byol", {}, infos),
        "swav": make("persistency", "swav", {}, infos),
        "tcl": make_tcl(infos, text_augmentation="none"),
    }
    mix = ObjectiveMix(objectives, dict.fromkeys(objectives, 1.0))
    model.add_scales(mix.scales)
    model.serve(mix.needs)
    return TrainStep(model, mix).double()


def build_shared(norm: str = "none") -> TrainStep:
    """Pictures through the video tower, with a momentum copy, its last blocks alone learning; a head of its own."""
    torch.manual_seed(3)
    towers = {
        "image": SharedOptions(tower="video", frames=1),
        "video": TinyVideoOptions(width=8, channels=8, size=16, frames=2, lock=3, checkpoint_activations=True),
        "text": TinyTextOptions(width=16, depth=2, lock=1),
    }
    heads = {"image": HeadOptions(layers=2, hidden=8, norm=norm), "text": HeadOptions(layers=2, hidden=8, norm=norm)}
    model = MultimodalModel(ModelOptions(towers=towers, joint_width=6, heads=heads))
    infos = model.tower_infos()
    pairs = cross_modal.CrossModalOptions(pairs=(("image", "text"), ("video", "text"), ("text", "image+video")))
    objectives = {
        "cross_modal": cross_modal.build(pairs, infos),
        "moco": make("intra_modal", "moco", {}, infos, tower="image"),
    }
    if norm == "batch":
        objectives["tcl"] = make_tcl(infos, pairs=(("image", "text"),), text_augmentation="none")
    mix = ObjectiveMix(objectives, dict.fromkeys(objectives, 1.0))
    model.add_scales(mix.scales)
    model.add_fusions(mix.fusions)
    model.serve(mix.needs)
    return TrainStep(model, mix).double()


@lru_cache
def global_batch(step: int, views: tuple[View, ...], empty_rank: int | None) -> Batch:
    random = torch.Generator().manual_seed(step)
    present = {m: torch.rand(ROWS, generator=random) > 0.25 for m in ("video", "text", "audio")}
    if empty_rank is not None:
        for rows in present.values():
            rows[empty_rank::2] = False
    data = {}
    for view in views:
        rows = present[view.modality]
        if view.modality == "text":
            ids = torch.randint(1, 60, (ROWS, 7), generator=random) * rows[:, None]
            mask = torch.arange(7) < torch.randint(2, 8, (ROWS, 1), generator=random)
            targets = ids.masked_fill(~mask | ~rows[:, None] | (ids % 3 > 0), -1)
            data[view] = ViewBatch(ids * mask, rows, mask, {"token_targets": targets})
        elif view.modality == "audio":
            sound = (torch.rand(ROWS, 250, generator=random) - 0.5) * rows[:, None]
            data[view] = ViewBatch(sound, rows, params=_params(view, rows, step))
        else:
            pixels = torch.randint(0, 256, (ROWS, 2, 3, 16, 16), dtype=torch.uint8, generator=random)
            data[view] = ViewBatch(pixels * rows[:, None, None, None, None], rows, params=_params(view, rows, step))
    none = torch.full((ROWS, 1), -1)
    labels = torch.randint(-1, 3, (ROWS,), generator=random)
    return Batch(data, tuple(f"{step}-{i}" for i in range(ROWS)), torch.arange(ROWS), none, labels)


def _params(view: View, present: Tensor, step: int) -> dict[str, Tensor]:
    """When clips begin, classes of pairs, and with whom a row was mixed."""
    params = times_and_labels(view, ROWS, step)
    return {**params, **mix_parts(present, torch.arange(ROWS))} if view.augmentation == "mixed" else params


def train(
    rank: int, world: int, micro_batch: int | None, ddp: bool = False, build: Callable[[], TrainStep] = build_step
) -> Record:
    """Three optimizer steps; the second has a rank without rows."""
    step = build()
    wrapped = DistributedDataParallel(step, broadcast_buffers=False) if ddp else step
    parameters = {name: p for name, p in step.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9)
    views = tuple(dict.fromkeys(need.view for need in step.mix.needs))
    record = Record()
    for number, empty in enumerate((None, 1, None)):
        own = pick_rows(global_batch(number, views, empty), torch.arange(rank, ROWS, world))
        optimizer.zero_grad()
        if micro_batch is None:
            term = wrapped(own)
            term.loss.backward()
        else:
            no_sync = wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else nullcontext
            term = cached_backward(wrapped, own, micro_batch=micro_batch, no_sync=no_sync)
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
        record.losses.append(float(term.loss.detach()))
        record.metrics.append({name: float(value) for name, value in term.metrics.items()})
        record.gradients.append({name: gradient.clone() for name, gradient in gradients.items()})
        optimizer.step()
        step.mix.commit(term.pending)
        advance([*step.model.ema_pairs(), *step.mix.ema_pairs()], 0.9)
    record.state = {name: value.clone() for name, value in step.state_dict().items()}
    return record


LEARNING, TAUGHT = partial(build_everything, False), partial(build_everything, True)
builds = pytest.mark.parametrize(
    "build",
    [
        build_step,
        build_shared,
        pytest.param(LEARNING, marks=pytest.mark.slow, id="all that learn together"),
        pytest.param(TAUGHT, marks=pytest.mark.slow, id="all that are taught"),
    ],
)


@builds
def test_equals_the_whole_batch(gloo: GlooPool, build: Callable[[], TrainStep]) -> None:
    """Also in temperatures, queues, momentum copies; 5 rows per forward leave a short one."""
    whole = train(0, 1, None, build=build)
    scales = [float(g.norm()) for name, g in whole.gradients[0].items() if "log_scales" in name]
    assert build is TAUGHT or (scales and min(scales) > 1e-4)
    for micro_batch in (1, 5):
        assert_same(train(0, 1, micro_batch, build=build), whole, f"{micro_batch} rows at once")
    for world in (2, 3):
        for rank, record in enumerate(gloo(world, train, 3, True, build)):
            assert_same(record, whole, f"rank {rank} of {world}")


def test_heads_with_batch_norm_count_the_rows_of_all_ranks(gloo: GlooPool) -> None:
    """Also where a rank has no row at all."""
    build = partial(build_shared, "batch")
    whole = train(0, 1, None, build=build)
    means = [value for name, value in whole.state.items() if "heads.image" in name and "running_mean" in name]
    assert len(means) == 2 and all(value.any() for value in means)
    for world in (2, 3):
        for rank, record in enumerate(gloo(world, train, None, True, build)):
            assert_same(record, whole, f"rank {rank} of {world}")
    with pytest.raises(ConfigError, match=r"the head of tower 'image' holds batch statistics \(RankBatchNorm\)"):
        check_cacheable(build())


with_dropout = pytest.mark.parametrize(
    "build",
    [
        build_step,
        pytest.param(LEARNING, marks=pytest.mark.slow, id="learning"),
        pytest.param(TAUGHT, marks=pytest.mark.slow, id="taught"),
    ],
)


@with_dropout
def test_with_dropout_equals_one_graph_over_the_same_forwards(build: Callable[..., TrainStep]) -> None:
    step = build(dropout=0.5)
    views = tuple(dict.fromkeys(need.view for need in step.mix.needs))
    batch = global_batch(0, views, None)
    torch.manual_seed(5)
    parts = [step(rows_of(batch, slice(i, i + 4)), CachePass("features")) for i in range(0, ROWS, 4)]
    values = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    state = {name: value.clone() for name, value in step.state_dict().items()}
    loss = step(batch, CachePass("loss", values)).loss
    loss.backward()
    after = torch.rand(3)
    wanted = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step.load_state_dict(state)  # running statistics of heads
    step.zero_grad()
    torch.manual_seed(5)
    term = cached_backward(step, batch, micro_batch=4)
    assert torch.equal(torch.rand(3), after), "random numbers go on as if there had been one forward"
    torch.testing.assert_close(term.loss, loss.detach())
    for name, gradient in wanted.items():
        torch.testing.assert_close(dict(step.named_parameters())[name].grad, gradient, msg=name)


def test_momentum_towers_and_objectives_run_once_and_gradients_are_reduced_once() -> None:
    step = build_step()
    calls = {"online": 0, "momentum": 0, "projector": 0, "unsynced": 0}

    def counting() -> AbstractContextManager[object]:
        calls["unsynced"] += 1
        return nullcontext()

    def count(name: str) -> object:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    step.model.towers["video"].register_forward_hook(count("online"))
    step.model.momentum_towers["video"].register_forward_hook(count("momentum"))
    step.mix.objectives["byol"].projector.register_forward_hook(count("projector"))
    views = tuple(dict.fromkeys(need.view for need in step.mix.needs))
    cached_backward(step, global_batch(0, views, None), micro_batch=4, no_sync=counting)
    assert calls.pop("unsynced") == 3, "the loss pass and all replays but the last keep their gradients to themselves"
    # views of the video tower online: two draws of one clip and another clip; by momentum: two clips
    assert calls == {"online": 3 * 3 * 2, "momentum": 3 * 2, "projector": 2}


def test_towers_with_batch_statistics_are_refused() -> None:
    step = build_step()
    check_cacheable(step)
    step.model.towers["video"].frame.append(torch.nn.BatchNorm2d(8))
    with pytest.raises(ConfigError, match=r"train\.micro_batch: tower 'video' holds batch statistics \(BatchNorm2d\)"):
        check_cacheable(step)
    assert inner(torch.nn.DataParallel(step)) is step
