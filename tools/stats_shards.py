#!/usr/bin/env python3
"""What shards hold, counted: the same as `mmcl shards stats`."""

from __future__ import annotations

import sys

from mmcl.cli import main

if __name__ == "__main__":
    sys.argv[:1] = ["mmcl", "shards", "stats"]
    main()
