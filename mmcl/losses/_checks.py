"""Checks of arguments; each failure is a ``ValueError`` of one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def positive(name: str, value: float | Tensor, *, or_zero: bool = False) -> None:
    """A number or 0-d tensor above zero; on an accelerator it is not read, every step would wait for the device."""
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.device.type != "cpu":
            return
        value = float(value.detach())
    if not (value > 0 or (or_zero and value == 0)):
        raise ValueError(f"{name} must be {'at least 0' if or_zero else 'above 0'}, got {value}")


def matrices(*, same: str = "shape", **tensors: Tensor) -> None:
    """Float matrices that agree in ``same``: ``shape``, ``rows`` or ``columns``."""
    _matrices(tensors, same)


def _matrices(tensors: Mapping[str, Tensor], same: str = "shape") -> None:
    shapes = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a 2-d float tensor, got {_describe(tensor)}")
        shapes[name] = tuple(tensor.shape)
    keys = {"shape": slice(None), "rows": slice(0, 1), "columns": slice(1, 2)}[same]
    if len({shape[keys] for shape in shapes.values()}) > 1:
        raise ValueError(f"need equal {same}: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def feature_maps(*, same: str, **tensors: Tensor) -> None:
    """Float ``(B, L, D)`` that agree in ``same``: ``shape``, ``rows`` or ``positions`` (rows and positions)."""
    shapes = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a 3-d float tensor, got {_describe(tensor)}")
        shapes[name] = tuple(tensor.shape)
    axes = {"shape": 3, "positions": 2, "rows": 1}[same]
    if len({shape[:axes] for shape in shapes.values()}) > 1:
        raise ValueError(f"need equal {same}: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def alike(**tensors: Tensor) -> None:
    """Float tensors of one shape, ``(B, D)`` or ``(B, L, D)``."""
    first = next(iter(tensors.values()))
    if isinstance(first, Tensor) and first.ndim == 3:
        feature_maps(same="shape", **tensors)
    else:
        _matrices(tensors)


def matrix_list(name: str, tensors: Sequence[Tensor], *, at_least: int, like: tuple[str, Tensor] | None = None) -> None:
    """At least so many float matrices of one shape, which is also that of ``like`` (name, tensor)."""
    if isinstance(tensors, Tensor) or len(tensors) < at_least:
        got = _describe(tensors) if isinstance(tensors, Tensor) else len(tensors)
        raise ValueError(f"{name} must be a list of at least {at_least} matrices, got {got}")
    _matrices({**dict([like] if like else []), **{f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)}})


def labels_of(labels: Tensor, rows: int) -> None:
    """One integer for each row."""
    if not isinstance(labels, Tensor) or labels.shape != (rows,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be an integer tensor ({rows},), got {_describe(labels)}")


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
