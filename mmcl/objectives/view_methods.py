"""The methods that compare views of one tower: by contrast, by a queue, by prediction, by statistics, by assignment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from mmcl.distributed import Comm, Form, view_contrastive
from mmcl.layers import MLPHead
from mmcl.losses import barlow, sinkhorn, vicreg
from mmcl.losses.byol import cosine_rows
from mmcl.losses.moco import moco_rows
from mmcl.losses.swav import swapped_rows
from mmcl.objectives.base import Term
from mmcl.objectives.ranks import mean_negatives
from mmcl.objectives.views import (
    Count,
    KeyQueue,
    MethodOptions,
    MultiView,
    NotNegative,
    PositiveFloat,
    PositiveInt,
    Prototypes,
    ViewSet,
    log_sum_over_ranks,
    present_keys,
    unit_rows,
)
from mmcl.types import Embeddings


class PairMethod(MultiView):
    """A loss of two views, over pairs of views; every pair if none are named."""

    def __init__(self, views: ViewSet, options: MethodOptions, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        super().__init__(views, options, online=range(len(views.views)))
        self.pairs = list(pairs or combinations(range(len(views.views)), 2))

    def losses(self, projected: Mapping[int, Tensor], embeddings: Embeddings, comm: Comm) -> list[Tensor]:
        """One 0-d loss per pair."""
        raise NotImplementedError

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        losses = self.losses(self.project(embeddings), embeddings, comm)
        return Term(self.reduce(losses), self.metrics(embeddings, comm))


class ContrastOptions(MethodOptions):
    """A projector and a temperature."""

    temperature: PositiveFloat = 0.1
    mask_false_negatives: bool = True
    """samples of equal key, caption or group are never each other's negatives"""


class ContrastMethod(PairMethod):
    """NT-Xent (SimCLR), or what else ``form`` says, over the rows of all ranks."""

    form = Form()
    pools = True

    def __init__(
        self, views: ViewSet, options: ContrastOptions, pairs: Sequence[tuple[int, int]] | None = None
    ) -> None:
        super().__init__(views, options, pairs)
        self.temperature, self.mask_false_negatives = options.temperature, options.mask_false_negatives

    def losses(self, projected: Mapping[int, Tensor], embeddings: Embeddings, comm: Comm) -> list[Tensor]:
        groups = embeddings.batch.groups if self.mask_false_negatives else None
        present = self.present(embeddings)
        return [
            view_contrastive(
                projected[a],
                projected[b],
                scale=1 / self.temperature,
                comm=comm,
                present=present,
                groups=groups,
                form=self.form,
                pools=embeddings.batch.pools,
            )
            for a, b in self.pairs
        ]

    def metrics(self, embeddings: Embeddings, comm: Comm) -> dict[str, Tensor]:
        """With the other samples that a row repels, in the mean."""
        groups = embeddings.batch.groups
        groups = groups if self.mask_false_negatives else torch.full_like(groups, -1)
        negatives = mean_negatives(groups, self.present(embeddings), comm, embeddings.batch.pools)
        return {**super().metrics(embeddings, comm), "negatives": negatives}


class BarlowOptions(MethodOptions):
    """A wide projector and the weight of redundancy."""

    redundancy: NotNegative = 5e-3


class BarlowMethod(PairMethod):
    """The cross-correlation of two views over the present rows of all ranks becomes the identity."""

    def __init__(self, views: ViewSet, options: BarlowOptions) -> None:
        super().__init__(views, options)
        self.redundancy = options.redundancy

    def losses(self, projected: Mapping[int, Tensor], embeddings: Embeddings, comm: Comm) -> list[Tensor]:
        own = self.present(embeddings)
        return [
            barlow(projected[a][own], projected[b][own], redundancy=self.redundancy, over_ranks=comm.sum)
            for a, b in self.pairs
        ]


class VICRegOptions(MethodOptions):
    """A wide projector and three weights."""

    invariance: NotNegative = 25.0
    variance: NotNegative = 25.0
    covariance: NotNegative = 1.0


class VICRegMethod(PairMethod):
    """Invariance, variance and covariance of the present rows of all ranks."""

    def __init__(self, views: ViewSet, options: VICRegOptions) -> None:
        super().__init__(views, options)
        self.weights = {name: getattr(options, name) for name in ("invariance", "variance", "covariance")}

    def losses(self, projected: Mapping[int, Tensor], embeddings: Embeddings, comm: Comm) -> list[Tensor]:
        own = self.present(embeddings)
        return [
            vicreg(projected[a][own], projected[b][own], **self.weights, over_ranks=comm.sum) for a, b in self.pairs
        ]


class QueueOptions(MethodOptions):
    """A projector, a temperature and the length of the queue."""

    temperature: PositiveFloat = 0.1
    queue: PositiveInt = 65_536
    """keys of earlier batches that serve as negatives; it starts empty and holds keys of present rows alone"""


class QueueMethod(MultiView):
    """Each asking view finds the momentum keys of the other views among the queue (MoCo)."""

    def __init__(self, views: ViewSet, options: QueueOptions, *, queries: Iterable[int], keys: Iterable[int]) -> None:
        super().__init__(views, options, online=queries, momentum=keys)
        self.temperature = options.temperature
        self.queue = KeyQueue(options.queue, options.out)
        self.other_queue = None if views.other is None else KeyQueue(options.queue, options.out)

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        present = self.present(embeddings)
        queries = self.project(embeddings)
        keys = {i: unit_rows(x) for i, x in self.project_momentum(embeddings).items()}
        hard = self.project_hard(embeddings) if self.hard else None
        terms = []
        for i, query in queries.items():
            rows = [self._rows(query, j, keys[j], hard) for j in self.view_set.positives(i) if j in keys]
            terms.append(comm.mean(torch.stack(rows).mean(0), present))
        sides: dict[str, list[Tensor]] = {}
        for j, key in keys.items():
            sides.setdefault("keys" if self._queue(j) is self.queue else "other_keys", []).append(key)
        pending = {name: present_keys(side, present, comm) for name, side in sides.items()}
        metrics = self.metrics(embeddings, comm)
        if hard:
            metrics["hard_negatives"] = comm.sum(hard[1].sum())
        return Term(self.reduce(terms), metrics, pending)

    def _queue(self, view: int) -> KeyQueue:
        """Keys of one tower: its negatives would else be told apart by their modality alone."""
        queue = self.of_tower(view, self.queue, self.other_queue)
        assert isinstance(queue, KeyQueue)
        return queue

    def _rows(self, query: Tensor, view: int, key: Tensor, hard: tuple[Tensor, Tensor] | None) -> Tensor:
        queue = self._queue(view)
        return moco_rows(query, key, queue.rows, queue.mask(), temperature=self.temperature, hard=hard)

    def commit(self, pending: Mapping[str, Tensor]) -> None:
        self.queue.push(pending["keys"])
        if self.other_queue is not None:
            self.other_queue.push(pending["other_keys"])


class TripletOptions(MethodOptions):
    """A projector and a margin."""

    margin: PositiveFloat = 0.5
    mask_false_negatives: bool = True
    """samples of equal key, caption or group are never each other's negatives"""


class TripletMethod(PairMethod):
    """A view lies nearer to the other than to another time of its sample, and than to those of other samples."""

    def __init__(self, views: ViewSet, options: TripletOptions) -> None:
        super().__init__(views, options)
        self.margin, self.mask_false_negatives = options.margin, options.mask_false_negatives

    def losses(self, projected: Mapping[int, Tensor], embeddings: Embeddings, comm: Comm) -> list[Tensor]:
        present = self.present(embeddings)
        hard, apart = self.project_hard(embeddings)
        negatives = comm.gather(unit_rows(hard))
        others = comm.gather(present) & present[:, None]
        others &= comm.index(len(present), present.device)[:, None] != torch.arange(len(negatives), device=hard.device)
        if self.mask_false_negatives:
            groups = embeddings.batch.groups
            others &= ~((groups[:, None] == comm.gather(groups)) & (groups[:, None] >= 0)).any(2)
        losses = []
        for a, b in self.pairs:
            query, positive = unit_rows(projected[a]), unit_rows(projected[b])
            near = _distance((query * positive).sum(1))
            own = (near - _distance((query * unit_rows(hard)).sum(1)) + self.margin).relu()
            with torch.autocast(query.device.type, enabled=False):
                far = _distance(query @ negatives.T)
            each = (near[:, None] - far + self.margin).relu().masked_fill(~others, 0)
            of_others = each.sum(1) / others.sum(1).clamp_min(1)
            losses.append(comm.mean(own, apart) + comm.mean(of_others, others.any(1)))
        return losses


def _distance(cosine: Tensor) -> Tensor:
    """Between unit rows; the root has no gradient at 0."""
    return (2 - 2 * cosine).clamp_min(1e-12).sqrt()


class SquaredMethod(PairMethod):
    """The mean squared difference of two views."""

    def losses(self, projected: Mapping[int, Tensor], embeddings: Embeddings, comm: Comm) -> list[Tensor]:
        present = self.present(embeddings)
        with torch.autocast(present.device.type, enabled=False):
            rows = {i: x if x.dtype == torch.float64 else x.float() for i, x in projected.items()}
            return [comm.mean((rows[a] - rows[b]).square().mean(1), present) for a, b in self.pairs]


class PredictionOptions(MethodOptions):
    """A projector and a predictor of two layers with the projector's norm."""

    predictor_hidden: PositiveInt = 4096


class PredictionMethod(MultiView):
    """Each view predicts the targets of the other views: of momentum copies (BYOL) or its own network's (SimSiam)."""

    def __init__(self, views: ViewSet, options: PredictionOptions, *, momentum: bool) -> None:
        everything = range(len(views.views))
        super().__init__(views, options, online=everything, momentum=everything if momentum else ())
        self.predictor = self._predictor(options)
        self.other_predictor = None if views.other is None else self._predictor(options)

    @staticmethod
    def _predictor(options: PredictionOptions) -> MLPHead:
        return MLPHead(options.out, options.predictor_hidden, options.out, layers=2, norm=options.norm)

    def distance(self, cosine: Tensor) -> Tensor:
        """2 − 2 cos; subclasses have their own scale."""
        return 2 - 2 * cosine

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        present = self.present(embeddings)
        projected = self.project(embeddings)
        targets = self.project_momentum(embeddings) if self.momentum else projected
        terms = []
        for i, rows in projected.items():
            prediction = self.of_tower(i, self.predictor, self.other_predictor)(rows, present)
            cosines = [cosine_rows(prediction, targets[j]) for j in self.view_set.positives(i)]
            terms.append(comm.mean(self.distance(torch.stack(cosines).mean(0)), present))
        return Term(self.reduce(terms), self.metrics(embeddings, comm))


class AssignmentOptions(MethodOptions):
    """A projector, prototypes and how rows are assigned to them."""

    prototypes: PositiveInt = 3000
    temperature: PositiveFloat = 0.1
    epsilon: PositiveFloat = 0.05
    """strength of the entropy term of the assignment; smaller is sharper"""
    iterations: PositiveInt = 3
    """rounds of Sinkhorn's algorithm"""
    frozen_batches: Count = 313
    """batches before prototypes learn"""
    queue: Count = 0
    """earlier rows per coding view that take part in the assignment, once that many are there; 0: none"""
    queue_after: Count = 0
    """batches before rows enter the queue"""


class AssignmentMethod(MultiView):
    """Balanced codes of some views over the rows of all ranks, predicted from every other view (SwAV)."""

    def __init__(self, views: ViewSet, options: AssignmentOptions, *, coding: Iterable[int]) -> None:
        super().__init__(views, options, online=range(len(views.views)))
        self.options, self.coding = options, tuple(coding)
        self.prototypes = Prototypes(options.prototypes, options.out, options.frozen_batches)
        sizes = [options.queue] * len(self.coding) if options.queue else []
        self.queues = nn.ModuleList(KeyQueue(size, options.out) for size in sizes)

    def forward(self, embeddings: Embeddings, comm: Comm) -> Term:
        present = self.present(embeddings)
        projected = {i: unit_rows(x) for i, x in self.project(embeddings).items()}
        scores = [self.prototypes(rows[present]) for rows in projected.values()]
        codes = {i: self._codes(number, scores[i], comm) for number, i in enumerate(self.coding)}
        predictions = [(view / self.options.temperature).log_softmax(1) for view in scores]
        values = swapped_rows(codes, predictions, {i: self.view_set.positives(i) for i in codes})
        loss = comm.mean(values, torch.ones_like(values, dtype=torch.bool))
        loss = loss * (1 if self.reduction == "mean" else len(self.coding))
        pending = {f"rows_{i}": present_keys([projected[i]], present, comm) for i in self.coding if self.queues}
        return Term(loss, self.metrics(embeddings, comm), pending)

    def _codes(self, number: int, scores: Tensor, comm: Comm) -> Tensor:
        """Codes ``(B, K)`` of own rows; rows of a full queue are shared out among the ranks, each counts once."""
        earlier = scores[:0]
        if self.queues:
            queue = self.queues[number]
            assert isinstance(queue, KeyQueue)
            if int(queue.filled) == len(queue):
                earlier = self.prototypes(queue.rows[comm.rank :: comm.world_size].to(scores.dtype))
        codes = sinkhorn(
            torch.cat([earlier, scores]),
            epsilon=self.options.epsilon,
            iterations=self.options.iterations,
            over_ranks=log_sum_over_ranks(comm),
        )
        return codes[len(earlier) :]

    def commit(self, pending: Mapping[str, Tensor]) -> None:
        if self.queues and int(self.prototypes.seen) >= self.options.queue_after:
            for queue, i in zip(self.queues, self.coding, strict=True):
                assert isinstance(queue, KeyQueue)
                queue.push(pending[f"rows_{i}"])
        self.prototypes.renew()
