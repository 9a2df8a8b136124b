"""The stream of batches: an order that is a pure function, a state that is one integer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmcl.data.collate import interleave
from mmcl.data.loader import Plan, part_loader
from mmcl.data.options import SamplingOptions
from mmcl.data.order import fitting_workers
from mmcl.data.views import ViewMaker
from mmcl.media.augmentation import Augmentation
from mmcl.media.video import Decoder
from mmcl.media.windows import Rule, Short
from mmcl.shards.manifest import Manifest
from mmcl.types import Batch, ConfigError, View


class ClipStream:
    """Batches of one rank, without end, over epoch borders; every sample of an epoch comes exactly once.

    Global batch t is draws ``t·B … (t+1)·B − 1``; rank r holds draws ``t·B + r + i·W``. Which samples these are depends
    on the manifest, ``seed``, ``streams`` and ``block`` alone, never on ranks, workers or failures.

    Args:
        manifest: the shards.
        views: what to decode of each sample.
        global_batch: rows of all ranks together; ``world_size`` must divide it.
        workers: decoding processes of this rank; lowered to a divisor of the rank's rows. 0 means one.
        shuffle: False reads the shards in order, once, and ends (evaluation); the last batch is filled with holes.
        rule: ``random`` windows and captions, or ``even`` ones.
        sampling: where random windows lie.
        augmentations: what views may name; their parameters come with the batch, ``mmcl.media.augment`` applies them.
        in_process: decode in this process.
        with_metadata: batches carry captions and metadata.

    Raises:
        ConfigError: an empty manifest, a batch that the ranks cannot share equally, an unknown augmentation.
    """

    def __init__(
        self,
        manifest: Manifest,
        views: Sequence[View],
        *,
        global_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        streams: int = 64,
        block: int = 256,
        shuffle: bool = True,
        rule: Rule = "random",
        decoder: Decoder = "decord",
        short: Short = "loop",
        sampling: SamplingOptions | None = None,
        augmentations: Mapping[str, Augmentation] | None = None,
        in_process: bool = False,
        with_metadata: bool = False,
    ) -> None:
        if manifest.num_samples == 0:
            raise ConfigError(f"data.shards: {manifest.url} holds no samples")
        if global_batch % world_size:
            nearest = max(world_size, round(global_batch / world_size) * world_size)
            raise ConfigError(
                f"train.global_batch: {world_size} processes cannot share {global_batch} rows; nearest: {nearest}"
            )
        rows = global_batch // world_size
        self.workers = fitting_workers(workers, rows)
        self.in_process = in_process
        self.plan = Plan(
            manifest=manifest,
            maker=ViewMaker(
                tuple(views),
                seed=seed,
                rule=rule,
                decoder=decoder,
                short=short,
                sampling=sampling or SamplingOptions(),
                augmentations=dict(augmentations or {}),
            ),
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            workers=1 if in_process else self.workers,
            streams=streams,
            block=block,
            shuffle=shuffle,
            last_draw=None if shuffle else manifest.num_samples,
            with_metadata=with_metadata,
            quarantine=frozenset(),
        )
        self.draws = 0
        """samples drawn so far by all ranks together: the position"""

    @property
    def epoch(self) -> float:
        """Epochs drawn so far."""
        return self.draws / self.plan.manifest.num_samples

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on; a state is only good for an equal one."""
        return {
            "manifest": self.plan.manifest.fingerprint,
            "samples": self.plan.manifest.num_samples,
            "seed": self.plan.maker.seed,
            "streams": self.plan.streams,
            "block": self.plan.block,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position: the draw counter, the fingerprint of what it counts in, and the quarantined keys."""
        return {"draws": self.draws, "fingerprint": self.fingerprint(), "quarantine": sorted(self.plan.quarantine)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on at a saved position, on any number of ranks and workers.

        Raises:
            ConfigError: the state belongs to another order; names what differs.
        """
        saved, mine = state["fingerprint"], self.fingerprint()
        different = [
            f"{name}: {saved.get(name)!r} then, {mine[name]!r} now" for name in mine if saved.get(name) != mine[name]
        ]
        if different:
            raise ConfigError(
                "the stream cannot go on where it stopped, its order has changed: " + "; ".join(different)
            )
        if state["draws"] % self.plan.global_batch:
            raise ConfigError(
                f"train.global_batch: the stream stopped after {state['draws']} samples, "
                f"which is no multiple of {self.plan.global_batch}"
            )
        self.draws = int(state["draws"])
        self.plan = replace(self.plan, quarantine=frozenset(state["quarantine"]))

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position; the position moves when a batch is handed out."""
        plan = self.plan
        parts = iter(part_loader(plan, self.draws // plan.global_batch, in_process=self.in_process))
        while True:
            batch = [part for part in (next(parts, None) for _ in range(plan.workers)) if part is not None]
            if not batch:
                return
            self.draws += plan.global_batch
            yield interleave(batch)
