"""A contact sheet of shards: frames, the shape of the sound and the captions of some samples on one page."""

from __future__ import annotations

import io
from contextlib import closing
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmcl.media.audio import read_audio
from mmcl.media.image import decode_image
from mmcl.media.probe import best_stream, open_container, probe
from mmcl.media.video import open_video
from mmcl.media.windows import frame_indices
from mmcl.progress import Progress, failures
from mmcl.shards.files import write_atomically, writing
from mmcl.shards.manifest import load_manifest
from mmcl.shards.members import Bytes, Sample, parse_sample
from mmcl.shards.page import cut, data_uri, render_page
from mmcl.shards.pool import Lost
from mmcl.shards.reader import ShardReader
from mmcl.shards.scan import choose_places, scan
from mmcl.types import SampleError, redact

FRAMES = 4
"""of each video, evenly spaced"""
_FRAME_PIXELS = 120
_SOUND_SECONDS = 60.0
_SOUND_HZ = 8_000
_BARS = 96
_MOST_CAPTIONS = 5
_CAPTION_LETTERS = 280


@dataclass(frozen=True, slots=True)
class Card:
    """One sample on the sheet."""

    key: str
    place: str
    about: str = ""
    strip: bytes = b""
    """JPEG of its frames side by side"""
    levels: tuple[int, ...] = ()
    """0 … 20: how loud each stretch of its sound is"""
    captions: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def preview_shards(
    folder: str | Path,
    out: str | Path,
    *,
    count: int = 48,
    seed: int = 0,
    workers: int | None = None,
    timeout_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Path:
    """Writes the page ``out`` (an .html file) of ``count`` samples drawn at random, decoded in child processes.

    Raises ``ConfigError`` where there is no manifest, ``RunError`` where a shard cannot be read or the page written.
    """
    manifest = load_manifest(folder)
    places = choose_places(manifest, count, seed)
    cards: list[Card] = []
    bad = 0
    for place, result in scan(manifest, draw_card, places, workers=workers, timeout_seconds=timeout_seconds):
        if isinstance(result, Lost):
            key = ShardReader(manifest).key(*place)
            result = Card(key, _place(manifest.shard_name(place[0]), place[1]), problems=(f"{result.reason}",))
        cards.append(result)
        bad += bool(result.problems)
        if progress is not None:
            progress(len(cards), len(places), failures(bad))
    about = f"{len(cards)} of {manifest.num_samples} samples in {manifest.num_shards} shards, drawn with seed {seed}."
    page = render_page(redact(str(folder)), about, {}, [render_card(card) for card in cards])
    target = Path(out).expanduser()
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page.encode("utf-8", "replace"))
    return target


def draw_card(reader: ShardReader, shard: int, index: int) -> Card:
    """Runs in a child process. Raises ``RunError`` where the shard cannot be read."""
    card = Card(reader.key(shard, index), _place(reader.manifest.shard_name(shard), index))
    try:
        sample = parse_sample(reader.read(shard, index))
    except SampleError as error:
        return replace(card, problems=(str(error),))
    problems, facts = [], []
    strip, levels = b"", tuple[int, ...]()
    try:
        pictures, words = _pictures(sample)
        facts += words
        strip = _strip(pictures) if pictures else b""
    except SampleError as error:
        problems.append(f"picture: {error}")
    try:
        levels, words = _levels(sample)
        facts += words
    except SampleError as error:
        problems.append(f"sound: {error}")
    captions = tuple(cut(text, _CAPTION_LETTERS) for text in sample.captions[:_MOST_CAPTIONS])
    if len(sample.captions) > _MOST_CAPTIONS:
        facts.append(f"{len(sample.captions)} captions")
    return replace(
        card, about=", ".join(facts), strip=strip, levels=levels, captions=captions, problems=tuple(problems)
    )


def render_card(card: Card) -> str:
    """HTML, everything from the shard escaped."""
    parts = [f"<figcaption>{escape(cut(card.key, 120))}</figcaption>"]
    if card.strip:
        parts.append(f'<img alt="frames of {escape(cut(card.key, 120))}" src="{data_uri(card.strip)}">')
    if card.levels:
        path = "".join(f"M{2 * place + 1} {20 - level}v{2 * level}" for place, level in enumerate(card.levels))
        parts.append(
            f'<svg viewBox="0 0 {2 * len(card.levels)} 40" role="img" aria-label="loudness of its sound">'
            f'<path d="{path}" stroke-width="1.2" stroke-linecap="round" fill="none"/></svg>'
        )
    if card.captions:
        parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in card.captions) + "</ul>")
    parts.append(f'<div class="dim">{escape(cut(card.place, 160))}</div>')
    if card.about:
        parts.append(f'<div class="dim">{escape(card.about)}</div>')
    parts += [f'<div class="bad">{escape(cut(problem, 280))}</div>' for problem in card.problems]
    return f"<figure>{''.join(parts)}</figure>"


def _place(shard: str, index: int) -> str:
    return f"{shard}, sample {index}"


def _pictures(sample: Sample) -> tuple[list[Image.Image], list[str]]:
    if sample.video is not None and _has_video(sample.video):
        info = probe(sample.video).video
        with closing(open_video(sample.video, decoder="pyav")) as reader:
            start, end = sample.window_seconds or (0.0, reader.duration_seconds)
            times = start + (np.arange(FRAMES) + 0.5) * (end - start) / FRAMES
            wanted = sorted(set(frame_indices(reader.frame_times_seconds, times).tolist()))
            frames = [_small(reader.read([number])[0]) for number in wanted]
            seconds = end - start
        facts = [f"{seconds:.2f} s"]
        if info is not None:
            height, width = info.displayed_size
            facts.append(f"{info.codec} {width}×{height} at {info.fps:g} fps")
        return frames, facts
    if sample.image is not None:
        picture = decode_image(sample.image)
        return [_small(picture)], [f"image {picture.shape[2]}×{picture.shape[1]}"]
    return [], []


def _has_video(data: Bytes) -> bool:
    with closing(open_container(data)) as container:
        return best_stream(container, "video") is not None


def _small(picture: npt.NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    image.thumbnail((_FRAME_PIXELS, _FRAME_PIXELS), Image.Resampling.LANCZOS)
    return image


def _strip(pictures: list[Image.Image]) -> bytes:
    gap, height = 3, max(picture.height for picture in pictures)
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    strip, left = Image.new("RGB", (width, height), "white"), 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + gap
    out = io.BytesIO()
    strip.save(out, "JPEG", quality=75, optimize=True)
    return out.getvalue()


def _levels(sample: Sample) -> tuple[tuple[int, ...], list[str]]:
    data = sample.audio if sample.audio is not None else sample.video
    if data is None:
        return (), []
    info = probe(data)
    if info.audio is None:
        return (), ["no sound"]
    facts = [f"{info.audio.codec} {info.audio.sample_rate_hz} Hz"]
    if sample.audio is not None or info.video is None:
        facts.insert(0, f"{info.duration_seconds:.2f} s of sound")
    start, end = sample.window_seconds or (0.0, info.duration_seconds)
    end = start + min(max(end - start, 0.1), _SOUND_SECONDS)
    wave = read_audio(data, start_seconds=start, end_seconds=end, sample_rate_hz=_SOUND_HZ)
    if wave is None:
        return (), facts
    peaks = np.array([np.abs(part).max(initial=0.0) for part in np.array_split(wave, _BARS)])
    loudest = max(float(peaks.max()), 1e-4)
    return tuple(np.rint(18 * peaks / loudest).astype(int).tolist()), facts
