"""Objectives that decode: a hybrid of contrast and likelihood (GCRL), and a contrastive model with latents (cMIM)."""

from mmcl.objectives.generative.cmim import CMIM
from mmcl.objectives.generative.cmim import build as build_cmim
from mmcl.objectives.generative.gcrl import GenerativeContrastive
from mmcl.objectives.generative.gcrl import build as build_generative_contrastive
from mmcl.objectives.generative.options import CMIMOptions, GenerativeContrastiveOptions

__all__ = [
    "CMIM",
    "CMIMOptions",
    "GenerativeContrastive",
    "GenerativeContrastiveOptions",
    "build_cmim",
    "build_generative_contrastive",
]
