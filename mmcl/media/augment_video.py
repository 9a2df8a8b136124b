"""Augmentation of pictures, batched: every row has its own parameters, every frame of a row the same."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""of one float32 copy of some rows: their number bounds the memory that augmentation takes"""
LUMA = (0.2989, 0.587, 0.114)
"""ITU-R BT.601: what red, green and blue add to brightness"""
_GEOMETRY = ("crop_box", "flip")
_NAMES = (
    *_GEOMETRY,
    "turns",
    "rotation_degrees",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "grey",
    "blur_sigma",
    "erase_frame",
    "erase_strength",
)


def augment_video(frames: Tensor, params: Mapping[str, Tensor], *, size: int) -> Tensor:
    """uint8 ``(B, T, C, H, H)`` to uint8 ``(B, T, C, size, size)``, computed in float32 and rounded once at the end.

    Zeros stay zeros. Parameters that are not there change nothing; those of a row change that row alone.
    """
    used = {name: params[name] for name in _NAMES if name in params}
    if not used and frames.shape[-1] == size:
        return frames
    rows = max(1, CHUNK_BYTES // (4 * math.prod(frames.shape[1:-2]) * max(frames.shape[-1], size) ** 2))
    parts = [
        _augment_rows(frames[i : i + rows], {name: value[i : i + rows] for name, value in used.items()}, size)
        for i in range(0, len(frames), rows)
    ]
    return torch.cat(parts) if parts else frames.new_zeros((*frames.shape[:-2], size, size))


def augment_motion(maps: Tensor, params: Mapping[str, Tensor], *, side: int, corrected: bool = True) -> Tensor:
    """float32 velocities ``(B, T, 2, S', S')`` to ``(B, T, 2, side, side)``, seen as the pictures that they belong to.

    What a smaller part of the picture shows moves faster, and what is turned left for right moves the other way
    (``corrected``; otherwise velocities change their places alone).
    """
    share, flip = params.get("crop_share"), params.get("flip")
    if share is None and flip is None and maps.shape[-1] == side:
        return maps
    box = None if share is None else share.double() * maps.shape[-1]
    out = crop_and_flip(maps, box, flip, side)
    if not corrected:
        return out
    if share is not None:  # width for x, height for y; an absent row has a box of nothing
        out = out / share[:, [3, 2]].clamp(min=1e-3).view(-1, 1, 2, 1, 1)
    if flip is not None:
        horizontal = torch.tensor([1.0, 0.0], device=out.device).view(1, 1, 2, 1, 1)
        out = out * (1 - 2 * horizontal * flip.view(-1, 1, 1, 1, 1))
    return out


def _augment_rows(frames: Tensor, params: Mapping[str, Tensor], size: int) -> Tensor:
    x = frames.float()
    if frames.shape[-1] != size or any(name in params for name in _GEOMETRY):
        x = crop_and_flip(x, params.get("crop_box"), params.get("flip"), size)
    if "turns" in params:
        x = quarter_turns(x, params["turns"])
    if "rotation_degrees" in params:
        x = rotate(x, params["rotation_degrees"])
    if "brightness" in params:
        x = (x * _per_row(params["brightness"])).clamp(0, 255)
    if "contrast" in params:
        mean = luma(x).mean((-3, -2, -1), keepdim=True)
        x = _blend(x, mean, params["contrast"])
    if "saturation" in params:
        x = _blend(x, luma(x), params["saturation"])
    if "hue" in params:
        x = turn_hue(x, params["hue"])
    if "grey" in params:
        x = torch.where(_per_row(params["grey"]), luma(x), x)
    if "blur_sigma" in params:
        x = blur(x, params["blur_sigma"])
    if "erase_frame" in params:
        x = background_erase(x, params["erase_frame"], params["erase_strength"])
    return x.round().clamp(0, 255).to(torch.uint8)


def background_erase(video: Tensor, frame_index: Tensor | int, strength: Tensor | float) -> Tensor:
    """One frame of a clip is laid over all of them, so that what stands still no longer tells: (1 − λ)·x_t + λ·x_k.

    Args:
        video: float or uint8 ``(T, C, H, W)`` or ``(B, T, C, H, W)``; not modified.
        frame_index: k, a number or int64 ``(B,)``.
        strength: λ in [0, 1], a number or float ``(B,)`` (the paper draws it from 0 to 0.3).

    Returns:
        Same shape and dtype; uint8 is rounded.

    Raises:
        ValueError: another number of axes, or a frame that the clip does not have.

    Source: Wang et al. 2021 (arXiv 2009.05769), eq. 1.

    >>> [f"{x:.1f}" for x in background_erase(torch.arange(4.0).view(4, 1, 1, 1), 2, 0.3).flatten()]
    ['0.6', '1.3', '2.0', '2.7']
    """
    if video.ndim not in (4, 5):
        raise ValueError(f"video must be (T, C, H, W) or (B, T, C, H, W), got {tuple(video.shape)}")
    clips = video if video.ndim == 5 else video[None]
    frames = torch.as_tensor(frame_index, device=video.device).expand(len(clips))
    if len(clips) and not (int(frames.min()) >= 0 and int(frames.max()) < clips.shape[1]):
        raise ValueError(f"frame_index must lie in 0 … {clips.shape[1] - 1}, got {frames.tolist()}")
    share = torch.as_tensor(strength, device=video.device).expand(len(clips))
    wide = clips if clips.is_floating_point() else clips.float()
    still = wide[torch.arange(len(clips), device=video.device), frames][:, None]
    mixed = wide + _per_row(share.to(wide.dtype)) * (still - wide)
    if not clips.is_floating_point():
        mixed = mixed.round().to(clips.dtype)
    return mixed.view(video.shape)


def _per_row(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)


def luma(x: Tensor) -> Tensor:
    """``(…, 3, H, W)`` to ``(…, 1, H, W)``"""
    red, green, blue = x.unbind(-3)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(-3)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    ratio = _per_row(factor)
    return (ratio * x + (1 - ratio) * other).clamp(0, 255)


def crop_and_flip(x: Tensor, box: Tensor | None, flip: Tensor | None, size: int) -> Tensor:
    """float ``(B, T, C, H, H)`` to ``(B, T, C, size, size)``: the box of each row, scaled bilinearly with antialiasing.

    ``box``: int64 ``(B, 4)`` top, left, height, width (None: all of it). ``flip``: bool ``(B,)``, left for right.
    """
    rows, side = len(x), x.shape[-1]
    if box is None:
        box = torch.tensor([0, 0, side, side], device=x.device).expand(rows, 4)
    top, left, height, width = box.clamp(min=0).unbind(1)
    vertical = _scaling(top, height, side, size)
    horizontal = _scaling(left, width, side, size)
    if flip is not None:
        horizontal = torch.where(flip.view(-1, 1, 1), horizontal.flip(1), horizontal)
    return _separable(x, vertical, horizontal)


def _scaling(first: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """float32 ``(B, size, side)``: how much of each pixel of a side goes into each pixel of the result.

    A triangle as wide as a pixel of the result (at least one of the source), cut off at the box and normalised.
    """
    length = length.clamp(min=1)
    scale = (length.double() / size).view(-1, 1, 1)
    centres = first.view(-1, 1, 1) + (torch.arange(size, device=first.device) + 0.5).view(1, -1, 1) * scale
    pixels = torch.arange(side, device=first.device)
    weights = (1 - (pixels + 0.5 - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    inside = (pixels >= first.view(-1, 1, 1)) & (pixels < (first + length).view(-1, 1, 1))
    weights = weights * inside
    return (weights / weights.sum(2, keepdim=True).clamp(min=1e-9)).float()


def _separable(x: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """V x Hᵀ for all pictures of each row; ``V (B, H', H)``, ``H (B, W', W)``: two batched products."""
    B, T, C, H, W = x.shape  # noqa: N806
    high, wide = vertical.shape[1], horizontal.shape[1]
    across = torch.bmm(x.reshape(B, T * C * H, W), horizontal.transpose(1, 2))
    turned = across.view(B, T * C, H, wide).transpose(2, 3).reshape(B, T * C * wide, H)
    down = torch.bmm(turned, vertical.transpose(1, 2))
    return down.view(B, T, C, wide, high).transpose(3, 4).contiguous()


def quarter_turns(x: Tensor, turns: Tensor) -> Tensor:
    """``(B, T, C, H, H)``: each row turned counter-clockwise by ``turns (B,)`` quarters, exactly."""
    turned = torch.empty_like(x)
    for number in range(4):
        rows = turns % 4 == number
        turned[rows] = x[rows].rot90(number, (-2, -1))
    return turned


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Each row turned counter-clockwise round its centre, bilinear, black outside; 0 degrees changes nothing."""
    B, T, C, H, W = x.shape  # noqa: N806
    radians = torch.deg2rad(degrees.float())
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(theta, [B, T * C, H, W], align_corners=False)
    turned = F.grid_sample(x.view(B, T * C, H, W), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.where(_per_row(degrees == 0), x, turned.view_as(x))


def turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Hue moved by ``turns (B,)`` full circles; value and saturation (of HSV) stay. 0 changes nothing."""
    red, green, blue = x.unbind(-3)
    value, low = x.amax(-3), x.amin(-3)
    chroma = value - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sector = sector + 6 * turns.view(-1, 1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        k = (offset + sector) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.where(_per_row(turns == 0), x, torch.stack(channels, -3))


def blur_radius(size: int) -> int:
    """Pixels on each side of a kernel: a tenth of the picture together, as SimCLR has it; never past its border."""
    return min(max(1, round(0.05 * size)), size - 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with ``sigma (B,)`` pixels, borders reflected; 0 changes nothing."""
    side = x.shape[-1]
    radius = blur_radius(side)
    if radius < 1:
        return x
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma.float().clamp(min=1e-6)[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    places = (torch.arange(side, device=x.device)[:, None] + offsets).abs()
    places = torch.where(places >= side, 2 * (side - 1) - places, places)
    shape = (len(x), *places.shape)
    matrix = x.new_zeros(len(x), side, side)
    matrix.scatter_add_(2, places.expand(shape), weights[:, None].expand(shape))
    return _separable(x, matrix, matrix)
