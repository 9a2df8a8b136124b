"""Retrieval numbers that can be trusted, and a page to look at."""

from mmcl.evaluation.ranking import retrieval_metrics

__all__ = ["retrieval_metrics"]
