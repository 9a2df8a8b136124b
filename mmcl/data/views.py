"""From a stored sample to the views that objectives asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mmcl.data.collate import Value, blank_value
from mmcl.data.options import SamplingOptions
from mmcl.data.places import place_views
from mmcl.hashing import text_hash, uniform
from mmcl.media.augmentation import Augmentation, Params, blank_params, check_views, decoded_spec, draw_params
from mmcl.media.clip import MediaReader
from mmcl.media.motion_file import MEMBER as MOTION_MEMBER
from mmcl.media.windows import Rule, Short
from mmcl.shards.members import Sample
from mmcl.shards.vectors import read_vector
from mmcl.types import DEFAULT_DECODER, TIMED, Decoder, SampleError, TextSpec, TimedSpec, VectorSpec, View

# what a random number is for, so that no two uses share their numbers
_CAPTION = 17


@dataclass(frozen=True, slots=True)
class ViewMaker:
    """Decodes the declared views of a sample. Random choices are keyed by (seed, epoch, key, view) alone.

    ``rule="random"`` draws windows and captions anew in each epoch, as ``sampling`` says; ``"even"`` spaces the windows
    evenly over the sample and takes the first captions (evaluation). Text views of different ``clip`` numbers are
    different captions; those beyond the number of captions are absent. Parameters of augmentations are drawn here and
    applied later, by ``mmcl.media.augment``.

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

    def __call__(self, sample: Sample, *, epoch: int) -> tuple[dict[View, Value], str]:
        """The views that this sample has, and the caption chosen for clip 0.

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
                windows = place_views(
                    timed, specs, media.duration_seconds, words=words, rule=self.rule, sampling=self.sampling
                )
                placed = [(v, w, spec) for v, w, spec in zip(timed, windows, specs, strict=True) if w is not None]
                found = media.read_all([(window, spec) for _, window, spec in placed])
                for (view, window, _), data in zip(placed, found, strict=True):
                    if data is not None:
                        values[view] = Value(data, window.start_seconds, self._params(view, words))
        for view in self.views:
            if isinstance(view.spec, TextSpec) and view.clip < len(captions):
                values[view] = Value(captions[view.clip], params=self._params(view, words))
            if isinstance(view.spec, VectorSpec) and view.spec.member in sample.vectors:
                values[view] = Value(read_vector(sample.vectors[view.spec.member], view.spec.width))
        if not values:
            raise SampleError("no_views", "the sample has none of the modalities that the run asks for")
        return values, captions[0] if captions else ""

    def _captions(self, captions: Sequence[str], words: tuple[int, ...]) -> Sequence[str]:
        """All captions: the first is drawn, the others follow it in their order."""
        first = 0 if self.rule == "even" else int(uniform(*words, _CAPTION) * len(captions))
        return [*captions[first:], *captions[:first]]

    def _decoded(self, view: View) -> TimedSpec:
        """What to decode for a view of picture, motion or sound."""
        assert isinstance(view.spec, TIMED)
        augmentation = self.augmentations.get(view.augmentation)
        return view.spec if augmentation is None else decoded_spec(view.spec, augmentation)

    def _params(self, view: View, words: tuple[int, ...]) -> Params:
        augmentation = self.augmentations.get(view.augmentation)
        return {} if augmentation is None else draw_params(augmentation, view, words)

    def blank(self, view: View) -> Value:
        """What an absent row of a view holds: zeros in the shapes of the others."""
        augmentation = self.augmentations.get(view.augmentation)
        if augmentation is None:
            return blank_value(view)
        like = replace(view, spec=self._decoded(view)) if isinstance(view.spec, TIMED) else view
        return replace(blank_value(like), params=blank_params(augmentation, view))
