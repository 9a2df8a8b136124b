"""Multiple-choice video question answering: golden values, attention inside a sentence's time, what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import agree, close, golden, randoms
from support.exactness import TOWERS
from support.objective_cases import CASES, rows_for
from support.objectives import batch_for
from torch import Tensor

from mmcl import losses
from mmcl.distributed import Comm
from mmcl.objectives.video_qa.reader import BothWays, frames_in_time, locally_aligned_attention
from mmcl.types import ConfigError, Embeddings, VideoSpec

A, B, C = golden()
OPTIONS = torch.cat([A, C[:1]])[None]


def test_masked_answer_contrast_golden() -> None:
    """Options are the rows of A and the first of C, the masked row is the first of B."""
    target = torch.tensor([0])
    close(losses.masked_answer_contrast(B[:1], OPTIONS, target), 1.35782113)
    close(losses.masked_answer_contrast(B[:1], B[:1, None].expand(1, 5, 3), target), math.log(5))
    # unit rows: the cosine is the dot product, of any length
    close(losses.masked_answer_contrast(7 * B[:1], 3 * OPTIONS, target, similarity="cosine"), 1.35782113)
    close(losses.masked_answer_contrast(B[:1], OPTIONS, target, temperature=math.inf), math.log(5))
    order = torch.tensor([3, 1, 4, 0, 2])
    close(losses.masked_answer_contrast(B[:1], OPTIONS[:, order], torch.tensor([3])), 1.35782113)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_masked_answer_contrast_is_its_formula(similarity: str) -> None:
    """Gradients reach the masked row and every option."""
    target = torch.tensor([1, 0, 3])

    def loop(masked: Tensor, options: Tensor) -> Tensor:
        values = []
        for i in range(3):
            scores = []
            for k in range(4):
                score = (masked[i] * options[i, k]).sum()
                if similarity == "cosine":
                    score = score / (masked[i].norm() * options[i, k].norm())
                scores.append((score / 0.3).exp())
            values.append(-(scores[int(target[i])] / sum(scores)).log())
        return sum(values) / 3

    def loss(masked: Tensor, options: Tensor) -> Tensor:
        return losses.masked_answer_contrast(masked, options, target, temperature=0.3, similarity=similarity)

    agree(loss, loop, *randoms(0, (3, 5), (3, 4, 5)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="masked must be"):
        losses.masked_answer_contrast(B[:1], torch.zeros(1, 5, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match="temperature"):
        losses.masked_answer_contrast(B[:1], OPTIONS, torch.tensor([0]), temperature=0)


def test_frames_outside_a_sentence_have_no_weight_and_no_gradient() -> None:
    query, key, value = (x.requires_grad_() for x in randoms(1, (2, 3, 3, 4), (2, 6, 4), (2, 6, 4)))
    times = torch.arange(6) + torch.zeros(2, 1)
    sentences = torch.tensor([[[1.0, 2.0], [4.2, 4.6], [8.0, 9.0]], [[0.0, 5.0], [math.nan, math.nan], [2.6, 3.0]]])
    allowed = frames_in_time(times, sentences, 0.5)
    assert allowed[0].tolist() == [
        [False, True, True, False, False, False],
        [False, False, False, False, True, True],
        [False] * 6,
    ]
    seen = locally_aligned_attention(query, key, value, allowed)
    assert not seen[0, :, 2].any() and not seen[1, :, 1].any(), "a sentence without a frame sees nothing, not NaN"
    expected = [((key[0, 1:3] @ query[0, k, 0]) / 2).softmax(0) @ value[0, 1:3] for k in range(3)]
    torch.testing.assert_close(seen[0, :, 0], torch.stack(expected))
    gradients = torch.autograd.grad(seen[0, :, :2].square().sum(), (query, key, value))
    outside = torch.tensor([True, False, False, True, False, False])
    for gradient in gradients[1:]:
        assert not gradient[0, outside].any() and gradient[0, ~outside].any(1).all()
        assert not gradient[1].any(), "another clip"
    lone = torch.autograd.grad(locally_aligned_attention(query, key, value, allowed)[0, :, 2].sum(), (query, value))
    assert all(gradient.isfinite().all() and not gradient.any() for gradient in lone)


def test_what_comes_after_the_last_sentence_changes_nothing() -> None:
    torch.manual_seed(0)
    rnn = BothWays(4).double()
    (x,) = randoms(2, (2, 5, 4))
    lengths = torch.tensor([3, 5])
    other = x.clone()
    other[0, 3:] = 9.0
    both = [rnn(each, lengths) for each in (x, other)]
    assert torch.equal(both[0][0, :3], both[1][0, :3])
    alone, _ = rnn.back(x[:1, :3].flip(1))
    torch.testing.assert_close(both[0][0, :3, 2:], alone[0].flip(0))
    assert not torch.equal(rnn(x, torch.tensor([5, 5]))[0, :3], both[0][0, :3])


def small(**changes: object):
    """Answers, contrast and localisation, on rows of which none is absent."""
    objective = CASES["video_qa"].build(**changes).double()
    return objective, rows_for(objective, batch_for(objective, "full"))


def test_without_masks_the_masked_row_is_the_right_option() -> None:
    objective, embeddings = small(answer=None, localisation=None)
    answers, truth = objective.answers.view, objective.truth.view
    views = embeddings.batch.views
    target = views[answers].params["target"]
    values, rows = dict(embeddings.values), torch.arange(len(target))
    texts = embeddings.get(objective.answers)
    values["text", truth, "pooled", "online"] = torch.cat([texts[rows, target][:, None], texts[:, 3:]], 1)
    params = {**views[truth].params, "sentence_seconds": views[answers].params["sentence_seconds"]}
    batch = dataclasses.replace(
        embeddings.batch, views={**views, truth: dataclasses.replace(views[truth], params=params)}
    )
    same = Embeddings(values, batch)
    frames = objective._frames(same)
    options, masked = (objective._read(same, need, frames) for need in (objective.answers, objective.truth))
    torch.testing.assert_close(masked[:, 0], options[rows, target])
    expected = losses.masked_answer_contrast(options[rows, target], options, target)
    torch.testing.assert_close(objective(same, Comm()).loss, expected)


def test_the_order_of_answers_does_not_matter() -> None:
    objective, embeddings = small()
    need, view = objective.answers, objective.answers.view
    order = torch.tensor([2, 0, 1])
    values = dict(embeddings.values)
    texts = embeddings.get(need)
    values["text", view, "pooled", "online"] = torch.cat([texts[:, order], texts[:, 3:]], 1)
    held = embeddings.batch.views[view]
    params = {**held.params, "target": order.argsort()[held.params["target"]]}
    views = {**embeddings.batch.views, view: dataclasses.replace(held, params=params)}
    turned = Embeddings(values, dataclasses.replace(embeddings.batch, views=views))
    torch.testing.assert_close(objective(turned, Comm()).loss, objective(embeddings, Comm()).loss)
    torch.testing.assert_close(objective.scores(turned), objective.scores(embeddings)[:, order])


def test_equal_answers_cost_log_k_and_terms_add_up() -> None:
    objective, embeddings = small(answer={"weight": 0.5}, localisation={"weight": 3.0})
    term = objective(embeddings, Comm())
    parts = {name: float(term.metrics[f"loss/{name}"]) for name in ("answer", "contrast", "localisation")}
    assert float(term.loss.detach()) == pytest.approx(
        0.5 * parts["answer"] + parts["contrast"] + 3 * parts["localisation"]
    )
    values = dict(embeddings.values)
    texts = embeddings.get(objective.answers)
    equal = torch.cat([texts[:, :1].expand(-1, 3, -1), texts[:, 3:]], 1)
    values["text", objective.answers.view, "pooled", "online"] = equal
    same = objective(Embeddings(values, embeddings.batch), Comm()).metrics
    assert float(same["loss/answer"]) == pytest.approx(math.log(3))
    assert float(same["loss/contrast"]) == pytest.approx(math.log(3))
    assert float(same["norm"]) > 0


def test_localisation_asks_frames_of_the_span() -> None:
    objective, embeddings = small(answer=None, contrast=None)
    torch.nn.init.zeros_(objective.match.candidate.weight)
    torch.nn.init.zeros_(objective.match.candidate.bias)
    assert float(objective(embeddings, Comm()).loss.detach()) == pytest.approx(math.log(2))
    torch.nn.init.ones_(objective.match.candidate.bias)
    frames = objective._frames(embeddings)
    logits = objective.match(torch.zeros(12, 8, dtype=torch.float64), frames)
    # four tokens of a window of eight frames, 4 a second: at frames 0, 2, 4, 6
    starts = embeddings.batch.views[objective.video.view].params["start_seconds"]
    times = starts[:, None] + torch.tensor([0.125, 0.625, 1.125, 1.625])
    span = embeddings.batch.views[objective.answers.view].params["span_seconds"]
    values = []
    for row in range(12):
        if not span[row].isnan().any():
            inside = (times[row] >= span[row, 0]) & (times[row] <= span[row, 1])
            share = torch.where(inside, logits[row], -logits[row]).sigmoid()
            values.append(-share.log().mean())
    assert 0 < len(values) < 12
    torch.testing.assert_close(objective(embeddings, Comm()).loss, torch.stack(values).mean())


def test_a_missing_video_is_seen_as_nothing() -> None:
    objective, embeddings = small()
    view = objective.video.view
    held = embeddings.batch.views[view]
    absent = dataclasses.replace(held, present=torch.zeros_like(held.present))
    views = {**embeddings.batch.views, view: absent}
    blind = Embeddings(embeddings.values, dataclasses.replace(embeddings.batch, views=views))
    tokens = embeddings.get(objective.video)
    (gradient,) = torch.autograd.grad(objective.scores(blind).sum(), tokens, allow_unused=True)
    assert gradient is None or not gradient.any()
    assert not torch.equal(objective.scores(blind), objective.scores(embeddings))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "video"}, "objectives.0.text: 'video' is a tower of video"),
        ({"video": "audio"}, "objectives.0.video: 'audio' is a tower of audio"),
        ({"video": "vido"}, "did you mean 'video'"),
        ({"answer": None, "contrast": None, "localisation": None}, "every term is off"),
        ({"video": None}, "objectives.0.localisation: needs a video tower"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CASES["video_qa"].build(**changes)


def test_frames_of_unknown_times_are_refused() -> None:
    towers = {**TOWERS, "video": dataclasses.replace(TOWERS["video"], spec=VideoSpec(stride=2))}
    with pytest.raises(ConfigError, match="times are not known"):
        CASES["video_qa"].build(towers)
