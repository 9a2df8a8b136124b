"""From a stored sample to the views that objectives asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmcl.data.collate import Value, blank_value
from mmcl.data.options import SamplingOptions
from mmcl.data.places import place_views
from mmcl.data.questions import question_texts
from mmcl.hashing import text_hash, uniform
from mmcl.media.augment_words import augment_words
from mmcl.media.augmentation import Augmentation, Params, check_views, decoded_spec
from mmcl.media.augmentation_draws import draw_erase, draw_params
from mmcl.media.clip import MediaReader
from mmcl.media.motion_file import MEMBER as MOTION_MEMBER
from mmcl.media.windows import TOLERANCE_SECONDS, ClipPair, Rule, Short, Window, overlap_clips
from mmcl.shards.members import Sample
from mmcl.shards.vectors import read_vector
from mmcl.types import (
    DEFAULT_DECODER,
    TIMED,
    Decoder,
    QuestionSpec,
    SampleError,
    Spec,
    TextSpec,
    TimedSpec,
    VectorSpec,
    VideoSpec,
    View,
)

# what a random number is for, so that no two uses share their numbers
_CAPTION, _PAIR, _TURN, _QUESTION = 17, 18, 19, 20


@dataclass(frozen=True, slots=True)
class ViewMaker:
    """Decodes the declared views of a sample. Random choices are keyed by (seed, epoch, key, view) alone.

    ``rule="random"`` draws windows and captions anew in each epoch, as ``sampling`` says; ``"even"`` spaces the windows
    evenly over the sample and takes the first captions (evaluation). Text views of different ``clip`` numbers are
    different captions, and question views different questions; those beyond their number are absent. Parameters of
    augmentations are drawn here and applied later, by ``mmcl.media.augment``.

    Raises:
        ConfigError: a view names an augmentation that does not exist.
    """

    views: tuple[View, ...]
    seed: int = 0
    rule: Rule = "random"
    decoder: Decoder = DEFAULT_DECODER
    short: Short = "loop"
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    augmentations: Mapping[str, Augmentation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_views(self.views, self.augmentations, path="data.augmentations")

    def __call__(self, sample: Sample, *, epoch: int, batch: int = 0) -> tuple[dict[View, Value], str]:
        """The views that this sample has, and the caption chosen for clip 0; ``batch``: number of its global batch.

        Raises:
            SampleError: a member of the sample is damaged; the whole sample is then a hole.
        """
        words = (self.seed, epoch, text_hash(sample.key))
        captions = self._captions(sample.captions, words)
        values: dict[View, Value] = {}
        timed = [view for view in self.views if isinstance(view.spec, TIMED)]
        specs = [self._decoded(view) for view in timed]
        if timed and (sample.video is not None or sample.image is not None or sample.audio is not None):
            with MediaReader(
                video=sample.video,
                image=sample.image,
                audio=sample.audio,
                motion=sample.vectors.get(MOTION_MEMBER),
                decoder=self.decoder,
                duration_seconds=sample.duration_seconds,
                source_size=sample.video_size,
                short=self.short,
                specs=specs,
                window_seconds=sample.window_seconds,
            ) as media:
                specs = [media.resolved(spec) for spec in specs]
                placed = self._placed(timed, specs, media.duration_seconds, words)
                found = media.read_all([(window, spec) for _, window, spec, _ in placed])
                for (view, window, _, params), data in zip(placed, found, strict=True):
                    if data is not None:
                        params = {**params, **self._params(view, words, batch)}
                        values[view] = Value(data, window.start_seconds, params)
        for view in self.views:
            if isinstance(view.spec, TextSpec) and view.clip < len(captions):
                spoken = self._words(captions[view.clip], view, words)
                values[view] = Value(spoken, params=self._params(view, words, batch))
            if isinstance(view.spec, QuestionSpec) and view.clip < len(sample.questions):
                values[view] = self._question(sample, view, words, batch)
            if isinstance(view.spec, VectorSpec) and view.spec.member in sample.vectors:
                values[view] = Value(read_vector(sample.vectors[view.spec.member], view.spec.width))
        if not values:
            raise SampleError("no_views", "the sample has none of the modalities that the run asks for")
        return values, captions[0] if captions else ""

    def _question(self, sample: Sample, view: View, words: tuple[int, ...], batch: int) -> Value:
        """As with captions: the first question is drawn, those of other clip numbers follow it."""
        assert isinstance(view.spec, QuestionSpec)
        count = len(sample.questions)
        first = 0 if self.rule == "even" else int(uniform(*words, _QUESTION) * count)
        question = sample.questions[(first + view.clip) % count]
        texts, params = question_texts(view.spec, question, (*words, view.clip), sample.duration_seconds)
        return Value(texts, params={**params, **self._params(view, words, batch)})

    def _captions(self, captions: Sequence[str], words: tuple[int, ...]) -> Sequence[str]:
        """All captions: the first is drawn, the others follow it in their order."""
        first = 0 if self.rule == "even" else int(uniform(*words, _CAPTION) * len(captions))
        return [*captions[first:], *captions[:first]]

    def _placed(
        self, timed: Sequence[View], specs: Sequence[TimedSpec], duration_seconds: float, words: tuple[int, ...]
    ) -> list[tuple[View, Window, TimedSpec, Params]]:
        """Where views lie, and what is drawn with that; without those that the source is too short for."""
        pairs = list(zip(timed, specs, strict=True))
        sampled = [(view, spec) for view, spec in pairs if view.overlap is None]
        windows = place_views(sampled, duration_seconds, words=words, rule=self.rule, sampling=self.sampling)
        placed: list[tuple[View, Window, TimedSpec, Params]] = [
            (view, window, spec, {})
            for (view, spec), window in zip(sampled, windows, strict=True)
            if window is not None
        ]
        placed += [(v, *_half(v, spec, duration_seconds, words)) for v, spec in pairs if v.overlap is not None]
        return placed

    def _decoded(self, view: View) -> TimedSpec:
        """What to decode for a view of picture, motion or sound."""
        assert isinstance(view.spec, TIMED)
        augmentation = self.augmentations.get(view.augmentation)
        if view.overlap is not None and isinstance(view.spec, VideoSpec):
            return replace(view.spec, size=round(view.spec.size * view.overlap.oversample))
        return view.spec if augmentation is None else decoded_spec(view.spec, augmentation)

    def _params(self, view: View, words: tuple[int, ...], batch: int) -> Params:
        augmentation = self.augmentations.get(view.augmentation)
        params = {} if augmentation is None else draw_params(augmentation, view, words)
        return params if view.erase is None else {**params, **draw_erase(view, words, batch)}

    def _words(self, caption: str, view: View, words: tuple[int, ...]) -> str:
        augmentation = self.augmentations.get(view.augmentation)
        if augmentation is None or augmentation.text.words is None:
            return caption
        drawn = (*words, view.clip, text_hash(view.augmentation), view.copy)
        return augment_words(caption, augmentation.text.words, drawn)

    def blank(self, view: View) -> Value:
        """What an absent row of a view holds: zeros in the shapes of the others."""
        like = replace(view, spec=self._decoded(view)) if isinstance(view.spec, TIMED) else view
        params = self._params(view, (0,), 0)
        if view.overlap is not None:
            params = {**_half(view, view.spec, 0.0, (0,))[2], **params}
        blank = blank_value(like)
        return replace(blank, params={**blank.params, **{name: np.zeros_like(each) for name, each in params.items()}})


def _half(view: View, spec: Spec, duration_seconds: float, words: tuple[int, ...]) -> tuple[Window, VideoSpec, Params]:
    """One clip of a pair: its window, its spec at the speed drawn, and how it is cropped, with its labels.

    Labels are int64 classes, the same for both but for ``turns``; −1: the source is too short to have one.
    """
    assert view.overlap is not None and isinstance(spec, VideoSpec)
    how, side = view.overlap, round(view.spec.size * view.overlap.oversample)  # type: ignore[union-attr]
    frames = int((duration_seconds + TOLERANCE_SECONDS) * spec.fps)
    pair: ClipPair = overlap_clips(frames, (side, side), frames=spec.frames, words=(*words, _PAIR), how=how)
    shown = replace(spec, fps=spec.fps / (pair.speed or min(how.speeds)))
    start_seconds = pair.starts[view.clip] / spec.fps
    labels = {
        "overlap_time": -1 if pair.time_rate is None else how.rates.index(pair.time_rate),
        "overlap_space": how.rates.index(pair.space_rate),
        "speed": -1 if pair.speed is None else how.speeds.index(pair.speed),
        "turns": int(4 * uniform(*words, _TURN, view.clip)) if how.turned else 0,
    }
    params = {name: np.asarray(label, dtype=np.int64) for name, label in labels.items()}
    params["crop_box"] = np.asarray(pair.boxes[view.clip], dtype=np.int64)
    return Window(start_seconds, start_seconds + shown.seconds), shown, params
