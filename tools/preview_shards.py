#!/usr/bin/env python3
"""A page to look at shards: the same as `mmcl shards preview`."""

from __future__ import annotations

import sys

from mmcl.cli import main

if __name__ == "__main__":
    sys.argv[:1] = ["mmcl", "shards", "preview"]
    main()
