#!/usr/bin/env python3
"""The same samples in other shards: the same as `mmcl shards reshard`."""

from __future__ import annotations

import sys

from mmcl.cli import main

if __name__ == "__main__":
    sys.argv[:1] = ["mmcl", "shards", "reshard"]
    main()
