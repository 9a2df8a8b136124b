"""Embedding shards with a checkpoint, on one process or on many.

accelerate launch [--config_file configs/accelerate/X.yaml] pipelines/embed.py OPTIONS (of `mmcl embed`)
"""

from __future__ import annotations

import sys

from mmcl.cli import app, guarded


def main() -> None:
    """Hands the command line on."""

    def run() -> None:
        from mmcl.distributed.launched import launched

        with launched():
            app([*["embed"], *sys.argv[1:]])

    guarded(run)


if __name__ == "__main__":
    main()
