"""Reading and decoding shards, beside a plain ``wds.WebDataset`` loop with decord, in one run, as JSON.

    python tools/bench/loader.py --quick

``decode``: two clips of 8 frames at 112 px and 2 s of log-mel of each sample, from the same shards, in one process.
``read``: the bytes of every sample of an indexed local shard, nothing decoded. Medians of ``--repeats`` passes that
take turns; CPU seconds beside wall seconds. The last lines are the ratios: ours is better above 1.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio

from mmcl.data import ClipStream
from mmcl.shards import load_manifest
from mmcl.shards.index import index_shards
from mmcl.shards.reader import ShardReader
from mmcl.types import AudioSpec, VideoSpec, View

FRAMES, SIZE, FPS, SECONDS, RATE_HZ = 8, 112, 6.25, 2.0, 16_000
MEL = torchaudio.transforms.MelSpectrogram(sample_rate=RATE_HZ, n_fft=400, hop_length=160, n_mels=80)


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def encode_clip(seconds: float, seed: int) -> bytes:
    """H.264 256p with a key frame every 30, and AAC."""
    file = io.BytesIO()
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (16, 20, 3), np.uint8).repeat(24, 0).repeat(24, 1)
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "23"})
        video.width, video.height, video.pix_fmt, video.gop_size = 340, 256, "yuv420p", 30
        sound = container.add_stream("aac", rate=RATE_HZ, layout="mono")
        for i in range(round(seconds * 25)):
            picture = np.ascontiguousarray(texture[i % 128 : i % 128 + 256, i % 140 : i % 140 + 340])
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for first in range(0, round(seconds * RATE_HZ), 1024):
            frame = av.AudioFrame.from_ndarray(rng.normal(0, 0.1, (1, 1024)).astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = RATE_HZ, first
            container.mux(sound.encode(frame))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    return file.getvalue()


def log_mel(wave: torch.Tensor) -> torch.Tensor:
    mel: torch.Tensor = MEL(wave)
    return mel.clamp_min(1e-6).log()


def decode_ours(folder: Path, count: int) -> int:
    views = [View(VideoSpec(frames=FRAMES, size=SIZE, fps=FPS), clip) for clip in range(2)]
    audio = View(AudioSpec(sample_rate_hz=RATE_HZ, seconds=SECONDS))
    stream = ClipStream(load_manifest(folder), [*views, audio], global_batch=8, in_process=True, seed=0)
    rows = 0
    for batch in itertools.islice(iter(stream), count // 8):
        log_mel(batch.views[audio].data)
        assert all(bool(batch.views[view].present.all()) for view in (*views, audio))
        rows += len(batch)
    return rows


def decode_plain(folder: Path, count: int) -> int:
    """As many loops over WebDataset do it: open, take the frames of a clip, scale them; read the whole sound."""
    import decord
    import webdataset as wds

    rng = np.random.default_rng(0)
    rows = 0
    for sample in wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False):
        for _ in range(2):
            reader = decord.VideoReader(io.BytesIO(sample["mp4"]), num_threads=1)
            start = rng.uniform(0, len(reader) / reader.get_avg_fps() - SECONDS)
            wanted = (start + np.arange(FRAMES) / FPS) * reader.get_avg_fps()
            frames = torch.from_numpy(reader.get_batch(wanted.astype(int).clip(0, len(reader) - 1)).asnumpy())
            scaled = F.interpolate(
                frames.permute(0, 3, 1, 2).float(), size=(SIZE, 149), mode="bilinear", antialias=True
            )
            scaled[..., 18 : 18 + SIZE].round().byte()
        with av.open(io.BytesIO(sample["mp4"])) as container:
            wave = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)
        first = rng.integers(0, wave.shape[1] - int(SECONDS * RATE_HZ))
        log_mel(torch.from_numpy(wave[:, first : first + int(SECONDS * RATE_HZ)]))
        rows += 1
        if rows == count:
            break
    return rows


def read_ours(folder: Path, count: int) -> int:
    manifest = load_manifest(folder)
    reader = ShardReader(manifest)
    rows = 0
    for shard, size in enumerate(manifest.sizes.tolist()):
        for index in range(size):
            assert reader.read(shard, index).members
            rows += 1
    return rows


def read_plain(folder: Path, count: int) -> int:
    import webdataset as wds

    return sum(1 for _ in wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False))


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(sides: dict[str, Callable[[Path, int], int]], folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """Medians of passes that take turns, after one of each that does not count."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            rows = side(folder, count)
            assert rows == count, f"{name}: {rows} of {count} samples"
            if turn:
                figures[name].append(((cpu_seconds() - cpu) / rows, (time.perf_counter() - wall) / rows))
    report: dict[str, Any] = {}
    for name, passes in figures.items():
        cpu, wall = (statistics.median(column) for column in zip(*passes, strict=True))
        report[name] = {"cpu_ms": 1e3 * cpu, "wall_ms": 1e3 * wall, "samples_per_cpu_second": 1 / cpu}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples: under three minutes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clips, seconds, small = (4, 6.0, 4_000) if options.quick else (16, 10.0, 20_000)
    with tempfile.TemporaryDirectory() as work:
        media, many = Path(work, "media"), Path(work, "many")
        for folder in (media, many):
            folder.mkdir()
        encoded = [encode_clip(seconds, seed) for seed in range(clips)]
        facts = json.dumps({"duration_seconds": seconds, "video": {"height": 256, "width": 340}}).encode()
        write_shard(media / "0.tar", [{"mp4": encoded[n % clips], "txt": b"a clip", "json": facts} for n in range(16)])
        write_shard(many / "0.tar", [{"mp4": bytes(4_000), "txt": b"a clip", "json": b"{}"}] * small)
        for folder in (media, many):
            index_shards(folder)
        report: dict[str, Any] = {
            "decode": measure({"mmcl": decode_ours, "plain": decode_plain}, media, 16, options.repeats),
            "read": measure({"mmcl": read_ours, "plain": read_plain}, many, small, options.repeats),
        }
    for part in ("decode", "read"):
        report[f"{part}_ratio"] = report[part]["plain"]["cpu_ms"] / report[part]["mmcl"]["cpu_ms"]
    text = json.dumps({"quick": options.quick, "repeats": options.repeats, **report}, indent=2)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
