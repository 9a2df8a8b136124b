"""Convolutions with their channels last (``train.channels_last``) beside the default: CPU seconds of a step.

python tools/bench/layout.py [--pairs N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from mmcl.encoders.base import Encoder
from mmcl.encoders.build import build_towers
from mmcl.recipe import ModelOptions
from mmcl.training.layout import channels_last

TOWERS = {
    "slow_r50": {"name": "slow_r50", "size": 64, "channels": 32},
    "r3d_18": {"name": "torchvision:r3d_18", "size": 64},
    "cnn_audio": {"name": "resnet_mel"},
}


def step_seconds(tower: Encoder, x: torch.Tensor) -> float:
    """CPU seconds of one forward and backward."""
    start = time.process_time()
    tower(x).pooled.sum().backward()
    return time.process_time() - start


def compare(options: dict[str, object], pairs: int) -> list[float]:
    """Default over channels last, pair by pair: above 1 is a gain."""
    towers = build_towers(ModelOptions.model_validate({"towers": {"a": options, "b": options}}).towers)
    plain, laid = towers["a"].train(), towers["b"].train()
    channels_last(laid)
    spec = plain.spec
    if spec.modality == "video":
        x = torch.randint(256, (2, spec.frames, 3, spec.size, spec.size)).byte()
    else:
        x = torch.randn(2, spec.samples)
    for tower in (plain, laid):
        step_seconds(tower, x)
    return [step_seconds(plain, x) / step_seconds(laid, x) for _ in range(pairs)]


def main() -> None:
    """Prints a line per tower and writes ``results/layout.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {}
    for name, options in TOWERS.items():
        ratios = compare(options, arguments.pairs)
        found[name] = {"median": round(statistics.median(ratios), 3), "all": [round(each, 3) for each in ratios]}
        print(f"{name}: {found[name]['median']:.2f} times as fast ({min(ratios):.2f}–{max(ratios):.2f})", flush=True)
    out = Path(__file__).parent / "results" / "layout.json"
    out.write_text(json.dumps({"device": "cpu", "torch": torch.__version__, "ratios": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
