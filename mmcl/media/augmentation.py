"""What an augmentation may change, and its parameters for one view of one sample.

Parameters are drawn where key and epoch are known, travel with the batch, and are applied by ``mmcl.media.augment`` on
the device that trains. They depend on (seed, epoch, key, view) alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, field_validator, model_validator

from mmcl.config import Options, unknown_name
from mmcl.hashing import hash64, text_hash, uniform
from mmcl.types import AudioSpec, ConfigError, MotionSpec, TextSpec, TimedSpec, VideoSpec, View

Params: TypeAlias = dict[str, np.ndarray]
"""parameters of one row by name; what each means stands in ``augment``"""

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

NONE = "none"
"""the built-in augmentation that changes nothing"""

CROP_TRIES = 10
# what a random number is for, so that no two uses share their numbers
_CROP, _FLIP, _ROTATION, _JITTER, _GREY, _BLUR, _GAIN, _SHIFT, _MASK, _TOKENS, _BAND, _MIX, _ERASE = range(32, 45)


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
    """Changes of tokens, each token on its own; marks such as start and end stay. Applied in this order."""

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
        if isinstance(view.spec, TextSpec) and view.augmentation != NONE:
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


def mask_id(spec: TextSpec) -> int | None:
    """The number that stands for a masked token; None where the tokenizer has none."""
    number = getattr(spec.tokenizer, "mask_id", None)
    return None if number is None else int(number)


def vocabulary(spec: TextSpec) -> int | None:
    """How many different tokens there are; None where the tokenizer does not say."""
    size = getattr(spec.tokenizer, "vocabulary", None)
    return None if size is None else int(size)


def decoded_spec(spec: TimedSpec, augmentation: Augmentation) -> TimedSpec:
    """What to decode for a view of this spec: larger, where the augmentation wants room to crop, and finer motion."""
    if isinstance(spec, VideoSpec):
        return replace(spec, size=_decoded_size(spec.size, augmentation.video))
    if isinstance(spec, MotionSpec):
        return replace(spec, cell=spec.cell / augmentation.video.oversample)
    return spec


def _decoded_size(size: int, options: VideoAugmentation) -> int:
    return round(size * options.oversample)


def draw_params(augmentation: Augmentation, view: View, words: Sequence[int]) -> Params:
    """Parameters of one view of one sample; ``words`` are (seed, epoch, hash of the key).

    Views that differ in their spec or place alone (towers of two sizes, pictures and the motion after them) share their
    draws; ``copy``, ``clip`` and the name of the augmentation make them independent. Names and shapes depend on the
    options alone.
    """
    draws = _Draws((*words, view.clip, text_hash(view.augmentation), view.copy))
    if isinstance(view.spec, VideoSpec):
        return _video_params(augmentation.video, view.spec.size, view.spec.frames, draws)
    if isinstance(view.spec, MotionSpec):
        return _motion_params(augmentation.video, view.spec.size, draws)
    if isinstance(view.spec, AudioSpec):
        return _audio_params(augmentation.audio, view.spec, draws)
    return _text_params(augmentation.text, draws) if isinstance(view.spec, TextSpec) else {}


def blank_params(augmentation: Augmentation, view: View) -> Params:
    """The same names and shapes, zeros: an absent row."""
    return {name: np.zeros_like(value) for name, value in draw_params(augmentation, view, (0,)).items()}


class _Draws:
    """Uniform numbers for one view of one sample, by purpose."""

    def __init__(self, words: tuple[int, ...]) -> None:
        self.words = words

    def __call__(self, purpose: int, count: int) -> np.ndarray:
        """float64 ``(count,)`` in [0, 1)"""
        return uniform(*self.words, purpose, np.arange(count))

    def number(self, purpose: int) -> np.ndarray:
        """0-d int64, any 64 bits"""
        return hash64(*self.words, purpose).astype(np.int64)


def _video_params(options: VideoAugmentation, size: int, frames: int, draws: _Draws) -> Params:
    params = _geometry(options, size, draws)
    if options.rotation is not None:
        chance, turn = draws(_ROTATION, 2)
        degrees = options.rotation.degrees * (2 * turn - 1)
        params["rotation_degrees"] = np.float32(degrees if chance < options.rotation.probability else 0.0)
    if options.jitter is not None:
        params.update(_jitter(options.jitter, draws(_JITTER, 5)))
    if options.grey:
        params["grey"] = draws(_GREY, 1)[0] < options.grey
    if options.blur is not None:
        chance, where = draws(_BLUR, 2)
        sigma = _between(options.blur.sigma, where)
        params["blur_sigma"] = np.float32(sigma if chance < options.blur.probability else 0.0)
    if options.erase is not None:
        chance, where, frame = draws(_ERASE, 3)
        strength = _between(options.erase.strength, where)
        params["erase_frame"] = np.asarray(int(frame * frames))
        params["erase_strength"] = np.float32(strength if chance < options.erase.probability else 0.0)
    if options.mix is not None:
        params.update(_mix_share(options.mix, draws))
    return {name: np.asarray(value) for name, value in params.items()}


def _geometry(options: VideoAugmentation, size: int, draws: _Draws) -> Params:
    params: Params = {}
    if options.crop is not None:
        tries = draws(_CROP, 4 * CROP_TRIES).reshape(4, CROP_TRIES)
        params["crop_box"] = _crop_box(options.crop, _decoded_size(size, options), tries)
    if options.flip:
        params["flip"] = np.asarray(draws(_FLIP, 1)[0] < options.flip)
    return params


def _motion_params(options: VideoAugmentation, size: int, draws: _Draws) -> Params:
    """Box and flip of a picture of this size, the box as shares of its sides."""
    params = _geometry(options, size, draws)
    if "crop_box" in params:
        params["crop_share"] = (params.pop("crop_box") / _decoded_size(size, options)).astype(np.float32)
    return params


def _between(limits: tuple[float, float], u: float) -> float:
    return float(limits[0] + (limits[1] - limits[0]) * u)


def _crop_box(options: CropOptions, size: int, u: np.ndarray) -> np.ndarray:
    """int64 (top, left, height, width) in a ``size`` × ``size`` picture; ``u`` float64 ``(4, tries)``.

    The first try that fits is taken; if none does, the largest centred box of an allowed aspect.
    """
    areas = (options.area[0] + (options.area[1] - options.area[0]) * u[0]) * size * size
    low, high = math.log(options.aspect[0]), math.log(options.aspect[1])
    aspects = np.exp(low + (high - low) * u[1])
    heights = np.rint(np.sqrt(areas / aspects)).astype(np.int64)
    widths = np.rint(np.sqrt(areas * aspects)).astype(np.int64)
    fits = np.flatnonzero((heights >= 1) & (widths >= 1) & (heights <= size) & (widths <= size))
    if len(fits):
        i = fits[0]
        height, width = int(heights[i]), int(widths[i])
        return np.array([int(u[2, i] * (size - height + 1)), int(u[3, i] * (size - width + 1)), height, width])
    height = max(1, min(size, round(size / options.aspect[0])))
    width = max(1, min(size, round(size * options.aspect[1])))
    return np.array([(size - height) // 2, (size - width) // 2, height, width])


def _jitter(options: JitterOptions, u: np.ndarray) -> Params:
    applied = u[0] < options.probability
    ranges = {
        name: (max(0.0, 1.0 - strength), 1.0 + strength)
        for name, strength in (
            ("brightness", options.brightness),
            ("contrast", options.contrast),
            ("saturation", options.saturation),
        )
        if strength
    }
    factors = {
        name: np.asarray(_between(limits, u[1 + i]) if applied else 1.0, dtype=np.float32)
        for i, (name, limits) in enumerate(ranges.items())
    }
    if options.hue:
        factors["hue"] = np.asarray(options.hue * (2 * u[4] - 1) if applied else 0.0, dtype=np.float32)
    return factors


def _audio_params(options: AudioAugmentation, spec: AudioSpec, draws: _Draws) -> Params:
    params: Params = {}
    if options.gain_db is not None:
        decibels = _between(options.gain_db, draws(_GAIN, 1)[0])
        params["gain"] = np.asarray(10.0 ** (decibels / 20.0), dtype=np.float32)
    if options.shift_seconds:
        most = round(options.shift_seconds * spec.sample_rate_hz)
        params["shift_samples"] = np.asarray(int(draws(_SHIFT, 1)[0] * (2 * most + 1)) - most)
    if options.frequency_masks:
        u = draws(_BAND, 2 * options.frequency_masks).reshape(2, -1)
        top_mels = _mels(spec.sample_rate_hz / 2)
        widths = u[0] * options.frequency_mask_width * top_mels
        lowest = u[1] * (top_mels - widths)
        params["frequency_masks"] = _hertz(np.stack([lowest, lowest + widths], axis=1)).astype(np.float32)
    if options.time_masks:
        u = draws(_MASK, 2 * options.time_masks).reshape(2, -1)
        most = min(spec.samples, round(options.time_mask_seconds * spec.sample_rate_hz))
        lengths = (u[0] * (most + 1)).astype(np.int64)
        starts = (u[1] * (spec.samples - lengths + 1)).astype(np.int64)
        params["time_masks"] = np.stack([starts, lengths], axis=1)
    if options.mix is not None:
        params.update(_mix_share(options.mix, draws))
    return params


def _mels(hertz: float) -> float:
    """The mel scale of O'Shaughnessy (1987)."""
    return 2595.0 * math.log10(1.0 + hertz / 700.0)


def _hertz(mels: np.ndarray) -> np.ndarray:
    hertz: np.ndarray = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    return hertz


def _mix_share(options: MixOptions, draws: _Draws) -> Params:
    chance, where = draws(_MIX, 2)
    share = _between(options.share, where) if chance < options.probability else 0.0
    return {f"{options.scope}_mix_share": np.asarray(share, dtype=np.float32)}


def _text_params(options: TextAugmentation, draws: _Draws) -> Params:
    chances = {
        "token_swap": options.swap,
        "token_delete": options.delete,
        "token_mask": options.mask,
        "token_mask_random": options.mask_random,
        "token_mask_keep": options.mask_keep,
    }
    params = {name: np.asarray(chance, dtype=np.float32) for name, chance in chances.items() if chance}
    return {"token_seed": draws.number(_TOKENS), **params} if params else {}
