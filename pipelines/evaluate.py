"""Retrieval evaluation of a checkpoint, on one process or on many.

accelerate launch [--config_file configs/accelerate/X.yaml] pipelines/evaluate.py OPTIONS (of `mmcl evaluate retrieval`)
"""

from __future__ import annotations

import sys

from mmcl.cli import app, guarded


def main() -> None:
    """Hands the command line on."""

    def run() -> None:
        from mmcl.distributed.launched import launched

        with launched():
            app([*["evaluate", "retrieval"], *sys.argv[1:]])

    guarded(run)


if __name__ == "__main__":
    main()
