"""A report on made-up items: coloured shapes, tones, captions, and embeddings that are right to a chosen degree."""

from __future__ import annotations

import numpy as np
import torch

from mmcl.evaluation.gallery import (
    SOUND_RATE_HZ,
    GalleryItem,
    clip_webp,
    poster_jpeg,
    sound_webm,
    waveform_svg,
)
from mmcl.evaluation.protocols import fingerprint
from mmcl.evaluation.report import ModalityRows, RetrievalReport, evaluate_list

COLOURS = {
    "red": (214, 69, 65),
    "orange": (232, 142, 56),
    "yellow": (236, 200, 75),
    "green": (94, 160, 90),
    "teal": (60, 150, 150),
    "blue": (70, 110, 190),
    "violet": (130, 90, 170),
    "grey": (130, 130, 130),
}
SHAPES = ("disc", "square", "ring", "cross", "stripes", "diamond")
PLACES = ("on the left", "in the middle", "on the right")


def shape_frame(colour: tuple[int, int, int], shape: str, place: int, height: int = 96, width: int = 128) -> np.ndarray:
    """uint8 ``(3, H, W)``: one shape on a dim ground."""
    y, x = np.mgrid[:height, :width]
    dy, dx = y - height / 2, x - width * (place + 1) / 4
    radius = np.hypot(dy, dx)
    inside = {
        "disc": radius < 26,
        "square": np.maximum(abs(dy), abs(dx)) < 24,
        "ring": abs(radius - 24) < 7,
        "cross": (np.minimum(abs(dy), abs(dx)) < 8) & (np.maximum(abs(dy), abs(dx)) < 28),
        "stripes": (np.maximum(abs(dy), abs(dx)) < 28) & (x // 7 % 2 == 0),
        "diamond": abs(dy) + abs(dx) < 32,
    }[shape]
    ground = np.stack([40 + 30 * y / height] * 3) + np.array(colour)[:, None, None] * 0.12
    return np.where(inside, np.array(colour)[:, None, None], ground).astype(np.uint8)


def tone(number: int, seconds: float = 2.0, rate_hz: int = 4000) -> np.ndarray:
    """float32 ``(S,)``: a tone whose loudness swells and falls at its own pace."""
    seconds = np.arange(round(rate_hz * seconds)) / rate_hz
    swell = np.abs(np.sin(np.pi * seconds * (0.5 + 0.37 * (number % 11)))) ** (1 + number % 3)
    return (swell * np.sin(2 * np.pi * (110 + 20 * number) * seconds)).astype(np.float32)


def is_silent(number: int) -> bool:
    return number % 24 == 23


def shape_clip(colour: tuple[int, int, int], shape: str, place: int) -> bytes | None:
    """The shape, going from left to right."""
    frames = np.stack([np.roll(shape_frame(colour, shape, place), 8 * step, axis=2) for step in range(8)])
    return clip_webp(frames, 1.0)


def shape_items(count: int = 120, *, media: bool = False) -> list[GalleryItem]:
    """Different items, one in 24 of them without sound; with ``media`` they move and sound too."""
    items = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % 8]
        shape, place = SHAPES[number // 8 % 6], number // 48 % 3
        items.append(
            GalleryItem(
                key=f"shapes/{number:04d}",
                captions=(f"{name} {shape} {PLACES[place]}",),
                poster=poster_jpeg(shape_frame(colour, shape, place)),
                waveform=waveform_svg(tone(number)) if not is_silent(number) else None,
                missing=("audio",) if is_silent(number) else (),
                clip=shape_clip(colour, shape, place) if media else None,
                sound=sound_webm(tone(number, 1.0, SOUND_RATE_HZ)) if media and not is_silent(number) else None,
            )
        )
    return items


def shape_rows(numbers: range, noise: float, seed: int = 0) -> dict[str, ModalityRows]:
    """Embeddings of these items: one direction each, blurred by ``noise`` (twice as much for sound)."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(len(numbers), 24, generator=random)
    rows = {}
    for modality, factor in (("text", 1.0), ("video", 1.0), ("audio", 2.0)):
        keep = [place for place, number in enumerate(numbers) if modality != "audio" or not is_silent(number)]
        blurred = base[keep] + factor * noise * torch.randn(len(keep), 24, generator=random)
        items = np.array([numbers[place] for place in keep], np.int64)
        rows[modality] = ModalityRows(torch.nn.functional.normalize(blurred), items)
    return rows


def shape_report(items: list[GalleryItem], new: int = 12, noise: float = 0.42) -> RetrievalReport:
    """Two lists: the first items are the known ones, ``new`` of the others the zero-shot ones."""
    known = len(items) - new
    return RetrievalReport(
        protocol="Shapes and tones",
        fingerprint=fingerprint({"name": "shapes"}, [item.key for item in items]),
        lists=(
            evaluate_list("known", shape_rows(range(known), noise), title="New recordings of known shapes"),
            evaluate_list("zero_shot", shape_rows(range(known, len(items)), 1.0, 1), title="Zero-shot: new shapes"),
        ),
        note="Generated shapes and tones, not filmed video.",
    )
