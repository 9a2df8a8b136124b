"""Contrast inside a modality: two or more views of one tower's input agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field
from torch import Tensor

from mmcl.config import Options
from mmcl.distributed import Form
from mmcl.objectives.base import Objective
from mmcl.objectives.view_methods import (
    AssignmentMethod,
    AssignmentOptions,
    BarlowMethod,
    BarlowOptions,
    ContrastMethod,
    ContrastOptions,
    PredictionMethod,
    PredictionOptions,
    QueueMethod,
    QueueOptions,
    SquaredMethod,
    TripletMethod,
    TripletOptions,
    VICRegMethod,
    VICRegOptions,
)
from mmcl.objectives.views import (
    Count,
    EraseViewsOptions,
    MethodOptions,
    Norm,
    PositiveFloat,
    PositiveInt,
    Reduction,
    ViewSet,
    erased,
    learning_tower,
)
from mmcl.objectives.weights import Weight
from mmcl.types import TIMED, ConfigError, TextSpec, TowerInfo, VideoSpec, View


class SimCLROptions(ContrastOptions):
    """NT-Xent over pairs of views (Chen et al. 2020, arXiv 2002.05709)."""

    name: Literal["simclr"] = "simclr"
    norm: Norm = "batch"


class DCLOptions(ContrastOptions):
    """NT-Xent without the positive in the denominator (Yeh et al. 2021, arXiv 2110.06848)."""

    name: Literal["dcl"] = "dcl"
    norm: Norm = "batch"


class DCLWOptions(ContrastOptions):
    """DCL whose positives weigh 2 − N·softmax(s / sigma), of mean 1 over the whole batch."""

    name: Literal["dclw"] = "dclw"
    norm: Norm = "batch"
    sigma: PositiveFloat = 0.5
    detach_weight: bool = True
    """the weight is a number, not something to learn through (the paper; a known implementation differs)"""


class MoCoOptions(QueueOptions):
    """Momentum contrast with a queue and an MLP head (He et al. 2020, arXiv 1911.05722; v2: arXiv 2003.04297)."""

    name: Literal["moco"] = "moco"
    layers: Annotated[int, Field(ge=1, le=4)] = 2
    temperature: PositiveFloat = 0.2
    symmetric: bool = False
    """every view asks and gives keys; otherwise the first asks and the others give keys"""
    hard_negative: bool = False
    """another time of the same sample is one more negative of each row, with a gradient (arXiv 2009.05769); ``sampling:
    {overlap: false}`` keeps the two apart, and a sample too short for both has none"""


class BYOLOptions(PredictionOptions):
    """Each view predicts the momentum targets of the others (Grill et al. 2020, arXiv 2006.07733).

    The paper's value is the sum over the asking views: ``reduction: sum``.
    """

    name: Literal["byol"] = "byol"
    layers: Annotated[int, Field(ge=1, le=4)] = 2
    hidden: PositiveInt = 4096
    out: PositiveInt = 256
    norm: Norm = "batch"


class SimSiamOptions(PredictionOptions):
    """Each view predicts the detached projections of the others, without momentum (Chen & He 2021, arXiv 2011.10566).

    The projector has no batch norm after its last layer, unlike the paper's.
    """

    name: Literal["simsiam"] = "simsiam"
    out: PositiveInt = 2048
    norm: Norm = "batch"
    predictor_hidden: PositiveInt = 512


class BarlowTwinsOptions(BarlowOptions):
    """Redundancy reduction (Zbontar et al. 2021, arXiv 2103.03230)."""

    name: Literal["barlow"] = "barlow"
    hidden: PositiveInt = 8192
    out: PositiveInt = 8192
    norm: Norm = "batch"


class IntraVICRegOptions(VICRegOptions):
    """Variance, invariance, covariance (Bardes et al. 2022, arXiv 2105.04906)."""

    name: Literal["vicreg"] = "vicreg"
    hidden: PositiveInt = 8192
    out: PositiveInt = 8192
    norm: Norm = "batch"


class BackgroundTripletOptions(TripletOptions):
    """A view lies nearer to the other one than to another time of the same sample, and than to other times of the other
    samples, by a margin of the distance of unit rows (Wang et al. 2021, arXiv 2009.05769: triplet form).

    The authors' code takes the next row of the batch as the other sample; this is the mean over all of them.
    """

    name: Literal["triplet"] = "triplet"


class SquaredOptions(MethodOptions):
    """The mean squared difference of two views (Wang et al. 2021, arXiv 2009.05769: simple form).

    With ``erase`` and no augmentation: of a clip and the same clip erased. Constant rows would do as well, so it comes
    beside another objective.
    """

    name: Literal["mse"] = "mse"


class SwAVOptions(AssignmentOptions):
    """Swapped prediction of balanced codes, with multi-crop (Caron et al. 2020, arXiv 2006.09882).

    The full views give codes, which every other view and crop predicts.
    """

    name: Literal["swav"] = "swav"
    layers: Annotated[int, Field(ge=1, le=4)] = 2
    norm: Norm = "batch"
    crops: Count = 0
    """further, small views"""
    crop_augmentation: str = "none"
    """a name in ``data.augmentations``"""
    crop_size: PositiveInt | None = None
    """pixels, height = width, of crops of a video tower; null: as the tower's"""


IntraModalMethod: TypeAlias = Annotated[
    SimCLROptions
    | DCLOptions
    | DCLWOptions
    | MoCoOptions
    | BYOLOptions
    | SimSiamOptions
    | BarlowTwinsOptions
    | IntraVICRegOptions
    | BackgroundTripletOptions
    | SquaredOptions
    | SwAVOptions,
    Field(discriminator="name"),
]


class IntraModalOptions(Options):
    """Views of one tower's input agree, by one of eleven methods.

    Needs: one tower that learns; different views of its samples, by ``augmentation`` or ``windows: different``. Methods
    moco and byol keep a momentum copy of the tower. Methods moco with ``hard_negative`` and triplet read a second clip.

    Background erasing (Wang et al. 2021, arXiv 2009.05769) is ``erase`` with any method; the authors' is moco with
    ``hard_negative``, temperature 0.07 and out 128. Unlike the authors' code: each sample draws its own strength
    (``per: batch`` draws one), the clip is mixed before its normalisation, which gives the same, from a copy, so that
    no frame is mixed twice, the queue's place is part of a checkpoint, and keys of all ranks enter it.
    """

    name: Literal["intra_modal"] = "intra_modal"
    weight: Weight = 1.0
    tower: str
    method: IntraModalMethod
    views: Annotated[int, Field(ge=2)] = 2
    augmentation: str = "none"
    """a name in ``data.augmentations``; each view is a draw of its own"""
    windows: Literal["same", "different"] = "same"
    """all views of one time window, or each of its own"""
    erase: EraseViewsOptions | None = None
    """background erasing, of a video tower's clips"""
    reduction: Reduction = "mean"
    """over pairs of views (simclr, dcl, dclw, barlow, vicreg), asking views (moco, byol, simsiam) or coding views"""


class DCLMethod(ContrastMethod):
    """DCL, and DCLW where the options have a sigma."""

    def __init__(self, views: ViewSet, options: DCLOptions | DCLWOptions) -> None:
        super().__init__(views, options)
        self.form = Form("dcl")
        if isinstance(options, DCLWOptions):
            self.form = Form("dclw", sigma=options.sigma, detach_weight=options.detach_weight)


class SimSiamMethod(PredictionMethod):
    """Prediction of one's own network, on the scale of the paper."""

    def distance(self, cosine: Tensor) -> Tensor:
        """−cos."""
        return -cosine


def build(options: IntraModalOptions, towers: Mapping[str, TowerInfo], path: str = "objectives.0") -> Objective:
    """The objective for these towers.

    Raises:
        ConfigError: an unknown or frozen tower, or views that its modality does not have, or that would be positives
            and negatives at once.
    """
    tower = learning_tower(options.tower, towers, f"{path}.tower")
    own, method = erased(_views(options, tower, path), options.erase, tower, f"{path}.erase"), options.method
    views = ViewSet(tower, own, options.reduction, negative=_negative(options, tower, path))
    everything = range(len(views.views))
    match method:
        case SimCLROptions():
            return ContrastMethod(views, method)
        case DCLOptions() | DCLWOptions():
            return DCLMethod(views, method)
        case MoCoOptions():
            queries, keys = (everything, everything) if method.symmetric else ([0], everything[1:])
            return QueueMethod(views, method, queries=queries, keys=keys)
        case BYOLOptions():
            return PredictionMethod(views, method, momentum=True)
        case SimSiamOptions():
            return SimSiamMethod(views, method, momentum=False)
        case BarlowTwinsOptions():
            return BarlowMethod(views, method)
        case IntraVICRegOptions():
            return VICRegMethod(views, method)
        case BackgroundTripletOptions():
            return TripletMethod(views, method)
        case SquaredOptions():
            return SquaredMethod(views, method)
        case SwAVOptions():
            return AssignmentMethod(views, method, coding=range(options.views))


def _views(options: IntraModalOptions, tower: TowerInfo, path: str) -> tuple[View, ...]:
    spec = tower.spec
    different = options.windows == "different"
    if different and isinstance(spec, TextSpec):
        raise ConfigError(f"{path}.windows: 'different' needs a modality with time; {tower.name!r} is a text tower")
    views = [
        View(spec, clip=i if different else 0, augmentation=options.augmentation, copy=0 if different else i)
        for i in range(options.views)
    ]
    if isinstance(options.method, SwAVOptions):
        size = options.method.crop_size
        if size is not None:
            if not isinstance(spec, VideoSpec):
                raise ConfigError(f"{path}.method.crop_size: {size}, but {tower.name!r} is no video tower")
            spec = dataclasses.replace(spec, size=size)
        # numbered on, so that a crop is a draw of its own also where it looks like a full view
        crops = range(options.views, options.views + options.method.crops)
        views += [View(spec, augmentation=options.method.crop_augmentation, copy=i) for i in crops]
    return tuple(views)


def _negative(options: IntraModalOptions, tower: TowerInfo, path: str) -> View | None:
    """Another time of each sample, where the method tells it from this one."""
    triplet = isinstance(options.method, BackgroundTripletOptions)
    if not triplet and not (isinstance(options.method, MoCoOptions) and options.method.hard_negative):
        return None
    if not isinstance(tower.spec, TIMED):
        raise ConfigError(f"{path}.method: a negative of another time needs video or audio; {tower.name!r} has no time")
    if options.windows == "different":
        raise ConfigError(f"{path}.windows: 'different', but another time of a sample is a negative here, no positive")
    return View(tower.spec, clip=1, augmentation=options.augmentation)
