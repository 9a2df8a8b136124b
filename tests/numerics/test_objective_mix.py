"""The mix: weights that change with the steps, how many negatives a row has, terms that are not finite or silent."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmcl.config import Options
from mmcl.config import build as build_options
from mmcl.distributed import Comm
from mmcl.objectives import OBJECTIVES
from mmcl.objectives.base import Objective, ObjectiveMix, Term
from mmcl.objectives.ranks import mean_negatives
from mmcl.objectives.weights import Ramp, Weight, over_run
from mmcl.training.soundness import SilenceWatch, not_finite
from mmcl.types import Batch, ConfigError, Embeddings, TextSpec, View, ViewBatch


class Weighted(Options):
    weight: Weight = 1.0


def weight(value: object, steps: int = 101) -> list[float]:
    """In each step of a run."""
    found = over_run(build_options(Weighted, {"weight": value}).weight, steps, "objectives.3.weight")
    return [found.at(step) if isinstance(found, Ramp) else found for step in range(steps)]


def test_shapes_of_schedules() -> None:
    assert weight(2) == [2.0] * 101
    assert weight({"start": 0, "end": 1}) == pytest.approx([step / 100 for step in range(101)])
    line = weight({"start": 3, "end": 1, "from_step": 10, "to_step": 30})
    assert line[:11] == [3.0] * 11 and line[20] == 2.0 and line[30:] == [1.0] * 71
    wave = weight({"start": 0, "end": 1, "from_fraction": 0.1, "to_fraction": 0.3, "shape": "cosine"})
    assert wave[:11] == [0.0] * 11 and wave[30:] == [1.0] * 71
    assert wave[11:30] == pytest.approx([(1 - math.cos(math.pi * k / 20)) / 2 for k in range(1, 20)])
    assert weight({"start": 0.5, "end": 2, "to_step": 4, "shape": "constant"}, 6) == [0.5] * 4 + [2.0] * 2


def test_every_objective_takes_them() -> None:
    for name, entry in OBJECTIVES.items():
        shown = entry.options.model_json_schema()["properties"]["weight"]
        assert {"$ref": "#/$defs/WeightSchedule"} in shown.get("oneOf", []), f"{name}: weight: Weight"


def test_schedules_of_runs_of_one_and_two_steps_are_defined() -> None:
    assert weight({"start": 0.25, "end": 1}, 1) == [0.25]
    assert weight({"start": 0.25, "end": 1}, 2) == [0.25, 1.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "weight: input should be greater than or equal to 0, got -1"),
        ("much", "weight: input should be a valid number.*got 'much'"),
        ({"start": -1}, r"weight\.start: input should be greater than or equal to 0"),
        ({"begin": 0}, r"weight\.begin: unknown key.*allowed: end, from_fraction, from_step, shape, start"),
        ({"shape": "line"}, r"weight\.shape: .*'linear', 'cosine' or 'constant'"),
        ({"from_step": 1, "from_fraction": 0.5}, "weight: from_step and from_fraction say the same"),
        ({"from_step": 9, "to_step": 9}, r"objectives\.3\.weight: the weight's way ends at step 9 and begins at 9"),
    ],
)
def test_wrong_weights_are_named(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weight(value)


class Given(Objective):
    """Says what it was told."""

    def __init__(self, loss: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(loss))

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        return Term(self.value * 1.0, {"inner": self.value.detach() * 2})


def embeddings(groups: Tensor, present: Tensor | None = None) -> Embeddings:
    rows = len(groups)
    here = torch.ones(rows, dtype=torch.bool) if present is None else present
    view = View(TextSpec(lambda texts: (torch.zeros(0), torch.zeros(0))))  # type: ignore[arg-type]
    seen = ViewBatch(torch.zeros(rows, 1), here)
    return Embeddings({}, Batch({view: seen}, ("",) * rows, torch.arange(rows), groups, torch.full((rows,), -1)))


def test_the_mix_weighs_by_the_step_that_it_is_given() -> None:
    mix = ObjectiveMix({"a": Given(3.0), "b": Given(5.0)}, {"a": Ramp(0.0, 1.0, 0, 10, "linear"), "b": 2.0})
    nobody = embeddings(torch.full((4, 1), -1))
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0)):
        term = mix(nobody, Comm(), step=step)
        assert float(term.loss.detach()) == pytest.approx(share * 3 + 10)
        assert float(term.metrics["a/weight"]) == share
        assert float(term.metrics["a"]) == 3.0 and "b/weight" not in term.metrics
        gradients = torch.autograd.grad(term.loss, list(mix.parameters()))
        assert [float(g) for g in gradients] == [share, 2.0]
    with pytest.raises(ValueError, match="weights of a change"):
        mix(nobody, Comm())


@given(st.data())
def test_negatives_are_those_that_share_no_number(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 7))
    groups = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(-1, 3), min_size=3, max_size=3), min_size=rows, max_size=rows))
    )
    present = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    related = ((groups[:, None] == groups) & (groups >= 0)).any(2) | torch.eye(rows, dtype=torch.bool)
    counts = (~related & present).sum(1)[present].double()
    expected = float(counts.mean()) if len(counts) else 0.0
    assert float(mean_negatives(groups, present, Comm())) == pytest.approx(expected)


def test_a_term_that_is_not_finite_is_named() -> None:
    mix = ObjectiveMix({"good": Given(1.0), "bad": Given(math.nan)}, {"good": 1.0, "bad": 0.0})
    fine = ObjectiveMix({"good": Given(1.0), "bad": Given(2.0)}, {"good": 1.0, "bad": 1.0})
    nobody = embeddings(torch.full((4, 1), -1))
    terms = [mix(nobody, Comm()), fine(nobody, Comm())]  # accumulated: the first one only is wrong
    one = torch.tensor(1.0)
    assert not_finite(terms, one, mix.objectives, []) == "objective bad (inner), loss"
    assert not_finite(terms[1:], one, mix.objectives, []) == ""
    torch.autograd.backward(terms[1].loss)
    fine.get_parameter("objectives.good.value").grad = torch.tensor(math.inf)
    said = not_finite(terms[1:], torch.tensor(math.inf), mix.objectives, fine.named_parameters())
    assert said == "gradient of objectives.good.value, grad_norm"


def test_an_objective_that_is_always_zero_is_named_once() -> None:
    mix = ObjectiveMix({"dead": Given(0.0), "alive": Given(1.0)}, {"dead": 1.0, "alive": 1.0})
    for groups, why in (
        (torch.zeros(4, 1, dtype=torch.long), "no row had a negative: a batch of one"),
        (-1, "figures"),
    ):
        watch = SilenceWatch({"dead": (), "alive": ()})
        rows = groups if isinstance(groups, Tensor) else torch.full((4, 1), groups)
        for _ in range(3):
            assert watch.complaints() == []
            watch.watch(mix(embeddings(rows), Comm()))
        (line,) = watch.complaints()
        assert re.search(f"^objective dead teaches nothing: its loss was 0 in all 3 steps .*{why}", line)
        assert watch.complaints() == [] and watch.complaints(last=True) == []


def test_a_part_that_is_always_zero_is_named_where_others_are_not() -> None:
    """One pair of towers whose samples are all of one caption, say, beside one that learns."""
    watch = SilenceWatch({"pairs": ("loss/a-b", "loss/a-c"), "dead": ("loss/a-b",)})
    figures = {"pairs": 1.0, "pairs/loss/a-b": 0.0, "pairs/loss/a-c": 1.0, "dead": 0.0, "dead/loss/a-b": 0.0}
    for _ in range(3):
        watch.watch(Term(torch.zeros(()), {name: torch.tensor(x) for name, x in {**figures, "negatives": 3}.items()}))
    said = [line.split(":")[0] for line in watch.complaints()]
    assert said == ["objective pairs/loss/a-b teaches nothing", "objective dead teaches nothing"]
    assert watch.complaints() == []
