"""Embedding shards with a checkpoint: the same as `mmcl embed`."""

from __future__ import annotations

import sys

from mmcl.cli import app, guarded


def main() -> None:
    """Hands the command line on."""
    guarded(lambda: app([*["embed"], *sys.argv[1:]]))


if __name__ == "__main__":
    main()
