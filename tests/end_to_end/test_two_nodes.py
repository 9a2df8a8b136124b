"""Two computers: two network namespaces joined by a cable. One of them goes, the other says so and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.launched import ACCELERATE, PRETRAIN, arguments, family, finish, latest, started, steps_logged, wait_until
from support.recipes import ROOT

import mmcl
from mmcl.training.launch import pretrain
from mmcl.training.trainer import Trainer

pytestmark = pytest.mark.slow

ADDRESSES = ("10.213.77.1", "10.213.77.2")
TIMEOUT_SECONDS = 10
STEPS = 10
RUN = ("train.steps=100000", f"train.timeout_seconds={TIMEOUT_SECONDS}", "train.processes=2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Names of two namespaces, each with its own loopback and one end of the cable."""
    names = (f"mmcl{os.getpid()}a", f"mmcl{os.getpid()}b")
    with ExitStack() as undo:
        try:
            for name in names:
                ip("netns", "add", name)
                undo.callback(ip, "netns", "del", name)
            ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
                for device in (name, "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no right to make network namespaces here: {getattr(error, 'stderr', '') or error}")
        yield names


def start(stack: ExitStack, nodes: tuple[str, str], rank: int, log: Path, run: list[str]) -> subprocess.Popen[bytes]:
    launcher = [*ACCELERATE, str(ROOT / "configs/accelerate/nodes_2x8.yaml"), "--num_processes", "2"]
    launcher += ["--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0], "--main_process_port", "29577"]
    inside = ["ip", "netns", "exec", nodes[rank]]
    return stack.enter_context(started([*inside, *launcher, PRETRAIN, *run], log, {"GLOO_SOCKET_IFNAME": nodes[rank]}))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()[:STEPS]]


@pytest.fixture(scope="module")
def alone(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The first losses of the same run on one process."""
    out, step = tmp_path_factory.mktemp("alone") / "run", Trainer.optimizer_step

    def stop_in_time(self: Trainer, batches: list) -> object:
        if self.progress.step == STEPS - 1:
            (out / "stop").touch()
        return step(self, batches)

    config, *overrides = arguments(shards_folder, out, RUN[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", stop_in_time)
        pretrain(mmcl.load_config(config, overrides))
    return losses(out)


def test_two_nodes_equal_one_and_one_outlives_the_other(
    shards_folder: Path, tmp_path: Path, nodes: tuple[str, str], alone: list[float]
) -> None:
    out, logs = tmp_path / "run", [tmp_path / "log0", tmp_path / "log1"]
    run = arguments(shards_folder, out, *RUN)
    with ExitStack() as stack:
        first, second = (start(stack, nodes, rank, logs[rank], run) for rank in range(2))
        wait_until(lambda: steps_logged(out) > STEPS, "steps on both nodes")
        for pid in family(second.pid):
            os.kill(pid, signal.SIGKILL)
        assert first.wait(timeout=3 * TIMEOUT_SECONDS) != 0
    said = logs[0].read_text()
    assert "error: rank 1 of 2 is gone" in said, said[-3000:]
    assert "on 2 process(es) (cpu)" in said
    for step, (one, both) in enumerate(zip(alone, losses(out), strict=True), 1):
        assert abs(one - both) <= 1e-4 * abs(one), f"step {step}: {one} and {both}"
    taken = int(latest(out).removeprefix("step_"))
    ends = [f"train.steps={taken + 2}", "train.processes=null", "--resume", "auto", "--allow", "train.steps"]
    done = finish([sys.executable, PRETRAIN, *run, *ends])
    assert "it ran on 2 process(es), now on 1" in done.stdout
    assert latest(out) == f"step_{taken + 2:08d}"


def test_a_node_that_falls_silent_is_named(shards_folder: Path, tmp_path: Path, nodes: tuple[str, str]) -> None:
    """The cable is pulled: no connection is closed, nothing ever comes again. Both ends find out and end."""
    out, logs = tmp_path / "run", [tmp_path / "log0", tmp_path / "log1"]
    run = arguments(shards_folder, out, *RUN)
    with ExitStack() as stack:
        both = [start(stack, nodes, rank, logs[rank], run) for rank in range(2)]
        wait_until(lambda: steps_logged(out) > 1, "steps on both nodes")
        ip("-n", nodes[0], "link", "set", nodes[0], "down")
        for node in both:
            assert node.wait(timeout=3 * TIMEOUT_SECONDS) != 0
    assert "rank 1 of 2 is gone" in logs[0].read_text(), logs[0].read_text()[-3000:]
    assert "rank 0 of 2 is gone" in logs[1].read_text(), logs[1].read_text()[-3000:]
