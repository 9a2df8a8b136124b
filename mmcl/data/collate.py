"""Rows to batches: padded tensors with absent rows as zeros, parts of workers interleaved back into draw order."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmcl.data.questions import blank_question
from mmcl.hashing import text_hash
from mmcl.types import (
    Batch,
    MotionSpec,
    QuestionSpec,
    TextSpec,
    TimedSpec,
    Tokenizer,
    VectorSpec,
    VideoSpec,
    View,
    ViewBatch,
)

T = TypeVar("T")

LAST_CHARACTER_TOKENS = 4
"""a cut caption may end so many bytes before the limit, never inside a character"""

GROUP_COLUMNS = 3
"""key, group, caption: rows equal in any of them are never each other's negatives"""


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One view of one sample."""

    data: np.ndarray | str | tuple[str, ...]
    start_seconds: float = 0.0
    params: Mapping[str, np.ndarray] = field(default_factory=dict)
    """what else it was, or is to be, made with; equal names and shapes in all rows of a view"""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What one draw gave: views, or a reason why there are none."""

    draw: int
    key: str = ""
    values: Mapping[View, Value] = field(default_factory=dict)
    group: str | None = None
    label: int = -1
    caption: str = ""
    """the caption that was chosen for this draw"""
    captions: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    pool: int = -1
    """its pseudo-label, where negatives keep to one"""
    skipped: tuple[str, str, str] | None = None
    """(key or position, reason, detail) of a bad sample"""


def blank_value(view: View) -> Value:
    """What an absent row of a view without augmentation holds."""
    spec = view.spec
    if isinstance(spec, TextSpec):
        return Value("")
    if isinstance(spec, QuestionSpec):
        texts, params = blank_question(spec)
        return Value(texts, params=params)
    return Value(np.zeros(row_shape(spec), dtype=np.uint8 if isinstance(spec, VideoSpec) else np.float32))


def collate(
    rows: Sequence[Row],
    views: Sequence[View],
    *,
    with_metadata: bool = False,
    with_pools: bool = False,
    blank: Callable[[View], Value] = blank_value,
) -> Batch:
    """One padded batch of rows, in their order; ``blank`` says what an absent row of a view holds."""
    return Batch(
        views={view: _collate_view([row.values.get(view) for row in rows], view, blank(view)) for view in views},
        keys=tuple(row.key for row in rows),
        draws=torch.tensor([row.draw for row in rows], dtype=torch.int64),
        groups=torch.tensor([_groups(row) for row in rows], dtype=torch.int64).reshape(len(rows), GROUP_COLUMNS),
        labels=torch.tensor([row.label for row in rows], dtype=torch.int64),
        skipped=tuple((row.draw, *row.skipped) for row in rows if row.skipped is not None),
        metadata=tuple(row.metadata for row in rows) if with_metadata else (),
        captions=tuple(row.captions for row in rows) if with_metadata else (),
        pools=torch.tensor([row.pool for row in rows], dtype=torch.int64) if with_pools else None,
    )


def holes(rows: int, views: Sequence[View], *, blank: Callable[[View], Value] = blank_value) -> Batch:
    """A batch in which every row is absent."""
    return collate([Row(draw=-1)] * rows, views, blank=blank)


def _groups(row: Row) -> tuple[int, int, int]:
    """Numbers of key, group and caption; a hole has none."""
    return (
        text_hash(row.key) if row.key else -1,
        text_hash(row.group) if row.group else -1,
        _caption_number(row.caption),
    )


def _caption_number(caption: str) -> int:
    """Equal for captions that differ in case and white space alone; −1: none."""
    words = caption.casefold().split()
    return text_hash(" ".join(words)) if words else -1


def _collate_view(values: Sequence[Value | None], view: View, blank: Value) -> ViewBatch:
    present = torch.tensor([value is not None for value in values], dtype=torch.bool)
    full = [blank if value is None else value for value in values]
    params = {
        name: torch.from_numpy(np.stack([value.params[name] for value in full])) if full else torch.zeros(0)
        for name in blank.params
    }
    if isinstance(view.spec, TextSpec):
        texts = [str(value.data) for value in full]
        params["caption_number"] = torch.tensor([_caption_number(text) for text in texts], dtype=torch.int64)
        ids, mask = view.spec.tokenizer(texts)
        params["cut"] = _cut(view.spec.tokenizer, texts, mask)
        return ViewBatch(ids * present[:, None], present, mask, params)
    if isinstance(view.spec, QuestionSpec):
        ids, mask = view.spec.tokenizer([text for value in full for text in value.data])
        shape = (len(full), view.spec.texts, ids.shape[1])
        return ViewBatch(ids.view(shape) * present[:, None, None], present, mask.view(shape), params)
    assert isinstance(blank.data, np.ndarray)
    data = torch.zeros((len(values), *blank.data.shape), dtype=torch.from_numpy(blank.data).dtype)
    for row, value in zip(data, values, strict=True):
        if value is not None and isinstance(value.data, np.ndarray):
            row.copy_(torch.from_numpy(value.data))
    starts = torch.tensor([value.start_seconds for value in full], dtype=torch.float64)
    return ViewBatch(data, present, params={"start_seconds": starts, **params})


def _cut(tokenizer: Tokenizer, texts: Sequence[str], mask: Tensor) -> Tensor:
    """bool ``(B,)``: captions longer than the tokenizer takes. Only rows about as long as the longest are looked at."""
    cut = torch.zeros(len(texts), dtype=torch.bool)
    asked = getattr(tokenizer, "cut", None)
    full = (mask.sum(1) > mask.shape[1] - LAST_CHARACTER_TOKENS).nonzero().flatten()
    if asked is not None and len(full):
        cut[full] = torch.tensor(asked([texts[int(row)] for row in full]))
    return cut


def row_shape(spec: TimedSpec | VectorSpec) -> tuple[int, ...]:
    """The shape of one row of a view."""
    if isinstance(spec, VideoSpec):
        return (spec.frames, 3, spec.size, spec.size)
    if isinstance(spec, MotionSpec):
        return (spec.frames, 2, spec.side, spec.side)
    return (spec.width,) if isinstance(spec, VectorSpec) else (spec.samples,)


def interleave(parts: Sequence[Batch]) -> Batch:
    """Parts of one batch, row i of part j being row ``i·len(parts) + j``, back in one batch."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Batch(
        views={view: _interleave_views([part.views[view] for part in parts]) for view in first.views},
        keys=_interleave_tuples([part.keys for part in parts]),
        draws=_interleave_tensors([part.draws for part in parts]),
        groups=_interleave_tensors([part.groups for part in parts]),
        labels=_interleave_tensors([part.labels for part in parts]),
        skipped=tuple(sorted(skip for part in parts for skip in part.skipped)),
        metadata=_interleave_tuples([part.metadata for part in parts]),
        captions=_interleave_tuples([part.captions for part in parts]),
        pools=None
        if first.pools is None
        else _interleave_tensors([part.pools for part in parts if part.pools is not None]),
    )


def _interleave_views(parts: Sequence[ViewBatch]) -> ViewBatch:
    masks = [part.mask for part in parts if part.mask is not None]
    return ViewBatch(
        _interleave_tensors([part.data for part in parts], pad=bool(masks)),
        _interleave_tensors([part.present for part in parts]),
        _interleave_tensors(masks, pad=True) if masks else None,
        {name: _interleave_tensors([part.params[name] for part in parts]) for name in parts[0].params},
    )


def _interleave_tensors(parts: Sequence[Tensor], *, pad: bool = False) -> Tensor:
    shape = list(parts[0].shape)
    if pad:  # texts of the parts are padded to their own longest
        shape[-1] = max(part.shape[-1] for part in parts)
    whole = parts[0].new_zeros((shape[0] * len(parts), *shape[1:]))
    for number, part in enumerate(parts):
        target = whole[number :: len(parts)]
        (target[..., : part.shape[-1]] if pad else target).copy_(part)
    return whole


def _interleave_tuples(parts: Sequence[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(value for row in zip(*parts, strict=True) for value in row)


_ALIGNMENT = 64
"""bytes; pieces of a packed part begin at multiples of it"""


def pack(part: Batch | Exception) -> Tensor:
    """A part, or the error that ended its worker, as one uint8 tensor: one transfer, whatever the number of views.

    Views are left out, the other side knows them: a tokenizer need not travel with every batch.
    """
    if isinstance(part, Batch):
        arrayed = part.map(Tensor.numpy)
        part = replace(arrayed, views=dict(enumerate(arrayed.views.values())))  # type: ignore[arg-type]
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(part, protocol=5, buffer_callback=buffers.append)
    arrays = [np.asarray(buffer.raw()) for buffer in buffers]
    head = np.array([len(body), len(arrays), *(len(array) for array in arrays)], np.int64).view(np.uint8)
    pieces = [head, np.frombuffer(body, np.uint8), *arrays]
    packed = torch.empty(sum(_aligned(len(piece)) for piece in pieces), dtype=torch.uint8)
    target, start = packed.numpy(), 0
    for piece in pieces:
        target[start : start + len(piece)] = piece
        start += _aligned(len(piece))
    return packed


def unpack(packed: Tensor, views: Sequence[View]) -> Batch | Exception:
    """What :func:`pack` was given; its tensors are views into ``packed``."""
    content = packed.numpy()
    body_bytes, count = content[:16].view(np.int64).tolist()
    lengths = content[16 : 16 + 8 * count].view(np.int64).tolist()
    start = _aligned(16 + 8 * count)
    body = content[start : start + body_bytes]
    start += _aligned(body_bytes)
    arrays = []
    for length in lengths:
        arrays.append(content[start : start + length])
        start += _aligned(length)
    part = pickle.loads(body.data, buffers=arrays)
    if isinstance(part, Exception):
        return part
    batch: Batch = replace(part, views=dict(zip(views, part.views.values(), strict=True))).map(torch.from_numpy)
    return batch


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
