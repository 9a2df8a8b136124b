"""What the loss tests share: the golden rows, one case per loss, and the comparison with a loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmcl import losses

Tensors = dict[str, Tensor]


def golden() -> tuple[Tensor, Tensor, Tensor]:
    """Three float64 ``(4, 3)`` sets of unit rows with closed forms."""
    i = torch.arange(1, 5, dtype=torch.float64)
    raw = [
        [i.sin(), (2 * i).cos(), (3 * i + 0.5).sin()],
        [i.cos(), (2 * i + 0.3).sin(), (3 * i).cos()],
        [(0.5 * i + 0.2).sin(), (i + 0.7).cos(), (i + 1.3).sin()],
    ]
    a, b, c = (normed(torch.stack(columns, 1)) for columns in raw)
    return a, b, c


def normed(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Of two vectors, for the loops."""
    return (x * y).sum() / ((x * x).sum().sqrt() * (y * y).sum().sqrt())


def mean(values: list[Tensor]) -> Tensor:
    """Mean of a list of scalars, for the loops."""
    return sum(values, torch.zeros((), dtype=torch.float64)) / len(values)


def log_sum(values: list[Tensor]) -> Tensor:
    """log Σ exp without any trick, for the loops."""
    return torch.stack([value.exp() for value in values]).sum().log()


def randoms(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def agree(loss: Callable[..., Tensor], loop: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-10) -> None:
    """Value and gradients of ``loss`` are those of ``loop``, which is written from the formula."""
    results = []
    for function in (loss, loop):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        value = function(*leaves)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        results.append([value.detach(), *(torch.zeros(()) if g is None else g for g in gradients)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype).expand_as(ours), rtol=0, atol=tolerance)


def close(value: Tensor, expected: float, tolerance: float = 1e-6) -> None:
    assert abs(float(value.detach()) - expected) <= tolerance


@dataclass(frozen=True)
class Case:
    """One loss with named random inputs; ``call`` takes them and, where there is one, a temperature."""

    name: str
    call: Callable[..., Tensor]
    shapes: Callable[[int], dict[str, tuple[int, ...]]]
    """of the inputs, from the number of rows"""
    detached: tuple[str, ...] = ()
    unscaled: tuple[str, ...] = ()
    """inputs whose rows are not normalised inside"""
    shared: tuple[str, ...] = ()
    """inputs without one row per sample"""
    indirect: tuple[str, ...] = ()
    """inputs that also reach the value through something detached, which finite differences see"""
    whole: tuple[str, ...] = ()
    """inputs that are normalised sample by sample, not row by row of a sample"""
    temperature: bool = True
    extra: Callable[[int], Tensors] = field(default=lambda rows: {})
    """labels and masks, one row per sample"""

    def inputs(self, rows: int = 4, *, seed: int = 0) -> Tensors:
        shapes = self.shapes(rows)
        return dict(zip(shapes, randoms(seed, *shapes.values()), strict=True)) | self.extra(rows)

    def floats(self, inputs: Tensors) -> list[str]:
        return [name for name, tensor in inputs.items() if tensor.is_floating_point()]


def pair(*names: str, width: int = 3) -> Callable[[int], dict[str, tuple[int, ...]]]:
    return lambda rows: dict.fromkeys(names, (rows, width))


def labels(rows: int) -> Tensors:
    return {"labels": torch.tensor([0, 0, 1, 2, 1, 3])[:rows]}


def valid(rows: int) -> Tensors:
    mask = torch.ones(rows, 2, dtype=torch.bool)
    mask[2:3, 1] = False
    return {"mask": mask}


STAGES = ("student_first", "student_second", "teacher_first", "teacher_second")

CASES = [
    Case("info_nce", lambda q, k, temperature=0.2: losses.info_nce(q, k, temperature=temperature), pair("q", "k")),
    Case("clip", lambda a, b, temperature=0.2: losses.clip(a, b, scale=1 / temperature), pair("a", "b")),
    Case("siglip", lambda a, b, temperature=0.2: losses.siglip(a, b, scale=1 / temperature, bias=-3), pair("a", "b")),
    Case("nt_xent", lambda a, b, temperature=0.2: losses.nt_xent(a, b, temperature=temperature), pair("a", "b")),
    Case("dcl", lambda a, b, temperature=0.2: losses.dcl(a, b, temperature=temperature), pair("a", "b")),
    Case(
        "dclw",
        lambda a, b, temperature=0.2: losses.dcl(a, b, temperature=temperature, sigma=0.5),
        pair("a", "b"),
        indirect=("a", "b"),
    ),
    Case(
        "moco",
        lambda q, k, queue, temperature=0.2: losses.moco(q, k, queue, temperature=temperature),
        lambda rows: {"q": (rows, 3), "k": (rows, 3), "queue": (5, 3)},
        detached=("k", "queue"),
        shared=("queue",),
    ),
    Case("byol", losses.byol, pair("predictions", "targets"), detached=("targets",), temperature=False),
    Case("barlow", losses.barlow, pair("a", "b"), unscaled=("a", "b"), temperature=False),
    Case("barlip", losses.barlip, pair("a", "b"), unscaled=("a", "b"), temperature=False),
    Case(
        "point_info_nce",
        lambda q, k, temperature=0.2: losses.point_info_nce(q[:, None], k[None, :, None], temperature=temperature),
        pair("q", "k"),
    ),
    Case(
        "mv_info_nce",
        lambda x, y, z, temperature=0.2: losses.mv_info_nce([x, y, z], temperature=temperature),
        pair("x", "y", "z"),
    ),
    Case(
        "mv_info_nce_all",
        lambda x, y, z, temperature=0.2: losses.mv_info_nce([x, y, z], temperature=temperature, negatives="all"),
        pair("x", "y", "z"),
    ),
    Case(
        "mv_dhel",
        lambda x, y, z, temperature=0.2: losses.mv_dhel([x, y, z], temperature=temperature),
        pair("x", "y", "z"),
    ),
    Case(
        "soft_clip",
        lambda a, b, temperature=0.2: losses.soft_clip(a, b, temperature=temperature, detach_targets=False),
        pair("a", "b"),
    ),
    Case(
        "cmim_contrast",
        lambda z, z_other, temperature=0.2: losses.cmim_contrast(z, z_other, temperature=temperature),
        pair("z", "z_other"),
    ),
    Case(
        "masked_answer_contrast",
        lambda masked, options, labels, temperature=0.2: losses.masked_answer_contrast(
            masked, options, labels, temperature=temperature
        ),
        lambda rows: {"masked": (rows, 3), "options": (rows, 4, 3)},
        unscaled=("masked", "options"),
        extra=labels,
    ),
    Case("vicreg", losses.vicreg, pair("a", "b"), unscaled=("a", "b"), temperature=False),
    Case(
        "swav",
        lambda x, y, z, temperature=0.2: losses.swav([x, y, z], temperature=temperature),
        pair("x", "y", "z"),
        unscaled=("x", "y", "z"),
        indirect=("x", "y"),
    ),
    Case(
        "persistency_moco",
        lambda q, k, m, queue, temperature=0.2: losses.persistency_moco(q, [k, m], queue, temperature=temperature),
        lambda rows: {"q": (rows, 3), "k": (rows, 3), "m": (rows, 3), "queue": (5, 3)},
        detached=("k", "m", "queue"),
        shared=("queue",),
    ),
    Case(
        "persistency_byol",
        lambda p, k, m, temperature=0.5: losses.persistency_byol(p, [k, m], temperature=temperature),
        pair("p", "k", "m"),
        detached=("k", "m"),
    ),
    Case(
        "class_nce",
        lambda f, g, labels, temperature=0.2: losses.class_nce(f, g, labels, temperature=temperature),
        pair("f", "g"),
        extra=labels,
    ),
    *(
        Case(
            name,
            getattr(losses, name),
            pair("logits_p", "logits_q"),
            unscaled=("logits_p", "logits_q"),
            temperature=False,
        )
        for name in ("jeffreys", "jensen_shannon")
    ),
    Case(
        "local_mutual_information",
        lambda g, tokens, mask, temperature=0.2: losses.local_mutual_information(
            g, tokens, mask, temperature=temperature
        ),
        lambda rows: {"g": (rows, 3), "tokens": (rows, 2, 3)},
        extra=valid,
    ),
    Case(
        "knowledge_distillation",
        lambda s, t, temperature=4.0: losses.knowledge_distillation(s, t, temperature=temperature),
        pair("s", "t"),
        detached=("t",),
        unscaled=("s", "t"),
    ),
    *(
        Case(
            name,
            getattr(losses, name),
            lambda rows: {"student": (rows, 3), "teacher": (rows, 2)},
            detached=("teacher",),
            unscaled=() if name == "probabilistic_transfer" else ("student", "teacher"),
            temperature=False,
        )
        for name in ("similarity_preserving", "relational_distance", "relational_angle", "probabilistic_transfer")
    ),
    *(
        Case(
            name,
            getattr(losses, name),
            lambda rows: {"student": (rows, 3), "teacher": (rows, 3)},
            detached=("teacher",),
            unscaled=("student",) if name == "activation_boundary" else ("student", "teacher"),
            temperature=False,
        )
        for name in ("hint", "activation_boundary", "correlation_congruence")
    ),
    Case(
        "variational_information",
        # numbers that every precision holds
        lambda s, t: losses.variational_information(s, torch.tensor([-1.0, 0.5, 2.0]).to(s.dtype), t),
        pair("s", "t"),
        detached=("t",),
        unscaled=("s", "t"),
        temperature=False,
    ),
    *(
        Case(
            name,
            getattr(losses, name),
            lambda rows: {"student": (rows, 4, 3), "teacher": (rows, 4, 2)},
            detached=("teacher",),
            whole=("student", "teacher"),
            temperature=False,
        )
        for name in ("attention_transfer", "factor_transfer", "neuron_selectivity")
    ),
    *(
        Case(
            name,
            loss,
            lambda rows: dict(zip(STAGES, ((rows, 4, 3), (rows, 4, 2), (rows, 5, 3), (rows, 5, 2)), strict=True)),
            detached=STAGES[2:],
            unscaled=STAGES if name == "flow" else (),
            whole=STAGES if name == "kdsvd" else (),
            temperature=False,
        )
        for name, loss in (("flow", losses.flow), ("kdsvd", losses.kdsvd))
    ),
    Case(
        "soft_target_cross_entropy",
        lambda logits, teacher, labels: losses.soft_target_cross_entropy(logits, teacher, labels, alpha=0.4),
        pair("logits", "teacher", width=4),
        detached=("teacher",),
        unscaled=("logits", "teacher"),
        temperature=False,
        extra=labels,
    ),
    Case("alignment", losses.alignment, pair("a", "b"), unscaled=("a", "b"), temperature=False),
    Case("uniformity", losses.uniformity, pair("x"), unscaled=("x",), temperature=False),
    Case("tolerance", losses.tolerance, pair("x"), unscaled=("x",), temperature=False, extra=labels),
]
