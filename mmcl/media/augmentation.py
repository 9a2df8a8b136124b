"""What an augmentation may change. ``mmcl.media.augmentation_draws`` draws how, ``mmcl.media.augment`` does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, field_validator, model_validator

from mmcl.config import Options, unknown_name
from mmcl.media.augment_words import WordOptions
from mmcl.types import READ, ConfigError, MotionSpec, QuestionSpec, TextSpec, TimedSpec, VideoSpec, View

Params: TypeAlias = dict[str, np.ndarray]
"""parameters of one row by name; what each means stands in ``augment``"""

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

NONE = "none"
"""the built-in augmentation that changes nothing"""


class _Ranges(Options):
    """Pairs [smallest, largest], in this order; YAML writes them as lists."""

    @field_validator("*", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("*")
    @classmethod
    def _ordered(cls, value: Any) -> Any:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError("must be [smallest, largest]")
        return value


class CropOptions(_Ranges):
    """A random part of the picture, scaled to the size of the view (Szegedy et al. 2015, arXiv 1409.4842)."""

    area: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.3, 1.0)
    """share of the picture's area, uniform"""
    aspect: tuple[Positive, Positive] = (0.75, 4 / 3)
    """width ÷ height, log-uniform"""


class JitterOptions(Options):
    """Brightness, contrast, saturation, hue, in this order (Chen et al. 2020, arXiv 2002.05709, appendix A)."""

    probability: Probability = 0.8
    brightness: Annotated[float, Field(ge=0)] = 0.4
    """the factor is uniform in [max(0, 1 − x), 1 + x]"""
    contrast: Annotated[float, Field(ge=0)] = 0.4
    saturation: Annotated[float, Field(ge=0)] = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """turn of the hue in full circles, uniform in [−x, x]"""


class BlurOptions(_Ranges):
    """Gaussian blur; the kernel is a tenth of the picture wide."""

    probability: Probability = 0.5
    sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """standard deviation in pixels, uniform"""


class RotationOptions(Options):
    """Turns round the centre; what comes in from outside is black."""

    probability: Probability = 1.0
    degrees: Annotated[float, Field(gt=0, le=180)] = 10.0
    """uniform in [−x, x], counter-clockwise"""


class EraseOptions(_Ranges):
    """One frame of the clip laid over all of them: background erasing (Wang et al. 2021, arXiv 2009.05769)."""

    probability: Probability = 1.0
    strength: tuple[Probability, Probability] = (0.0, 0.3)
    """share of that frame, uniform"""


class MixOptions(_Ranges):
    """A part of another sample of the batch, laid over last (Zhang et al. 2018, arXiv 1710.09412)."""

    probability: Probability = 1.0
    share: tuple[Probability, Probability] = (0.0, 0.5)
    """of the other sample, uniform"""
    beta: Annotated[float, Field(gt=0, le=1)] | None = None
    """draw the share from Beta(x, x) within the limits of ``share`` instead (M3CoL: 0.15, with limits 0 and 1)"""
    scope: Literal["rank", "global"] = "rank"
    """choose the other among the rows of the same rank, or of all: the same on any number of ranks, for an exchange"""


class VideoAugmentation(Options):
    """Changes of pictures, the same for all frames of a clip; applied in the order of these keys."""

    oversample: Annotated[float, Field(ge=1, le=4)] = 1.0
    """decode pictures this many times larger than the view, so that a small crop is not a blurred one"""
    crop: CropOptions | None = None
    flip: Probability = 0.0
    """left for right"""
    rotation: RotationOptions | None = None
    jitter: JitterOptions | None = None
    grey: Probability = 0.0
    blur: BlurOptions | None = None
    erase: EraseOptions | None = None
    mix: MixOptions | None = None


class AudioAugmentation(_Ranges):
    """Changes of the wave; applied in the order of these keys."""

    gain_db: tuple[float, float] | None = None
    """[least, most], uniform; the result is clipped to [−1, 1]"""
    shift_seconds: Annotated[float, Field(ge=0)] = 0.0
    """later or earlier by at most this, uniform; silence comes in from the other side"""
    frequency_masks: Annotated[int, Field(ge=0, le=64)] = 0
    """bands of silence (SpecAugment: Park et al. 2019, arXiv 1904.08779)"""
    frequency_mask_width: Annotated[float, Field(gt=0, le=1)] = 0.2
    """width of each as a share of the mel scale, uniform from 0 to this"""
    time_masks: Annotated[int, Field(ge=0, le=64)] = 0
    """stretches of silence"""
    time_mask_seconds: Positive = 0.2
    """length of each, uniform from 0 to this"""
    mix: MixOptions | None = None


class TextAugmentation(Options):
    """Changes of words, then of tokens, each on its own; marks such as start and end stay. Applied in this order."""

    words: WordOptions | None = None
    swap: Probability = 0.0
    """a token changes places with its neighbour"""
    delete: Probability = 0.0
    """at least one token stays"""
    mask: Probability = 0.0
    """a token becomes the tokenizer's mask token"""
    mask_random: Probability = 0.0
    """share of the masked tokens that become any token of the vocabulary instead (BERT: 0.1)"""
    mask_keep: Probability = 0.0
    """share of the masked tokens that stay as they are, and still count as masked (BERT: 0.1)"""

    @model_validator(mode="after")
    def _shares(self) -> TextAugmentation:
        if self.mask_random + self.mask_keep > 1:
            raise ValueError(f"mask_random {self.mask_random:g} and mask_keep {self.mask_keep:g} exceed 1 together")
        if (self.mask_random or self.mask_keep) and not self.mask:
            raise ValueError("mask_random and mask_keep are shares of mask, which is 0")
        return self


class Augmentation(Options):
    """One named augmentation: what it does to views of each modality."""

    video: VideoAugmentation = VideoAugmentation()
    audio: AudioAugmentation = AudioAugmentation()
    text: TextAugmentation = TextAugmentation()


def check_views(views: Sequence[View], augmentations: Mapping[str, Augmentation], *, path: str) -> None:
    """Refuses views that name an augmentation which does not exist, or which their tokenizer cannot carry out.

    Raises:
        ConfigError: names ``path``, the name and the nearest known one.
    """
    if NONE in augmentations:
        raise ConfigError(f"{path}.{NONE}: this name is built in and changes nothing; choose another")
    for view in views:
        if view.augmentation != NONE and view.augmentation not in augmentations:
            raise unknown_name(path, view.augmentation, [*augmentations, NONE])
        if view.augmentation != NONE:
            _check_once(view, augmentations[view.augmentation].video, f"{path}.{view.augmentation}.video")
        if isinstance(view.spec, READ) and view.augmentation != NONE:
            text = augmentations[view.augmentation].text
            if text.mask and mask_id(view.spec) is None:
                raise ConfigError(
                    f"{path}.{view.augmentation}.text.mask: {text.mask}, but {view.spec.tokenizer!r} has no mask token"
                )
            if text.mask_random and vocabulary(view.spec) is None:
                raise ConfigError(
                    f"{path}.{view.augmentation}.text.mask_random: {text.mask_random}, but {view.spec.tokenizer!r} "
                    "does not say how large its vocabulary is"
                )


def _check_once(view: View, options: VideoAugmentation, path: str) -> None:
    """ConfigError where an augmentation does what a view has of itself."""
    if view.erase is not None and options.erase is not None:
        raise ConfigError(f"{path}.erase: the objective erases these views itself; leave one of the two out")
    if view.overlap is not None and (options.crop is not None or options.oversample != 1):
        name = "crop" if options.crop is not None else "oversample"
        raise ConfigError(f"{path}.{name}: the objective crops these views itself, so that their overlap is known")


def mask_id(spec: TextSpec | QuestionSpec) -> int | None:
    """The number that stands for a masked token; None where the tokenizer has none."""
    number = getattr(spec.tokenizer, "mask_id", None)
    return None if number is None else int(number)


def vocabulary(spec: TextSpec | QuestionSpec) -> int | None:
    """How many different tokens there are; None where the tokenizer does not say."""
    size = getattr(spec.tokenizer, "vocabulary", None)
    return None if size is None else int(size)


def decoded_spec(spec: TimedSpec, augmentation: Augmentation) -> TimedSpec:
    """What to decode for a view of this spec: larger, where the augmentation wants room to crop, and finer motion."""
    if isinstance(spec, VideoSpec):
        return replace(spec, size=decoded_size(spec.size, augmentation.video))
    if isinstance(spec, MotionSpec):
        return replace(spec, cell=spec.cell / augmentation.video.oversample)
    return spec


def decoded_size(size: int, options: VideoAugmentation) -> int:
    """Pixels, height = width, of what is decoded for a view of this size."""
    return round(size * options.oversample)
