"""What the app searches: a model, the rows that it made, and the shards that show what a row is of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from mmcl.evaluation.gallery_data import CAPTION_LETTERS, cut, media_type
from mmcl.evaluation.shard_gallery import SampleMedia
from mmcl.media.probe import probe
from mmcl.model import MultimodalModel
from mmcl.search import Hit, Index
from mmcl.serve.uploads import decoded
from mmcl.shards.manifest import Manifest, load_manifest
from mmcl.shards.members import Sample, parse_sample
from mmcl.shards.reader import ShardReader
from mmcl.types import AudioSpec, ConfigError, Modality, RunError, SampleError, TextSpec, VideoSpec

KINDS = ("poster", "clip", "waveform", "sound")
MEDIA_KEPT = 512
"""pictures and sounds that are made once while they are asked for again"""

Medium: TypeAlias = tuple[bytes, str] | None
"""its bytes and their type; None: there is no such thing, or it cannot be decoded"""


@dataclass(frozen=True, eq=False)
class Library:
    """An opened index, the model that made it, and the shards, where they can be read."""

    model: MultimodalModel
    index: Index
    shards: Shards | None

    @classmethod
    def open(cls, checkpoint: Path, index: Path, shards: str | None) -> Library:
        """Checks that all of them belong together.

        Args:
            shards: None: where they were when they were embedded, if they are still there.

        Raises:
            ConfigError: no such model, index or shards, or of different ones.
        """
        opened = Index.open(index)
        opened.check_model(checkpoint)
        place = shards or opened.source()
        manifest = None if place is None else load_manifest(place)
        if manifest is not None:
            known = {manifest.shard_name(number) for number in range(manifest.num_shards)}
            if lost := [name for name in opened.shard_names if name not in known]:
                raise ConfigError(f"--shards {place}: has no {lost[0]}, of which {index} holds rows")
        model = MultimodalModel.from_pretrained(checkpoint)
        return cls(model, opened, None if manifest is None else Shards(manifest))

    def specs(self) -> dict[Modality, VideoSpec | AudioSpec]:
        """What the towers take of uploads, by modality."""
        found: dict[Modality, VideoSpec | AudioSpec] = {}
        for name in self.model.towers:
            spec = self.model.tower(name).spec
            if isinstance(spec, VideoSpec | AudioSpec):
                found.setdefault(spec.modality, spec)
        return found

    def takes_text(self) -> bool:
        return any(isinstance(self.model.tower(name).spec, TextSpec) for name in self.model.towers)

    def by_text(self, text: str, top: int, modality: Modality | None) -> list[Hit]:
        """Raises ConfigError where the model reads no text, or the index has no such modality."""
        return self.index.query(self.model.encode_text(text), top, modality=modality)[0]

    def by_upload(self, path: Path, top: int, modality: Modality | None, seconds: float) -> list[Hit]:
        """Raises SampleError for a file that is no media or takes longer than ``seconds``; as :meth:`by_text`."""
        kind, windows = decoded(path, specs := self.specs(), seconds)
        spec = specs[kind]
        if isinstance(spec, AudioSpec):
            rows = self.model.encode_audio(windows, sample_rate_hz=spec.sample_rate_hz, progress=False)
        else:
            rows = self.model.encode_video(windows, progress=False)
        mean = F.normalize(rows.mean(0, keepdim=True), dim=1) if len(rows) > 1 else rows
        if not bool(torch.isfinite(mean).all()):
            raise SampleError("not_finite", "the model makes no finite numbers of it")
        return self.index.query(mean, top, modality=modality)[0]

    def shown(self, hit: Hit) -> Mapping[str, Any]:
        """A hit as the page takes it; addresses of media are relative to the app."""
        item: dict[str, Any] = {"key": cut(hit.key, 80), "captions": {"0": cut(hit.caption, CAPTION_LETTERS)}}
        if not hit.caption:
            item["captions"] = {}
        if self.shards is not None:
            number = self.shards.number(hit.shard)
            base = f"media/{number}/{hit.index}"
            item |= {kind: f"{base}/{kind}" for kind in self.shards.kinds(number, hit.index)}
        return {"item": item, "modality": hit.modality, "score": hit.score, "shard": hit.shard, "index": hit.index}


class Shards:
    """Samples of a manifest as pictures and sounds; safe to ask from several threads."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest, self._reader = manifest, ShardReader(manifest)
        self._numbers = {manifest.shard_name(number): number for number in range(manifest.num_shards)}
        self._lock = threading.Lock()
        self.kinds: Callable[[int, int], tuple[str, ...]] = lru_cache(MEDIA_KEPT)(self._kinds)
        self.medium: Callable[[int, int, str], Medium] = lru_cache(MEDIA_KEPT)(self._medium)

    def number(self, name: str) -> int:
        return self._numbers[name]

    def holds(self, shard: int, index: int) -> bool:
        return 0 <= shard < self._manifest.num_shards and 0 <= index < int(self._manifest.sizes[shard])

    def _sample(self, shard: int, index: int) -> Sample:
        with self._lock:
            return parse_sample(self._reader.read(shard, index))

    def _kinds(self, shard: int, index: int) -> tuple[str, ...]:
        """What there is to show of a sample, without decoding it."""
        try:
            sample = self._sample(shard, index)
            sounds = sample.audio is not None
            if sample.video is not None and not sounds:
                sounds = probe(bytes(sample.video)).audio is not None
        except (SampleError, RunError):
            return ()
        looks = sample.video is not None or sample.image is not None
        return (
            *(("poster",) if looks else ()),
            *(("clip",) if sample.video is not None else ()),
            *(("waveform", "sound") if sounds else ()),
        )

    def _medium(self, shard: int, index: int, kind: str) -> Medium:
        try:
            made: bytes | None = getattr(SampleMedia(lambda: self._sample(shard, index)), kind)
        except (SampleError, RunError):
            return None
        return None if made is None else (made, media_type(made, kind))
