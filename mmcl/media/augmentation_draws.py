"""The parameters of an augmentation for one view of one sample.

They are drawn where key and epoch are known, travel with the batch, and are applied by ``mmcl.media.augment`` on the
device that trains. They depend on (seed, epoch, key, view) alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mmcl.hashing import hash64, text_hash, uniform
from mmcl.media.augmentation import (
    AudioAugmentation,
    Augmentation,
    CropOptions,
    JitterOptions,
    MixOptions,
    Params,
    TextAugmentation,
    VideoAugmentation,
    decoded_size,
)
from mmcl.types import READ, AudioSpec, MotionSpec, VideoSpec, View

CROP_TRIES = 10
BETA_TRIES = 16
# what a random number is for, so that no two uses share their numbers
_CROP, _FLIP, _ROTATION, _JITTER, _GREY, _BLUR, _GAIN, _SHIFT, _MASK, _TOKENS, _BAND, _MIX, _ERASE = range(32, 45)


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
    return _text_params(augmentation.text, draws) if isinstance(view.spec, READ) else {}


def draw_erase(view: View, words: Sequence[int], batch: int) -> Params:
    """Parameters of the erasing that a view itself asks for; ``words`` as for :func:`draw_params`.

    ``batch``: number of the global batch, which decides a strength that all its rows share.
    """
    assert view.erase is not None and isinstance(view.spec, VideoSpec)
    own = (view.clip, text_hash(view.augmentation), view.copy)
    _, where, frame = _Draws((*words, *own))(_ERASE, 3)
    if view.erase.per == "batch":
        where = _Draws((words[0], batch, *own))(_ERASE, 1)[0]
    return _erase_params(view.erase.strength, where, frame, view.spec.frames)


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
        params.update(_erase_params(options.erase.strength, where, frame, frames))
        if chance >= options.erase.probability:
            params["erase_strength"] = np.zeros((), dtype=np.float32)
    if options.mix is not None:
        params.update(_mix_share(options.mix, draws))
    return {name: np.asarray(value) for name, value in params.items()}


def _geometry(options: VideoAugmentation, size: int, draws: _Draws) -> Params:
    params: Params = {}
    if options.crop is not None:
        tries = draws(_CROP, 4 * CROP_TRIES).reshape(4, CROP_TRIES)
        params["crop_box"] = _crop_box(options.crop, decoded_size(size, options), tries)
    if options.flip:
        params["flip"] = np.asarray(draws(_FLIP, 1)[0] < options.flip)
    return params


def _motion_params(options: VideoAugmentation, size: int, draws: _Draws) -> Params:
    """Box and flip of a picture of this size, the box as shares of its sides."""
    params = _geometry(options, size, draws)
    if "crop_box" in params:
        params["crop_share"] = (params.pop("crop_box") / decoded_size(size, options)).astype(np.float32)
    return params


def _erase_params(strength: tuple[float, float], where: float, frame: float, frames: int) -> Params:
    """Strength and frame for two uniform numbers."""
    return {
        "erase_frame": np.asarray(int(frame * frames)),
        "erase_strength": np.asarray(_between(strength, where), dtype=np.float32),
    }


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
    if options.beta is not None:
        where = float(beta_share(options.beta, draws(_MIX, 2 + 2 * BETA_TRIES)[2:].reshape(2, BETA_TRIES)))
    share = _between(options.share, where) if chance < options.probability else 0.0
    return {f"{options.scope}_mix_share": np.asarray(share, dtype=np.float32)}


def beta_share(concentration: float, u: np.ndarray) -> np.ndarray:
    """float64 ``(…)`` in [0, 1] of Beta(x, x), x in (0, 1], from uniform numbers ``(2, …, tries)`` (Jöhnk 1964).

    Of the tries, at least half of which succeed, the first that does is taken; one row in 65,536 at worst has none and
    gets its last.
    """
    logs = np.log(np.maximum(u, 2.0**-53)) / concentration
    fits = np.logaddexp(logs[0], logs[1]) <= 0
    last = u.shape[-1] - 1
    chosen = np.where(fits.any(-1), fits.argmax(-1), last)[..., None]
    difference = np.take_along_axis(logs[1] - logs[0], chosen, -1)[..., 0]
    share: np.ndarray = 1 / (1 + np.exp(np.minimum(difference, 700.0)))
    return share


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
