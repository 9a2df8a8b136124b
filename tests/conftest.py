"""Fixtures shared by all tests; each lives in its own module of ``support``."""

from __future__ import annotations

import os
from multiprocessing import forkserver

import pytest
from hypothesis import settings

# Two cores are the smallest machine that runs these tests; every test process counts on one thread of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Continuous integration always tries the same examples; elsewhere new ones are found.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

pytest_plugins = ["support.gloo", "support.media", "support.shards"]


@pytest.fixture(scope="session", autouse=True)
def _warm_forkserver() -> None:
    """Processes that tests start are forked from one that has torch loaded: they then start in milliseconds."""
    # the first optimizer of a process imports torch._dynamo, which takes a second
    forkserver.set_forkserver_preload(["mmcl.data.loader", "mmcl.training.trainer", "torch._dynamo"])
    forkserver.ensure_running()
