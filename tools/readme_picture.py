"""Makes the pictures of the README: generated clips (colour = word = tone), shards, a short training, its report.

``.github/report.png`` is the top of the page, ``.github/gallery.png`` its gallery with the worst queries first.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from report_screenshot import photograph

ROOT = Path(__file__).parents[1]
OUT = ROOT / ".github"
PICTURE_BYTES = 300_000
WIDTH = 880
STEPS = 15


def make_report(work: Path) -> Path:
    """The page of a model that was trained too shortly to get everything right."""
    from support.media import make_media_folder

    make_media_folder(work / "media", per_colour=6)
    mmcl = [sys.executable, "-m", "mmcl"]
    config = str(ROOT / "configs/pretrain/tiny_cpu.yaml")
    overrides = [f"data.shards={work}/generated/shards/train", f"train.out={work}/runs/tiny", f"train.steps={STEPS}"]
    evaluated = [str(work / "runs/tiny"), str(work / "generated/shards/test"), "--out", str(work / "report")]
    for command in (
        [*mmcl, "shards", "make", str(work / "media/clips.csv"), "--out", str(work / "generated/shards")],
        [*mmcl, "train", config, *overrides],
        [*mmcl, "evaluate", "retrieval", *evaluated],
    ):
        subprocess.run(command, check=True, cwd=ROOT)
    return work / "report/report.html"


def save(page: Path, out: Path) -> None:
    """Smaller, and in fewer colours, until below :data:`PICTURE_BYTES`."""
    picture = Image.open(page).convert("RGB")
    picture = picture.resize((WIDTH, WIDTH * picture.height // picture.width), Image.Resampling.LANCZOS)
    picture.save(out, optimize=True)
    for colours in (256, 128):
        if out.stat().st_size < PICTURE_BYTES:
            return
        picture.quantize(colours, method=Image.Quantize.FASTOCTREE).save(out, optimize=True)
    if out.stat().st_size >= PICTURE_BYTES:
        raise SystemExit(f"{out} has {out.stat().st_size} bytes, {PICTURE_BYTES} are allowed")


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        report = make_report(work)
        photograph(report, work / "top.png", 1280, 1085)
        photograph(report, work / "gallery.png", 1280, 1240, choose=["Worst first"], at="section.gallery")
        save(work / "top.png", OUT / "report.png")
        save(work / "gallery.png", OUT / "gallery.png")
    print(OUT / "report.png", OUT / "gallery.png")


if __name__ == "__main__":
    main()
