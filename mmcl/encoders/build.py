"""The one table of towers: a name to its options, options to an ``Encoder``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeAlias

from pydantic import Discriminator, Tag

from mmcl.config import Options, unknown_name
from mmcl.encoders.audio import TinyAudio, TinyAudioOptions
from mmcl.encoders.base import Encoder
from mmcl.encoders.library import HfText, HfTextOptions, OpenClipOptions, build_open_clip
from mmcl.encoders.motion import TinyMotion, TinyMotionOptions
from mmcl.encoders.precomputed import Precomputed, PrecomputedOptions
from mmcl.encoders.text import TinyText, TinyTextOptions
from mmcl.encoders.video import TinyVideo, TinyVideoOptions


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
    "precomputed": TowerEntry(PrecomputedOptions, Precomputed, "stored embeddings"),
    "open_clip:": TowerEntry(OpenClipOptions, build_open_clip, "video, text"),
    "hf:": TowerEntry(HfTextOptions, HfText, "text"),
}
"""Names that end in a colon are prefixes: a library's own name follows."""


def table_name(name: str) -> str:
    """The entry of ``TOWERS`` that a tower's name belongs to, or the name itself.

    >>> table_name("tiny_text"), table_name("open_clip:ViT-B-32"), table_name("tiny_txt")
    ('tiny_text', 'open_clip:', 'tiny_txt')
    """
    prefix, colon, _ = name.partition(":")
    return prefix + colon


def _tag(options: Any) -> str | None:
    name = options.get("name") if isinstance(options, dict) else getattr(options, "name", None)
    return table_name(name) if isinstance(name, str) else None


TowerOptions: TypeAlias = Annotated[
    Annotated[TinyVideoOptions, Tag("tiny_video")]
    | Annotated[TinyAudioOptions, Tag("tiny_audio")]
    | Annotated[TinyMotionOptions, Tag("tiny_motion")]
    | Annotated[TinyTextOptions, Tag("tiny_text")]
    | Annotated[PrecomputedOptions, Tag("precomputed")]
    | Annotated[OpenClipOptions, Tag("open_clip:")]
    | Annotated[HfTextOptions, Tag("hf:")],
    Discriminator(_tag),
]
"""The options of any tower, told apart by ``name``: a pydantic field of this type takes them or a mapping."""


def build_encoder(options: Options) -> Encoder:
    """The tower that ``options`` describes, freshly initialised: its weights depend on torch's random state alone.

    Raises:
        ConfigError: the options are of no tower of the table, or name a model that a library does not have.
    """
    name = str(getattr(options, "name", type(options).__name__))
    entry = TOWERS.get(table_name(name))
    if entry is None or not isinstance(options, entry.options):
        raise unknown_name("tower.name", name, TOWERS)
    return entry.build(options)
