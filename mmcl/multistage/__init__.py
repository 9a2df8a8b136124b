"""Multistage contrastive learning: stages that each draw their batches from clusters of those before.

Zhang, Lan et al. 2024 (arXiv 2402.11816).
"""

from mmcl.multistage.kmeans import assign, kmeans
from mmcl.multistage.run import run_stages

__all__ = ["assign", "kmeans", "run_stages"]
