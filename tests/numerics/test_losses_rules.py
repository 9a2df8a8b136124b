"""Rules that every loss keeps.

float64 in, float64 out; half precision and autocast are float32 inside; inputs are not modified; the order of rows does
not matter; normalised rows have no length; what is detached has no gradient and the rest has the right one (finite
differences); every extreme input gives finite numbers; wrong arguments are one clear ``ValueError``.
"""

from __future__ import annotations

import ast
import doctest
import inspect
from pathlib import Path

import pytest
import torch
from loss_cases import CASES, Case, golden
from torch import Tensor

from mmcl import losses

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
with_temperature = pytest.mark.parametrize("case", [c for c in CASES if c.temperature], ids=lambda case: case.name)


def value_and_gradients(
    case: Case, inputs: dict[str, Tensor], *, autocast: bool = False, **options: object
) -> tuple[Tensor, dict[str, Tensor]]:
    names = case.floats(inputs)
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    # the backward pass runs outside, as torch asks: inside, autocast would round its matrix products
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = case.call(**(inputs | leaves), **options)
    if not value.requires_grad:
        return value.detach(), {}
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), {name: g for name, g in zip(names, gradients, strict=True) if g is not None}


def converted(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_float32_or_better(case: Case, dtype: torch.dtype) -> None:
    inputs = converted(case.inputs(), dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value, gradients = value_and_gradients(case, inputs)
    assert value.dtype == wide
    assert value.shape == ()
    torch.testing.assert_close(value, value_and_gradients(case, converted(inputs, wide))[0], rtol=0, atol=0)
    assert all(gradient.dtype == dtype for gradient in gradients.values())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    inputs = converted(case.inputs(), dtype)
    value, gradients = value_and_gradients(case, inputs)
    inside, gradients_inside = value_and_gradients(case, inputs, autocast=True)
    torch.testing.assert_close(inside, value, rtol=0, atol=0)
    torch.testing.assert_close(gradients_inside, gradients, rtol=0, atol=0)


def test_mixed_precisions_meet_at_the_widest() -> None:
    a, b, _ = golden()
    assert losses.info_nce(a.bfloat16(), b.float(), temperature=0.1).dtype == torch.float32
    assert losses.moco(a.float(), b.bfloat16(), b, temperature=0.1).dtype == torch.float64
    # a learnable temperature neither widens nor narrows
    assert (
        losses.info_nce(a.float(), b.float(), temperature=torch.tensor(0.1, dtype=torch.float64)).dtype == torch.float32
    )
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    losses.clip(a, b, scale=scale).backward()
    assert scale.grad is not None and scale.grad.dtype == torch.float32


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inputs_are_not_modified(case: Case, dtype: torch.dtype) -> None:
    inputs = converted(case.inputs(), dtype)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    case.call(**inputs)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)


@each
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    inputs = case.inputs()
    names = [name for name in case.floats(inputs) if name not in (*case.detached, *case.indirect)]
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    assert not leaves or torch.autograd.gradcheck(
        lambda *values: case.call(**(inputs | dict(zip(names, values, strict=True)))), leaves
    )


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name not in {"clip", "siglip", "swav"} and c.temperature],
    ids=lambda case: case.name,
)
def test_temperature_can_be_learned(case: Case) -> None:
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    inputs = case.inputs()
    assert torch.autograd.gradcheck(lambda t: case.call(**inputs, temperature=t), [temperature])


def test_scale_and_bias_can_be_learned() -> None:
    a, b, _ = golden()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (7.0, -2.0))
    assert torch.autograd.gradcheck(lambda s: losses.clip(a, b, scale=s), [scale])
    assert torch.autograd.gradcheck(lambda s, t: losses.siglip(a, b, scale=s, bias=t), [scale, bias])


@each
def test_only_the_detached_have_no_gradient(case: Case) -> None:
    inputs = case.inputs()
    _, gradients = value_and_gradients(case, inputs)
    reached = {name for name, gradient in gradients.items() if gradient.abs().max() > 1e-6}
    assert reached == set(case.floats(inputs)) - set(case.detached)


@each
def test_order_of_rows_does_not_matter(case: Case) -> None:
    inputs = case.inputs(6)
    order, queue_order = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([4, 2, 0, 1, 3])
    turned = {name: x[queue_order if name in case.shared else order] for name, x in inputs.items()}
    torch.testing.assert_close(case.call(**turned), case.call(**inputs), rtol=0, atol=1e-12)


@each
def test_normalised_rows_have_no_length(case: Case) -> None:
    inputs = case.inputs()
    stretched = dict(inputs)
    for name in case.floats(inputs):
        x = inputs[name]
        if name not in case.unscaled:
            part = x[:, :1, :1] if name in case.whole else x[..., :1]
            stretched[name] = x * torch.logspace(-6, 6, part.numel(), dtype=x.dtype).reshape(part.shape)
    torch.testing.assert_close(case.call(**stretched), case.call(**inputs), rtol=0, atol=1e-10)


@each
def test_unnormalised_rows_keep_their_length(case: Case) -> None:
    inputs = case.inputs()
    relative = {"relational_distance", "relational_angle", "similarity_preserving"}
    for name in case.unscaled:
        longer = inputs[name].clone()
        longer[0] *= 1.5
        assert (case.call(**(inputs | {name: longer})) - case.call(**inputs)).abs() > 1e-4
        if case.name in relative:
            scaled = case.call(**(inputs | {name: 5 * inputs[name]}))
            torch.testing.assert_close(scaled, case.call(**inputs), rtol=0, atol=1e-12)


EXTREMES = {
    "far apart": lambda x: 100 * x,
    "identical rows": lambda x: x[:1].expand_as(x).clone(),
    "all zero": torch.zeros_like,
    "one row zero": lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]),
    "opposite": lambda x: x[:1] * torch.tensor([1.0, -1.0]).repeat(3)[: len(x)].reshape(-1, *[1] * (x.ndim - 1)),
}


@each
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_inputs_are_finite(case: Case, extreme: str) -> None:
    inputs = case.inputs()
    for name in case.floats(inputs):
        inputs[name] = EXTREMES[extreme](inputs[name])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for options in [{"temperature": 0.01}, {"temperature": 100.0}] if case.temperature else [{}]:
            value, gradients = value_and_gradients(case, converted(inputs, dtype), **options)
            assert value.isfinite(), (dtype, options)
            assert gradients
            assert all(gradient.isfinite().all() for gradient in gradients.values()), (dtype, options)


@each
def test_a_zero_row_gets_no_gradient_of_its_own(case: Case) -> None:
    """… and not the 1e12 times too long one that a division by a small constant leaves."""
    inputs = case.inputs()
    for name in set(case.floats(inputs)) - set(case.unscaled):
        inputs[name][0] = 0
    _, gradients = value_and_gradients(case, inputs)
    for name in set(gradients) - set(case.unscaled):
        assert (gradients[name][0] == 0).all()


@each
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row_are_finite_and_joined_to_the_graph(case: Case, rows: int) -> None:
    # no NaN on the way either, which a mask would hide at the end
    with torch.autograd.set_detect_anomaly(True):
        value, gradients = value_and_gradients(case, case.inputs(rows))
    assert value.isfinite()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if rows == 0:
        assert value == 0


@pytest.mark.parametrize(
    "name", ["info_nce", "clip", "nt_xent", "dcl", "dclw", "class_nce", "local_mutual_information"]
)
def test_one_row_alone_has_nothing_to_learn(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    value, gradients = value_and_gradients(case, case.inputs(1))
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


@with_temperature
@pytest.mark.parametrize("wrong", [-0.1, float("nan"), torch.tensor(-0.1), torch.ones(1)])
def test_temperature_must_be_above_zero(case: Case, wrong: float | Tensor) -> None:
    with pytest.raises(ValueError, match=r"^(temperature|scale) must be [^\n]*$"):
        case.call(**case.inputs(), temperature=wrong)


def test_other_numbers_must_be_in_range() -> None:
    a, b, _ = golden()
    for call in [
        lambda: losses.info_nce(a, b, temperature=0),
        lambda: losses.dcl(a, b, temperature=0.1, sigma=0.0),
        lambda: losses.sinkhorn(a, epsilon=0.0),
        lambda: losses.sinkhorn(a, iterations=0),
        lambda: losses.swav([a, b], epsilon=-1.0),
        lambda: losses.uniformity(a, t=0.0),
    ]:
        with pytest.raises(ValueError, match=r"^\w+ must be above 0, got [^\n]*$"):
            call()


@each
def test_wrong_shapes_are_refused(case: Case) -> None:
    inputs = case.inputs()
    for name, tensor in inputs.items():
        wrongs = [tensor[0], tensor[None], tensor.long() if tensor.is_floating_point() else tensor.double()]
        if len(inputs) > 1 and name not in case.shared:
            wrongs.append(tensor[:-1])
        for wrong in wrongs:
            with pytest.raises(ValueError, match=r"^[^\n]*$"):
                case.call(**(inputs | {name: wrong}))


def test_messages_name_what_is_wrong() -> None:
    a, b, _ = golden()
    with pytest.raises(ValueError, match=r"^need equal shape: queries \(4, 3\), keys \(3, 3\)$"):
        losses.info_nce(a, b[:3], temperature=0.1)
    with pytest.raises(ValueError, match=r"^need equal columns: queries \(4, 3\), queue \(5, 2\)$"):
        losses.moco(a, b, torch.zeros(5, 2), temperature=0.1)
    with pytest.raises(ValueError, match=r"^scores must be a list of at least 2 matrices, got 1$"):
        losses.swav([a])
    with pytest.raises(
        ValueError, match=r"^need equal shape: queries \(4, 3\), keys\[0\] \(4, 3\), keys\[1\] \(3, 3\)$"
    ):
        losses.persistency_moco(a, [b, b[1:]], b, temperature=0.1)
    with pytest.raises(ValueError, match=r"^labels must be an integer tensor \(4,\), got torch.float64 \(4, 3\)$"):
        losses.class_nce(a, b, a, temperature=0.1)


def test_lists_are_lists() -> None:
    a, b, _ = golden()
    for call in [
        lambda: losses.persistency_moco(a, [], b, temperature=0.1),
        lambda: losses.persistency_byol(a, []),
        lambda: losses.swav(torch.stack([a, b])),
    ]:
        with pytest.raises(ValueError, match="must be a list of at least"):
            call()
    assert losses.swav((a, b)) == losses.swav([a, b])


@pytest.mark.parametrize("name", losses.__all__)
def test_examples_in_docstrings(name: str) -> None:
    function = inspect.unwrap(getattr(losses, name))
    names = {each: getattr(losses, each) for each in losses.__all__} | {"torch": torch}
    tests = doctest.DocTestFinder().find(function, name, globs=names)
    assert sum(len(test.examples) for test in tests) > 0
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_every_loss_has_a_case() -> None:
    # m3co takes numbers of rows, which do not move with the rows
    assert {case.name for case in CASES} - {"dclw", "mv_info_nce_all"} == set(losses.__all__) - {"sinkhorn", "m3co"}


def test_losses_import_torch_alone() -> None:
    allowed = {"__future__", "collections", "contextlib", "functools", "math", "typing", "torch"}
    for path in Path(losses.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                assert module.split(".")[0] in allowed or module.startswith("mmcl.losses"), (path.name, module)
