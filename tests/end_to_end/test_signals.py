"""Every way to ask a run to end, under every launcher: a checkpoint is there, nobody is left, a resume goes on."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.launched import (
    CPU_2,
    MMCL,
    PRETRAIN,
    TORCHRUN,
    alive,
    arguments,
    family,
    finish,
    latest,
    started,
    steps_logged,
    wait_until,
)
from support.recipes import ROOT

pytestmark = pytest.mark.slow

LONG = "train.steps=100000"


def test_sigterm_to_torchrun_saves_and_plain_python_goes_on(shards_folder: Path, tmp_path: Path) -> None:
    """The launcher hands SIGTERM on to its ranks; fewer ranks go on, and say so."""
    out, log = tmp_path / "run", tmp_path / "log"
    run = arguments(shards_folder, out, LONG)
    with started([*TORCHRUN, "--nproc_per_node", "2", PRETRAIN, *run], log) as launcher:
        wait_until(lambda: steps_logged(out) >= 3, log.read_text())
        launcher.terminate()
        launcher.wait(timeout=60)
    taken = steps_logged(out)
    assert latest(out) == f"step_{taken:08d}", log.read_text()[-2000:]
    done = finish([sys.executable, PRETRAIN, *run, f"train.steps={taken + 2}", "--resume", "--allow", "train.steps"])
    assert f"going on from {out}/checkpoints/step_{taken:08d}, after step {taken}" in done.stdout
    assert "it ran on 2 process(es), now on 1" in done.stdout
    assert f"changed: train.steps: 100000 → {taken + 2}" in done.stdout
    assert latest(out) == f"step_{taken + 2:08d}"


def test_no_rank_outlives_a_killed_launcher(shards_folder: Path, tmp_path: Path) -> None:
    """``kill -9`` of the launcher: its ranks save and end within ten seconds."""
    out, log = tmp_path / "run", tmp_path / "log"
    with started([*CPU_2, PRETRAIN, *arguments(shards_folder, out, LONG)], log) as launcher:
        wait_until(lambda: steps_logged(out) >= 3, "three steps")
        ranks = [pid for pid in family(launcher.pid) if pid != launcher.pid]
        assert len(ranks) >= 2
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not alive(ranks), f"ranks are left: {log.read_text()[-2000:]}", seconds=10)
    assert latest(out) == f"step_{steps_logged(out):08d}"
    assert "is gone: saving and ending" in log.read_text()


def test_a_stop_file_of_the_start_counts_and_a_second_ctrl_c_ends_at_once(shards_folder: Path, tmp_path: Path) -> None:
    """An old stop file is dropped; one that is touched while the run starts is meant for it."""
    out, log = tmp_path / "run", tmp_path / "log"
    out.mkdir()
    (out / "stop").touch()
    os.utime(out / "stop", (1e9, 1e9))
    run = arguments(shards_folder, out, LONG)
    with started([*MMCL, *run], log) as process:
        wait_until(lambda: not (out / "stop").exists(), "the old file is dropped")
        (out / "stop").touch()
        assert process.wait(timeout=60) == 0, log.read_text()
    assert steps_logged(out) < 20
    assert latest(out) == f"step_{steps_logged(out):08d}"
    assert not (out / "stop").exists(), "it would stop the next run too"
    # data that stands still: such a run comes to no end of its step
    still = ["data.in_process=false", "data.timeout_seconds=600", "--resume", "auto"]
    taken = steps_logged(out)
    with started([*MMCL, *run, *still], log) as process:
        wait_until(lambda: steps_logged(out) > taken, "a step")
        workers = [pid for pid in family(process.pid) if pid != process.pid]
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            os.kill(process.pid, signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1.5)
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(timeout=2) == 130
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
    assert "stopped at once" in log.read_text()


def test_the_slurm_script_saves_when_its_time_ends_and_queues_itself_again(shards_folder: Path, tmp_path: Path) -> None:
    """Real bash, trap and run; of Slurm only what the script calls, as it would answer on one node."""
    out, log, tools = tmp_path / "run", tmp_path / "log", tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "srun": '#!/bin/bash\nshift\nSLURM_NODEID=0 exec "$@"\n',
        "scontrol": f'#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" >>{tmp_path}/queued\n',
        "accelerate": f'#!/bin/bash\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    script = ["bash", str(ROOT / "configs/accelerate/slurm.sh"), *arguments(shards_folder, out, LONG)]
    slurm = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4217",
        "SLURM_JOB_NODELIST": "node",
        "MMCL_LAUNCH": "configs/accelerate/single.yaml",
    }
    with started(script, log, slurm) as batch:
        wait_until(lambda: steps_logged(out) >= 2, "two steps")
        os.kill(batch.pid, signal.SIGUSR1)  # to the script alone, as `B:` says
        assert batch.wait(timeout=60) == 0, log.read_text()[-2000:]
    assert latest(out) == f"step_{steps_logged(out):08d}"
    assert re.search("stopped after step", log.read_text())
    assert (tmp_path / "queued").read_text() == "requeue 4217\n"
