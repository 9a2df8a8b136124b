"""Batches that are on the GPU before the step asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mmcl.types import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """On CUDA the next batch is copied, from pinned memory and on a stream of its own, while this one is used."""
    return one_ahead(batches, CopyAhead(device)) if device.type == "cuda" else batches


def one_ahead(batches: Iterator[Batch], begin: Callable[[Batch], Callable[[], Batch]]) -> Iterator[Batch]:
    """The same batches in their order. ``begin`` starts work on a batch, what it returns waits for the result."""
    ready = begin(next(batches))
    for batch in batches:
        coming = begin(batch)
        yield ready()
        ready = coming
    yield ready()


class CopyAhead:
    """Copies to a CUDA device beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Callable[[], Batch]:
        pinned = batch.map(Tensor.pin_memory)
        with torch.cuda.stream(self.stream):
            moved = pinned.to(self.device)

        def wait() -> Batch:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)

            def use(tensor: Tensor) -> Tensor:
                tensor.record_stream(current)  # its memory was given by the other stream
                return tensor

            return moved.map(use)

        return wait
