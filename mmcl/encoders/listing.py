"""``mmcl encoders``: the towers that a configuration can name, their sizes, what they eat, whose weights they take."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mmcl.config import Options, build, unknown_name
from mmcl.encoders.base import Encoder
from mmcl.encoders.build import TOWERS, TowerOptions, build_encoder, table_name, tower_tag
from mmcl.encoders.packages import PACKAGES
from mmcl.encoders.torchvision_video import NETWORKS
from mmcl.types import AudioSpec, ConfigError, MotionSpec, Spec, TextSpec, VectorSpec, VideoSpec

WIDTH = 80

SHOWN: Mapping[str, Sequence[str]] = {
    "open_clip:": ("open_clip:ViT-B-32", "open_clip:ViT-L-14", "open_clip:RN50"),
    "timm:": ("timm:vit_small_patch16_224", "timm:resnet50", "timm:tf_efficientnet_lite0"),
    "torchvision:": tuple(f"torchvision:{name}" for name in NETWORKS),
    "hf:text": ("hf:bert", "hf:distilbert", "hf:roberta", "hf:siglip_text_model"),
    "hf:video": ("hf:videomae", "hf:vivit", "hf:timesformer", "hf:vjepa2"),
    "hf:audio": ("hf:audio-spectrogram-transformer", "hf:clap", "hf:whisper", "hf:wav2vec2"),
}
"""Names of each prefix that the list shows; a name without a colon is shown itself."""

UNSIZED = ("precomputed", "shared")
"""entries that have no weights of their own"""


@dataclass(frozen=True, slots=True)
class Tower:
    """One name of the list."""

    name: str
    modality: str
    parameters: int
    width: int
    eats: str


class _Holder(Options):
    tower: TowerOptions


def measure(name: str, **options: object) -> Tower:
    """Builds a tower with its defaults on no device, so that nothing is computed, and counts its weights.

    Raises:
        ConfigError: no such name.
    """
    described = build(_Holder, {"tower": {"name": name, **options}}, where=name).tower
    if table_name(name) == "hf:":
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns of marks that captions of bytes do not have
    try:
        with torch.device("meta"):
            encoder = build_encoder(described)
    except (NotImplementedError, RuntimeError):  # some front ends compute their tables when they are made
        encoder = build_encoder(described)
    return Tower(name, encoder.spec.modality, _count(encoder), encoder.width, eats(encoder.spec))


def eats(spec: Spec) -> str:
    """One view in words.

    >>> eats(VideoSpec(frames=8, size=224, fps=4.0))
    '8 frames of 224 px at 4/s'
    >>> eats(VideoSpec(frames=1, size=224)), eats(AudioSpec(16_000, 10.0))
    ('pictures of 224 px', '10 s at 16000 Hz')
    >>> eats(MotionSpec(frames=8, size=64, stride=1))
    '8 maps of 64 px in a row'
    """
    if isinstance(spec, VideoSpec):
        if spec.frames == 1:
            return f"pictures of {spec.size} px"
        return f"{spec.frames} frames of {spec.size} px {_rate(spec)}"
    if isinstance(spec, MotionSpec):
        return f"{spec.frames} maps of {spec.size} px {_rate(spec)}"
    if isinstance(spec, AudioSpec):
        return f"{spec.seconds:.4g} s at {spec.sample_rate_hz} Hz"
    if isinstance(spec, TextSpec):
        return f"{getattr(spec.tokenizer, 'max_tokens', '?')} tokens"
    return f"{spec.width} numbers" if isinstance(spec, VectorSpec) else f"questions of {spec.texts} texts"


def _rate(spec: VideoSpec | MotionSpec) -> str:
    if spec.stride == 1:
        return "in a row"
    return f"every {spec.stride}th" if spec.stride else f"at {spec.fps:.3g}/s"


def overview() -> str:
    """Every entry of the table with the names that it shows, at most 80 columns wide."""
    lines: list[str] = []
    for entry in TOWERS:
        lines += [*_head(entry), *(_line(tower) for tower in _shown(entry)), ""]
    return "\n".join(lines[:-1])


def detail(name: str) -> str:
    """One tower with its size, what it eats and its options; of a prefix alone, all names that it takes.

    Raises:
        ConfigError: no such name; names the nearest.
    """
    if name in _LIBRARIES:
        return "\n".join(f"{name}{model}" for model in _LIBRARIES[name]())
    entry = tower_tag({"name": name}) or ""
    if entry not in TOWERS:
        raise unknown_name("name", name, [*TOWERS, *(known for shown in SHOWN.values() for known in shown)])
    towers = [] if entry in UNSIZED or name in SHOWN else _measured(entry, name)
    lines = [*_head(entry, title=name), *(_line(tower) for tower in towers)]
    lines += [line for fact in _published(name) for line in _wrapped(fact)]
    fields = TOWERS[entry].options.model_fields
    lines += ["  options"]
    for key, field in fields.items():
        if key != "name":
            default = "required" if field.is_required() else f"{field.get_default(call_default_factory=True)!r}"
            meaning = " ".join((field.description or "").replace("``", "`").split())
            lines += _wrapped(f"{key} ({default}){': ' if meaning else ''}{meaning}", "    ", "      ")
    return "\n".join(lines)


def _count(encoder: Encoder) -> int:
    return sum(parameter.numel() for parameter in encoder.parameters())


def _shown(entry: str) -> list[Tower]:
    if entry in UNSIZED:
        return []
    return [tower for name in SHOWN.get(entry, (entry,)) for tower in _measured(entry, name)]


def _measured(entry: str, name: str) -> list[Tower]:
    """More than one where a name stands for towers of several modalities."""
    if entry != "open_clip:":
        return [measure(name)]
    found = [measure(name)]
    try:
        return [*found, measure(name, modality="text")]
    except ConfigError:  # its text tower, or the tokenizer, is another library's and lies on a hub
        return found


def _head(entry: str, title: str = "") -> list[str]:
    told = TOWERS[entry]
    more = f"; `mmcl encoders {entry}` lists {len(_LIBRARIES[entry]())} names" if entry in _LIBRARIES else ""
    facts = [f"takes {told.modalities}{more}", f"weights: {told.weights}"]
    facts += [f"needs: pip install 'mmcl[{told.extra}]'"] if told.extra else []
    return [title or (f"{entry}NAME" if entry.endswith(":") else entry), *(x for fact in facts for x in _wrapped(fact))]


def _line(tower: Tower) -> str:
    return f"  {tower.name:30} {tower.parameters / 1e6:7.2f} M  D {tower.width:<5}{tower.eats}"


def _published(name: str) -> list[str]:
    """What libraries and packages say of weights for this very name."""
    facts = [f"pretrained: package:{key}: {p.licence}" for key, p in PACKAGES.items() if p.tower == name]
    model = name.partition(":")[2]
    if table_name(name) == "timm:":
        import timm

        told = timm.get_pretrained_cfg(model)
        if told is not None and told.has_weights:
            facts.append(
                f"timm's weights: {told.hf_hub_id or told.url or 'a file'}; licence {told.license or 'not stated'}"
            )
    elif table_name(name) == "open_clip:":
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(model)
        facts += [f"open_clip's weights, licence on each card: {', '.join(tags)}"] if tags else []
    elif table_name(name) == "torchvision:":
        from torchvision.models import get_model_weights

        told = get_model_weights(model).DEFAULT
        facts.append(f"torchvision's weights: {told}; {told.meta['recipe']}")
    return facts


def _wrapped(text: str, first: str = "  ", rest: str = "    ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _timm_names() -> Sequence[str]:
    import timm

    names: Sequence[str] = timm.list_models()
    return names


def _open_clip_names() -> Sequence[str]:
    import open_clip

    names: Sequence[str] = open_clip.list_models()
    return names


_LIBRARIES: Mapping[str, Callable[[], Sequence[str]]] = {"timm:": _timm_names, "open_clip:": _open_clip_names}
