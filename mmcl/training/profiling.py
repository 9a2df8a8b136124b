"""Where a step goes: a trace to open in a browser, and a page that says it in two tables."""

from __future__ import annotations

import os
import socket
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from mmcl.training.spans import PARTS, PREFIX
from mmcl.training.step import TrainStep

SETTLE_STEPS, STEPS = 3, 10
"""steps that are let go by, the profiler's own warm-up among them, and those that are looked at"""
OPERATORS = 15
FORWARD = "forward: "


class StepProfile(AbstractContextManager["StepProfile"]):
    """Profiles a few steps of a run into ``RUN/profile``: ``trace.json`` and ``profile.md``.

    A run that ends before tells what it has seen.
    """

    def __init__(self, folder: Path, step: TrainStep, *, wanted: bool) -> None:
        self.folder, self.step = folder / "profile", step
        self._profile = self._make() if wanted else None
        self._hooks: list[Any] = []
        self._seen = 0

    def _make(self) -> Any:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its stages, and calls a lack of GPUs an error
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        return profile(
            activities=activities,
            schedule=schedule(wait=SETTLE_STEPS - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> StepProfile:
        if self._profile is not None:
            for name, tower in self.step.model.towers.items():
                self._hooks += _spanned(tower, FORWARD + name)
            self._hooks += _spanned(self.step.mix, "objectives")
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, value, trace)
            for hook in self._hooks:
                hook.remove()

    def next_step(self) -> None:
        """One step of the run is over."""
        if self._profile is not None:
            self._seen += 1
            self._profile.step()

    def _write(self, found: Any) -> None:
        steps = min(max(self._seen - SETTLE_STEPS, 1), STEPS)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(self.folder / "trace.json"))
            (self.folder / "profile.md").write_text(summary(found.key_averages(), steps), encoding="utf-8")
        except OSError as error:
            print(f"{self.folder} not written: {error}", flush=True)
            return
        print(
            f"profile of {steps} steps: {self.folder / 'profile.md'}; trace.json opens in ui.perfetto.dev", flush=True
        )


def _spanned(module: nn.Module, name: str) -> list[Any]:
    """Hooks that give the forward of a module a name in the profile."""
    opened: list[Any] = []

    def enter(*_: object) -> None:
        opened.append(torch.profiler.record_function(PREFIX + name))
        opened[-1].__enter__()

    def leave(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def summary(events: Any, steps: int) -> str:
    """``profile.md`` of averaged events of so many steps."""
    device = torch.cuda.is_available()
    parts = {event.key.removeprefix(PREFIX): event for event in events if event.key.startswith(PREFIX)}
    forwards = [name for name in parts if name.startswith(FORWARD)]
    order = [*PARTS[:2], *forwards, *PARTS[2:]]
    step = next((event for event in events if event.key.startswith("ProfilerStep")), None)
    total = step.cpu_time_total if step is not None else sum(e.cpu_time_total for e in parts.values())
    lines = [
        "# Where a step goes",
        "",
        f"{steps} steps on {socket.gethostname()}, rank 0; {total / steps / 1000:.1f} ms a step. Times are of the "
        "process that trains; on a GPU, which works beside it, they tell when it was asked, and the second column "
        "what it did. The gradient cache holds the forwards and the objectives of its passes.",
        "",
        "| part | ms a step | GPU ms a step | share |" if device else "| part | ms a step | share |",
        "| --- | ---: | ---: | ---: |" if device else "| --- | ---: | ---: |",
    ]
    for name in order:
        event = parts.get(name)
        if event is None:
            lines.append(f"| {name} | – | {'– | ' if device else ''}– |")
            continue
        gpu = f"{event.device_time_total / steps / 1000:.2f} | " if device else ""
        share = event.cpu_time_total / max(total, 1e-9)
        lines.append(f"| {name} | {event.cpu_time_total / steps / 1000:.2f} | {gpu}{share:.1%} |")
    lines += ["", "– : not in these steps.", "", "## Operators that take longest by themselves", ""]
    lines += _operators(events, steps, device)
    return "\n".join(lines) + "\n"


def _operators(events: Any, steps: int, device: bool) -> list[str]:
    def own(event: Any) -> float:
        return float(event.self_device_time_total if device else event.self_cpu_time_total)

    named = [event for event in events if not event.key.startswith((PREFIX, "ProfilerStep"))]
    longest = sorted(named, key=own, reverse=True)[:OPERATORS]
    lines = ["| operator | ms a step | calls a step |", "| --- | ---: | ---: |"]
    return lines + [
        f"| {event.key.replace('|', '/')[:80]} | {own(event) / steps / 1000:.2f} | {event.count / steps:.1f} |"
        for event in longest
    ]
