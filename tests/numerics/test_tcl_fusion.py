"""Terms of tcl that read with the fusion tower: matching with hard negatives, masked tokens."""

from __future__ import annotations

import math

import pytest
import torch
from support.objectives import embed
from support.tcl import batch_of, tcl, value
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.objectives.tcl import matching
from mmcl.objectives.tcl.fusion import Tokens
from mmcl.objectives.tcl.matching import hard_negatives
from mmcl.objectives.tcl.rows import Rows
from mmcl.types import Batch


def test_matching_at_zero_logits_is_log_two() -> None:
    objective = tcl(itm={})
    torch.nn.init.zeros_(objective.pairs["video-text"].matching.head.weight)
    torch.nn.init.zeros_(objective.pairs["video-text"].matching.head.bias)
    embeddings, _ = embed(objective, batch_of(objective, 6))
    assert value(objective(embeddings, Comm()), "itm") == pytest.approx(math.log(2), abs=1e-12)


def test_matching_against_a_loop() -> None:
    """True pairs, and for each row a negative of either side, of which every label is known."""
    objective = tcl(itm={"seed": 3})
    pair = objective.pairs["video-text"]
    embeddings, _ = embed(objective, batch_of(objective, 6))
    needs = {need.tower: need for need in objective.needs}
    video, text = (embeddings.get(needs[name], "tokens") for name in ("video", "text"))
    joint = {name: embeddings.get(needs[name], "joint") for name in ("video", "text")}
    rows = Rows.of(embeddings.batch, torch.ones(6, dtype=torch.bool), Comm(), mask_false_negatives=True)
    everything = torch.ones(6, 4, dtype=torch.bool)

    def one(i: int, j: int, label: int) -> Tensor:
        fused = pair.fusion(
            Tokens(text, everything).pick(torch.tensor([i])), Tokens(video, everything).pick(torch.tensor([j]))
        )
        return -pair.matching.head(fused[0, 0]).log_softmax(0)[label]

    scale = embeddings.scales["video-text"]
    texts = hard_negatives(joint["video"], joint["text"], rows, scale, (3, matching._READING))
    videos = hard_negatives(joint["text"], joint["video"], rows, scale, (3, matching._CONTEXT))
    parts = [one(i, i, 1) for i in range(6)]
    parts += [one(i, int(videos[i]), 0) for i in range(6)] + [one(int(texts[i]), i, 0) for i in range(6)]
    wanted = torch.stack(parts).mean()
    assert value(objective(embeddings, Comm()), "itm") == pytest.approx(float(wanted.detach()), abs=1e-9)


def sampling_rows(groups: Tensor, draws: Tensor) -> Rows:
    count = len(draws)
    none = torch.full((count,), -1)
    batch = Batch({}, ("x",) * count, draws, groups, none)
    return Rows.of(batch, torch.ones(count, dtype=torch.bool), Comm(), mask_false_negatives=True)


def test_hard_negatives_follow_the_similarity() -> None:
    """2,000 draws of six rows: shares within four standard deviations of the softmax over the others."""
    groups = torch.tensor([[1, -1], [2, 8], [3, -1], [4, 9], [1, 5], [6, 8]])
    random = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(6, 3, generator=random, dtype=torch.float64) for _ in range(2))
    counts = torch.zeros(6, 6, dtype=torch.float64)
    for trial in range(2_000):
        rows = sampling_rows(groups, 6 * trial + torch.arange(6))
        counts[torch.arange(6), hard_negatives(queries, keys, rows, torch.tensor(1.5), (0, 1))] += 1
    total = counts.sum(1, keepdim=True)
    hidden = torch.eye(6, dtype=torch.bool)
    for a, b in ((0, 4), (1, 5)):
        hidden[a, b] = hidden[b, a] = True
    wanted = (1.5 * queries @ keys.T).masked_fill(hidden, -torch.inf).softmax(1)
    assert (counts[hidden] == 0).all()
    spread = (wanted * (1 - wanted) / total).sqrt()
    assert ((counts / total - wanted).abs() <= 4 * spread + 1e-12).all()


def test_hard_negatives_do_not_depend_on_the_order_of_rows() -> None:
    random = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(8, 3, generator=random, dtype=torch.float64) for _ in range(2))
    groups, draws = torch.full((8, 1), -1), torch.arange(80, 88)
    picked = hard_negatives(queries, keys, sampling_rows(groups, draws), torch.tensor(1.0), (0, 1))
    order = torch.randperm(8, generator=random)
    turned = sampling_rows(groups, draws[order])
    again = hard_negatives(queries[order], keys[order], turned, torch.tensor(1.0), (0, 1))
    assert torch.equal(draws[order][again], draws[picked][order])
    other = hard_negatives(queries, keys, sampling_rows(groups, draws), torch.tensor(1.0), (1, 1))
    assert not torch.equal(other, picked)


def test_without_another_sample_only_the_true_pairs_are_matched() -> None:
    objective = tcl(itm={})
    embeddings, leaves = embed(objective, batch_of(objective, 3, [4, 4, 4]))
    term = objective(embeddings, Comm())
    head = objective.pairs["video-text"].matching.head
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.0, 50.0]))
    assert value(objective(embeddings, Comm()), "itm") < 1e-9, "no pair is false"
    torch.autograd.backward(term.loss)
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves.values())


def test_masked_tokens_without_teacher_and_with_one() -> None:
    """The teacher's share moves the value; nobody has a copy of the fusion tower without one."""
    hard, soft = (tcl(mlm={"augmentation": "masked", "alpha": alpha}, ramp_batches=0) for alpha in (0.0, 1.0))
    assert hard.ema_pairs() == [] and len(soft.ema_pairs()) == 2
    assert not any(need.kind == "momentum" for need in hard.needs)
    embeddings, _ = embed(soft, batch_of(soft, 6))
    pair = soft.pairs["video-text"]
    term = soft(embeddings, Comm())
    targets = next(v.params["token_targets"] for v in embeddings.batch.views.values() if v.params)
    assert int(term.metrics["mlm_tokens/video-text"]) == int((targets >= 0).sum()) > 5
    # online and momentum are equal here: against its own beliefs a network has the entropy of these
    for _, copied in soft.ema_pairs():
        assert not any(p.requires_grad for p in copied.parameters())
    with torch.no_grad():
        for head in (pair.vocabulary_head, pair.momentum_head):
            head.out.weight.zero_()
            head.out.bias.zero_()
    assert value(soft(embeddings, Comm()), "mlm") == pytest.approx(math.log(9), abs=1e-9)
    with torch.no_grad():
        pair.momentum_head.out.bias[2] = 60.0
        pair.vocabulary_head.out.bias[2] = 3.0
    assert value(soft(embeddings, Comm()), "mlm") == pytest.approx(math.log(1 + 8 * math.exp(-3)), abs=1e-9)


def test_a_batch_without_a_masked_token_is_zero() -> None:
    objective = tcl(mlm={"augmentation": "masked"})
    embeddings, _ = embed(objective, batch_of(objective, 4))
    for view in embeddings.batch.views.values():
        for targets in view.params.values():
            targets.fill_(-1)
    term = objective(embeddings, Comm())
    torch.autograd.backward(term.loss)
    assert float(term.loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters() if p.requires_grad)
