"""Protocols: what is searched or told apart, by what, and what counts as right, as data that a report can name.

A protocol is a YAML file: one of ``configs/evaluate`` by its name, or one's own by its path. Its fingerprint, with the
gallery's, stands in every report: two reports of one fingerprint answered the same question.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, field_validator

from mmcl.config import Options, build, read_yaml, unknown_name
from mmcl.shards.files import join_url
from mmcl.shards.manifest import load_manifest
from mmcl.shipped import shipped
from mmcl.types import ConfigError, Modality

Post: TypeAlias = Literal["dual_softmax", "inverted_softmax", "qb_norm"]
Fusion: TypeAlias = Literal["mean", "learned"]
TRANSDUCTIVE: tuple[Post, ...] = ("dual_softmax", "inverted_softmax")
"""those that need nothing but the queries"""

ALL = "all"
"""for ``directions``: every ordered pair of sets of modalities that share none"""
_FOLDER = "configs/evaluate"


class _Named(Options):
    name: str = Field(pattern=r"^[a-z0-9_]{1,40}$")
    about: str = ""
    """what it is, in one sentence, for people"""
    source: str = ""
    """whose protocol it is: a paper or the data set's page"""
    split: str = ""
    """the split that is meant; where the shards given are a folder of splits, that one is taken"""
    items: int | None = Field(None, ge=1)
    """how many items the whole set has; a report on fewer says so"""
    clips: int | None = Field(None, ge=1)
    """windows per item, evenly spaced, whose embeddings are averaged; default: as the checkpoint's run says"""

    def asked(self) -> dict[str, Any]:
        """All of it that figures depend on, for JSON; ``about`` and ``source`` are for people."""
        return self.model_dump(mode="json", exclude={"about", "source"})

    def fingerprint(self, keys: Sequence[str] = ()) -> str:
        """:func:`fingerprint` of what is asked and of the items."""
        return fingerprint(self.asked(), keys)


class RetrievalProtocol(_Named):
    """Who asks what of which gallery."""

    task: Literal["retrieval"] = "retrieval"
    directions: tuple[str, ...] = ()
    """``QUERY->GALLERY`` each, such as ``text->video`` or ``text->video+audio``; none: every ordered pair of
    modalities; ``all`` alone: of sets of them too"""
    captions: int | None = Field(None, ge=1)
    """the first so many captions of an item take part, each as a query and as a gallery row; default: all"""
    text_gallery: Literal["captions", "best"] = "captions"
    """where texts are searched: ``captions``: each is a gallery row of its own, any right one is a hit; ``best``: an
    item's captions are one gallery row that scores as the best of them (CLIP4Clip's video→text on MSVD)"""
    right: Literal["item", "caption"] = "item"
    """what is right for a query: its own item alone, or every item with the same first caption"""
    ties: Literal["expected"] = "expected"
    """rows of equal score: every figure is its expectation over their random order"""
    fusion: Fusion = "mean"
    """of a set such as ``video+audio``: the mean of an item's unit rows, scaled to unit length, or what the model has
    learned of this set (``learned``)"""
    post: tuple[Post, ...] = ()
    """scores that other queries changed, in figures of their own, marked transductive (none where ``best`` is
    searched); ``qb_norm`` needs a bank"""
    figures: tuple[str, ...] = ("R@1", "R@5", "R@10", "MedR", "MnR")
    """what the field compares in this protocol; the report holds all others too"""

    @field_validator("directions")
    @classmethod
    def _directions(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if given == (ALL,):
            return given
        named = tuple(parse_direction(each).name for each in given)
        if len(set(named)) < len(named):
            raise ValueError(f"a direction stands twice in {', '.join(given)}")
        return named


class ClassificationProtocol(_Named):
    """Which classes are told apart, and by what words."""

    task: Literal["classification"] = "classification"
    modality: Modality
    """what is classified: ``video`` or ``audio``, or a set such as ``video+audio`` by mean"""
    label: str = "label_name"
    """the metadata column with an item's class name (``mmcl shards make`` writes ``label_name`` for labels that are
    words); a list of names there: several are right"""
    classes: tuple[str, ...] = ()
    """names of all classes; none: those that the items of the shards have"""
    num_classes: int | None = Field(None, ge=2)
    """how many classes the whole set has; a report on fewer says so"""
    prompts: tuple[str, ...] = ("{}",)
    """sentences with ``{}`` where the class name goes"""
    prompt_average: Literal["mean", "max"] = "mean"
    """a class is the mean of its sentences' unit rows, or scores as the best of them"""
    crops: Literal[1, 3] = 1
    """3: left, middle and right (or top, middle, bottom) of each window, averaged as the windows are"""
    figures: tuple[str, ...] = ("top-1", "top-5", "mean-per-class")
    """what the field compares in this protocol"""

    @field_validator("prompts")
    @classmethod
    def _prompts(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if not given or any(prompt.count("{}") != 1 for prompt in given):
            raise ValueError("every prompt needs {} once, where the class name goes")
        return given

    def sentences(self, name: str) -> list[str]:
        """The prompts about one class.

        >>> ClassificationProtocol(name="x", modality="audio", prompts=("a sound of {}.",)).sentences("rain")
        ['a sound of rain.']
        """
        return [prompt.replace("{}", name) for prompt in self.prompts]


AnyProtocol: TypeAlias = RetrievalProtocol | ClassificationProtocol
"""a protocol of either task"""


class Direction(Options):
    """One direction of retrieval: the modalities of the query, and those of what is searched."""

    query: tuple[Modality, ...]
    gallery: tuple[Modality, ...]

    @property
    def name(self) -> str:
        """``text->video+audio``: text asks, items are searched by picture and sound together."""
        return f"{'+'.join(self.query)}->{'+'.join(self.gallery)}"


def parse_direction(text: str) -> Direction:
    """``QUERY->GALLERY``, each a modality or several joined by ``+``.

    Raises ValueError for any other form: V2T could be read both ways, and is refused.

    >>> parse_direction("text -> video+audio").gallery
    ('video', 'audio')
    """
    sides = [tuple(name.strip() for name in side.split("+")) for side in text.split("->")]
    if len(sides) != 2 or not all(name.isidentifier() for side in sides for name in side):
        raise ValueError(
            f"{text!r} is no direction: write QUERY->GALLERY, such as text->video or text->video+audio, "
            "or nothing but all"
        )
    both = [*sides[0], *sides[1]]
    if len(set(both)) < len(both):
        raise ValueError(f"{text!r}: a modality stands twice, and would find itself")
    return Direction(query=sides[0], gallery=sides[1])


def load_protocol(name_or_path: str | Path) -> AnyProtocol:
    """A shipped protocol by its name, or one's own by the path of its YAML file.

    Raises:
        ConfigError: no such protocol or file, or one that does not say what a protocol must; names the key.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text).expanduser()
    else:
        path = shipped(_FOLDER) / f"{text}.yaml"
        if not path.exists():
            raise unknown_name("protocol", text, protocol_names())
    tree = read_yaml(path)
    kinds: dict[str, Any] = {"retrieval": RetrievalProtocol, "classification": ClassificationProtocol}
    task = tree.get("task", "retrieval")
    if task not in kinds:
        raise unknown_name(f"{path}: task", task, kinds)
    protocol: AnyProtocol = build(kinds[task], tree, where=str(path))
    return protocol


def protocol_names() -> list[str]:
    """Names of the protocols that come with the package."""
    return sorted(path.stem for path in shipped(_FOLDER).glob("*.yaml"))


def fingerprint(protocol: Any, keys: Sequence[str]) -> str:
    """Sixteen hex digits of the SHA-256 of a protocol (anything JSON can hold) and the keys of its items, in order."""
    text = json.dumps([protocol, list(keys)], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def retrieval_protocol(
    name_or_path: str | Path = "paired",
    *,
    directions: Sequence[str] = (),
    post: Sequence[Post] = (),
    fusion: str | None = None,
) -> RetrievalProtocol:
    """As :func:`load_protocol`; ``directions`` and ``fusion``: these instead of its own; ``post``: these besides.

    Raises:
        ConfigError: also for a protocol of classification, and for what is no direction.
    """
    protocol = load_protocol(name_or_path)
    if not isinstance(protocol, RetrievalProtocol):
        raise ConfigError(f"protocol {protocol.name} is one of {protocol.task}: use `mmcl evaluate classify`")
    changes = {
        "directions": tuple(directions) or protocol.directions,
        "post": (*protocol.post, *(each for each in post if each not in protocol.post)),
        "fusion": fusion or protocol.fusion,
    }
    return build(RetrievalProtocol, {**protocol.model_dump(), **changes}, where=f"protocol {protocol.name}")


def classification_protocol(name_or_path: str | Path) -> ClassificationProtocol:
    """As :func:`load_protocol`. Raises ``ConfigError`` also for a protocol of retrieval."""
    protocol = load_protocol(name_or_path)
    if not isinstance(protocol, ClassificationProtocol):
        raise ConfigError(f"protocol {protocol.name} is one of {protocol.task}: use `mmcl evaluate retrieval`")
    return protocol


def split_of(shards: str, protocol: AnyProtocol) -> str:
    """``shards``, or the folder of the protocol's split below it where they lie there."""
    try:
        load_manifest(shards)
    except ConfigError:
        below = join_url(shards, protocol.split)
        with contextlib.suppress(ConfigError):
            load_manifest(below)
            return below
        raise
    return shards
