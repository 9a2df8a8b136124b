"""Multistage contrastive learning: stages that each draw their batches from clusters of those before."""

from mmcl.multistage.kmeans import assign, kmeans
from mmcl.multistage.run import Outcome, evaluate_stages, run_stages

__all__ = ["Outcome", "assign", "evaluate_stages", "kmeans", "run_stages"]
