"""One tower with its projection as an ONNX graph, compared with the tower itself before it is kept."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcl.encoders.base import Encoder
from mmcl.types import AudioSpec, ConfigError, TextSpec, VectorSpec, VideoSpec

OPSET = 18
TOLERANCE = 1e-4
"""largest difference of a number of the outputs"""
SAMPLE_TEXTS = ("a dog barks at the sea", "two", "")


class _Joint(nn.Module):
    """A tower and its head: ``pooled (B, D)`` and unit rows ``joint (B, D)``."""

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pooled = self.encoder(x, mask).pooled
        return pooled, F.normalize(self.head(pooled), dim=-1)


def sample_inputs(encoder: Encoder, rows: int) -> dict[str, Tensor]:
    """Inputs of a tower by name, random but for texts."""
    spec, random = encoder.spec, torch.Generator().manual_seed(rows)
    if isinstance(spec, VideoSpec):
        shape = (rows, spec.frames, 3, spec.size, spec.size)
        return {"video": torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)}
    if isinstance(spec, AudioSpec):
        return {"audio": 0.3 * torch.randn(rows, spec.samples, generator=random)}
    if isinstance(spec, TextSpec):
        ids, mask = spec.tokenizer([SAMPLE_TEXTS[row % len(SAMPLE_TEXTS)] for row in range(rows)])
        return {"ids": ids, "mask": mask}
    assert isinstance(spec, VectorSpec)
    return {"vector": torch.randn(rows, spec.width, generator=random)}


def write_onnx(encoder: Encoder, head: nn.Module, path: Path, *, tower: str) -> dict[str, Any]:
    """Writes the graph; returns what is told of it: ``opset``, ``inputs``, ``outputs`` with names of their axes.

    Inputs are what the tower eats (uint8 frames, a float32 wave, ids and mask): normalisation and front end are inside.
    The batch axis is free, of texts the number of tokens too.

    Raises:
        ConfigError: the extra is missing, a part of the tower has no ONNX form, or onnxruntime computes otherwise.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - the exporter's own need
    except ImportError:
        raise ConfigError("--to onnx needs onnx, onnxscript and onnxruntime: pip install 'mmcl[onnx]'") from None
    module = _Joint(encoder, head).eval()
    inputs = sample_inputs(encoder, 2)
    axes = {name: {0: "batch", 1: "tokens"} if name in ("ids", "mask") else {0: "batch"} for name in inputs}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=["pooled", "joint"],
                dynamic_shapes=tuple(_dimensions(each) for each in axes.values()),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter has dozens of its own; all say that a part has no ONNX form
        path.unlink(missing_ok=True)
        words = " ".join(str(error.__cause__ or error).split())[:200]
        raise ConfigError(f"--to onnx: tower {tower!r} ({type(encoder).__name__}) has no ONNX form: {words}") from None
    _compare(module, encoder, onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]), path, tower)
    return {"opset": OPSET, "inputs": axes_of(axes), "outputs": {"pooled": ["batch", "D"], "joint": ["batch", "D"]}}


def axes_of(axes: dict[str, dict[int, str]]) -> dict[str, list[str]]:
    """Names of the free axes of each input."""
    return {name: list(each.values()) for name, each in axes.items()}


def _dimensions(axes: dict[int, str]) -> dict[int, Any]:
    return {place: _DIMENSIONS[name] for place, name in axes.items()}


_DIMENSIONS = {"batch": torch.export.Dim("batch"), "tokens": torch.export.Dim("tokens", min=2)}


def _compare(module: nn.Module, encoder: Encoder, session: Any, path: Path, tower: str) -> None:
    """On three rows, other than those that the graph was traced with.

    Raises:
        ConfigError: the outputs differ; the file is removed.
    """
    inputs = sample_inputs(encoder, 3)
    wanted = {each.name for each in session.get_inputs()}  # a mask that a tower does not look at is no input
    try:
        found = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in wanted})
    except Exception as error:  # onnxruntime's own, of many classes
        path.unlink(missing_ok=True)
        raise ConfigError(f"--to onnx: tower {tower!r}: onnxruntime: {' '.join(str(error).split())[:200]}") from None
    with torch.no_grad():
        own = module(*inputs.values())
    worst = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, own, strict=True))
    if not worst <= TOLERANCE:
        path.unlink(missing_ok=True)
        raise ConfigError(f"--to onnx: tower {tower!r} differs by {worst:.2g} in onnxruntime, allowed {TOLERANCE:g}")
