"""From a stored sample to the views that objectives asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmcl.data.collate import Value
from mmcl.hashing import text_hash, uniform
from mmcl.media.clip import MediaReader
from mmcl.media.video import Decoder
from mmcl.media.windows import Rule, Short, Window, place_windows
from mmcl.shards.members import Sample
from mmcl.types import SampleError, TextSpec, View

# what a random number is for, so that no two uses share their numbers
_WINDOW, _CAPTION = 16, 17


@dataclass(frozen=True, slots=True)
class ViewMaker:
    """Decodes the declared views of a sample. Random choices are keyed by (seed, epoch, key, view) alone.

    ``rule="random"`` draws windows and captions anew in each epoch; ``"even"`` spaces the windows evenly over the
    sample and takes the first caption (evaluation).
    """

    views: tuple[View, ...]
    seed: int = 0
    rule: Rule = "random"
    decoder: Decoder = "decord"
    short: Short = "loop"

    def __call__(self, sample: Sample, *, epoch: int) -> tuple[dict[View, Value], str]:
        """The views that this sample has, and the caption chosen.

        Raises:
            SampleError: a member of the sample is damaged; the whole sample is then a hole.
        """
        words = (self.seed, epoch, text_hash(sample.key))
        caption = self._caption(sample.captions, words)
        values: dict[View, Value] = {}
        timed = [view for view in self.views if not isinstance(view.spec, TextSpec)]
        if timed and (sample.video is not None or sample.image is not None or sample.audio is not None):
            with MediaReader(
                video=sample.video,
                image=sample.image,
                audio=sample.audio,
                decoder=self.decoder,
                duration_seconds=sample.duration_seconds,
                source_size=sample.video_size,
                short=self.short,
            ) as media:
                windows = self._windows(timed, media.duration_seconds, words)
                for view in timed:
                    assert not isinstance(view.spec, TextSpec)
                    data = media.read(windows[view.clip], view.spec)
                    if data is not None:
                        values[view] = Value(data, windows[view.clip].start_seconds)
        if caption:
            values.update({view: Value(caption) for view in self.views if isinstance(view.spec, TextSpec)})
        if not values:
            raise SampleError("no_views", "the sample has none of the modalities that the run asks for")
        return values, caption

    def _caption(self, captions: Sequence[str], words: tuple[int, ...]) -> str:
        if not captions:
            return ""
        if self.rule == "even":
            return captions[0]
        return captions[int(uniform(*words, _CAPTION) * len(captions))]

    def _windows(self, timed: Sequence[View], duration_seconds: float, words: tuple[int, ...]) -> Mapping[int, Window]:
        """One window per clip number, as long as the longest view asks for."""
        clips = sorted({view.clip for view in timed})
        length_seconds = max(view.spec.seconds for view in timed)
        numbers = [float(uniform(*words, _WINDOW, clip)) for clip in clips]
        windows = place_windows(duration_seconds, length_seconds, len(clips), rule=self.rule, uniform=numbers)
        return dict(zip(clips, windows, strict=True))
