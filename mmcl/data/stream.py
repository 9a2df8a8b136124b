"""The stream of batches: an order that is a pure function, a state that is one integer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.data.clusters import Clusters
from mmcl.data.collate import interleave
from mmcl.data.health import append_quarantine
from mmcl.data.loader import Loss, PartLoader, WorkersLostError
from mmcl.data.options import SamplingOptions
from mmcl.data.order import MAX_PERIOD, Integers, fitting_workers, reduced_weights, stream_sharing
from mmcl.data.plan import Plan
from mmcl.data.views import ViewMaker
from mmcl.media.augmentation import Augmentation
from mmcl.media.windows import Rule, Short
from mmcl.shards.files import is_remote
from mmcl.shards.manifest import Manifest
from mmcl.shards.remote import RemoteOptions
from mmcl.shards.sequential import TarList, describe_order
from mmcl.types import DEFAULT_DECODER, Batch, ConfigError, Decoder, RunError, View

IDLE_LOSSES = 3
"""workers that may be lost one after the other, before a batch is whole, without having been at any sample"""
SAMPLE_LOSSES = 100
"""samples that may cost a worker before one batch is whole"""


class ClipStream:
    """Batches of one rank, without end, over epoch borders; every sample of an epoch comes exactly once.

    Global batch t is draws ``t·B … (t+1)·B − 1``; rank r holds draws ``t·B + r + i·W``. Which samples these are depends
    on the manifest, ``seed``, ``streams`` and ``block`` alone (with ``clusters`` also on these and on B), never on
    ranks, workers or failures.

    A worker that dies, or is at one sample for longer than ``timeout_seconds``, costs that sample alone: its key is
    quarantined, a hole from then on, and the workers start again at the last batch that was handed out.

    Args:
        source: the shards; or several, each with a weight in whole numbers, to be mixed; or tars without an index,
            whose order depends on ranks and workers and which are skipped through again on resume.
        views: what to decode of each sample.
        global_batch: rows of all ranks together; ``world_size`` must divide it.
        workers: decoding processes of this rank; lowered to a divisor of the rank's rows. 0 means one.
        shuffle: False reads the shards in order, once, and ends (evaluation); the last batch is filled with holes.
        samples: without shuffle, the numbers of the samples to read, in this order, instead of all; −1 is a hole.
        clusters: with shuffle, pseudo-labels of the samples: every global batch holds samples of one, and holes where
            a label's samples do not fill its batches (see ``mmcl.data.cluster_order``).
        mixed_clusters: batches in the usual order instead, whose rows carry their pseudo-label (``Batch.pools``).
        rule: ``random`` windows and captions, or ``even`` ones.
        sampling: where random windows lie.
        augmentations: what views may name; their parameters come with the batch, ``mmcl.media.augment`` applies them.
        in_process: decode in this process.
        with_metadata: batches carry captions and metadata.
        allow_shared_streams: let several workers read each stream of remote shards.
        quarantine_file: where quarantined keys are noted before the workers start again.
        remote: how remote shards are read; what may be read ahead is this rank's, its workers share it.

    Raises:
        ConfigError: an empty manifest, a batch that the ranks cannot share equally, weights that cannot be mixed,
            remote streams that several workers would read, an unknown augmentation, labels of other shards.
    """

    def __init__(
        self,
        source: Manifest | TarList | Sequence[tuple[Manifest | TarList, int]],
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
        samples: Sequence[int] | None = None,
        clusters: Clusters | None = None,
        mixed_clusters: bool = False,
        rule: Rule = "random",
        decoder: Decoder = DEFAULT_DECODER,
        short: Short = "loop",
        sampling: SamplingOptions | None = None,
        augmentations: Mapping[str, Augmentation] | None = None,
        in_process: bool = False,
        with_metadata: bool = False,
        timeout_seconds: float = 120.0,
        allow_shared_streams: bool = False,
        quarantine_file: Path | None = None,
        remote: RemoteOptions | None = None,
    ) -> None:
        given = [(source, 1)] if isinstance(source, (Manifest, TarList)) else list(source)
        sources = [(each, weight) for each, weight in given if isinstance(each, Manifest)]
        manifests = tuple(manifest for manifest, _ in sources)
        tars = _only_tars(given, shuffle=shuffle)
        if samples is not None and shuffle:
            raise ValueError("samples are read in the order given: shuffle=False")
        if tars is None:
            _check_sources(sources, shuffle=shuffle)
        if clusters is not None:
            _check_clusters(clusters, manifests, tars is not None or not shuffle)
        if global_batch % world_size:
            nearest = max(world_size, round(global_batch / world_size) * world_size)
            raise ConfigError(
                f"train.global_batch: {world_size} processes cannot share {global_batch} rows; nearest: {nearest}"
            )
        rows = global_batch // world_size
        self.workers = fitting_workers(workers, rows)
        self.in_process, self.timeout_seconds, self.quarantine_file = in_process, timeout_seconds, quarantine_file
        self.sharing = 1
        if shuffle and tars is None and (clusters is None or mixed_clusters):  # all workers read a label's samples
            self.sharing = stream_sharing(streams, world_size * (1 if in_process else self.workers))
        """workers that read each stream"""
        if self.sharing > 1 and not allow_shared_streams and any(is_remote(manifest.url) for manifest in manifests):
            readers = world_size * self.workers
            raise ConfigError(
                f"data.streams: {streams} streams of remote shards on {readers} decoding workers (all ranks together): "
                f"each would be read by {self.sharing} of them; choose a multiple of {readers}, e.g. "
                f"{-(-streams // readers) * readers}, or set data.allow_shared_streams=true"
            )
        self.plan = Plan(
            manifests=manifests,
            weights=reduced_weights([weight for _, weight in given]),
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
            last_draw=None if shuffle else manifests[0].num_samples,
            with_metadata=with_metadata,
            quarantine=frozenset(),
            remote=remote or RemoteOptions(),
            tars=tars,
            samples=None if samples is None else _padded(samples, global_batch, manifests[0].num_samples),
            clusters=clusters,
            mixed=clusters is not None and mixed_clusters,
        )
        self.draws = 0
        """samples drawn so far by all ranks together: the position"""

    @property
    def num_samples(self) -> int:
        """Samples of all sources; 0: not known, of tars without an index."""
        return sum(manifest.num_samples for manifest in self.plan.manifests)

    @property
    def num_shards(self) -> int:
        """Shards of all sources."""
        if self.plan.tars is not None:
            return self.plan.tars.num_shards
        return sum(manifest.num_shards for manifest in self.plan.manifests)

    @property
    def epochs(self) -> list[float]:
        """Epochs drawn so far, of each source its own; none where they are not known."""
        if self.plan.tars is not None:
            return []
        return self.plan.order().epochs(self.draws)

    @property
    def quarantine(self) -> frozenset[str]:
        """Keys that are never decoded again."""
        return self.plan.quarantine

    def add_quarantine(self, keys: Iterable[str]) -> None:
        """Makes holes of these keys from the next batch on."""
        new = frozenset(keys) - self.plan.quarantine
        if new:  # another plan: a running loader is built again
            self.plan = replace(self.plan, quarantine=self.plan.quarantine | new)

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on; a state is only good for an equal one."""
        manifests, tars = self.plan.manifests, self.plan.tars
        if tars is not None:
            readers = self.plan.world_size * self.plan.workers
            return {"tars": tars.fingerprint, "ranks × workers": readers, "seed": self.plan.maker.seed}
        same: dict[str, Any] = {
            "seed": self.plan.maker.seed,
            "streams": self.plan.streams,
            "block": self.plan.block,
        }
        if self.plan.clusters is not None:
            same["clusters"] = self.plan.clusters.checksum
            if not self.plan.mixed:
                same["global batch"] = self.plan.global_batch
        if len(manifests) == 1:
            return {"manifest": manifests[0].fingerprint, "samples": manifests[0].num_samples, **same}
        return {
            "manifest": [manifest.fingerprint for manifest in manifests],
            "samples": [manifest.num_samples for manifest in manifests],
            "weights": list(self.plan.weights),
            **same,
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
            f"{name}: {saved.get(name)!r} then, {mine.get(name)!r} now"
            for name in {**mine, **saved}
            if saved.get(name) != mine.get(name)
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
        """Batches from the current position; the position moves when a batch is handed out.

        Raises:
            RunError: shards are missing or changed; workers are lost again and again.
        """
        loader: PartLoader | None = None
        losses: list[Loss] = []
        try:
            while True:
                if loader is not None and loader.plan is not self.plan:
                    loader.close()
                    loader = None
                if loader is None:
                    step = self.draws // self.plan.global_batch
                    loader = PartLoader(
                        self.plan, step, in_process=self.in_process, timeout_seconds=self.timeout_seconds
                    )
                try:
                    parts = loader.next_batch()
                except WorkersLostError as lost:
                    losses += lost.losses
                    self._quarantine(lost.losses)
                    _check_losses(losses)
                    loader.close()
                    loader = None
                    continue
                if not parts:
                    return
                losses.clear()
                self.draws += self.plan.global_batch
                yield interleave(parts)
        finally:
            if loader is not None:
                loader.close()

    def _quarantine(self, losses: Sequence[Loss]) -> None:
        """Notes what lost workers were at: first on disk, then for the workers that come after them."""
        records = []
        for loss in losses:
            if loss.note is None:
                print(f"rank {self.plan.rank}: a decoding worker was lost, {loss.detail}; going on", flush=True)
                continue
            key = loss.note.key
            if key is None:
                key = self.plan.place_of(loss.note.draw)
            print(f"rank {self.plan.rank}: sample {key} is quarantined: {loss.detail}", flush=True)
            records.append(
                {
                    "key": key,
                    "draw": loss.note.draw,
                    "rank": self.plan.rank,
                    "reason": loss.reason,
                    "detail": loss.detail,
                }
            )
        if records and self.quarantine_file is not None:
            append_quarantine(self.quarantine_file, records)
        self.add_quarantine(str(record["key"]) for record in records)


def _padded(samples: Sequence[int], batch: int, hole: int) -> Integers:
    """Whole batches of sample numbers; ``hole`` in place of −1 and at the end."""
    numbers = np.full(-(-len(samples) // batch) * batch, hole, dtype=np.int64)
    numbers[: len(samples)] = samples
    return np.where(numbers < 0, hole, numbers)


def _only_tars(sources: Sequence[tuple[Manifest | TarList, int]], *, shuffle: bool) -> TarList | None:
    """Tars without an index are read alone, and without end."""
    found = [source for source, _ in sources if isinstance(source, TarList)]
    if not found:
        return None
    if len(sources) > 1 or not shuffle:
        what = "mixed with other sources" if len(sources) > 1 else "read in order, once"
        raise ConfigError(f"data.shards: tars without an index cannot be {what}; {describe_order(found[0])}")
    return found[0]


def _check_clusters(clusters: Clusters, manifests: Sequence[Manifest], unordered: bool) -> None:
    if unordered or len(manifests) != 1:
        raise ConfigError("data.clusters: pseudo-labels order the draws of one indexed folder of shards, shuffled")
    if clusters.manifest != manifests[0].fingerprint:
        raise ConfigError(f"data.clusters: labels of other shards than {manifests[0].url}; cluster these again")


def _check_sources(sources: Sequence[tuple[Manifest, int]], *, shuffle: bool) -> None:
    for manifest, weight in sources:
        if manifest.num_samples == 0:
            raise ConfigError(f"data.shards: {manifest.url} holds no samples")
        if weight < 1:
            raise ConfigError(
                f"data.sources: the weight of {manifest.url} must be a whole number from 1 on, got {weight}"
            )
    if not sources or (len(sources) > 1 and not shuffle):
        raise ConfigError(f"data.sources: {len(sources)} sources; a stream in order reads exactly one")
    period = sum(reduced_weights([weight for _, weight in sources]))
    if period > MAX_PERIOD:
        raise ConfigError(
            f"data.sources: the weights, without common factor, add up to {period:,}, at most {MAX_PERIOD:,}"
        )


def _check_losses(losses: Sequence[Loss]) -> None:
    """A loader that never gets anywhere stops the run."""
    idle = [loss for loss in losses if loss.note is None]
    if len(idle) >= IDLE_LOSSES:
        raise RunError(
            f"{len(idle)} decoding workers were lost while they were at no sample ({idle[-1].detail}): "
            "is there enough memory, and shared memory (/dev/shm)?"
        )
    if len(losses) >= SAMPLE_LOSSES:
        raise RunError(
            f"{len(losses)} samples cost a decoding worker before one batch was whole (last: {losses[-1].detail}): "
            "try data.decoder=pyav, or `mmcl shards verify`"
        )
