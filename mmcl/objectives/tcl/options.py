"""Options of triple contrastive learning, each term on its own switch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmcl.config import Options
from mmcl.objectives.transformers import TransformerOptions
from mmcl.objectives.views import Count, NotNegative, PositiveInt
from mmcl.objectives.weights import Weight

Fraction = Annotated[float, Field(ge=0, le=1)]


class CMAOptions(Options):
    """Cross-modal alignment: each modality finds the momentum keys of the other."""

    weight: NotNegative = 1 / 3
    alpha: Fraction = 0.4
    """share of the targets that the momentum towers give, once ``ramp_batches`` are over; 0: hard targets"""


class IMCOptions(Options):
    """Intra-modal contrast: each modality finds its own momentum key of the other view."""

    weight: NotNegative = 1 / 3


class LMIOptions(Options):
    """Local mutual information: each modality's global feature finds the momentum tokens of its own sample."""

    weight: NotNegative = 1 / 3
    pool: PositiveInt = 1
    """tokens of picture or sound, neighbours in their tower's order, whose mean is one local feature; texts: each"""


class ITMOptions(Options):
    """Matching: does a pair belong together, for true pairs and two hard negatives of each."""

    weight: NotNegative = 1.0
    seed: int = 0
    """of the draws of hard negatives"""


class MLMOptions(Options):
    """Masked tokens of the text, predicted with the other modality in view."""

    weight: NotNegative = 1.0
    augmentation: str
    """a name in ``data.augmentations`` whose text part masks; BERT's is ``{mask: 0.15, mask_random: 0.1,
    mask_keep: 0.1}``"""
    alpha: Fraction = 0.4
    """share of the targets that the momentum towers and their fusion give; 0: hard targets alone, no such copy"""


class FusionOptions(TransformerOptions):
    """The transformer in which one modality's tokens attend to the other's."""

    layers: PositiveInt = 2
    """each of self-attention, cross-attention and an MLP, with norms before them (the paper's BERT: 6, norms after)"""


class TCLOptions(Options):
    """Triple contrastive learning (Yang et al. 2022, arXiv 2202.10401) on any pairs of towers; a term set to null is
    off. Temperatures are the model's, one per pair; ``train.momentum`` moves the copies (the paper: 0.995, constant).
    """

    name: Literal["tcl"] = "tcl"
    weight: Weight = 1.0
    pairs: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)] | None = None
    """towers, e.g. ``[[video, text], [video, audio]]``; the loss is the mean over pairs; null: every pair of towers"""
    key_clip: Count = 1
    """the clip of picture and sound that momentum towers see; online towers see clip 0. 0: the same time window"""
    augmentation: str = "none"
    """a name in ``data.augmentations``, of both views of picture and sound, drawn for each"""
    text_augmentation: str = "none"
    """of both views of a text; none: one text, whose views differ by dropout alone, as in the paper"""
    queue: Count = 65_536
    """keys of earlier batches among which cma and imc search too; 0: the batch alone"""
    ramp_batches: Count = 1000
    """batches over which both alphas rise from 0 in a straight line (the paper: the first epoch)"""
    mask_false_negatives: bool = True
    """samples of equal key, group or caption are never each other's negatives, in batch, queue and matching"""
    cma: CMAOptions | None = CMAOptions()
    imc: IMCOptions | None = IMCOptions()
    lmi: LMIOptions | None = LMIOptions()
    itm: ITMOptions | None = ITMOptions()
    mlm: MLMOptions | None = None
    """for the pairs of which one tower reads text; e.g. ``{augmentation: masked}``"""
    fusion: FusionOptions = FusionOptions()
    """for itm and mlm, one of each pair"""
