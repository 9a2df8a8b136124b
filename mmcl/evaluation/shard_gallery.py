"""The items of embedded shards as a report shows them; every picture and sound is decoded when the page asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cached_property
from typing import overload

import numpy as np

from mmcl.evaluation.embed import EmbeddedItem, EmbeddedShards
from mmcl.evaluation.gallery import (
    SOUND_RATE_HZ,
    SOUND_SECONDS,
    Showable,
    clip_webp,
    poster_jpeg,
    sound_webm,
    waveform_svg,
)
from mmcl.media.clip import MediaReader
from mmcl.media.image import decode_image
from mmcl.media.video import open_video
from mmcl.media.windows import Window, frame_indices
from mmcl.shards.manifest import Manifest
from mmcl.shards.members import Sample, parse_sample
from mmcl.shards.reader import ShardReader
from mmcl.types import AudioSpec, Modality, SampleError

WAVE_RATE_HZ = 4000
WAVE_SECONDS = 10.0
CLIP_SECONDS = 3.0
CLIP_FRAMES = 12


class ShardGallery(Sequence[Showable]):
    """The items of some embedded shards, in their order."""

    def __init__(self, manifest: Manifest, embedded: EmbeddedShards) -> None:
        self._reader = ShardReader(manifest)
        self._ends = np.cumsum(manifest.sizes)
        self._embedded = embedded
        self._have = {modality: set(owners.tolist()) for modality, owners in embedded.owners.items()}

    def __len__(self) -> int:
        return len(self._embedded.items)

    @overload
    def __getitem__(self, number: int) -> ShardItem: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[ShardItem]: ...
    def __getitem__(self, number: int | slice) -> ShardItem | Sequence[ShardItem]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        missing = tuple(modality for modality, owners in self._have.items() if number not in owners)
        return ShardItem(self, self._embedded.items[number], missing)

    def sample(self, draw: int) -> Sample:
        """The sample of this number in the shards."""
        shard = int(np.searchsorted(self._ends, draw, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        return parse_sample(self._reader.read(shard, draw - first))


class SampleMedia:
    """What a page shows of one sample; what cannot be decoded, or is not there, is None."""

    def __init__(self, read: Callable[[], Sample]) -> None:
        self._read = read

    @cached_property
    def _sample(self) -> Sample:
        return self._read()

    @property
    def poster(self) -> bytes | None:
        """The middle frame, or the image."""
        frames = self._frames(1, 0.0)
        return None if frames is None else poster_jpeg(frames[0])

    @property
    def clip(self) -> bytes | None:
        """The middle :data:`CLIP_SECONDS`."""
        frames = None if self._sample.video is None else self._frames(CLIP_FRAMES, CLIP_SECONDS)
        return None if frames is None else clip_webp(frames, CLIP_SECONDS)

    @property
    def waveform(self) -> bytes | None:
        wave = self._wave(WAVE_RATE_HZ, WAVE_SECONDS)
        return None if wave is None else waveform_svg(wave)

    @property
    def sound(self) -> bytes | None:
        wave = self._wave(SOUND_RATE_HZ, SOUND_SECONDS)
        return None if wave is None else sound_webm(wave)

    def _frames(self, count: int, seconds: float) -> np.ndarray | None:
        """uint8 ``(count, 3, H, W)``, evenly over the middle ``seconds``."""
        sample = self._sample
        try:
            if sample.video is None:
                return None if sample.image is None else decode_image(sample.image)[None]
            with closing(open_video(sample.video, decoder="pyav")) as reader:
                start, end = sample.window_seconds or (0.0, reader.duration_seconds)
                half = min(seconds, end - start) / 2
                edges = np.linspace((start + end) / 2 - half, (start + end) / 2 + half, count + 1)
                wanted = (edges[1:] + edges[:-1]) / 2
                return np.asarray(reader.read(frame_indices(reader.frame_times_seconds, wanted)))
        except SampleError:
            return None

    def _wave(self, rate_hz: int, longest_seconds: float) -> np.ndarray | None:
        """float32 ``(S,)`` of the middle of the sound."""
        sample = self._sample
        try:
            with MediaReader(
                video=sample.video,
                image=sample.image,
                audio=sample.audio,
                duration_seconds=sample.duration_seconds,
                window_seconds=sample.window_seconds,
            ) as media:
                seconds = min(max(media.duration_seconds, 0.1), longest_seconds)
                start = max(0.0, (media.duration_seconds - seconds) / 2)
                return media.read_audio(Window(start, start + seconds), AudioSpec(rate_hz, seconds))
        except SampleError:
            return None


class ShardItem(SampleMedia):
    """One embedded item."""

    def __init__(self, gallery: ShardGallery, item: EmbeddedItem, missing: tuple[Modality, ...]) -> None:
        super().__init__(lambda: gallery.sample(item.draw))
        self.key, self.captions, self.missing = item.key, item.captions, missing
