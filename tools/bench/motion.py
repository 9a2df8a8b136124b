"""What motion vectors cost: frames per CPU second with and without them, beside plain decoding.

    python tools/bench/motion.py --out tools/bench/results/motion.json

Films of 320×240: soft shapes and grain under a moving camera, H.264 with B frames (x264, preset medium) and MPEG-4.
``plain`` decodes every frame with PyAV and looks at none; ``vectors`` also lets FFmpeg hand the vectors out, as arrays
of blocks; ``maps`` is ``MotionReader.grids`` of every frame, rasterised to cells of 8 pixels; ``tower`` is what a view
of eight maps costs, resized, from a random place of the film; ``stored`` the same from ``KEY.motion.npy``. One thread
each, CPU seconds, the kinds in turn, so that what else the machine does hits all of them; the median over rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags2

from mmcl.media.motion import MotionReader, motion_maps
from mmcl.media.motion_file import StoredMotion, extract_motion
from mmcl.media.probe import decoded
from mmcl.types import MotionSpec

HEIGHT, WIDTH, FPS = 240, 320, 25
SPEC = MotionSpec(frames=8, size=112, cell=4)
FILMS = {
    "H.264, keyframe every 250": ("libx264", 250, {"preset": "medium", "crf": "23"}),
    "H.264, keyframe every 16": ("libx264", 16, {"preset": "medium", "crf": "23"}),
    "MPEG-4": ("mpeg4", 12, {}),
}
VIEWS = 20


def film(codec: str, gop: int, options: dict[str, str], frames: int) -> bytes:
    """The bytes of an MP4; a shape moves over a scene that a camera pans."""
    rng = np.random.default_rng(0)
    shapes = av.VideoFrame.from_ndarray(rng.integers(0, 256, (40, 50, 3), np.uint8), format="rgb24")
    scene = shapes.reformat(800, 640, interpolation="BICUBIC").to_ndarray().astype(np.float32)
    scene = (scene + rng.normal(0, 6, scene.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", gop
        stream.codec_context.thread_count = 1
        if codec == "mpeg4":
            stream.bit_rate = 600_000
        for i in range(frames):
            y, x = round(100 + 80 * np.sin(i / 23)), round(100 + 90 * np.cos(i / 17))
            picture = np.ascontiguousarray(scene[y : y + HEIGHT, x : x + WIDTH])
            place = round(100 + 80 * np.cos(i / 9))
            picture[60:140, place : place + 80] = scene[400:480, 500:580]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def decode(data: bytes, *, vectors: bool) -> int:
    """Every frame of a film; returns how many."""
    frames = 0
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"
        if vectors:
            stream.codec_context.flags2 |= Flags2.export_mvs
        for frame in decoded(container, stream):
            side_data = frame.side_data.get("MOTION_VECTORS") if vectors else None
            if side_data is not None:
                side_data.to_ndarray()
            frames += 1
    return frames


def maps(data: bytes) -> int:
    reader = MotionReader(data)
    try:
        return len(reader.grids(np.arange(len(reader.frame_times_seconds))))
    finally:
        reader.close()


def views(opened: Callable[[], Any]) -> int:
    """Eight maps from each of some places; opens the film for each as a loader does. Returns how many views."""
    random = np.random.default_rng(0)
    for _ in range(VIEWS):
        field = opened()
        try:
            first = int(random.integers(0, len(field.frame_times_seconds) - SPEC.frames))
            motion_maps(field, np.arange(first, first + SPEC.frames), SPEC)
        finally:
            field.close()
    return VIEWS


def rate(function: Callable[[], int]) -> float:
    """What it returns per CPU second."""
    start = time.process_time()
    count = function()
    return count / (time.process_time() - start)


def measure(data: bytes, rounds: int) -> dict[str, Any]:
    stored = extract_motion(data)
    kinds: dict[str, Callable[[], int]] = {
        "plain": lambda: decode(data, vectors=False),
        "vectors": lambda: decode(data, vectors=True),
        "maps": lambda: maps(data),
        "tower": lambda: views(lambda: MotionReader(data)),
        "stored": lambda: views(lambda: StoredMotion(stored)),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, function in kinds.items():
            value = rate(function)
            if number:  # the first round warms up
                found[name].append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    pairs = [b / a for a, b in zip(found["plain"], found["maps"], strict=True)]
    return {
        "frames per CPU second": {name: round(medians[name]) for name in ("plain", "vectors", "maps")},
        "of plain decoding, round by round": [round(pair, 3) for pair in pairs],
        "views per CPU second": {name: round(medians[name], 1) for name in ("tower", "stored")},
        "bytes": {"film": len(data), "stored motion": len(stored)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short films, two rounds: to see that it runs")
    parser.add_argument("--rounds", type=int, help="default: 7")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    frames, rounds = (100, 2) if options.quick else (500, 7)
    rounds = options.rounds or rounds
    results = {}
    for name, (codec, gop, how) in FILMS.items():
        results[name] = found = measure(film(codec, gop, how, frames), rounds)
        rates = found["frames per CPU second"]
        shown = ", ".join(f"{kind} {value:,}" for kind, value in rates.items())
        print(f"{name}: {shown} frames/s; {found['views per CPU second']} views/s", flush=True)
    if options.out is not None:
        settings = {"height": HEIGHT, "width": WIDTH, "frames": frames, "rounds": rounds, "av": av.__version__}
        text = json.dumps({"settings": settings, "films": results}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
