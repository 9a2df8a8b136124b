"""Video through torchcodec."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.format import VideoFormat

from mmcl.media.frames import Fit, has_index
from mmcl.media.probe import DECODE_ERRORS, MediaSource, quarter_turns, read_head, short_message
from mmcl.media.video_pyav import PyAVReader
from mmcl.types import ConfigError, SampleError

_COLORSPACES = {"gbr": 0, "bt709": 1, "fcc": 4, "bt470bg": 5, "smpte170m": 6, "smpte240m": 7, "ycgco": 8}
_COLORSPACES |= {"bt2020nc": 9, "bt2020c": 10, "smpte2085": 11, "ictcp": 14}
"""FFmpeg's names and numbers; all others are as unspecified"""
_UNSPECIFIED = 2
_RANGES = {"tv": 1, "pc": 2}


class TorchCodecRefusedError(Exception):
    """torchcodec does not give the stored samples of this file."""


class _Decoded(NamedTuple):
    """A frame that torchcodec has decoded; its samples are copied only where it is wanted."""

    pts: int
    raw: Any


class TorchCodecReader(PyAVReader):
    """Frames that torchcodec seeks and decodes; PyAV lists them before and scales their stored samples after.

    torchcodec's own conversion to RGB happens before it scales: up to 15 levels away from scaling the stored samples.
    """

    _errors = (*DECODE_ERRORS, RuntimeError)

    def __init__(self, data: MediaSource, size: int | None, fit: Fit, threads: int) -> None:
        decoders = _decoders()
        if not has_index(read_head(data, 12)):  # there it seeks to wrong frames
            raise TorchCodecRefusedError
        super().__init__(data, size, fit, 1)
        self._skips = False
        try:
            if not _has_planes(self.codec_context.format):
                raise TorchCodecRefusedError
            self._connect(decoders, data, threads)
        except self._errors as error:
            self.close()
            raise SampleError("decode", short_message(error)) from error
        except TorchCodecRefusedError:
            self.close()
            raise

    def _connect(self, decoders: Any, data: MediaSource, threads: int) -> None:
        file = f"file:{Path(data).absolute()}" if isinstance(data, (str, Path)) else bytes(data)
        self._demuxer = decoders.Demuxer(file, streams=self._stream.index)
        self._decoder = self._demuxer.streams[0].make_decoder("cpu", num_ffmpeg_threads=threads)

    def _seek(self, pts: int) -> None:
        self._demuxer.seek(float(pts * self._stream.time_base))
        self._decoder.reset()

    def _frames(self, needed_pts: set[int] | None) -> Iterator[_Decoded]:
        ticks = 1 / self._stream.time_base
        for packet in self._demuxer:
            for raw in self._decoder.decode(packet):
                yield _Decoded(round(raw.pts_seconds * ticks), raw)
        for raw in self._decoder.drain():
            yield _Decoded(round(raw.pts_seconds * ticks), raw)

    def _picture(self, frame: _Decoded, size: int | None, fit: Fit) -> np.ndarray:
        return self._scaled(_as_pyav(frame.raw), quarter_turns(frame.raw), size, fit)

    def close(self) -> None:
        self._demuxer = self._decoder = None
        super().close()


def _decoders() -> Any:
    try:
        decoders = importlib.import_module("torchcodec.decoders")
    except (ImportError, RuntimeError, OSError) as error:  # the latter two: FFmpeg's libraries are missing
        raise ConfigError(
            f"decoder 'torchcodec' cannot be loaded ({short_message(error)}): "
            "pip install 'mmcl[torchcodec]' and the system's FFmpeg libraries"
        ) from error
    if not hasattr(decoders, "Demuxer"):
        raise ConfigError("decoder 'torchcodec' gives no stored samples before version 0.17: pip install -U torchcodec")
    return decoders


def _has_planes(pixels: VideoFormat | None) -> bool:
    """Whether every component of a picture has a plane of its own, of whole bytes."""
    if pixels is None or pixels.has_palette or pixels.is_bit_stream:
        return False
    return all(part.plane == i and 8 <= part.bits <= 16 for i, part in enumerate(pixels.components))


def _as_pyav(raw: Any) -> av.VideoFrame:
    frame = av.VideoFrame(raw.width, raw.height, raw.pixel_format)
    for plane, samples in zip(frame.planes, raw.planes, strict=True):
        rows = samples.numpy().view(np.uint8)
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: len(rows), : rows.shape[1]] = rows
    frame.pts = 0
    frame.colorspace = _COLORSPACES.get(raw.color_space, _UNSPECIFIED)
    frame.color_range = _RANGES.get(raw.color_range, 0)
    return frame
