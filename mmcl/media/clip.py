"""One time window of a sample: picture and sound of the same instants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from mmcl.media.audio import AudioReader, Sound, open_audio
from mmcl.media.frames import Fit, ScalingReader, VideoReader
from mmcl.media.image import decode_image
from mmcl.media.motion import MotionField, MotionReader, motion_maps
from mmcl.media.motion_file import StoredMotion
from mmcl.media.probe import MediaSource, probe
from mmcl.media.video import open_scaling, open_video
from mmcl.media.windows import Short, Window, centred, frame_indices, wanted_times
from mmcl.types import (
    DEFAULT_DECODER,
    AudioSpec,
    Clip,
    Decoder,
    MotionSpec,
    SampleError,
    Source,
    TimedSpec,
    VideoSpec,
)

Scale: TypeAlias = tuple[int, Fit]
"""size and fit of pictures"""


class MediaReader:
    """The media of one sample, opened once for any number of windows; a context manager.

    ``video``, ``image`` and ``audio`` are files (bytes or paths). Without an ``audio`` member the video's own sound
    track is the sound; without a ``video`` member the image is a video of one frame, shown for as long as one asks.
    ``window_seconds``: the [start, end) of the files that the sample is; all times then count from its start, and the
    source ends with it. ``duration_seconds`` and ``source_size`` (displayed height, width) spare a look at the file if
    they are known; ``specs``, all that will be read, spare a second opening of a video whose duration is not known, or
    of which frames in several sizes are wanted: decord and torchcodec scale to one size per open file, so PyAV reads
    these; so it does keyframes. ``motion`` is a stored member of motion; without it motion comes from the video's own
    stream, by a pass of its own.
    Nothing is opened before it is needed.
    """

    def __init__(
        self,
        *,
        video: MediaSource | None = None,
        image: MediaSource | None = None,
        audio: MediaSource | None = None,
        motion: bytes | memoryview | None = None,
        decoder: Decoder = DEFAULT_DECODER,
        threads: int = 1,
        duration_seconds: float | None = None,
        source_size: tuple[int, int] | None = None,
        short: Short = "loop",
        specs: Sequence[TimedSpec] = (),
        window_seconds: tuple[float, float] | None = None,
    ) -> None:
        self._video, self._image = video, image
        self._audio = audio if audio is not None else video
        self._decoder: Decoder = decoder
        self._threads, self._source_size, self._short = threads, source_size, short
        self._duration_seconds = duration_seconds
        self._begin_seconds = 0.0
        if window_seconds is not None:
            self._begin_seconds, self._duration_seconds = window_seconds[0], window_seconds[1] - window_seconds[0]
        self._scales = list(dict.fromkeys((spec.size, spec.fit) for spec in specs if isinstance(spec, VideoSpec)))
        self._keyframes = any(isinstance(spec, VideoSpec) and spec.keyframe for spec in specs)
        self._stored_motion, self._motion = motion, None  # type: bytes | memoryview | None, MotionField | None
        self._readers: dict[Scale, VideoReader] = {}
        self._scaling: ScalingReader | None = None
        self._sound: AudioReader | None = None

    @property
    def duration_seconds(self) -> float:
        """The length of the source: of its video, else of its audio, else 0 (an image).

        Raises ``SampleError`` as ``open_video`` and ``probe`` do.
        """
        if self._duration_seconds is None:
            self._duration_seconds = self._find_duration()
        return self._duration_seconds

    def _find_duration(self) -> float:
        if self._video is None:
            return probe(self._audio).duration_seconds if self._audio is not None else 0.0
        # Not the container's duration: that one includes sound which goes on after the last frame.
        try:
            opened = self._scaling or next(iter(self._readers.values()), None)
            if opened is not None:
                return opened.duration_seconds
            if self._scales:
                return self._open(self._scales).duration_seconds
            with closing(open_video(self._video, decoder="pyav")) as reader:
                return reader.duration_seconds
        except SampleError as error:
            if error.reason != "no_video_stream":
                raise
            return probe(self._video).duration_seconds

    def resolved(self, spec: TimedSpec) -> TimedSpec:
        """The spec with ``stride`` turned into this source's frames per second; any other spec as it is.

        Raises ``SampleError`` as ``open_video`` does.
        """
        if isinstance(spec, AudioSpec) or spec.stride is None:
            return spec
        fps = spec.fps
        if self._video is not None:
            try:
                opened: VideoReader | MotionField
                if isinstance(spec, MotionSpec):
                    opened = self._open_motion(self._video)
                else:
                    opened = self._open(self._scales or [(spec.size, spec.fit)])
                times = opened.frame_times_seconds
            except SampleError as error:
                if error.reason != "no_video_stream":
                    raise
            else:
                if len(times) > 1:
                    fps = (len(times) - 1) / float(times[-1] - times[0]) / spec.stride
        return replace(spec, fps=fps, stride=None)

    def read_all(self, wanted: Sequence[tuple[Window, TimedSpec]]) -> list[np.ndarray | None]:
        """What towers of these specs eat of these windows, each taken round the window's centre (see ``own_window``).

        One pass over the pictures and one over the sound: a frame that several ask for is decoded once, so are
        stretches of sound that overlap or are near. For each uint8 ``(T, 3, H, W)``, float32 ``(S,)`` or, by a pass of
        its own, float32 ``(T, 2, S, S)``; None where the sample has no such modality, also where a video file holds
        sound alone. Raises ``SampleError`` where a member is damaged.
        """
        found: list[np.ndarray | None] = [None] * len(wanted)
        own = [(i, own_window(window, spec), spec) for i, (window, spec) in enumerate(wanted)]
        pictures = [(i, window, spec) for i, window, spec in own if isinstance(spec, VideoSpec)]
        sounds = [(i, window, spec) for i, window, spec in own if isinstance(spec, AudioSpec)]
        motions = [(i, window, spec) for i, window, spec in own if isinstance(spec, MotionSpec)]
        if pictures and sounds:
            self._open_for_both([spec for _, _, spec in pictures])
        # Sound first: decord's thread goes on decoding beside whatever comes after it.
        waves = self._read_waves([(window, spec) for _, window, spec in sounds])
        try:
            frames = self._read_frames([(window, spec) for _, window, spec in pictures])
            maps = self._read_motion([(window, spec) for _, window, spec in motions])
        except SampleError as error:
            if error.reason != "no_video_stream":
                raise
            frames, maps = [None] * len(pictures), [None] * len(motions)
        for (i, _, _), value in zip([*pictures, *sounds, *motions], [*frames, *waves, *maps], strict=True):
            found[i] = value
        return found

    def read(self, window: Window, spec: TimedSpec) -> np.ndarray | None:
        """``read_all`` of one."""
        return self.read_all([(window, spec)])[0]

    def read_video(self, window: Window, spec: VideoSpec) -> tuple[np.ndarray, np.ndarray] | None:
        """Frames uint8 ``(T, 3, H, W)`` and the instants float64 ``(T,)`` they stand for; None without a picture.

        Past the end of a short source the instants go on while the frames are folded back into it.
        Raises ``SampleError``: ``no_video_stream``, ``decode``, … (see ``open_video`` and ``decode_image``).
        """
        frames = self._read_frames([(window, spec)])[0]
        return None if frames is None else (frames, wanted_times(window, spec.frames, spec.fps))

    def read_audio(self, window: Window, spec: AudioSpec) -> np.ndarray | None:
        """float32 ``(S,)`` in [−1, 1] with S = ``spec.samples``; None where there is no sound track."""
        return self._read_waves([(window, spec)])[0]

    def _read_frames(self, wanted: Sequence[tuple[Window, VideoSpec]]) -> list[np.ndarray] | list[None]:
        if not wanted or (self._video is None and self._image is None):
            return [None] * len(wanted)
        self._keyframes |= any(spec.keyframe for _, spec in wanted)
        groups: dict[Scale, list[int]] = {}
        for i, (_, spec) in enumerate(wanted):
            groups.setdefault((spec.size, spec.fit), []).append(i)
        if self._video is None:
            assert self._image is not None
            shown = {scale: decode_image(self._image, size=scale[0], fit=scale[1]) for scale in groups}
            return [np.repeat(shown[spec.size, spec.fit][None], spec.frames, axis=0) for _, spec in wanted]
        reader = self._open(groups)
        indices = [self._frame_numbers(reader, window, spec) for window, spec in wanted]
        if self._scaling is not None:
            near = self._scaling.nearest_keyframes
            indices = [near(own) if spec.keyframe else own for own, (_, spec) in zip(indices, wanted, strict=True)]
        together = [np.concatenate([indices[i] for i in members]) for members in groups.values()]
        if self._scaling is not None:
            scaled = [(numbers, *scale) for numbers, scale in zip(together, groups, strict=True)]
            parts = self._scaling.read_scaled(scaled)
        else:
            parts = [reader.read(together[0])]
        frames: dict[int, np.ndarray] = {}
        for part, members in zip(parts, groups.values(), strict=True):
            ends = np.cumsum([len(indices[i]) for i in members])[:-1]
            frames.update(zip(members, np.split(part, ends), strict=True))
        return [frames[i] for i in range(len(wanted))]

    def _read_motion(self, wanted: Sequence[tuple[Window, MotionSpec]]) -> list[np.ndarray] | list[None]:
        if not wanted or self._video is None:
            return [None] * len(wanted)
        field = self._open_motion(self._video)
        numbers = [self._frame_numbers(field, window, spec) for window, spec in wanted]
        # one pass over the file; scaled each as its own spec says
        parts = np.cumsum([len(own) for own in numbers])[:-1]
        spec = wanted[0][1]
        if all(other == spec for _, other in wanted):
            return np.split(motion_maps(field, np.concatenate(numbers), spec), parts)
        return [motion_maps(field, own, each) for own, (_, each) in zip(numbers, wanted, strict=True)]

    def _open_motion(self, video: MediaSource) -> MotionField:
        if self._motion is None:
            stored = self._stored_motion
            self._motion = MotionReader(video, threads=self._threads) if stored is None else StoredMotion(stored)
        return self._motion

    def _frame_numbers(
        self, reader: VideoReader | MotionField, window: Window, spec: VideoSpec | MotionSpec
    ) -> np.ndarray:
        times = wanted_times(window, spec.frames, spec.fps, duration_seconds=self.duration_seconds, short=self._short)
        return frame_indices(reader.frame_times_seconds, times + self._begin_seconds)

    def _read_waves(self, wanted: Sequence[tuple[Window, AudioSpec]]) -> list[np.ndarray] | list[None]:
        if not wanted or self._audio is None:
            return [None] * len(wanted)
        if self._sound is None:
            self._sound = open_audio(self._audio, container=self._shared_container())
            if self._sound is None:
                return [None] * len(wanted)
        sounds = [Sound(window.start_seconds, spec.samples, spec.sample_rate_hz) for window, spec in wanted]
        return self._sound.read(
            sounds, duration_seconds=self.duration_seconds, short=self._short, begin_seconds=self._begin_seconds
        )

    def _open_for_both(self, specs: Sequence[VideoSpec]) -> None:
        """Opens a video whose reader can share the file with the reader of its sound, before that one opens it too."""
        scales = dict.fromkeys((spec.size, spec.fit) for spec in specs)
        if self._video is None or self._audio is not self._video or (self._decoder == "decord" and len(scales) < 2):
            return
        try:
            self._open(scales)
        except SampleError as error:
            if error.reason != "no_video_stream":
                raise

    def _shared_container(self) -> Any:
        if self._audio is not self._video:
            return None
        return getattr(self._scaling or next(iter(self._readers.values()), None), "shared_container", None)

    def _open(self, scales: Iterable[Scale]) -> VideoReader:
        """A reader of these scales; where several are known of, the one file that gives them all."""
        assert self._video is not None
        asked = list(scales)
        if self._scaling is None and (self._keyframes or len({*self._scales, *asked}) > 1):
            self._scaling = open_scaling(self._video, threads=self._threads)
        if self._scaling is not None:
            return self._scaling
        (scale,) = asked
        if scale not in self._readers:
            self._scales = [scale]
            self._readers[scale] = open_video(
                self._video,
                decoder=self._decoder,
                size=scale[0],
                fit=scale[1],
                threads=self._threads,
                source_size=self._source_size,
            )
        return self._readers[scale]

    def close(self) -> None:
        for reader in (*self._readers.values(), self._scaling, self._sound, self._motion):
            if reader is not None:
                reader.close()
        self._readers.clear()
        self._scaling = self._sound = self._motion = None

    def __enter__(self) -> MediaReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_clip(
    key: str,
    *,
    window: Window,
    video: MediaSource | None = None,
    image: MediaSource | None = None,
    audio: MediaSource | None = None,
    video_spec: VideoSpec | None = None,
    audio_spec: AudioSpec | None = None,
    decoder: Decoder = DEFAULT_DECODER,
    threads: int = 1,
    duration_seconds: float | None = None,
    source_size: tuple[int, int] | None = None,
    short: Short = "loop",
    text: str | None = None,
    source: Source | None = None,
) -> Clip:
    """Decodes one window of a sample; ``MediaReader`` explains the members.

    ``video_spec`` and ``audio_spec`` say what is wanted (None: nothing). Frames and sound that are not as long as the
    window are taken round its centre. A sample without a sound track has ``audio`` None.

    Raises ``SampleError`` where a wanted member is damaged, ``no_video_stream``, or ``no_audio_stream`` (only for a
    separate ``audio`` member that holds no sound).
    """
    frames = times = wave = None
    audio_start_seconds = window.start_seconds
    with MediaReader(
        video=video,
        image=image,
        audio=audio,
        decoder=decoder,
        threads=threads,
        duration_seconds=duration_seconds,
        source_size=source_size,
        short=short,
    ) as reader:
        if video_spec is not None:
            seen = reader.resolved(video_spec)
            assert isinstance(seen, VideoSpec)
            found = reader.read_video(own_window(window, seen), seen)
            if found is not None:
                frames, times = found
        if audio_spec is not None:
            heard = own_window(window, audio_spec)
            audio_start_seconds = heard.start_seconds
            wave = reader.read_audio(heard, audio_spec)
            if wave is None and audio is not None:
                raise SampleError("no_audio_stream", "the file has no audio stream")
    return Clip(
        key=key,
        video=frames,
        frame_times_seconds=times,
        audio=wave,
        sample_rate_hz=audio_spec.sample_rate_hz if audio_spec is not None and wave is not None else None,
        audio_start_seconds=audio_start_seconds,
        text=text,
        source=source,
    )


def own_window(window: Window, spec: TimedSpec) -> Window:
    """The part of a window that a spec sees: as long as the spec, round the same centre, never before 0."""
    same = abs(window.seconds - spec.seconds) < 1e-9
    return window if same else centred(window, spec.seconds)
