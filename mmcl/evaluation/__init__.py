"""Retrieval numbers that can be trusted, and a page to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcl.evaluation.ranking import retrieval_metrics

__all__ = ["retrieval_metrics"]


def __getattr__(name: str) -> Any:
    # protocols are read before a command imports torch, which takes seconds
    if name == "retrieval_metrics":
        from mmcl.evaluation.ranking import retrieval_metrics

        return retrieval_metrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
