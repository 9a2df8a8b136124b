"""Clips with questions that only the picture answers: what is shown while a bell rings?

A clip has three scenes of one second, each with a moving disc of one colour on one ground and a sentence of its own: in
one a bell rings, in the others something else. Every sentence names all colours and all grounds, the wrong answers
include what the other scenes show, and which answer is right is drawn evenly: texts alone say nothing, and neither does
a picture at another time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from mmcl.shards import ShardWriter, write_manifest
from mmcl.shards.reshard import ReshardOptions, reshard

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 50), "blue": (40, 60, 230), "yellow": (225, 215, 40)}
LIGHTS = {"black": 10, "dark": 85, "pale": 165, "white": 245}
"""grey level of the ground"""
EVENTS = ("a dog barks", "a door shuts", "a car starts", "a bird sings")
BELL = "a bell rings"
KINDS = ("colour", "ground")
ANSWERS = 4
SCENES, FPS, SIZE = 3, 8, 32


def make_questions(folder: Path, clips: int, *, seed: int, kinds: Sequence[str] = KINDS) -> Path:
    """Indexed shards of so many clips with a question of each kind, in the new folder ``folder``; returns it.

    Beside it: ``NAME.clips`` without questions, and the questions themselves, ``NAME.jsonl``.
    """
    random = np.random.default_rng(seed)
    bare, lines = folder.with_suffix(".clips"), []
    with ShardWriter(bare) as writer:
        for number in range(clips):
            key = f"{seed:02d}-{number:05d}"
            colours, lights = (random.permutation(list(names))[:SCENES] for names in (COLOURS, LIGHTS))
            writer.write(key, {"mp4": _clip(colours, lights, random), "json": b'{"duration_seconds": %d}' % SCENES})
            lines += [line for line in _questions(key, colours, lights, random) if line["type"] in kinds]
    write_manifest(bare, writer.entries)
    questions = folder.with_suffix(".jsonl")
    questions.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    reshard([bare], folder, ReshardOptions(questions=str(questions)))
    return folder


def _questions(
    key: str, colours: np.ndarray, lights: np.ndarray, random: np.random.Generator
) -> list[dict[str, object]]:
    bell = int(random.integers(SCENES))
    said = list(random.permutation(EVENTS)[:SCENES])
    said[bell] = BELL
    subtitles = []
    for scene, event in enumerate(said):
        words = [*random.permutation([*COLOURS, *LIGHTS])]
        subtitles.append({"start": scene, "end": scene + 1, "text": f"{event}: {' '.join(words)}"})
    asked = []
    for kind, shown, names in zip(KINDS, (colours, lights), (COLOURS, LIGHTS), strict=True):
        answers = [str(name) for name in random.permutation(list(names))]
        asked.append(
            {
                "clip": key,
                "question": f"which {kind} when the bell rings",
                "answers": answers,
                "answer": answers.index(str(shown[bell])),
                "subtitles": subtitles,
                "span": [bell, bell + 1],
                "duration_seconds": SCENES,
                "type": kind,
            }
        )
    return asked


def _clip(colours: np.ndarray, lights: np.ndarray, random: np.random.Generator) -> bytes:
    """An MP4 file without sound."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.bit_rate = "yuv420p", 400_000
        for colour, light in zip(colours, lights, strict=True):
            place, step = random.integers(8, SIZE - 8, 2), random.integers(-2, 3, 2)
            for number in range(FPS):
                picture = _picture(COLOURS[str(colour)], LIGHTS[str(light)], place + step * number)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return out.getvalue()


def _picture(rgb: tuple[int, int, int], ground: int, place: np.ndarray) -> np.ndarray:
    """uint8 ``(H, W, 3)``: a disc round ``place`` that comes back on the other side."""
    y, x = np.mgrid[:SIZE, :SIZE]
    down, right = ((axis - at + SIZE / 2) % SIZE - SIZE / 2 for axis, at in zip((y, x), place, strict=True))
    disc = np.hypot(down, right) < SIZE / 3
    return np.where(disc[..., None], np.array(rgb), ground).astype(np.uint8)
