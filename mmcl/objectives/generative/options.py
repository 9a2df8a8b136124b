"""Options of the objectives that decode."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from mmcl.config import Options
from mmcl.objectives.transformers import TransformerOptions
from mmcl.objectives.views import NotNegative, PositiveFloat, PositiveInt
from mmcl.objectives.weights import Weight


class DecoderOptions(TransformerOptions):
    """The transformer that predicts each token from those before it."""


class PatchOptions(Options):
    """How pictures and sound are cut into what a token stands for; layout ``prefix`` takes its tower's patches."""

    frames: PositiveInt = 1
    """of a patch of a video"""
    pixels: PositiveInt = 16
    """height and width of a patch of a video"""
    samples: Annotated[int, Field(ge=2)] = 640
    """of a block of sound"""


class CodesOptions(PatchOptions):
    """Vector quantisation: the nearest of some means of patches, which follow by moving averages (van den Oord et al.
    2017, arXiv 1711.00937, appendix A.1). Means that are not used start again at the worst fitted patches.
    """

    name: Literal["codes"] = "codes"
    count: Annotated[int, Field(ge=2)] = 256
    detail: PositiveInt = 4
    """a patch is the mean of its frames at so many pixels a side, a block of sound the level of its square in bands"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """share that a mean keeps of itself in a step"""


class PaletteOptions(PatchOptions):
    """Uniform quantisation: of the mean colour of a patch, channel by channel, or of the loudness of a block."""

    name: Literal["palette"] = "palette"
    levels: Annotated[int, Field(ge=2, le=32)] = 8
    """of each number; ``levels³`` tokens for pictures, ``levels`` for sound"""


class PatchValuesOptions(PatchOptions):
    """The patches themselves, by regression: independent Gaussians of their pixels, or of the samples of a wave.

    The likelihood is the density of numbers in [0, 1] (pixels / 255) or [−1, 1] (samples), the sum over a patch's
    numbers: a patch of 768 makes a loss 768 times that of one, which ``generation`` or the weight has to even out.
    ``bits_per_dim`` is that density times the data's steps, 1/255 and 2⁻¹⁵: bits of each of 256 values of a pixel, or
    of 16-bit sound, which can be compared with discrete models of the same numbers. Knowing nothing costs 8 and 16.
    """

    name: Literal["patches"] = "patches"
    detail: PositiveInt | None = None
    """null: every pixel and sample; else the coarse patches that ``codes`` quantise, also in steps of 1/255"""
    deviation: PositiveFloat | Literal["learned"] = "learned"
    """of the Gaussians: what the decoder says of each number, or one for all, which makes it squared error"""
    floor: Annotated[float, Field(gt=0, lt=0.25)] = 1 / 255
    """what learned deviations come down to at the least; a step of the data (1/255, of a wave 2⁻¹⁵) or more"""


def _kind(options: Any) -> Any:
    """Codes where no name is given."""
    return options.get("name", "codes") if isinstance(options, dict) else getattr(options, "name", None)


TargetOptions: TypeAlias = Annotated[
    Annotated[CodesOptions, Tag("codes")]
    | Annotated[PaletteOptions, Tag("palette")]
    | Annotated[PatchValuesOptions, Tag("patches")],
    Discriminator(_kind),
]
"""What the tokens of pictures and sound are; those of a text are its tokenizer's."""


class DecodingOptions(Options):
    """What both objectives have."""

    weight: Weight = 1.0
    tower: str
    targets: TargetOptions = CodesOptions()
    """of pictures and sound: ``codes`` (frames, pixels, samples, count, detail, momentum), learned means of patches;
    ``palette`` (frames, pixels, samples, levels), uniformly quantised colours and loudness; or ``patches`` (frames,
    pixels, samples, detail, deviation, floor), Gaussians of the pixels or of the wave"""
    decoder: DecoderOptions = DecoderOptions()
    temperature: PositiveFloat = 0.1
    """of the contrast"""
    mask_false_negatives: bool = True
    """samples of equal key, group or with an equal caption are never each other's negatives"""


class GenerativeContrastiveOptions(DecodingOptions):
    """Hybrid generative–contrastive learning: one tower compares two views and a decoder predicts each from what the
    tower saw of it (GCRL; Kim, Kim & Lee 2021, arXiv 2106.06162): contrast + generation · likelihood.

    The authors' code is not public: depths, weights, tokens and both layouts are our own choice. The contrast is
    symmetric InfoNCE over the rows of all ranks; the decoder predicts the view that its tower saw, never the other one,
    token by token, in the mean over a row's tokens, then over rows and both views. ``bits_per_dim`` is logged of data
    that was not augmented: of the views themselves where they have no augmentation, else of a third, plain view of
    each sample, without a gradient; an augmentation changes the density, and what was augmented is
    ``bits_per_dim_augmented``. It counts bits per token of a text, per code, per channel of a palette, and per number
    of ``patches``: the density of pixels / 255, or of samples in [−1, 1], times the data's steps, 1/255 and 2⁻¹⁵.

    Needs: a tower that learns, of text, video or sound; a causal one (``causal_text``, ``causal_video``,
    ``causal_audio``) in layout ``prefix``; for texts an augmentation or dropout that makes views differ.
    """

    name: Literal["generative_contrastive"] = "generative_contrastive"
    layout: Literal["cross", "prefix"] = "cross"
    """a decoder of its own that sees the tower through a bottleneck, or one causal stack: the tower is its lower part,
    the decoder its upper one"""
    latents: Annotated[int, Field(ge=1, le=16)] = 4
    """layout ``cross``: vectors that the tower's tokens are pooled to; with all of them the decoder would copy"""
    contrast: NotNegative = 1.0
    """of the contrast"""
    generation: NotNegative = 1.0
    """λ, of the negative log-likelihood in nats per token"""
    augmentation: str = "none"
    """a name in ``data.augmentations``, drawn for each of the two views"""
    windows: Literal["same", "different"] = "same"
    """both views of one time window, or each of its own; texts have none"""
    plain: bool = True
    """under an augmentation: run the tower on a view without it too, for ``bits_per_dim``"""
    layers: Annotated[int, Field(ge=1, le=4)] = 2
    """linear maps of the projector, an MLP from ``pooled``"""
    hidden: PositiveInt = 2048
    out: PositiveInt = 128
    """width of the rows that are compared"""


class CMIMOptions(DecodingOptions):
    """Contrastive mutual information machine: a Gaussian latent of each row, a decoder of it, and a contrast whose
    negatives weigh as their mean (cMIM; Livne 2025, arXiv 2502.19642 and 2509.21511):
    −log p(x | z) − ½ (log q(z | x) + log N(z; 0, I)) + contrast.

    There is no code of the authors. The MIM part is that of NVIDIA NeMo's A-MIM; the critic and the pairing of the
    contrast are as understood from the paper, hence ``critic`` and ``other``; the decoder is our own choice: one token
    after the other, with the latent in view. Noise is drawn by (seed, draw), never by rank. The decoder's states before
    its last linear map are the informative embeddings: ``mmcl evaluate linear --features informative``, and
    ``mmcl.evaluation.informative``. ``bits_per_dim`` counts what that of ``generative_contrastive`` does.

    Needs: a tower that learns, of text, video or sound; one view of it without augmentation.
    """

    name: Literal["cmim"] = "cmim"
    latent: PositiveInt = 64
    """width of z"""
    log_scale: tuple[float, float] = (-4.0, 2.0)
    """bounds of the logarithm of the posterior's deviation; without a floor log q grows without end"""
    contrast: NotNegative = 1.0
    """of the contrast"""
    critic: Literal["cosine", "dot"] = "cosine"
    """of two latents, over the temperature; ``dot`` is divided by the root of their width"""
    other: Literal["draw", "mean"] = "draw"
    """what z is compared with: a second draw from each posterior, or its mean"""
    likelihood: Literal["sum", "mean"] = "sum"
    """over a row's tokens; the formula has the sum, which grows with their number"""
    latents: Annotated[int, Field(ge=1, le=16)] = 4
    """vectors that the decoder sees, all linear maps of z"""
    seed: int = 0
    """of the noise"""

    @model_validator(mode="after")
    def _bounds(self) -> CMIMOptions:
        if not self.log_scale[0] < self.log_scale[1]:
            raise ValueError(f"log_scale must be a lower and a higher bound, got {list(self.log_scale)}")
        return self
