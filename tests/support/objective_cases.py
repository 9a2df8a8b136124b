"""One small configuration of every objective with every method: what all rules of objectives are tested on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmcl.config import Options
from mmcl.config import build as build_options
from mmcl.objectives import OBJECTIVES
from mmcl.objectives.base import Objective, ObjectiveMix
from mmcl.types import Batch, Embeddings, TowerInfo
from support.exactness import MOTION, RAW, TOWERS, Subject, learned_fusions, texts_of
from support.objectives import FROZEN, SHAPES
from support.tcl import SMALL as TCL
from support.view_methods import EXTRAS, INTRA_MODAL, PERSISTENCY
from support.view_methods import SMALL as HEAD

NO_TEMPERATURE = ("byol", "simsiam", "barlow", "vicreg", "triplet", "mse")
SWITCHES = ("estimator", "layout", "method")
"""options that say how: a word, or options of their own that bear one"""


@dataclass(frozen=True)
class Case:
    """An objective and its options; the towers are three that learn, or a student of video and two teachers."""

    objective: str
    options: Mapping[str, Any]
    taught: bool = False
    raw: bool = False
    """towers eat pictures, waves and token numbers"""
    moving: bool = False
    """there is a tower of motion too"""
    cold: Mapping[str, Any] | None = None
    """what makes its temperature 0.01; None: it has none, or takes the model's"""
    smooth: Mapping[str, Any] | None = None
    """what makes it differentiable where its own options are not; see ``detached_by``"""
    detached_by: str = ""
    """a method of the objective whose results are targets, without a gradient"""

    def build(self, towers: Mapping[str, TowerInfo] | None = None, *, seed: int = 3, **changes: Any) -> Objective:
        """A float32 objective with weights from this seed."""
        infos = towers or (FROZEN if self.taught else RAW if self.raw else TOWERS)
        if self.moving:
            infos = {**infos, **MOTION}
        torch.manual_seed(seed)
        entry = OBJECTIVES[self.objective]
        options = build_options(entry.options, _merged({"name": self.objective, **self.options}, changes))
        return entry.build(options, infos)


def _merged(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {**options, **changes}
    if isinstance(changes.get("method"), dict):
        both["method"] = {**options["method"], **changes["method"]}
    return both


def _view_method(objective: str, method: str, how: Mapping[str, Any] = {}, **more: Any) -> Case:
    chosen = {"name": method, **HEAD, **EXTRAS.get(method, {}), **how}
    cold = None if objective == "intra_modal" and method in NO_TEMPERATURE else 0.01
    return Case(
        objective,
        {"tower": "video", "method": chosen, **more},
        cold=None if cold is None else {"method": {"temperature": cold}},
        smooth={"method": {"detach_weight": False}} if method == "dclw" else None,
        detached_by="_codes" if method == "swav" else "",
    )


def _zoo(method: str, **more: Any) -> Case:
    return Case("distillation", {"method": method, "teacher": "audio", **more}, taught=True)


def _improved(method: str, detached_by: str = "", cold: Mapping[str, Any] | None = None, **more: Any) -> Case:
    options = {"pair": ("video", "text"), "method": method, "layers": 2, **HEAD, **more}
    return Case("improved", options, detached_by=detached_by, cold=cold)


_TOKENS = ("tokens", "tokens")
_CCL, _CRD = "compositional_distillation", "contrastive_distillation"
_COLD = {"temperature": 0.01}
_DECOUPLING: Mapping[str, Any] = {
    "points": 4,
    "width": 8,
    "heads": 2,
    "feed_forward": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "hidden": 8,
    "out": 5,
    "negatives": 2,
    "temperature": 0.3,
}
_QA = {"answers": 3, "sentences": 2, "width": 8}
_COSINE = {"augmentation": "masked", "similarity": "cosine", "temperature": 0.5}
_COLD_COSINE = {**_COSINE, **_COLD}

_HEAD = {"hidden": 6, "out": 5}
_DECODER = {"width": 8, "layers": 1, "heads": 2, "hidden": 12, "chunk": 5}
_CODES = {"name": "codes", "count": 5, "detail": 1, "samples": 2, "momentum": 0.5}


def _decoding(objective: str, tower: str, **more: Any) -> Case:
    options = {"tower": tower, "temperature": 0.3, "decoder": _DECODER, "targets": _CODES, **more}
    return Case(objective, options, raw=True, cold=_COLD)


CASES: dict[str, Case] = {
    "cross_modal": Case("cross_modal", {}),
    "cross_modal: siglip": Case("cross_modal", {"estimator": "siglip", "hard_quantile": 0.5}),
    "cross_modal: dcl": Case("cross_modal", {"estimator": "dcl", "captions": 2}),
    "cross_modal: dclw": Case("cross_modal", {"estimator": "dclw"}, smooth={"detach_weight": False}),
    "cross_modal: clip_label_smoothing": Case(
        "cross_modal", {"estimator": "clip_label_smoothing", "unpaired_negatives": True, "shared_temperature": True}
    ),
    "cross_modal: sets": Case(
        "cross_modal",
        {
            "pairs": (("text", "video"), ("audio+video", "text"), ("text+audio", "video")),
            "captions": 2,
            "hard_quantile": 0.5,
            "unpaired_negatives": True,
        },
    ),
    "cross_modal: siglip of sets": Case("cross_modal", {"estimator": "siglip", "pairs": (("text", "video+audio"),)}),
    **{f"intra_modal: {method}": _view_method("intra_modal", method) for method in INTRA_MODAL},
    "intra_modal: swav with a queue": _view_method(
        "intra_modal", "swav", {"queue": 6, "frozen_batches": 0, "crops": 1}
    ),
    "intra_modal: moco, erased, with hard negatives": _view_method(
        "intra_modal", "moco", {"hard_negative": True}, erase={}
    ),
    "intra_modal: byol, all erased": _view_method("intra_modal", "byol", erase={"views": "all"}),
    "persistency: moco, all erased": _view_method("persistency", "moco", erase={"views": "all"}, other="audio"),
    **{f"persistency: {method}": _view_method("persistency", method) for method in PERSISTENCY},
    **{
        f"persistency: {method} with sound": _view_method("persistency", method, other="audio")
        for method in PERSISTENCY
    },
    "classification": Case("classification", {"classes": 3, "label_smoothing": 0.1}),
    "classification: joint": Case("classification", {"tower": "audio", "classes": 3, "level": "joint"}),
    "compositional_distillation": Case(
        _CCL, {"teachers": ("audio",)}, taught=True, cold={"temperatures": {"audio": 0.01}}
    ),
    "compositional_distillation: labels": Case(
        _CCL,
        {"teachers": ("audio", "text"), "classes": 3},
        taught=True,
        cold={"temperatures": {"audio": 0.01, "text": 0.01}},
    ),
    "contrastive_distillation": Case(
        _CRD, {"teacher": "audio", "slots": 64, "negatives": 32, "width": 6}, taught=True, cold=_COLD
    ),
    "knowledge_distillation": _zoo("knowledge_distillation", classes=3),
    "hint": _zoo("hint"),
    "hint: labels": _zoo("hint", classes=3, strength=1.0),
    "variational_information": _zoo("variational_information"),
    "activation_boundary": _zoo("activation_boundary", strength=1.0),
    "similarity_preserving": _zoo("similarity_preserving"),
    "relational": _zoo("relational"),
    "probabilistic_transfer": _zoo("probabilistic_transfer"),
    "correlation_congruence": _zoo("correlation_congruence", strength=1.0),
    "attention_transfer": _zoo("attention_transfer"),
    "factor_transfer": _zoo("factor_transfer"),
    "neuron_selectivity": _zoo("neuron_selectivity"),
    "flow": _zoo("flow", levels=(_TOKENS, _TOKENS)),
    "kdsvd": _zoo("kdsvd", levels=(_TOKENS, _TOKENS)),
    "motion_decoupling": Case("motion_decoupling", _DECOUPLING, moving=True, cold=_COLD),
    "motion_decoupling: motion": Case(
        "motion_decoupling", {**_DECOUPLING, "terms": "motion", "negatives": 0}, moving=True, cold=_COLD
    ),
    "motion_decoupling: context": Case(
        "motion_decoupling",
        {**_DECOUPLING, "terms": "context", "mask_false_negatives": False, "augmentation": "strong"},
        moving=True,
        cold=_COLD,
    ),
    "generative_contrastive: prefix": _decoding("generative_contrastive", "video", layout="prefix", **_HEAD),
    "generative_contrastive: cross": _decoding(
        "generative_contrastive", "text", layout="cross", latents=2, augmentation="worn", **_HEAD
    ),
    "generative_contrastive: palette": _decoding(
        "generative_contrastive", "audio", targets={"name": "palette", "samples": 2}, windows="different", **_HEAD
    ),
    "generative_contrastive: patches": _decoding(
        "generative_contrastive", "video", layout="prefix", targets={"name": "patches"}, generation=0.1, **_HEAD
    ),
    "cmim": _decoding("cmim", "text", latent=5),
    "cmim: patches": _decoding(
        "cmim", "audio", latent=3, targets={"name": "patches", "samples": 2, "deviation": 0.5}, likelihood="mean"
    ),
    "cmim: codes": _decoding("cmim", "audio", latent=3, latents=1, critic="dot", other="mean", likelihood="mean"),
    "improved: rocket": _improved("rocket"),
    "improved: siamlip": _improved("siamlip", predictor_hidden=4, strong=1),
    "improved: byolip": _improved("byolip", predictor_hidden=4, strong=1),
    "improved: barlip": _improved("barlip", barlow_hidden=6, barlow_out=5, strong=1),
    "improved: swalip": _improved("swalip", detached_by="_codes", cold={"swap_temperature": 0.01}),
    "improved: swalip with prototypes": _improved("swalip", detached_by="_codes", prototypes=4, strong=1),
    "m3col": Case("m3col", {"seed": 3, "mixed_rows": 0.8, "beta": 0.9}, cold=_COLD),
    "m3col: inputs and labels": Case(
        "m3col", {"inputs": {"video": "mixed", "audio": "mixed"}, "classes": 3, "hidden": 5}, cold=_COLD
    ),
    "m3col: soft": Case("m3col", {"towers": ("video", "text"), "mixed_share": 0.0}, cold={"soft_temperature": 0.01}),
    "m3col: soft targets that learn": Case(
        "m3col", {"mixed_share": 0.0, "soft_temperature": 0.3, "detach_targets": False}, cold={"soft_temperature": 0.01}
    ),
    "multi_view: mv_dhel": Case(
        "multi_view", {"temperature": 0.3, "views": {"video": 2, "audio": 1, "text": 1}}, cold=_COLD
    ),
    "multi_view: mv_info_nce": Case("multi_view", {"temperature": 0.3, "method": "mv_info_nce"}, cold=_COLD),
    "multi_view: mv_info_nce within": Case(
        "multi_view", {"method": "mv_info_nce", "negatives": "all", "temperature": 0.3}, cold=_COLD
    ),
    "mutual": Case("mutual", {"queue": 7, "temperature": 0.3}, cold=_COLD),
    "mutual: in the batch": Case("mutual", {"queue": 0, "keys": "online", "temperature": 0.3}, cold=_COLD),
    "mutual: labels": Case("mutual", {"queue": 7, "classes": 3, "temperature": 0.3, "ensemble": 0.5}, cold=_COLD),
    "mutual: labels in the batch": Case("mutual", {"queue": 0, "classes": 3, "temperature": 0.3}, cold=_COLD),
    "stor": Case("stor", {"tower": "video", **HEAD, "predictor_hidden": 4, "head_hidden": 7}),
    "stor: overlap alone": Case(
        "stor", {"tower": "video", **HEAD, "predictor_hidden": 4, "head_hidden": 7, "speed": 0, "rotation": 0}
    ),
    "tcl": Case("tcl", {**TCL, "pairs": (("video", "text"),)}),
    "tcl: sound": Case("tcl", {**TCL, "pairs": (("audio", "video"),), "mlm": None}),
    "video_qa": Case("video_qa", {**_QA, "contrast": {"augmentation": "masked"}, "localisation": {}}),
    "video_qa: cosine": Case("video_qa", {**_QA, "answer": None, "contrast": _COSINE}, cold={"contrast": _COLD_COSINE}),
    "video_qa: questions": Case("video_qa", {**_QA, "answer": None, "question": {"candidates": 4}}),
    "video_qa: texts alone": Case("video_qa", {**_QA, "video": None, "question": {}}),
}


def ways(options: type[Options]) -> set[tuple[str, str]]:
    """(option, value) of every word that the options let one choose by ``SWITCHES``."""
    found = set()
    for switch in SWITCHES:
        if switch not in options.model_fields:
            continue
        for kind in get_args(options.model_fields[switch].annotation):
            found.add((switch, kind.model_fields["name"].default if isinstance(kind, type) else kind))
    return found


def without_a_case() -> set[tuple[str, str, str]]:
    """(objective, option, value) that no case chooses; ("name", "", "") for an objective without any."""
    there: set[tuple[str, str, str]] = set()
    for case in CASES.values():
        there.add((case.objective, "", ""))
        options = OBJECTIVES[case.objective].options
        for switch in {name for name, _ in ways(options)}:
            chosen = case.options.get(switch, options.model_fields[switch].default)
            there.add((case.objective, switch, chosen["name"] if isinstance(chosen, Mapping) else chosen))
    wanted = {(name, *way) for name, entry in OBJECTIVES.items() for way in (ways(entry.options) | {("", "")})}
    return wanted - there


def rows_for(
    objective: Objective, batch: Batch, seed: int = 8, dtype: torch.dtype = torch.float64, scale: float = 8.0
) -> Embeddings:
    """Random rows, other ones for each view and copy; those of online towers are leaves that ask for a gradient."""
    random = torch.Generator().manual_seed(seed)
    values = {}
    for need in objective.needs:
        present = batch.views[need.view].present
        for level in need.levels:
            shape = (*texts_of(need.view), *SHAPES[level])
            x = torch.randn(len(batch), *shape, generator=random, dtype=torch.float64).to(dtype)
            x = x * present.view(-1, *[1] * (x.ndim - 1))
            values[need.tower, need.view, level, need.kind] = x.requires_grad_(need.kind == "online")
    scales = {name: torch.tensor(scale, dtype=dtype, requires_grad=True) for name in objective.scales}
    fusions = {name: fusion.to(dtype) for name, fusion in learned_fusions(objective.fusions).items()}
    return Embeddings(values, batch, scales, dict(fusions))


def leaves_of(embeddings: Embeddings) -> list[Tensor]:
    """What asks for a gradient: online rows and temperatures."""
    return [x for x in (*embeddings.values.values(), *embeddings.scales.values()) if x.requires_grad]


PARTS = 3


def everything(taught: bool, part: int) -> Subject:
    """Every third case of one set of towers, in one mix: in larger ones rounding errors grow from step to step."""
    chosen = [(name, case) for name, case in CASES.items() if case.taught == taught][part::PARTS]
    objectives = {name.replace(": ", "_").replace(" ", "_"): case.build() for name, case in chosen}
    weights = {name: 0.5 + 0.25 * (i % 3) for i, name in enumerate(objectives)}
    return Subject(ObjectiveMix(objectives, weights), FROZEN if taught else {**TOWERS, **MOTION})


class Constants(TorchFunctionMode):
    """What a first evaluation detaches stays what it was in later ones, so that finite differences see what gradients
    see. Each evaluation runs under :meth:`again`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.place = 0

    def again(self) -> Constants:
        self.place = 0
        return self

    def keep(self, make: Callable[[], Any]) -> Any:
        if self.place == len(self.kept):
            value = make()
            self.kept.append(value.clone() if isinstance(value, Tensor) else copy.deepcopy(value))
        self.place += 1
        return self.kept[self.place - 1]

    def targets(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same of a function's results."""

        def kept(*args: Any) -> Any:
            with torch.no_grad():
                return self.keep(lambda: function(*args))

        return kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # without gradients: the inside of an autograd.Function, which is its own affair
        if func is Tensor.detach and torch.is_grad_enabled():
            return self.keep(lambda: func(*args))
        return func(*args, **(kwargs or {}))
