"""Pre-training on one CPU or on many nodes of GPUs.

accelerate launch [--config_file configs/accelerate/X.yaml] pipelines/pretrain.py CONFIG [dotted.path=value …]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mmcl.cli import guarded


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, e.g. configs/pretrain/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="changes to it: dotted.path=value")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="go on: 'auto' (newest checkpoint of the run folder, or a new run) or a checkpoint; last word: auto",
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="a dotted key that may differ from the checkpoint's"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and one batch; train nothing")
    arguments = parser.parse_intermixed_args()

    def run() -> None:
        from mmcl.config import read_yaml
        from mmcl.folders import check_resume

        check_resume(arguments.resume)
        read_yaml(Path(arguments.config))  # a wrong path is said before torch is imported, which takes seconds

        from mmcl.recipe import load_config
        from mmcl.training.launch import describe, pretrain

        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            if os.environ.get("RANK", "0") == "0":
                print(describe(config))
        else:
            pretrain(config, resume=arguments.resume, allow=arguments.allow)

    guarded(run)


if __name__ == "__main__":
    main()
