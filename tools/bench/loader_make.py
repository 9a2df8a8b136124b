"""Clips per second of one core: `mmcl shards make` beside the ``ffmpeg`` command line for the same transcode, as JSON.

    python tools/bench/loader_make.py --quick

Both take turns, clip by clip, on one thread: H.264 of 256 lines and AAC in; 128 lines, the same preset, quality, key
frames and sound out. Ours is all that ``make`` does with a row: hashing the source, probing, transcoding, staging, and
writing the shard with its index. Compared are CPU seconds (of the process, and of ``ffmpeg``'s); the ratio is the
median over the pairs, above 1 where ours needs less. ``command``: CPU seconds of a whole `mmcl shards make` with one
worker, start-up of its processes included.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmcl.shards.assemble import Assembler
from mmcl.shards.inputs import read_rows
from mmcl.shards.prepare import Job, prepare
from mmcl.shards.transcode import MediaOptions

BAR = 0.85
OPTIONS = MediaOptions()
_BECOME_SUBREAPER = 36


def write_sources(folder: Path, count: int, seconds: float) -> list[Path]:
    """Clips with motion and noise, 25 frames per second, a key frame every 250, 44.1 kHz stereo."""
    paths = []
    for number in range(count):
        path = folder / f"{number:04d}.mp4"
        picture = (
            f"testsrc2=size=340x256:rate=25,rotate=a=t/{2 + number % 5}:c=gray,noise=alls=12:allf=t:all_seed={number}"
        )
        sound = f"anoisesrc=sample_rate=44100:amplitude=0.3:seed={number}"
        command = ["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", sound]
        command += ["-t", str(seconds), "-c:v", "libx264", "-preset", "veryfast", "-g", "250", "-pix_fmt", "yuv420p"]
        subprocess.run([*command, "-c:a", "aac", "-ac", "2", str(path)], check=True)
        paths.append(path)
    return paths


def run_ffmpeg(source: Path, target: Path) -> None:
    """What ``make`` does by default, as one would ask ``ffmpeg`` for it."""
    command = ["ffmpeg", "-v", "error", "-y", "-threads", "1", "-i", str(source), "-threads", "1"]
    command += ["-filter_threads", "1", "-vf", f"scale=-2:{OPTIONS.short_side}:flags=area"]
    command += ["-c:v", "libx264", "-preset", "veryfast", "-tune", "fastdecode", "-crf", str(OPTIONS.crf)]
    command += ["-g", str(OPTIONS.gop), "-bf", "0", "-pix_fmt", "yuv420p"]
    command += ["-c:a", "aac", "-b:a", "64k", "-ac", "1", "-ar", str(OPTIONS.audio_rate_hz), str(target)]
    subprocess.run(command, check=True)


def cpu_seconds(of: int) -> float:
    used = resource.getrusage(of)
    return used.ru_utime + used.ru_stime


def spent(of: int, work: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds, wall seconds)."""
    cpu, wall = cpu_seconds(of), time.perf_counter()
    work()
    return cpu_seconds(of) - cpu, time.perf_counter() - wall


def whole_command(sources: Path, out: Path) -> float:
    """CPU seconds of the command and of all processes that it starts."""
    command = [sys.executable, "-m", "mmcl", "shards", "make", str(sources), "--out", str(out), "--workers", "1"]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # its workers are children of a server that outlives the command: they are waited for here
        ctypes.CDLL(None).prctl(_BECOME_SUBREAPER, 1, 0, 0, 0)
        before = cpu_seconds(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        try:
            while True:
                os.wait()
        except ChildProcessError:
            pass
        os.write(writer, json.dumps([done, cpu_seconds(resource.RUSAGE_CHILDREN) - before]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    code, seconds = json.loads(os.read(reader, 1 << 16))
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return float(seconds)


def measure(quick: bool) -> dict[str, Any]:
    """Ratios of CPU time: ``ffmpeg``'s over ours."""
    if shutil.which("ffmpeg") is None:
        raise SystemExit("ffmpeg is not on the path")
    count, seconds = (8, 4.0) if quick else (16, 10.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("in", "ffmpeg", "staging", "shards"):
            (folder / part).mkdir()
        sources = write_sources(folder / "in", count, seconds)
        rows = read_rows(folder / "in")
        assembler = Assembler(folder / "shards", folder / "staging", 1_000, 512 << 20)
        prepare(Job(rows[0], OPTIONS, None, str(folder / "staging")))  # imports and first allocations
        ours: list[tuple[float, float]] = []
        theirs: list[tuple[float, float]] = []
        for path in (folder / "staging").iterdir():
            path.unlink()
        for row, source in zip(rows, sources, strict=True):
            job = Job(row, OPTIONS, None, str(folder / "staging"))

            def ours_once(job: Job = job) -> None:
                prepared = prepare(job)
                if prepared.reason:
                    raise SystemExit(f"{job.row.path}: {prepared.reason} ({prepared.detail})")
                assembler.add(job.row.key, prepared)

            ours.append(spent(resource.RUSAGE_SELF, ours_once))
            target = folder / "ffmpeg" / source.name
            theirs.append(spent(resource.RUSAGE_CHILDREN, lambda s=source, t=target: run_ffmpeg(s, t)))
        end, _ = spent(resource.RUSAGE_SELF, assembler.finish)
        ratios = [them[0] / (us[0] + end / count) for us, them in zip(ours, theirs, strict=True)]
        command = whole_command(folder / "in", folder / "whole")
        sizes = {
            "ours": sum(path.stat().st_size for path in (folder / "shards").glob("*.tar")),
            "ffmpeg": sum(path.stat().st_size for path in (folder / "ffmpeg").iterdir()),
        }
    cpu_ours, cpu_theirs = (statistics.median(cpu for cpu, _ in part) for part in (ours, theirs))
    return {
        "clips": count,
        "seconds_per_clip": seconds,
        "cpu_seconds_per_clip": {"ours": cpu_ours + end / count, "ffmpeg": cpu_theirs},
        "wall_seconds_per_clip": {
            "ours": statistics.median(wall for _, wall in ours),
            "ffmpeg": statistics.median(wall for _, wall in theirs),
        },
        "clips_per_cpu_second": {"ours": 1 / (cpu_ours + end / count), "ffmpeg": 1 / cpu_theirs},
        "bytes": sizes,
        "ratio": statistics.median(ratios),
        "command": {"cpu_seconds": command, "ratio": sum(cpu for cpu, _ in theirs) / command},
        "bar": BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few short clips")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    report = measure(options.quick)
    text = json.dumps(report, indent=2)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)
    print(f"make / ffmpeg, clips per CPU second: {report['ratio']:.2f} (bar {BAR})")


if __name__ == "__main__":
    main()
