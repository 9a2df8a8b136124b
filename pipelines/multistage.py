"""Multistage contrastive learning: trains, embeds and clusters, stage by stage; goes on with what the folder holds.

accelerate launch [--config_file configs/accelerate/X.yaml] pipelines/multistage.py CONFIG [dotted.path=value …]
Then, of the concatenation of all stages: mmcl evaluate retrieval OUT SHARDS --out REPORT, mmcl embed OUT SHARDS …
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmcl.cli import guarded


def main() -> None:
    """Reads the command line and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, e.g. configs/pretrain/multistage.yaml")
    parser.add_argument("overrides", nargs="*", help="changes to it: dotted.path=value")
    arguments = parser.parse_intermixed_args()

    def run() -> None:
        from mmcl.config import read_yaml

        read_yaml(Path(arguments.config))  # a wrong path is said before torch is imported, which takes seconds

        from mmcl.multistage import run_stages
        from mmcl.recipe import load_config

        run_stages(load_config(arguments.config, arguments.overrides))

    guarded(run)


if __name__ == "__main__":
    main()
