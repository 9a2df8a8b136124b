"""What making shards is asked for, and what it says when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mmcl.shards.cut import Windows, check_windows
from mmcl.shards.engine import check_engine
from mmcl.shards.scenes import check_detector
from mmcl.shards.transcode import MediaOptions
from mmcl.shards.writer import MAX_BYTES, MAX_COUNT
from mmcl.types import ConfigError


@dataclass(frozen=True, slots=True)
class MakeOptions:
    """How shards are made. All but the last four decide the output and are kept with it."""

    media: MediaOptions = field(default_factory=MediaOptions)
    max_count: int = MAX_COUNT
    """samples per shard, at most"""
    max_bytes: int = MAX_BYTES
    """bytes per shard, at most"""
    shuffle: int | None = 0
    """Seed of the order of samples; None: the order of the input. Shuffled by default: neighbours of a table are alike
    (clips of one film), and every reader mixes only within a window."""
    subtitles: bool = False
    """samples are the cues of the SRT or WebVTT file beside each video, their texts the captions"""
    merge_cues_seconds: float = 0.0
    """neighbouring cues are joined until a sample is so long"""
    windows: Windows | None = None
    """(length, stride) in seconds: samples are the windows of each row; None: each row is one sample"""
    scenes: str = ""
    """``pyav`` or ``scenedetect``: what finds the scene changes that rows are cut at; "": no cutting at scenes"""
    min_scene_seconds: float = 0.5
    """a shorter scene stays with its neighbour"""
    dedup: bool = False
    """leave out rows of the same media bytes, stretch and crop as an earlier row; they are named either way"""
    workers: int | None = None
    """processes; None: as many as there are cores"""
    timeout_seconds: float = 300.0
    """per sample; then its process is ended and the file named"""
    engine: str = "pool"
    """``pool``: processes of this machine; ``ray``: of a cluster whose nodes see input and output at the same paths"""
    address: str = ""
    """of the Ray cluster; "": the one that ``RAY_ADDRESS`` names, else one is started here"""

    def __post_init__(self) -> None:
        for name in ("max_count", "max_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
        if self.windows is not None:
            check_windows(self.windows)
        if not 0 <= self.merge_cues_seconds <= 1e6 or (self.merge_cues_seconds and not self.subtitles):
            raise ConfigError(f"merge_cues_seconds={self.merge_cues_seconds}: at least 0, and only with subtitles")
        if self.scenes:
            check_detector(self.scenes)
            if self.subtitles:
                raise ConfigError("scenes and subtitles are two ways to cut a video: choose one")
        if not 0 <= self.min_scene_seconds <= 1e6:
            raise ConfigError(f"min_scene_seconds={self.min_scene_seconds}: at least 0")
        check_engine(self.engine, self.address)
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers={self.workers}: at least 1")
        if not 0 < self.timeout_seconds <= 1e6:
            raise ConfigError(f"timeout_seconds={self.timeout_seconds}: more than 0, at most 1000000")
        if self.shuffle is not None and not -(2**63) <= self.shuffle < 2**63:
            raise ConfigError(f"shuffle={self.shuffle}: a whole number of 64 bits")


@dataclass(frozen=True, slots=True)
class MakeReport:
    """What a run did."""

    folders: tuple[Path, ...]
    """each holds an ``index.json``"""
    samples: int
    reused: int
    """samples that were in shards already"""
    seconds: float
    """of media, all samples together"""
    num_bytes: int
    """of all shards"""
    shards: int
    notes: tuple[str, ...]
    """what the settings cost or changed"""
    failures: dict[str, int]
    """rows without a sample, by reason; ``failures.jsonl`` names them"""
    ignored: dict[str, int] = field(default_factory=dict)
    """members of tars that nothing reads, by extension"""
    duplicates: int = 0
    """rows whose media, stretch and crop are those of an earlier one; ``duplicates.jsonl`` names them"""
    left_out: bool = False
    """whether these were left out"""

    def lines(self, out: Path) -> list[str]:
        """What to tell the user."""
        failed = sum(self.failures.values())
        lines = [
            f"{self.samples} samples ({self.reused} were there), {self.seconds:.1f} s of media, "
            f"{self.num_bytes / 1e6:.1f} MB in {self.shards} shards, {failed} failures"
        ]
        if failed:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.failures.items())
            lines.append(f"failures: {reasons}; see {out / 'failures.jsonl'}")
        if self.duplicates:
            kept = "left out" if self.left_out else "kept; --dedup leaves them out"
            lines.append(f"duplicates: {self.duplicates}, {kept}; see {out / 'duplicates.jsonl'}")
        if self.ignored:
            lines.append("ignored: " + ", ".join(f"{n} × .{ascii(name)[1:-1]}" for name, n in self.ignored.items()))
        return [*lines, *self.notes, *map(str, self.folders)]
