"""Pure losses: tensors in, a 0-d tensor out. No state, no devices, no process groups; torch alone.

Every function works in float64 if an input is float64, else in float32, inside autocast too, and modifies no input.
"""

from __future__ import annotations

from mmcl.losses.barlow import barlip, barlow, vicreg
from mmcl.losses.byol import byol
from mmcl.losses.class_nce import class_nce, jeffreys, jensen_shannon
from mmcl.losses.cmim import cmim_contrast
from mmcl.losses.dcl import dcl
from mmcl.losses.diagnostics import alignment, tolerance, uniformity
from mmcl.losses.distillation import (
    knowledge_distillation,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from mmcl.losses.distillation_features import (
    activation_boundary,
    correlation_congruence,
    hint,
    variational_information,
)
from mmcl.losses.distillation_maps import attention_transfer, factor_transfer, flow, kdsvd, neuron_selectivity
from mmcl.losses.info_nce import clip, info_nce, siglip
from mmcl.losses.local_mutual_information import local_mutual_information
from mmcl.losses.mixup import m3co, soft_clip
from mmcl.losses.moco import moco
from mmcl.losses.multi_view import mv_dhel, mv_info_nce
from mmcl.losses.nt_xent import nt_xent
from mmcl.losses.persistency import persistency_byol, persistency_moco
from mmcl.losses.points import point_info_nce
from mmcl.losses.soft_targets import soft_target_cross_entropy
from mmcl.losses.swav import sinkhorn, swav
from mmcl.losses.video_qa import masked_answer_contrast

__all__ = [
    "activation_boundary",
    "alignment",
    "attention_transfer",
    "barlip",
    "barlow",
    "byol",
    "class_nce",
    "clip",
    "cmim_contrast",
    "correlation_congruence",
    "dcl",
    "factor_transfer",
    "flow",
    "hint",
    "info_nce",
    "jeffreys",
    "jensen_shannon",
    "kdsvd",
    "knowledge_distillation",
    "local_mutual_information",
    "m3co",
    "masked_answer_contrast",
    "moco",
    "mv_dhel",
    "mv_info_nce",
    "neuron_selectivity",
    "nt_xent",
    "persistency_byol",
    "persistency_moco",
    "point_info_nce",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "siglip",
    "similarity_preserving",
    "sinkhorn",
    "soft_clip",
    "soft_target_cross_entropy",
    "swav",
    "tolerance",
    "uniformity",
    "variational_information",
    "vicreg",
]
