#!/usr/bin/env python3
"""Proof that shards decode, or a list of what does not: the same as `mmcl shards verify`."""

from __future__ import annotations

import sys

from mmcl.cli import main

if __name__ == "__main__":
    sys.argv[:1] = ["mmcl", "shards", "verify"]
    main()
