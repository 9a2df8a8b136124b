"""The one table of towers: a name to its options, options to an ``Encoder``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Tag

from mmcl.config import Options, unknown_name
from mmcl.encoders.audio import TinyAudio, TinyAudioOptions
from mmcl.encoders.base import Encoder
from mmcl.encoders.library import HfText, HfTextOptions, OpenClipOptions, build_open_clip
from mmcl.encoders.precomputed import Precomputed, PrecomputedOptions
from mmcl.encoders.text import TinyText, TinyTextOptions
from mmcl.encoders.video import TinyVideo, TinyVideoOptions

TOWERS: Mapping[str, tuple[type[Options], Callable[[Any], Encoder]]] = {
    "tiny_video": (TinyVideoOptions, TinyVideo),
    "tiny_audio": (TinyAudioOptions, TinyAudio),
    "tiny_text": (TinyTextOptions, TinyText),
    "precomputed": (PrecomputedOptions, Precomputed),
    "open_clip:": (OpenClipOptions, build_open_clip),
    "hf:": (HfTextOptions, HfText),
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
    if entry is None or not isinstance(options, entry[0]):
        raise unknown_name("tower.name", name, TOWERS)
    return entry[1](options)
