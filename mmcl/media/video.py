"""Frames of a video, decoded and scaled in one pass, behind one protocol for three decoders.

Open a reader in the process that reads it (never before a fork) and use it from one thread.
"""

from __future__ import annotations

from mmcl.media.frames import FITS, Fit, ScalingReader, VideoReader
from mmcl.media.probe import MediaSource
from mmcl.media.video_decord import DecordReader, DecordRefusedError
from mmcl.media.video_pyav import PyAVReader
from mmcl.media.video_torchcodec import TorchCodecReader, TorchCodecRefusedError
from mmcl.types import DEFAULT_DECODER, ConfigError, Decoder


def open_video(
    data: MediaSource,
    *,
    decoder: Decoder = DEFAULT_DECODER,
    size: int | None = None,
    fit: Fit = "crop",
    threads: int = 1,
    source_size: tuple[int, int] | None = None,
) -> VideoReader:
    """Opens the video stream of a file for reading single frames.

    ``size``: frames come out as ``size`` × ``size`` pixels (None: as they are displayed). ``fit="crop"`` scales the
    short side to ``size`` and cuts out the centre (``"crop_start"``, ``"crop_end"``: the start or end of the long
    side), ``"squash"`` scales both sides. ``source_size`` is the displayed (height, width) where the caller knows it,
    which saves decord a look at the file.
    All decoders give the same frames. decord gives way to PyAV where it is not installed, where it refuses a file, and
    for files that it is known to get wrong: edit lists, containers without an index, a rotation in MKV, and, where the
    height is kept, 4:2:0 of more than 8 bits, of odd height or with another width. torchcodec gives way for containers
    without an index and for samples that are not in planes (packed RGB, palettes). decord ends the process on some
    damaged files; PyAV does not. Pictures are those of the stored levels: HDR tags are ignored (``probe`` names them).

    Raises ``SampleError``: ``missing_file``, ``unreadable``, ``empty``, ``not_media``, ``no_video_stream``,
    ``too_large``, ``truncated``, ``decode``; ``ConfigError`` for an unknown decoder or one that is not installed.
    """
    if fit not in FITS:
        raise ConfigError(f"fit is {fit!r}; allowed: {', '.join(map(repr, FITS))}")
    if decoder == "pyav":
        return PyAVReader(data, size, fit, threads)
    if decoder not in ("decord", "torchcodec"):
        raise ConfigError(f"decoder is {decoder!r}; allowed: 'decord', 'pyav', 'torchcodec'")
    try:
        if decoder == "torchcodec":
            return TorchCodecReader(data, size, fit, threads)
        return DecordReader(data, size, fit, threads, source_size)
    except (DecordRefusedError, TorchCodecRefusedError):
        return PyAVReader(data, size, fit, threads)


def open_scaling(data: MediaSource, *, threads: int = 1) -> ScalingReader:
    """Opens a video for reading frames in several sizes in one pass, which PyAV alone can.

    Raises ``SampleError`` as ``open_video`` does.
    """
    return PyAVReader(data, None, "crop", threads)
