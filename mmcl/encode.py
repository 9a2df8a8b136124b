"""From what a user hands in to unit rows: the ``encode_*`` of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcl.encoders.base import Encoder
from mmcl.encoders.fusion import Fusions
from mmcl.media.inputs import Media, decode_windows
from mmcl.progress import show_progress
from mmcl.types import TIMED, Clip, Level, TextSpec, ViewBatch

Rows: TypeAlias = Iterator[tuple[list[int], ViewBatch]]
"""batches, and which item each of their rows is of"""


class Encodes(nn.Module):
    """What a model of towers can encode; the model says how a tower runs (``encode_view``)."""

    joint_width: int
    fusions: Fusions

    def tower(self, name: str) -> Encoder:
        """The tower of this name."""
        raise NotImplementedError

    def tower_of(self, modality: str) -> str:
        """The first tower of a modality."""
        raise NotImplementedError

    def width(self, tower: str, level: Level) -> int:
        """Numbers in a row of ``joint`` or ``pooled``."""
        return self.joint_width if level == "joint" else self.tower(tower).width

    def encode_view(self, tower: str, view: ViewBatch, levels: Sequence[str]) -> dict[str, Tensor]:
        """Levels of one tower on one view."""
        raise NotImplementedError

    def encode_text(self, texts: str | Sequence[str], *, batch: int = 64, progress: bool | None = None) -> Tensor:
        """Unit rows float32 ``(B, D)``, on the CPU, of texts; one text is one row.

        Args:
            batch: texts per forward.
            progress: show a bar; None: only on a terminal, if there is more than one batch.
        """
        items = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [item for item in items if not isinstance(item, str)]:
            raise TypeError(f"encode_text takes texts, got {type(wrong[0]).__name__}")
        tower = self.tower_of("text")
        spec = self.tower(tower).spec
        assert isinstance(spec, TextSpec)
        tokenizer = spec.tokenizer

        def rows() -> Rows:
            for start in range(0, len(items), batch):
                ids, mask = tokenizer(items[start : start + batch])
                owners = list(range(start, start + len(ids)))
                yield owners, ViewBatch(ids, torch.ones(len(ids), dtype=torch.bool), mask)

        return self._encode(tower, rows(), len(items), batch, progress)

    def encode_video(
        self,
        clips: Media | Sequence[Media],
        *,
        fps: float | None = None,
        windows: int | None = None,
        batch: int = 16,
        progress: bool | None = None,
    ) -> Tensor:
        """Unit rows float32 ``(B, D)``, on the CPU, of videos or pictures; one item is one row.

        Args:
            clips: paths, bytes of files, decoded :class:`Clip`, or arrays of numpy or torch: uint8 ``(T, 3, H, W)``
                frames, or ``(3, H, W)`` a picture. A list holds several of these.
            fps: frames per second of arrays; None: an array is one window, whatever its length.
            windows: evenly spaced windows of each item whose rows are averaged; None: as many as cover it, up to 8.
            batch: windows per forward.
            progress: show a bar; None: only on a terminal, if there is more than one batch.

        Raises:
            SampleError: an item is damaged or without a picture.
            ConfigError: an array of another kind.
        """
        return self._encode_media("video", clips, windows, batch, fps, progress)

    def encode_audio(
        self,
        clips: Media | Sequence[Media],
        *,
        sample_rate_hz: int | None = None,
        windows: int | None = None,
        batch: int = 16,
        progress: bool | None = None,
    ) -> Tensor:
        """Unit rows float32 ``(B, D)``, on the CPU, of sounds; one item is one row.

        Args:
            clips: paths, bytes of files (of videos too), decoded :class:`Clip`, or arrays of numpy or torch: float
                ``(S,)`` or ``(channels, S)`` in [−1, 1]. A list holds several of these.
            sample_rate_hz: of arrays; they are brought to the rate that the tower hears.
            windows: evenly spaced windows of each item whose rows are averaged; None: as many as cover it, up to 8.
            batch: windows per forward.
            progress: show a bar; None: only on a terminal, if there is more than one batch.

        Raises:
            SampleError: an item is damaged or without sound.
            ConfigError: an array of another kind, or without its rate.
        """
        return self._encode_media("audio", clips, windows, batch, sample_rate_hz, progress)

    def fuse(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Unit rows float32 ``(B, D)``, on the CPU: joint rows of several towers as one, by the fusion that the model
        learned of them (``pairs: [[text, video+audio]]`` of the objective ``cross_modal``).

        Args:
            rows: tower: unit rows ``(B, D)``, such as ``encode_video`` gives; row i of each is of the same item.

        Raises:
            ConfigError: the model has no fusion of these towers; names those that it has.
            ValueError: not equally many rows of each.
        """
        return self.fusions.fuse(rows)

    def _encode_media(
        self,
        modality: str,
        clips: Media | Sequence[Media],
        windows: int | None,
        batch: int,
        rate: float | None,
        progress: bool | None,
    ) -> Tensor:
        items = [clips] if isinstance(clips, (str, bytes, Path, Clip, np.ndarray, Tensor)) else list(clips)
        tower = self.tower_of(modality)
        spec = self.tower(tower).spec
        assert isinstance(spec, TIMED)

        def rows() -> Rows:
            owners: list[int] = []
            waiting: list[Any] = []
            for number, item in enumerate(items):
                decoded = decode_windows(item, spec, windows, rate=rate)
                owners += [number] * len(decoded)
                waiting += list(decoded)
                while len(waiting) >= batch or (waiting and number == len(items) - 1):
                    data = torch.from_numpy(np.stack(waiting[:batch]))
                    yield owners[:batch], ViewBatch(data, torch.ones(len(data), dtype=torch.bool))
                    del owners[:batch], waiting[:batch]

        return self._encode(tower, rows(), len(items), batch, progress)

    @torch.no_grad()
    def _encode(self, tower: str, rows: Rows, items: int, batch: int, progress: bool | None) -> Tensor:
        """The unit mean of the unit rows of each item."""
        total = torch.zeros(items, self.joint_width)
        counts = torch.zeros(items, dtype=torch.long)
        device = next(self.parameters()).device
        quiet = progress is False or (progress is None and items <= batch)
        learned = self.training
        self.eval()
        try:
            with show_progress("encoding", "items", quiet=quiet, plain=bool(progress)) as show:
                for owners, view in rows:
                    joint = self.encode_view(tower, view.map(lambda x: x.to(device)), ["joint"])["joint"]
                    total.index_add_(0, torch.tensor(owners), joint.float().cpu())
                    counts.index_add_(0, torch.tensor(owners), torch.ones(len(owners), dtype=torch.long))
                    show(owners[-1] + 1, items, "")
        finally:
            self.train(learned)
        several = counts > 1
        total[several] = F.normalize(total[several], dim=-1)
        return total
