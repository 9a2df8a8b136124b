"""Exporting a checkpoint as a model folder: the same as `mmcl export`."""

from __future__ import annotations

import sys

from mmcl.cli import app, guarded


def main() -> None:
    """Hands the command line on."""
    guarded(lambda: app([*["export"], *sys.argv[1:]]))


if __name__ == "__main__":
    main()
