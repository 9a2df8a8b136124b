"""Throughput of ``encode_video``, ``encode_text`` and ``encode_audio`` beside the bare library model, as JSON.

    python tools/bench/encode.py                       # all, a few minutes of one core
    python tools/bench/encode.py --only text_minilm --pairs 9

Both sides have the same weights, get the same inputs in the same batches, and must give the same unit rows: frames and
waves that are decoded already, and texts. The bare side is what a user would write with the library alone: its
preprocessing (normalisation, tokenizer, front end) and its model in a loop, without a gradient. Ours is the method of
the model, with the projection into the joint space on top, which the comparison of rows takes into account.

The two take turns, the first of a pair changes, and the ratio of a pair is bare / ours: above 1 we are faster. What
counts is the median of the pairs, in CPU seconds of the one thread (``ratio_clock`` is the same by the clock, which
other programs on the machine disturb); lowest and highest are printed beside it. The goal is 0.95.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcl.config import build
from mmcl.model import ModelOptions, MultimodalModel
from mmcl.types import AudioSpec, Clip, VideoSpec

RESULTS = Path(__file__).parent / "results" / "encode.json"
GOAL = 0.95
LEAST_COSINE = 0.9999


class Pair(NamedTuple):
    """Two ways to the same rows."""

    model: MultimodalModel
    tower: str
    ours: Callable[[], Tensor]
    bare: Callable[[], Tensor]
    """features before the projection"""
    items: int
    what: str


def model_of(modality: str, **tower: Any) -> MultimodalModel:
    torch.manual_seed(0)
    return MultimodalModel(build(ModelOptions, {"towers": {modality: tower}})).eval()


def take_weights(model: MultimodalModel, modality: str, library: nn.Module) -> None:
    encoder = model.tower(modality)
    told = encoder.load_state_dict(encoder.foreign(library.state_dict()), strict=False)
    assert not told.missing_keys, told.missing_keys


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def frames_of(spec: VideoSpec, count: int) -> list[Clip]:
    draw = np.random.default_rng(0)
    shape = (spec.frames, 3, spec.size, spec.size)
    times = np.arange(spec.frames) / spec.fps
    return [Clip(str(n), draw.integers(0, 256, shape, dtype=np.uint8), frame_times_seconds=times) for n in range(count)]


def stacked(clips: Sequence[Clip], spec: VideoSpec) -> Tensor:
    """float32 ``(B, T, C, H, W)``, normalised as the libraries' own transforms do it."""
    pixels = torch.from_numpy(np.stack([clip.video for clip in clips])).float().div_(255)  # type: ignore[misc]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return pixels.sub_(mean).div_(std)


def video_pair(model: MultimodalModel, features: Callable[[Tensor], Tensor], count: int, batch: int, what: str) -> Pair:
    spec = model.tower("video").spec
    assert isinstance(spec, VideoSpec)
    clips = frames_of(spec, count)

    def bare() -> Tensor:
        return torch.cat([features(stacked(part, spec)) for part in batches(clips, batch)])

    return Pair(model, "video", lambda: model.encode_video(clips, batch=batch), bare, count, what)


def video_open_clip() -> Pair:
    import open_clip

    library = open_clip.create_model("ViT-B-32").eval()
    model = model_of("video", name="open_clip:ViT-B-32", frames=4)
    take_weights(model, "video", library)

    def features(pixels: Tensor) -> Tensor:
        out: Tensor = library.encode_image(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).mean(1)
        return out

    return video_pair(model, features, 8, 4, "open_clip ViT-B-32, 8 clips of 4 frames of 224 px")


def video_torchvision() -> Pair:
    from torchvision.models.video import r3d_18

    library: Any = r3d_18().eval()
    model = model_of("video", name="torchvision:r3d_18", frames=8)
    take_weights(model, "video", library)
    library.fc = nn.Identity()
    return video_pair(
        model, lambda x: library(x.transpose(1, 2)), 4, 2, "torchvision r3d_18, 4 clips of 8 frames of 112 px"
    )


def video_timm() -> Pair:
    import timm

    library = timm.create_model("resnet18", num_classes=0).eval()
    model = model_of("video", name="timm:resnet18", frames=4)
    take_weights(model, "video", library)

    def features(pixels: Tensor) -> Tensor:
        out: Tensor = library(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).mean(1)
        return out

    return video_pair(model, features, 8, 4, "timm resnet18, 8 clips of 4 frames of 224 px")


def captions(count: int) -> list[str]:
    words = ["a", "the", "dog", "cat", "man", "woman", "rides", "plays", "loud", "guitar", "on", "street", "in", "rain"]
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(words, draw.integers(4, 24))) for _ in range(count)]


def text_minilm() -> Pair:
    from transformers import AutoModel, AutoTokenizer

    from mmcl.encoders import packages

    folder = packages.place_of("package:minilm")
    library = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = model_of("text", name="hf:package:minilm")
    encoder = model.tower("text")
    encoder.load_state_dict(encoder.foreign(packages.load("minilm")), strict=False)
    texts, longest = captions(256), int(encoder.spec.tokenizer.max_tokens)  # type: ignore[union-attr]

    def features(part: Sequence[str]) -> Tensor:
        rows = tokenizer(list(part), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        tokens, mask = library(**rows).last_hidden_state, rows["attention_mask"][..., None]
        return F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)

    return Pair(
        model,
        "text",
        lambda: model.encode_text(texts, batch=64),
        lambda: torch.cat([features(part) for part in batches(texts, 64)]),
        len(texts),
        "transformers, all-MiniLM-L6-v2, 256 captions of 4 to 23 words",
    )


def audio_ast() -> Pair:
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    small = {"num_hidden_layers": 3}
    library = ASTModel(ASTConfig(**small)).eval()
    front_end = ASTFeatureExtractor()
    model = model_of("audio", name="hf:audio-spectrogram-transformer", config=small)
    take_weights(model, "audio", library)
    spec = model.tower("audio").spec
    assert isinstance(spec, AudioSpec)
    draw = np.random.default_rng(0)
    waves = [draw.uniform(-0.5, 0.5, spec.samples).astype(np.float32) for _ in range(4)]
    clips = [Clip(str(n), audio=wave, sample_rate_hz=spec.sample_rate_hz) for n, wave in enumerate(waves)]

    def features(part: Sequence[np.ndarray]) -> Tensor:
        seen = front_end(list(part), sampling_rate=spec.sample_rate_hz, return_tensors="pt")
        out: Tensor = library(**seen).pooler_output
        return out

    return Pair(
        model,
        "audio",
        lambda: model.encode_audio(clips, batch=2),
        lambda: torch.cat([features(part) for part in batches(waves, 2)]),
        len(waves),
        "transformers, AST with 3 of its 12 layers, 4 waves of 10.24 s",
    )


PAIRS: Mapping[str, Callable[[], Pair]] = {
    "video_open_clip": video_open_clip,
    "video_torchvision": video_torchvision,
    "video_timm": video_timm,
    "text_minilm": text_minilm,
    "audio_ast": audio_ast,
}


def same_rows(pair: Pair) -> float:
    """The lowest cosine of a row of ours with the bare features, brought to the joint space."""
    with torch.no_grad():
        expected = F.normalize(pair.model.heads[pair.tower](pair.bare().clone()), dim=-1)
    return float((pair.ours() * expected).sum(1).min())


def timed(run: Callable[[], Tensor]) -> tuple[float, float]:
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def compare(pair: Pair, pairs: int) -> dict[str, Any]:
    def bare() -> Tensor:
        with torch.inference_mode():
            return pair.bare()

    cosine = same_rows(pair)
    if cosine < LEAST_COSINE:
        raise SystemExit(f"{pair.what}: rows differ, lowest cosine {cosine:.6f}")
    timed(pair.ours), timed(bare)
    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    for number in range(pairs):
        sides = [("ours", pair.ours), ("bare", bare)]
        for name, run in sides if number % 2 else reversed(sides):
            taken[name].append(timed(run))
    clock = [b[0] / o[0] for o, b in zip(taken["ours"], taken["bare"], strict=True)]
    cpu = [b[1] / o[1] for o, b in zip(taken["ours"], taken["bare"], strict=True)]
    return {
        "what": pair.what,
        "ratio": round(statistics.median(cpu), 4),
        "ratio_lowest": round(min(cpu), 4),
        "ratio_highest": round(max(cpu), 4),
        "ratio_clock": round(statistics.median(clock), 4),
        "pairs": pairs,
        "items_per_cpu_second": round(pair.items / statistics.median(o[1] for o in taken["ours"]), 3),
        "lowest_cosine": round(cosine, 7),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--pairs", type=int, default=9, help="at least 7")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.pairs < 7:
        parser.error("--pairs: at least 7")
    torch.set_num_threads(1)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["machine"] = {"cpu": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__}
    for name in args.only:
        figures = compare(PAIRS[name](), args.pairs)
        results[name] = figures
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        spread = f"{figures['ratio_lowest']:.3f} to {figures['ratio_highest']:.3f}"
        verdict = "" if figures["ratio"] >= GOAL else f"  BELOW {GOAL}"
        print(
            f"{name:18} {figures['ratio']:.3f} ({spread}), {args.pairs} pairs: {figures['what']}{verdict}", flush=True
        )


if __name__ == "__main__":
    main()
