"""Retrieval evaluation of a checkpoint: the same as `mmcl evaluate retrieval`."""

from __future__ import annotations

import sys

from mmcl.cli import app, guarded


def main() -> None:
    """Hands the command line on."""
    guarded(lambda: app([*["evaluate", "retrieval"], *sys.argv[1:]]))


if __name__ == "__main__":
    main()
