"""Captions are one clean line or an error with a reason; tokens never split a character or leave a row empty."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmcl.media.text import ByteTokenizer, clean_caption, decode_caption
from mmcl.types import SampleError


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a dog barks", "a dog barks"),
        (b"\xef\xbb\xbf a\tdog\r\n\r\nbarks \n", "a dog barks"),
        ("cafe\u0301".encode(), "caf\u00e9"),
        ("a\u00a0b\u2003c\u0000d\u007fe".encode(), "a b c d e"),
        ("<b>犬</b>".encode(), "<b>犬</b>"),
    ],
)
def test_captions_are_one_clean_line(data, text):
    assert decode_caption(data) == text and decode_caption(memoryview(data)) == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "caption_empty"),
        (b" \n\x00\t", "caption_empty"),
        (b"caf\xe9", "caption_not_utf8"),
        (b"\xff\xfea\x00", "caption_not_utf8"),
        (b"a" * 101, "caption_too_long"),
    ],
)
def test_bad_captions_have_reasons(data, reason):
    with pytest.raises(SampleError) as caught:
        decode_caption(data, limit_bytes=100)
    assert caught.value.reason == reason
    assert decode_caption(b"a" * 100, limit_bytes=100) == "a" * 100


@given(st.text())
def test_cleaning_twice_changes_nothing(text):
    once = clean_caption(text)
    assert clean_caption(once) == once and once == once.strip() and "\n" not in once


def test_tokens_are_bytes_plus_one_padded_to_the_longest():
    ids, mask = ByteTokenizer(max_tokens=8)(["Ab", "", "é"])
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids.tolist() == [[98, 99], [0, 0], [0xC3 + 1, 0xA9 + 1]]
    assert mask.tolist() == [[True, True], [True, False], [True, True]]
    assert [tuple(x.shape) for x in ByteTokenizer()([])] == [(0, 1), (0, 1)]


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.integers(1, 40))
def test_cut_rows_are_whole_characters(texts, max_tokens):
    ids, mask = ByteTokenizer(max_tokens)(texts)
    assert ids.shape == mask.shape and ids.shape[1] <= max_tokens and mask.any(1).all()
    assert int(ids.max()) < ByteTokenizer(max_tokens).vocabulary
    for row, kept, text in zip(ids.tolist(), mask.tolist(), texts, strict=True):
        read = bytes(i - 1 for i, real in zip(row, kept, strict=True) if real and i > 0).decode("utf-8")
        whole = text.lower().encode("utf-8", errors="replace").decode()
        assert whole.startswith(read) and (read == whole or len(read.encode()) > max_tokens - 4)


def test_lone_surrogates_are_text_too():
    assert ByteTokenizer()(["\ud800"])[0].tolist() == [[ord("?") + 1]]


def test_it_is_a_value():
    assert hash(ByteTokenizer(8)) == hash(ByteTokenizer(8)) and ByteTokenizer(8) != ByteTokenizer(9)
    assert pickle.loads(pickle.dumps(ByteTokenizer(8))) == ByteTokenizer(8)
    with pytest.raises(ValueError):
        ByteTokenizer(0)
