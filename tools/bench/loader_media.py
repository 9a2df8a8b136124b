"""Clips for the benchmarks of the loader: like short web videos in size, frame rate, bit rate and sound."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import av
import numpy as np

from mmcl.shards.index import index_shards

HEIGHT, WIDTH, FPS, SOUND_HZ = 256, 340, 25, 44_100


def encode_clip(seconds: float, seed: int, gop: int) -> bytes:
    """H.264 256p with B-frames and a keyframe every ``gop`` frames, about 0.4 Mbit/s, and AAC 44.1 kHz in stereo.

    A camera that moves over a scene of soft shapes and fine grain.
    """
    rng = np.random.default_rng(seed)
    shapes = av.VideoFrame.from_ndarray(rng.integers(0, 256, (40, 50, 3), np.uint8), format="rgb24")
    scene = shapes.reformat(800, 640, interpolation="BICUBIC").to_ndarray().astype(np.float32)
    scene = (scene + rng.normal(0, 6, scene.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "medium", "crf": "23"})
        video.width, video.height, video.pix_fmt, video.gop_size = WIDTH, HEIGHT, "yuv420p", gop
        video.codec_context.thread_count = 1
        sound = container.add_stream("aac", rate=SOUND_HZ, layout="stereo")
        sound.bit_rate = 128_000
        for i in range(round(seconds * FPS)):
            y, x = round(100 + 80 * np.sin(i / 23 + seed)), round(100 + 90 * np.cos(i / 17))
            picture = np.ascontiguousarray(scene[y : y + HEIGHT, x : x + WIDTH])
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for first in range(0, round(seconds * SOUND_HZ), 1024):
            frame = av.AudioFrame.from_ndarray(rng.normal(0, 0.1, (2, 1024)).astype(np.float32), "fltp", "stereo")
            frame.sample_rate, frame.pts = SOUND_HZ, first
            container.mux(sound.encode(frame))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    return file.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    """A plain tar; each sample is its files by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_media_shard(folder: Path, clips: list[bytes], samples: int, seconds: float) -> Path:
    """An indexed shard of these clips, over and over, as ``video2dataset`` writes them: video, caption, facts."""
    facts = json.dumps({"duration": seconds, "height": HEIGHT, "width": WIDTH}).encode()
    files = [{"mp4": clips[n % len(clips)], "txt": b"a clip", "json": facts} for n in range(samples)]
    write_shard(folder / "000000.tar", files)
    index_shards(folder)
    return folder
