"""One sample, the same tensors, by several loaders: two clips of 8 frames at 112 px (uint8) and 2 s of log-mel.

Each side reads a folder of shards once in order of the tar (ours: in its own random order), with windows drawn at
random, one thread per decoder, and gives batches of ``BATCH`` samples. All but ours read through ``wds.WebDataset``.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torchaudio
from torch import Tensor

from mmcl.data import ClipStream
from mmcl.media.video import Decoder
from mmcl.shards import load_manifest
from mmcl.types import AudioSpec, VideoSpec, View

CLIP_SECONDS = 10.0
"""of every clip in the shards; SPDL does not say how long a file is"""
FRAMES, SIZE, FPS, SECONDS, RATE_HZ, BATCH = 8, 112, 6.25, 2.0, 16_000, 8
CLIPS = tuple(View(VideoSpec(frames=FRAMES, size=SIZE, fps=FPS), clip) for clip in range(2))
SOUND = View(AudioSpec(sample_rate_hz=RATE_HZ, seconds=SECONDS))
MEL = torchaudio.transforms.MelSpectrogram(sample_rate=RATE_HZ, n_fft=400, hop_length=160, n_mels=80)

Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""two clips uint8 ``(T, C, H, W)`` and a wave float32 ``(S,)``"""
Side: TypeAlias = Callable[[Path, int], int]


def log_mel(waves: Tensor) -> Tensor:
    """float32 ``(B, M, frames)``"""
    mel: Tensor = MEL(waves)
    return mel.clamp_min(1e-6).log()


def ours(decoder: Decoder) -> Side:
    def read(folder: Path, count: int) -> int:
        stream = ClipStream(
            load_manifest(folder), [*CLIPS, SOUND], global_batch=BATCH, in_process=True, seed=0, decoder=decoder
        )
        rows = 0
        for batch in itertools.islice(iter(stream), count // BATCH):
            log_mel(batch.views[SOUND].data)
            assert all(bool(batch.views[view].present.all()) for view in (*CLIPS, SOUND)), batch.skipped
            rows += len(batch)
        return rows

    return read


def through_webdataset(decode: Callable[[bytes, np.random.Generator], Tensors]) -> Side:
    """The loop that everybody writes: the samples of the tars, each decoded, stacked to batches."""

    def read(folder: Path, count: int) -> int:
        import webdataset as wds

        rng = np.random.default_rng(0)
        tars = sorted(map(str, folder.glob("*.tar")))
        rows = 0
        samples = (decode(sample["mp4"], rng) for sample in wds.WebDataset(tars, shardshuffle=False))
        for batch in _batches(itertools.islice(samples, count)):
            first, second, waves = (torch.stack(column) for column in zip(*batch, strict=True))
            assert first.shape == second.shape == (len(batch), FRAMES, 3, SIZE, SIZE)
            assert first.dtype == torch.uint8 and waves.shape == (len(batch), round(SECONDS * RATE_HZ))
            log_mel(waves)
            rows += len(batch)
        return rows

    return read


def _batches(samples: Iterator[Tensors]) -> Iterator[list[Tensors]]:
    while batch := list(itertools.islice(samples, BATCH)):
        yield batch


def _start(rng: np.random.Generator, seconds: float, length: float) -> float:
    return float(rng.uniform(0, max(0.0, seconds - length)))


def _numbers(start: float, fps: float, frames: int) -> np.ndarray:
    return np.clip((start + (np.arange(FRAMES) + 0.5) / FPS) * fps, 0, frames - 1).astype(int)


def _whole_sound(data: bytes, rng: np.random.Generator) -> Tensor:
    """The usual order: load the track, mix to mono, resample it, cut out a window."""
    wave, rate = torchaudio.load(io.BytesIO(data))
    mono = _resampler(rate)(wave.mean(0))
    first = round(_start(rng, len(mono) / RATE_HZ, SECONDS) * RATE_HZ)
    return mono[first : first + round(SECONDS * RATE_HZ)]


_RESAMPLERS: dict[int, Any] = {}


def _resampler(rate_hz: int) -> Any:
    if rate_hz not in _RESAMPLERS:
        _RESAMPLERS[rate_hz] = torchaudio.transforms.Resample(rate_hz, RATE_HZ)
    return _RESAMPLERS[rate_hz]


def _resized_frames(frames: np.ndarray) -> Tensor:
    """uint8 ``(T, H, W, C)`` -> ``(T, C, 112, 112)``, each frame through the transforms of open_clip's pictures."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize, ToPILImage

    transform = Compose(
        [ToPILImage(), Resize(SIZE, interpolation=InterpolationMode.BICUBIC), CenterCrop(SIZE), PILToTensor()]
    )
    return torch.stack([transform(frame) for frame in frames])


def _resized_clip(frames: np.ndarray) -> Tensor:
    """The same by torchvision on the whole uint8 tensor, its fastest form."""
    from torchvision.transforms.v2 import functional

    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized: Tensor = functional.center_crop(functional.resize(pictures, [SIZE], antialias=True), [SIZE, SIZE])
    return resized


def plain(resized: Callable[[np.ndarray], Tensor]) -> Callable[[bytes, np.random.Generator], Tensors]:
    """decord as in open_clip- and video2dataset-style code: a function that decodes one clip, called for each clip."""

    def decode(data: bytes, rng: np.random.Generator) -> Tensors:
        import decord

        def clip() -> Tensor:
            reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
            fps = reader.get_avg_fps()
            numbers = _numbers(_start(rng, len(reader) / fps, FRAMES / FPS), fps, len(reader))
            return resized(reader.get_batch(numbers).asnumpy())

        return clip(), clip(), _whole_sound(data, rng)

    return decode


def plain_one_open(data: bytes, rng: np.random.Generator) -> Tensors:
    """By somebody who opens the file once and asks for the frames of both clips together."""
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    fps = reader.get_avg_fps()
    starts = sorted(_start(rng, len(reader) / fps, FRAMES / FPS) for _ in range(2))
    numbers = np.concatenate([_numbers(start, fps, len(reader)) for start in starts])
    frames = _resized_clip(reader.get_batch(numbers).asnumpy())
    return frames[:FRAMES], frames[FRAMES:], _whole_sound(data, rng)


def torchcodec(mode: str) -> Callable[[bytes, np.random.Generator], Tensors]:
    """torchcodec as its documentation advises: one decoder, scaled while decoding, a range of the sound."""

    def decode(data: bytes, rng: np.random.Generator) -> Tensors:
        from torchcodec.decoders import AudioDecoder, VideoDecoder
        from torchcodec.transforms import CenterCrop, Resize

        scale = [Resize((SIZE, 149)), CenterCrop((SIZE, SIZE))]
        video = VideoDecoder(data, num_ffmpeg_threads=1, seek_mode=mode, transforms=scale)  # type: ignore[arg-type]
        fps, frames = video.metadata.average_fps, len(video)
        assert fps is not None
        starts = [_start(rng, frames / fps, FRAMES / FPS) for _ in range(2)]
        both = video.get_frames_at(np.concatenate([_numbers(start, fps, frames) for start in starts]).tolist()).data
        sound = AudioDecoder(data, sample_rate=RATE_HZ, num_channels=1)
        first = _start(rng, frames / fps, SECONDS + 0.01)
        wave = sound.get_samples_played_in_range(first, first + SECONDS + 0.01).data[0]
        return both[:FRAMES], both[FRAMES:], wave[: round(SECONDS * RATE_HZ)]

    return decode


def spdl(data: bytes, rng: np.random.Generator) -> Tensors:
    """SPDL: one demuxer, only the packets of each window, frames dropped and scaled in its filter graph."""
    import spdl.io

    with spdl.io.Demuxer(data) as demuxer:

        def clip(start: float) -> Tensor:
            window = (start, start + (FRAMES + 1) / FPS)  # one more: its filter may begin one late
            graph = spdl.io.get_video_filter_desc(
                timestamp=window,
                frame_rate=(round(FPS * 100), 100),
                scale_width=149,
                scale_height=SIZE,
                scale_algo="bilinear",
                scale_mode=None,
                crop_width=SIZE,
                crop_height=SIZE,
                pix_fmt="rgb24",
            )
            frames = spdl.io.decode_packets(demuxer.demux_video(window), filter_desc=graph)
            return spdl.io.to_torch(spdl.io.convert_frames(frames))[:FRAMES].permute(0, 3, 1, 2)

        clips = [clip(_start(rng, CLIP_SECONDS - 0.1, (FRAMES + 1) / FPS)) for _ in range(2)]
        first = _start(rng, CLIP_SECONDS - 0.1, SECONDS)
        window = (first, first + SECONDS)
        graph = spdl.io.get_audio_filter_desc(
            timestamp=window, sample_rate=RATE_HZ, num_channels=1, num_frames=round(SECONDS * RATE_HZ)
        )
        sound = spdl.io.decode_packets(demuxer.demux_audio(window), filter_desc=graph)
        return clips[0], clips[1], spdl.io.to_torch(spdl.io.convert_frames(sound))[0]
