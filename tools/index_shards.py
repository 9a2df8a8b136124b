#!/usr/bin/env python3
"""Shards of other tools to indexed ones: the same as `mmcl shards index`."""

from __future__ import annotations

import sys

from mmcl.cli import main

if __name__ == "__main__":
    sys.argv[:1] = ["mmcl", "shards", "index"]
    main()
