"""Shards made on a cluster of two Ray nodes (on loopback): the bytes of the process pool, and what may go wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.media import write_clip

from mmcl.shards import MakeOptions, make_shards
from mmcl.shards.pool import Lost
from mmcl.types import ConfigError, RunError

COLOURS = ["red", "green", "blue", "yellow", "white", "cyan"]


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "settings.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with two CPUs each; their processes end with the fixture."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    here = Path(__file__).parent
    # short, for the paths of sockets
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as ray_folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", ray_folder)
        # the nodes import the package, and `job` from this file
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here.parents[1], here.parent, here))))
        node = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
        cluster.wait_for_nodes()
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number, colour in enumerate(COLOURS):
        write_clip(folder / f"{colour}.mp4", colour=colour, seconds=1.0, audio=number % 2 == 0)
    (folder / "broken.mp4").write_bytes((folder / "red.mp4").read_bytes()[:3000])
    shutil.copy(folder / "red.mp4", folder / "twin.mp4")
    return folder


@pytest.mark.slow
def test_the_same_bytes_as_the_process_pool(cluster, clips, tmp_path):
    options = {"max_count": 3, "windows": (0.5, 0.5), "dedup": True}
    local = make_shards(clips, tmp_path / "pool", MakeOptions(**options, workers=2))
    there = MakeOptions(**options, workers=3, engine="ray", address=cluster.address)
    report = make_shards(clips, tmp_path / "ray", there)
    assert (report.samples, report.duplicates, report.failures) == (12, 2, local.failures)
    assert contents(tmp_path / "ray") == contents(tmp_path / "pool")
    assert make_shards(clips, tmp_path / "ray", there).reused == 12
    assert make_shards(clips, tmp_path / "ray", MakeOptions(**options)).reused == 12  # the engine is no setting


def job(what: tuple[str, str]) -> str:
    """Runs in a child process of an actor."""
    kind, note = what
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hangs":
        time.sleep(60)
    if kind == "loses its actor" and not Path(note).exists():
        Path(note).write_text("")
        os.kill(_actor(), signal.SIGKILL)
        time.sleep(60)
    if kind == "raises":
        raise ZeroDivisionError("ours")
    if kind == "waits":
        time.sleep(0.3)
    return kind


class Unknown:
    """What the nodes cannot load."""

    def __reduce__(self):
        return __import__, ("a_module_that_no_node_has",)


def _is_ray(process: int) -> bool:
    return b"ray::" in Path(f"/proc/{process}/cmdline").read_bytes()


def _actor() -> int:
    """Jobs run in children of a server, which the actor started."""
    process = os.getppid()
    while not _is_ray(process):
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process


@pytest.mark.slow
def test_what_dies_hangs_or_is_lost_costs_one_job_at_most(cluster, tmp_path):
    from mmcl.shards.ray_pool import open_cluster

    kinds = ["x", "dies", "waits", "hangs", "loses its actor", *["waits"] * 20]
    with open_cluster(cluster.address) as (run, processors):
        assert processors == 4
        jobs = [(kind, str(tmp_path / "lost")) for kind in kinds]
        results = list(run(job, jobs, workers=4, timeout_seconds=5))
        with pytest.raises(ZeroDivisionError, match="ours"):
            list(run(job, [("x", ""), ("raises", "")], workers=2, timeout_seconds=5))
        with pytest.raises(RunError, match="cannot start"):
            list(run(Unknown(), [("x", "")], workers=2, timeout_seconds=5))
    assert (tmp_path / "lost").exists()
    lost = {number: result for number, result in enumerate(results) if isinstance(result, Lost)}
    assert {number: result.reason for number, result in lost.items()} == {1: "worker_died", 3: "timeout"}
    assert "SIGSEGV" in lost[1].detail
    assert [result for number, result in enumerate(results) if number not in lost] == [
        kind for kind in kinds if kind not in ("dies", "hangs")
    ]


RUN = """
import sys
from mmcl.shards import MakeOptions, make_shards
options = MakeOptions(max_count=2, workers=2, windows=(0.4, 0.3), engine="ray", address=sys.argv[3])
make_shards(sys.argv[1], sys.argv[2], options, progress=lambda *counts: print(*counts, flush=True))
"""


@pytest.mark.slow
def test_a_lost_node_and_a_killed_driver(cluster, clips, tmp_path):
    """The driver is killed, a node goes away, a run on what is left takes over what was done."""
    options = {"max_count": 2, "windows": (0.4, 0.3)}
    make_shards(clips, tmp_path / "pool", MakeOptions(**options, workers=2))
    command = [sys.executable, "-c", RUN, str(clips), str(tmp_path / "out"), cluster.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line.split()[0]) >= 6:
                process.send_signal(signal.SIGKILL)
                break
    node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    there = MakeOptions(**options, workers=5, engine="ray", address=cluster.address)
    gone = []

    def progress(done: int, total: int, note: str) -> None:
        if done >= 8 and not gone:
            gone.append(done)
            cluster.remove_node(node, allow_graceful=False)

    report = make_shards(clips, tmp_path / "out", there, progress=progress)
    assert gone and report.reused >= 2 and set(report.failures) == {"not_media"}
    assert contents(tmp_path / "out") == contents(tmp_path / "pool")


def test_an_engine_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="engine=x: pool or ray"):
        MakeOptions(engine="x")
    with pytest.raises(ConfigError, match="only with engine=ray"):
        MakeOptions(address="127.0.0.1:1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "mmcl\[ray\]"'):
        MakeOptions(engine="ray")


@pytest.mark.slow
def test_no_cluster_at_the_address(clips, tmp_path):
    pytest.importorskip("ray")
    code = "import sys; from mmcl.cli import main; sys.argv = ['mmcl', *sys.argv[1:]]; main()"
    command = ["shards", "make", str(clips), "--out", str(tmp_path), "--engine", "ray", "--address", "127.0.0.1:9"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "address=127.0.0.1:9" in done.stderr, done.stderr[-2000:]
    assert len(done.stderr.strip().splitlines()) < 4
