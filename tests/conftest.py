"""Fixtures shared by all tests; each lives in its own module of ``support``."""

from __future__ import annotations

import os
import tempfile
from multiprocessing import forkserver
from multiprocessing.util import get_temp_dir

import pytest
from hypothesis import HealthCheck, settings

# Two cores are the smallest machine that runs these tests; every test process counts on one thread of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Continuous integration always tries the same examples; elsewhere new ones are found.
# No time limits: on a busy machine they would say nothing of the code.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

pytest_plugins = ["support.gloo", "support.media", "support.shards"]


@pytest.fixture(scope="session", autouse=True)
def _warm_forkserver(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Processes that tests start are forked from one that has torch loaded: they then start in milliseconds."""
    get_temp_dir()  # of this process, which removes it at its end
    # what processes leave behind that are killed goes with the folders of the tests
    folder = str(tmp_path_factory.mktemp("tmp"))
    if len(folder) < 60:  # paths of sockets have a limit of a hundred characters
        os.environ["TMPDIR"] = tempfile.tempdir = folder
    # the first optimizer of a process imports torch._dynamo, which takes a second
    forkserver.set_forkserver_preload(["mmcl.data.loader", "mmcl.training.trainer", "torch._dynamo"])
    forkserver.ensure_running()
