"""Samples that end the process that decodes them."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mmcl.data import ClipStream
from mmcl.data.collate import Value
from mmcl.data.views import ViewMaker
from mmcl.shards.members import Sample
from mmcl.types import View


@dataclass(frozen=True)
class Deadly(ViewMaker):
    """Decodes as ever, but on some keys its process is killed, stopped for ever, or meets a mistake of ours."""

    fates: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, sample: Sample, *, epoch: int, batch: int = 0) -> tuple[dict[View, Value], str]:
        fate = self.fates.get(sample.key)
        if fate in ("SIGKILL", "SIGSEGV", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, fate))
        if fate == "mistake":
            raise RuntimeError("a mistake in our own code")
        return super().__call__(sample, epoch=epoch, batch=batch)


def make_deadly(source: ClipStream, fates: Mapping[str, str]) -> ClipStream:
    """The stream, some of whose samples now end their worker."""
    maker = source.plan.maker
    options = {name: getattr(maker, name) for name in ViewMaker.__dataclass_fields__}
    source.plan = replace(source.plan, maker=Deadly(**options, fates=dict(fates)))
    return source
