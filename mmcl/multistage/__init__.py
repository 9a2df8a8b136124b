"""Stages that each draw their batches from clusters of those before (Zhang, Lan et al. 2024, arXiv 2402.11816).

A stage trains a model with any objective. Then all samples are embedded and parted by k-means; the cluster becomes one
more digit of a sample's pseudo-label, and the next stage trains a fresh model, from the same start, on batches of one
pseudo-label: its negatives share what the stages before have told apart. The representation is the concatenation of
all stages' rows, made unit once.

It differs from the authors' code: an epoch holds every sample once, where theirs draws whole batches alone, leaves
small clusters out without a word and shuffles each rank by a seed of its own, so that ranks overlap. What fills no
batch becomes holes, spread over the batches of its label; a label of fewer samples than a batch is one batch, whose
step counts as any other. Batches come in random order, not label by label in turn. Where they cluster pictures alone,
`multistage.modality` may be any, and a sample without it goes by another. `data.cluster_batches: mixed` does the same
by a mask: batches in the usual order whose negatives keep to their label. The clusters are those of our own k-means,
fitted to `multistage.fit_rows` rows, which needs no further package.
"""

from mmcl.multistage.kmeans import assign, kmeans
from mmcl.multistage.run import run_stages

__all__ = ["assign", "kmeans", "run_stages"]
