"""Evaluation while a run goes on, which it does as if there were none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from torch import nn

from mmcl.distributed import Comm
from mmcl.evaluation.class_labels import labelled
from mmcl.evaluation.embed import EmbeddedShards, embed_shards
from mmcl.evaluation.ranking import ranks_both
from mmcl.evaluation.report import right_rows
from mmcl.evaluation.run import caption_labels
from mmcl.evaluation.sides import sides_of, wanted_directions
from mmcl.evaluation.tasks import neighbours_task
from mmcl.model import MultimodalModel
from mmcl.recipe import RunConfig
from mmcl.shards import load_manifest
from mmcl.training.average import WeightAverage
from mmcl.training.snapshot import random_state, set_random_state
from mmcl.types import ConfigError

FIGURES = ("R@1", "R@5", "R@10", "MedR")
"""of each direction; of all directions together the mean R@1"""
PREFIX = "eval/"


class Evaluator:
    """Retrieval between all modalities of ``evaluate.shards``, and k-NN of their labels in ``evaluate.knn_shards``.

    Both look at the joint space, so shards are embedded once. Of the moving average, where a run keeps one.
    """

    def __init__(self, config: RunConfig, comm: Comm, *, sharded: bool) -> None:
        """Raises ``ConfigError`` where shards are missing, or cannot be evaluated in this run."""
        self.options, self.config, self.comm = config.evaluate, config, comm
        best = config.train.best
        if best is not None and best.metric.startswith(PREFIX) and self.options.shards is None:
            raise ConfigError(f"train.best.metric: {best.metric!r} needs evaluate.shards, which are evaluated")
        if self.options.shards is None:
            if self.options.knn_shards is not None:
                raise ConfigError("evaluate.knn_shards: needs evaluate.shards, whose samples are to be told apart")
            return
        if sharded:
            raise ConfigError("evaluate.shards: towers that are split over ranks (train.sharding) cannot be evaluated")
        places = filter(None, (self.options.shards, self.options.knn_shards))
        self._samples = sum(load_manifest(place).num_samples for place in places)
        self._clock = time.monotonic
        self._began = self._clock()
        self._spent_seconds = 0.0
        self._cost_seconds: float | None = None
        """of the last evaluation"""

    def due(self, step: int) -> bool:
        """Whether this step is one of those that are evaluated."""
        return self.options.shards is not None and (
            step % self.options.every_steps == 0 or step == self.config.train.steps
        )

    def affordable(self, samples_per_second: float) -> bool:
        """Whether one more stays within the share of time, agreed by all ranks.

        The first is taken to cost what training on as many samples does.
        """
        cost = self._cost_seconds
        if cost is None:
            cost = self._samples / max(samples_per_second, 1e-9)
        elapsed = self._clock() - self._began
        share = (self._spent_seconds + cost) / (elapsed + cost)
        dear = share > self.options.max_share
        if self.comm.any(dear):
            if self.comm.rank == 0:
                print(
                    f"evaluation skipped: with it {share:.0%} of the time would be spent on evaluating "
                    f"(evaluate.max_share: {self.options.max_share:.0%}; evaluate.max_share=1 allows it)",
                    file=sys.stderr,
                    flush=True,
                )
            return False
        return True

    def figures(self, model: MultimodalModel, average: WeightAverage | None) -> dict[str, float]:
        """``eval/DIRECTION/FIGURE``, ``eval/mean_R@1``, ``eval/knn/MODALITY/top-1`` and ``eval/seconds``.

        Every rank calls it; leaves weights, modes and random states as they were.
        """
        start = self._clock()
        with untouched(model), nullcontext() if average is None else average.in_place():
            assert self.options.shards is not None
            embedded = self._embedded(model, self.options.shards)
            figures = _retrieval(embedded, self.comm)
            if self.options.knn_shards is not None:
                figures.update(self._neighbours(self._embedded(model, self.options.knn_shards), embedded))
        self._cost_seconds = self._clock() - start
        self._spent_seconds += self._cost_seconds
        return {f"{PREFIX}{name}": value for name, value in {**figures, "seconds": self._cost_seconds}.items()}

    def _embedded(self, model: MultimodalModel, shards: str) -> EmbeddedShards:
        return embed_shards(
            model,
            shards,
            clips=self.options.clips,
            workers=self.options.workers,
            in_process=self.config.data.in_process,
            decoder=self.config.data.decoder,
            comm=self.comm,
            device=next(model.parameters()).device,  # so that nothing is moved
            quiet=True,
        )

    def _neighbours(self, bank: EmbeddedShards, tests: EmbeddedShards) -> dict[str, float]:
        found = {}
        for modality in (name for name in tests.rows if name != "text"):
            known = labelled(bank, modality, self.options.knn_shards or "")
            asked = labelled(tests, modality, self.options.shards or "")
            result = neighbours_task(modality, known, asked)
            found[f"knn/{modality}/top-1"] = result.metrics["top-1"]
        return found


def _retrieval(embedded: EmbeddedShards, comm: Comm) -> dict[str, float]:
    """Every ordered pair of modalities, as the protocol ``paired`` asks."""
    directions = wanted_directions((), list(embedded.rows))
    sides = sides_of(embedded, np.arange(len(embedded.items)), directions)
    labels = caption_labels(embedded.items)
    figures = {}
    # both directions of a pair follow each other
    for direction in directions[::2]:
        a, b = direction.query[0], direction.gallery[0]
        if not len(sides[a].items) or not len(sides[b].items):
            continue
        right = right_rows(sides[a], sides[b], labels)
        both = ranks_both(sides[a].embeddings, sides[b].embeddings, right, comm=comm)
        for name, result in ((f"{a}->{b}", both[0]), (f"{b}->{a}", both[1])):
            if result.answerable.any():
                metrics = result.metrics()
                figures.update({f"{name}/{figure}": metrics[figure] for figure in FIGURES})
    hits = [value for name, value in figures.items() if name.endswith("/R@1")]
    return {**figures, **({"mean_R@1": sum(hits) / len(hits)} if hits else {})}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within the context a model may be evaluated; afterwards its modes and all random states are what they were."""
    random, training = random_state(), [module.training for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in zip(model.modules(), training, strict=True):
            module.training = mode
        set_random_state(random)
