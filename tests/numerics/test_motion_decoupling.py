"""Context and motion decoupling: its oracles, a loop over all points with keys missing, and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import agree, close, cosine, log_sum, mean, randoms
from support.exactness import MOTION, TOWERS
from support.objective_cases import CASES, leaves_of, rows_for
from support.objectives import batch_for, build_objective
from torch import Tensor

from mmcl import losses
from mmcl.distributed import Comm
from mmcl.objectives.motion_decoupling import MotionDecoupling
from mmcl.types import Batch, ConfigError, Embeddings, MotionSpec, VideoSpec, View

INFOS = {**TOWERS, **MOTION}
SMALL = CASES["motion_decoupling"].options
ROWS, POINTS, EXTRA = 12, 4, 2


def objective_of(**options: object) -> MotionDecoupling:
    return build_objective("motion_decoupling", INFOS, **{**SMALL, **options})


def test_the_pure_loss_is_the_loop_over_points() -> None:
    queries, keys = randoms(1, (3, 2, 5), (3, 3, 2, 5))

    def loop(q: Tensor, k: Tensor) -> Tensor:
        rows = [(b, p) for b in range(3) for p in range(2)]
        everything = [k[n, b, p] for n in range(3) for b, p in rows]
        return mean(
            [
                log_sum([cosine(q[b, p], key) / 0.3 for key in everything]) - cosine(q[b, p], k[0, b, p]) / 0.3
                for b, p in rows
            ]
        )

    agree(lambda q, k: losses.point_info_nce(q, k, temperature=0.3), loop, queries, keys)


def test_one_point_and_no_further_motion_is_info_nce() -> None:
    queries, keys = randoms(2, (6, 5), (6, 5))
    value = losses.point_info_nce(queries[:, None], keys[None, :, None], temperature=0.2)
    torch.testing.assert_close(value, losses.info_nce(queries, keys, temperature=0.2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("negatives", [0, EXTRA])
def test_constant_features(negatives: int) -> None:
    """Context: log N. Motion: log((1 + n) · N · P)."""
    close(
        losses.point_info_nce(torch.ones(ROWS, POINTS, 3), torch.ones(1 + negatives, ROWS, POINTS, 3), temperature=0.1),
        math.log((1 + negatives) * ROWS * POINTS),
        1e-5,
    )
    objective = objective_of(negatives=negatives, mask_false_negatives=False)
    batch = batch_for(objective, "full", rows=ROWS)
    embeddings = rows_for(objective, batch)
    values = {key: torch.ones_like(x) for key, x in embeddings.values.items()}
    term = objective(Embeddings(values, batch), Comm())
    close(term.metrics["context"], math.log(ROWS))
    close(term.metrics["motion"], math.log((1 + negatives) * ROWS * POINTS), 1e-5)
    close(term.loss, float(term.metrics["context"] + term.metrics["motion"]))


def test_a_video_that_stands_still_has_a_uniform_loss() -> None:
    """Keys that are all alike: the queries do not matter."""
    objective = objective_of(terms="motion", mask_false_negatives=False)
    batch = batch_for(objective, "full", rows=ROWS)
    values = {
        key: torch.ones_like(x) if key[0] == "motion" else x for key, x in rows_for(objective, batch).values.items()
    }
    close(objective(Embeddings(values, batch), Comm()).loss, math.log((1 + EXTRA) * ROWS * POINTS), 1e-5)


def _lose(batch: Batch, view: View, rows: list[int]) -> None:
    batch.views[view].present[rows] = False


@pytest.mark.parametrize("masked", [True, False])
def test_keys_that_are_missing_or_related_are_no_negatives(masked: bool) -> None:
    objective = objective_of(mask_false_negatives=masked)
    clip, frame, positive, first, second = (need.view for need in objective.needs)
    batch = batch_for(objective, "full", rows=ROWS)
    _lose(batch, first, [0, 5])
    _lose(batch, second, [5, 7])
    _lose(batch, frame, [2])
    _lose(batch, positive, [3])
    embeddings = rows_for(objective, batch)
    groups = batch.groups
    related = ((groups[:, None] == groups[None]) & (groups[:, None] >= 0)).any(2) & masked
    related.fill_diagonal_(False)
    assert related.any() == masked
    has = {view: batch.views[view].present for view in batch.views}
    term = objective(embeddings, Comm())

    rows = has[clip] & has[positive]
    keys = torch.stack([embeddings.get(need) for need in objective.motion], 1)
    there = torch.stack([has[view] for view in (positive, first, second)], 1) & rows[:, None]
    keys = objective.key_head(keys.flatten(0, 2), there.flatten().repeat_interleave(POINTS)).view(ROWS, 3, POINTS, -1)
    foretold = objective.predictor(embeddings.get(objective.clip, "tokens")).flatten(0, 1)
    asked = objective.query_head(foretold, rows.repeat_interleave(POINTS)).view(ROWS, POINTS, -1)
    values = []
    for i in rows.nonzero()[:, 0].tolist():
        seen = [keys[j, k, p] for j in range(ROWS) for k in range(3) for p in range(POINTS)
                if there[j, k] and not related[i, j]]  # fmt: skip
        values += [
            log_sum([cosine(asked[i, p], key) / 0.3 for key in seen]) - cosine(asked[i, p], keys[i, 0, p]) / 0.3
            for p in range(POINTS)
        ]
    torch.testing.assert_close(term.metrics["motion"], mean(values).detach(), rtol=1e-9, atol=0)

    pairs = has[clip] & has[frame]
    queries = objective.clip_head(embeddings.get(objective.clip, "pooled"), pairs)
    pictures = objective.frame_head(embeddings.get(objective.frame, "pooled"), pairs)
    values = []
    for i in pairs.nonzero()[:, 0].tolist():
        seen = [pictures[j] for j in range(ROWS) if pairs[j] and not related[i, j]]
        values.append(log_sum([cosine(queries[i], key) / 0.3 for key in seen]) - cosine(queries[i], pictures[i]) / 0.3)
    torch.testing.assert_close(term.metrics["context"], mean(values).detach(), rtol=1e-9, atol=0)


def test_everything_that_takes_part_learns() -> None:
    objective = objective_of()
    embeddings = rows_for(objective, batch_for(objective, "full"))
    objective(embeddings, Comm()).loss.backward()
    assert all(x.grad is not None and x.grad.any() for x in leaves_of(embeddings))
    silent = [name for name, p in objective.named_parameters() if p.grad is None]
    assert not silent


def test_the_order_of_a_clips_tokens_matters() -> None:
    predictor = objective_of().predictor
    tokens = torch.randn(2, 6, 10, dtype=torch.float64)
    assert predictor(tokens).shape == (2, POINTS, 8)
    assert not torch.allclose(predictor(tokens), predictor(tokens.flip(1)))
    torch.testing.assert_close(predictor(tokens)[:1], predictor(tokens[:1]))


def test_its_views() -> None:
    objective = objective_of(augmentation="strong", negatives=3, gap_frames=2)
    clip, frame, *motion = (need.view for need in objective.needs)
    assert (clip.place, frame.place, *(view.place for view in motion)) == (
        "window",
        "near",
        "after",
        *["elsewhere"] * 3,
    )
    assert (clip.copy, motion[0].copy) == (0, 0), "they share crop and flip"
    assert len({view.copy for view in (clip, frame, *motion[1:])}) == 5, "the others have their own"
    assert frame.spec == dataclasses.replace(VideoSpec(), frames=1, stride=1, keyframe=True)
    assert motion[0].gap_frames == 2 and all(isinstance(view.spec, MotionSpec) for view in motion)
    assert [need.view.place for need in objective_of(terms="context").needs] == ["window", "near"]
    assert [need.view.place for need in objective_of(terms="motion", negatives=0).needs] == ["window", "after"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tower": "vidoe"}, "objectives.4.tower: .*'vidoe'"),
        ({"tower": "audio"}, "objectives.4.tower: a video tower is needed, 'audio' is none"),
        ({"frame_tower": "audio"}, "objectives.4.frame_tower: a video tower is needed, 'audio' is none"),
        ({"motion_tower": "video"}, "objectives.4.motion_tower: a tower of motion is needed.*'video' is none"),
        ({"motion_tower": "motoin"}, "objectives.4.motion_tower: .*'motoin'"),
        ({"heads": 3}, "objectives.4.heads: 3 do not divide a width of 8"),
    ],
)
def test_refuses(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        objective_of(**options)


def test_pictures_cut_otherwise_and_another_number_of_points_are_refused() -> None:
    infos = {**INFOS, "motion": dataclasses.replace(MOTION["motion"], spec=MotionSpec(fit="squash"))}
    with pytest.raises(ConfigError, match="it fits pictures by 'squash', tower 'video' by 'crop'"):
        build_objective("motion_decoupling", infos, **SMALL)
    objective = objective_of(points=5)
    with pytest.raises(ConfigError, match="points is 5, but tower 'motion' gives 4 tokens"):
        objective(rows_for(objective, batch_for(objective, "full")), Comm())
