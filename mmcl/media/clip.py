"""One time window of a sample: picture and sound of the same instants."""

from __future__ import annotations

from types import TracebackType

import numpy as np

from mmcl.media.audio import read_audio
from mmcl.media.image import decode_image
from mmcl.media.probe import MediaSource, probe
from mmcl.media.video import Decoder, Fit, VideoReader, open_video
from mmcl.media.windows import Short, Window, centred, frame_indices, wanted_times
from mmcl.types import AudioSpec, Clip, SampleError, Source, VideoSpec


class MediaReader:
    """The media of one sample, opened once for any number of windows; a context manager.

    ``video``, ``image`` and ``audio`` are files (bytes or paths). Without an ``audio`` member the video's own sound
    track is the sound; without a ``video`` member the image is a video of one frame, shown for as long as one asks.
    ``duration_seconds`` and ``source_size`` (displayed height, width) spare a look at the file where they are known.
    Nothing is opened before it is needed.
    """

    def __init__(
        self,
        *,
        video: MediaSource | None = None,
        image: MediaSource | None = None,
        audio: MediaSource | None = None,
        decoder: Decoder = "decord",
        threads: int = 1,
        duration_seconds: float | None = None,
        source_size: tuple[int, int] | None = None,
        short: Short = "loop",
    ) -> None:
        self._video, self._image = video, image
        self._audio = audio if audio is not None else video
        self._decoder: Decoder = decoder
        self._threads, self._source_size, self._short = threads, source_size, short
        self._duration_seconds = duration_seconds
        self._readers: dict[tuple[int, Fit], VideoReader] = {}

    @property
    def duration_seconds(self) -> float:
        """The length of the source: of its video, else of its audio, else 0 (an image).

        Raises ``SampleError`` as ``open_video`` and ``probe`` do.
        """
        if self._duration_seconds is None:
            self._duration_seconds = self._find_duration()
        return self._duration_seconds

    def _find_duration(self) -> float:
        if self._readers:
            return next(iter(self._readers.values())).duration_seconds
        if self._video is not None:
            info = probe(self._video)
            if info.video is None:
                return info.duration_seconds
            # Not the container's duration: that one includes sound which goes on after the last frame.
            reader = open_video(self._video, decoder="pyav")
            try:
                return reader.duration_seconds
            finally:
                reader.close()
        return probe(self._audio).duration_seconds if self._audio is not None else 0.0

    def read_video(self, window: Window, spec: VideoSpec) -> tuple[np.ndarray, np.ndarray] | None:
        """Frames uint8 ``(T, 3, H, W)`` and the instants float64 ``(T,)`` they stand for; None without a picture.

        Past the end of a short source the instants go on while the frames are folded back into it.
        Raises ``SampleError``: ``no_video_stream``, ``decode``, … (see ``open_video`` and ``decode_image``).
        """
        times = wanted_times(window, spec.frames, spec.fps)
        if self._video is not None:
            reader = self._reader(spec)
            folded = wanted_times(
                window, spec.frames, spec.fps, duration_seconds=self.duration_seconds, short=self._short
            )
            return reader.read(frame_indices(reader.frame_times_seconds, folded)), times
        if self._image is not None:
            picture = decode_image(self._image, size=spec.size, fit=spec.fit)
            return np.repeat(picture[None], spec.frames, axis=0), times
        return None

    def read_audio(self, window: Window, spec: AudioSpec) -> np.ndarray | None:
        """float32 ``(S,)`` in [−1, 1] with S = ``spec.samples``; None where there is no sound track."""
        if self._audio is None:
            return None
        return read_audio(
            self._audio,
            start_seconds=window.start_seconds,
            end_seconds=window.start_seconds + spec.samples / spec.sample_rate_hz,
            sample_rate_hz=spec.sample_rate_hz,
            duration_seconds=self.duration_seconds,
            short=self._short,
        )

    def read(self, window: Window, spec: VideoSpec | AudioSpec) -> np.ndarray | None:
        """What a tower of this spec eats of a window, taken round its centre where the lengths differ.

        uint8 ``(T, 3, H, W)`` or float32 ``(S,)``; None where the sample has no such modality, also where a video file
        holds sound alone. Raises ``SampleError`` where a member is damaged.
        """
        own = _of_length(window, spec.seconds)
        if isinstance(spec, AudioSpec):
            return self.read_audio(own, spec)
        try:
            found = self.read_video(own, spec)
        except SampleError as error:
            if error.reason == "no_video_stream":
                return None
            raise
        return None if found is None else found[0]

    def _reader(self, spec: VideoSpec) -> VideoReader:
        key = (spec.size, spec.fit)
        if key not in self._readers:
            assert self._video is not None
            self._readers[key] = open_video(
                self._video,
                decoder=self._decoder,
                size=spec.size,
                fit=spec.fit,
                threads=self._threads,
                source_size=self._source_size,
            )
        return self._readers[key]

    def close(self) -> None:
        while self._readers:
            self._readers.popitem()[1].close()

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
    decoder: Decoder = "decord",
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
            found = reader.read_video(_of_length(window, video_spec.seconds), video_spec)
            if found is not None:
                frames, times = found
        if audio_spec is not None:
            heard = _of_length(window, audio_spec.seconds)
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


def _of_length(window: Window, length_seconds: float) -> Window:
    same = abs(window.seconds - length_seconds) < 1e-9
    return window if same else centred(window, length_seconds)
