#!/usr/bin/env python3
"""Media and captions to shards: the same as `mmcl shards make`."""

from __future__ import annotations

import sys

from mmcl.cli import main

if __name__ == "__main__":
    sys.argv[:1] = ["mmcl", "shards", "make"]
    main()
