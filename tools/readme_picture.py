"""Makes the picture of the README: generated clips (colour = word = tone), shards, a short training, its report."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
OUT = ROOT / ".github" / "report.png"


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from support.media import make_media_folder

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_media_folder(work / "media", per_colour=4)
        mmcl = [sys.executable, "-m", "mmcl"]
        config = str(ROOT / "configs/pretrain/tiny_cpu.yaml")
        overrides = [f"data.shards={work}/shards/train", f"train.out={work}/run", "train.steps=40"]
        for command in (
            [*mmcl, "shards", "make", str(work / "media/clips.csv"), "--out", str(work / "shards")],
            [*mmcl, "train", config, *overrides],
            [
                *mmcl,
                "evaluate",
                "retrieval",
                str(work / "run"),
                str(work / "shards/test"),
                "--out",
                str(work / "report"),
            ],
        ):
            subprocess.run(command, check=True, cwd=ROOT)
        OUT.parent.mkdir(exist_ok=True)
        page = work / "page.png"
        photograph = [sys.executable, str(ROOT / "tools/report_screenshot.py"), str(work / "report/report.html")]
        subprocess.run([*photograph, "--out", str(page), "--width", "1280", "--height", "2300"], check=True)
        picture = Image.open(page).convert("RGB")
        picture.resize((880, 880 * picture.height // picture.width)).quantize(128).save(OUT, optimize=True)
    print(OUT)


if __name__ == "__main__":
    main()
