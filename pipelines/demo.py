"""The whole main job on real clips: the same as `mmcl demo`."""

from __future__ import annotations

import sys

from mmcl.cli import app, guarded


def main() -> None:
    """Hands the command line on."""
    guarded(lambda: app(["demo", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
