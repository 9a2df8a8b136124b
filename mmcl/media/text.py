"""Captions from bytes, and the tokenizer that needs no vocabulary."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcl.types import SampleError

LIMIT_BYTES = 1 << 16


def decode_caption(data: bytes | bytearray | memoryview, *, limit_bytes: int = LIMIT_BYTES) -> str:
    """A caption as one line: UTF-8 (a byte order mark is dropped), NFC, white space and control characters collapsed.

    Raises ``SampleError``: ``caption_too_long`` (more than ``limit_bytes``), ``caption_not_utf8``, ``caption_empty``.

    >>> decode_caption(b"  a dog\\n barks ")
    'a dog barks'
    """
    if len(data) > limit_bytes:
        raise SampleError("caption_too_long", f"{len(data)} bytes, at most {limit_bytes}")
    try:
        text = bytes(data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("caption_not_utf8", f"byte {error.start} of {len(data)}") from error
    text = clean_caption(text)
    if not text:
        raise SampleError("caption_empty", f"{len(data)} bytes without a visible character")
    return text


def clean_caption(text: str) -> str:
    """NFC, with runs of white space and control characters made one blank and none at the ends.

    >>> clean_caption("cafe\\u0301\\tnoir")
    'café noir'
    """
    printable = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(unicodedata.normalize("NFC", printable).split())


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """Text as UTF-8 bytes: number = byte + 1, 0 is padding, so the vocabulary is 257.

    Texts are lowercased: a small tower should not have to learn that "A dog" is "a dog". Longer ones are cut at
    ``max_tokens``, or up to three bytes before, never inside a character. Rows are padded to the longest one. An empty
    text keeps one unmasked padding token, so that attention over it is finite.

    >>> ids, mask = ByteTokenizer()(["Ab", ""])
    >>> ids.tolist(), mask.tolist()
    ([[98, 99], [0, 0]], [[True, True], [True, False]])
    """

    max_tokens: int = 64

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")

    @property
    def mask_id(self) -> int:
        """What stands for a masked token: the padding number, at a place that counts."""
        return 0

    @property
    def vocabulary(self) -> int:
        """How many different numbers there are."""
        return 257

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids int64 ``(B, L)`` and mask bool ``(B, L)``, L = the longest row's tokens, at least 1."""
        rows = [self._encode(text) for text in texts]
        length = max([1, *map(len, rows)])
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            if row:
                ids[i, : len(row)] = torch.frombuffer(bytearray(row), dtype=torch.uint8).long() + 1
            mask[i, : max(1, len(row))] = True
        return ids, mask

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are longer than ``max_tokens``."""
        return [len(text.lower().encode("utf-8", errors="replace")) > self.max_tokens for text in texts]

    def _encode(self, text: str) -> bytes:
        encoded = text.lower().encode("utf-8", errors="replace")
        if len(encoded) <= self.max_tokens:
            return encoded
        return encoded[: self.max_tokens].decode("utf-8", errors="ignore").encode("utf-8")
