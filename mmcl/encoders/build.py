"""The one table of towers: a name to its options, options to an ``Encoder``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeAlias

from pydantic import Discriminator, Tag

from mmcl.config import Options, unknown_name
from mmcl.encoders.audio import TinyAudio, TinyAudioOptions
from mmcl.encoders.base import Encoder
from mmcl.encoders.causal import (
    CausalAudio,
    CausalAudioOptions,
    CausalText,
    CausalTextOptions,
    CausalVideo,
    CausalVideoOptions,
)
from mmcl.encoders.cnn_audio import Cnn14, Cnn14Options, ResnetMel, ResnetMelOptions, SfxCnn, SfxCnnOptions
from mmcl.encoders.frames import TimmFrames, TimmOptions
from mmcl.encoders.hf_audio import AUDIO_KINDS, HfAudioOptions, build_hf_audio
from mmcl.encoders.hf_common import model_type
from mmcl.encoders.hf_text import HfText, HfTextOptions
from mmcl.encoders.hf_video import VIDEO_KINDS, HfVideo, HfVideoOptions
from mmcl.encoders.library import OpenClipOptions, build_open_clip
from mmcl.encoders.motion import TinyMotion, TinyMotionOptions
from mmcl.encoders.options import TowerCommon
from mmcl.encoders.precomputed import Precomputed, PrecomputedOptions
from mmcl.encoders.prepare import prepare
from mmcl.encoders.shared import Shared, SharedOptions
from mmcl.encoders.slow import SlowOptions, SlowR50
from mmcl.encoders.text import TinyText, TinyTextOptions
from mmcl.encoders.torchvision_video import TorchvisionOptions, build_torchvision
from mmcl.encoders.video import TinyVideo, TinyVideoOptions
from mmcl.types import ConfigError


class TowerEntry(NamedTuple):
    """One line of the table."""

    options: type[Options]
    build: Callable[[Any], Encoder]
    modalities: str
    """what it takes: ``video``, ``audio``, ``text``, a few with commas between"""
    weights: str = "random"
    """where weights come from that it can start from, and their licence as their makers state it"""
    extra: str = ""
    """the extra of ``mmcl`` that it needs, if any"""


TOWERS: Mapping[str, TowerEntry] = {
    "tiny_video": TowerEntry(TinyVideoOptions, TinyVideo, "video"),
    "tiny_audio": TowerEntry(TinyAudioOptions, TinyAudio, "audio"),
    "tiny_motion": TowerEntry(TinyMotionOptions, TinyMotion, "motion"),
    "tiny_text": TowerEntry(TinyTextOptions, TinyText, "text"),
    "causal_video": TowerEntry(CausalVideoOptions, CausalVideo, "video"),
    "causal_audio": TowerEntry(CausalAudioOptions, CausalAudio, "audio"),
    "causal_text": TowerEntry(CausalTextOptions, CausalText, "text"),
    "precomputed": TowerEntry(PrecomputedOptions, Precomputed, "stored embeddings"),
    "open_clip:": TowerEntry(
        OpenClipOptions, build_open_clip, "video, text", "open_clip's; the card of each states its licence"
    ),
    "timm:": TowerEntry(
        TimmOptions, TimmFrames, "video", "package:efficientnet-lite0 (Apache-2.0); timm's, as timm lists them"
    ),
    "torchvision:": TowerEntry(
        TorchvisionOptions,
        build_torchvision,
        "video",
        "torchvision's, trained on Kinetics-400 (BSD-3-Clause; mvit_v2_s and swin3d_t ported from Apache-2.0)",
    ),
    "slow_r50": TowerEntry(
        SlowOptions, SlowR50, "video", "SLOW_8x8_R50 of SlowFast (Apache-2.0) or PyTorchVideo (Apache-2.0)"
    ),
    "cnn14": TowerEntry(Cnn14Options, Cnn14, "audio", "Cnn14_mAP=0.431.pth of PANNs (CC-BY-4.0)"),
    "resnet_mel": TowerEntry(ResnetMelOptions, ResnetMel, "audio"),
    "sfx_cnn": TowerEntry(
        SfxCnnOptions, SfxCnn, "audio", "package:aisfx (CC-BY-4.0 in its licence file, MIT among its classifiers)"
    ),
    "hf:audio": TowerEntry(
        HfAudioOptions, build_hf_audio, "audio", "a folder of transformers; its card states the licence"
    ),
    "hf:text": TowerEntry(HfTextOptions, HfText, "text", "a folder; package:minilm (Apache-2.0)"),
    "hf:video": TowerEntry(HfVideoOptions, HfVideo, "video", "a folder of transformers; its card states the licence"),
}
"""Where a name ends in a colon, a library's own name follows; ``hf:`` towers are told apart by their model's type, or
by ``modality``.
"""


HF_MODALITIES: Mapping[str, str] = {
    **dict.fromkeys(VIDEO_KINDS, "video"),
    **dict.fromkeys(AUDIO_KINDS, "audio"),
}
"""Model types of transformers that are not for text."""


def table_name(name: str) -> str:
    """The entry of ``TOWERS`` that a tower's name belongs to, or the name itself.

    >>> table_name("tiny_text"), table_name("open_clip:ViT-B-32"), table_name("tiny_txt")
    ('tiny_text', 'open_clip:', 'tiny_txt')
    """
    prefix, colon, _ = name.partition(":")
    return prefix + colon


def tower_tag(options: Any) -> str | None:
    """The entry of ``TOWERS`` that a mapping, or the options of a tower, belongs to; None: it has no name."""
    told = options.get if isinstance(options, dict) else lambda key, default=None: getattr(options, key, default)
    name = told("name")
    if not isinstance(name, str):
        return None
    if table_name(name) != "hf:":
        return table_name(name)
    return f"hf:{told('modality') or HF_MODALITIES.get(model_type(name), 'text')}"


TowerOptions: TypeAlias = Annotated[
    Annotated[TinyVideoOptions, Tag("tiny_video")]
    | Annotated[TinyAudioOptions, Tag("tiny_audio")]
    | Annotated[TinyMotionOptions, Tag("tiny_motion")]
    | Annotated[TinyTextOptions, Tag("tiny_text")]
    | Annotated[CausalVideoOptions, Tag("causal_video")]
    | Annotated[CausalAudioOptions, Tag("causal_audio")]
    | Annotated[CausalTextOptions, Tag("causal_text")]
    | Annotated[PrecomputedOptions, Tag("precomputed")]
    | Annotated[OpenClipOptions, Tag("open_clip:")]
    | Annotated[TimmOptions, Tag("timm:")]
    | Annotated[TorchvisionOptions, Tag("torchvision:")]
    | Annotated[SlowOptions, Tag("slow_r50")]
    | Annotated[Cnn14Options, Tag("cnn14")]
    | Annotated[ResnetMelOptions, Tag("resnet_mel")]
    | Annotated[SfxCnnOptions, Tag("sfx_cnn")]
    | Annotated[HfAudioOptions, Tag("hf:audio")]
    | Annotated[HfTextOptions, Tag("hf:text")]
    | Annotated[HfVideoOptions, Tag("hf:video")]
    | Annotated[SharedOptions, Tag("shared")],
    Discriminator(tower_tag),
]
"""The options of any tower, told apart by ``name``: a pydantic field of this type takes them or a mapping."""


def build_encoder(options: Options, path: str = "tower") -> Encoder:
    """The tower that ``options`` describes, freshly initialised: its weights depend on torch's random state alone.

    Raises:
        ConfigError: the options are of no tower of the table, name a model that a library does not have, or cannot take
            effect on this tower; names ``path``.
    """
    name = str(getattr(options, "name", type(options).__name__))
    entry = TOWERS.get(tower_tag(options) or "")
    if entry is None or not isinstance(options, entry.options):
        raise unknown_name(f"{path}.name", name, TOWERS)
    try:
        encoder = entry.build(options)
    except ConfigError as error:  # a tower knows its options, not where they stand
        place, dot, rest = str(error).partition(".")
        raise ConfigError(f"{path}.{rest}" if place == "tower" and dot else str(error)) from None
    return prepare(encoder, options, path) if isinstance(options, TowerCommon) else encoder


def build_towers(towers: Mapping[str, Options], path: str = "model.towers") -> dict[str, Encoder]:
    """The towers of a model, by name in this order; one that shares weights runs the other.

    Raises:
        ConfigError: as :func:`build_encoder`, or no tower there has weights that can be shared.
    """
    built = {n: build_encoder(o, f"{path}.{n}") for n, o in towers.items() if not isinstance(o, SharedOptions)}
    for name, options in towers.items():
        if isinstance(options, SharedOptions):
            if options.tower not in built or isinstance(built[options.tower], Shared):
                own = [n for n, o in towers.items() if not isinstance(o, SharedOptions)]
                raise unknown_name(f"{path}.{name}.tower", options.tower, own)
            built[name] = Shared(options, built[options.tower], f"{path}.{name}")
    return {name: built[name] for name in towers}


def exported_towers(towers: Mapping[str, Options]) -> dict[str, Options]:
    """Options of the same towers, without what matters to training alone."""
    plain = {"pretrained": None, "lora": None, "checkpoint_activations": False, "compile": False}
    return {n: o.model_copy(update=plain) if isinstance(o, TowerCommon) else o for n, o in towers.items()}
