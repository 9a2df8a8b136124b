"""From sentences and frames to one row per candidate: attention inside each sentence's time, RNN, maximum over time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frames_in_time(times: Tensor, sentences: Tensor, window_seconds: float) -> Tensor:
    """bool ``(B, J, L)``: which frames each sentence may attend to.

    Args:
        times: ``(B, L)``, seconds.
        sentences: ``(B, J, 2)``, start and end in seconds; NaN where there is no sentence.
        window_seconds: added on both sides.
    """
    start, end = sentences[:, :, :1] - window_seconds, sentences[:, :, 1:] + window_seconds
    return (times[:, None] >= start) & (times[:, None] <= end)


def locally_aligned_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Σ_l softmax_l(⟨query, key_l⟩/√D) value_l over the allowed frames, ``(B, K, J, D)``.

    The others have no weight and get no gradient; a sentence with none gives zeros.

    Args:
        query: float ``(B, K, J, D)``.
        key, value: float ``(B, L, D)``.
        allowed: bool ``(B, J, L)``.
    """
    scores = torch.einsum("bkjd,bld->bkjl", query, key) / math.sqrt(query.shape[-1])
    allowed = allowed[:, None]
    # a row of −inf alone would be NaN
    nothing = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~allowed, float("-inf")).masked_fill(nothing, 0.0).softmax(-1)
    return torch.einsum("bkjl,bld->bkjd", weights.masked_fill(~allowed, 0.0), value)


class BothWays(nn.Module):
    """A GRU in each direction over the real sentences, which come first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.onward = nn.GRU(width, width // 2, batch_first=True)
        self.back = nn.GRU(width, width // 2, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """``x (B, J, D)``, ``lengths`` int64 ``(B,)`` to ``(B, J, D)``; what comes after the length is arbitrary."""
        places = torch.arange(x.shape[1], device=x.device)
        turned = (lengths[:, None] - 1 - places).clamp(min=0)[:, :, None]
        onward, _ = self.onward(x)
        back, _ = self.back(x.gather(1, turned.expand_as(x)))
        return torch.cat([onward, back.gather(1, turned.expand_as(back))], -1)


class Watch(nn.Module):
    """Sentences attend to the frames of their time."""

    def __init__(self, video_width: int, width: int) -> None:
        super().__init__()
        self.frame = nn.Sequential(nn.LayerNorm(video_width), nn.Linear(video_width, width))
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, read: Tensor, frames: Tensor, allowed: Tensor) -> Tensor:
        """``(B, K, J, width)`` to the same."""
        return locally_aligned_attention(self.query(read), self.key(frames), frames, allowed)


class LocalReader(nn.Module):
    """h of each candidate, its score, and how well frames match it. All candidates, masked or not, share it."""

    def __init__(self, text_width: int, video_width: int | None, width: int) -> None:
        super().__init__()
        self.asked, self.said = (
            nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width)) for _ in range(2)
        )
        self.pair = nn.Linear(3 * width, width)
        self.watch = None if video_width is None else Watch(video_width, width)
        self.fuse = nn.Linear(width if video_width is None else 3 * width, width)
        self.norm = nn.LayerNorm(width)
        self.rnn = BothWays(width)
        self.score = nn.Linear(width, 1)

    def forward(
        self, asked: Tensor, said: Tensor, real: Tensor, frames: Tensor | None = None, allowed: Tensor | None = None
    ) -> Tensor:
        """h, float ``(B, K, width)``; zeros for a row without sentences.

        Args:
            asked: float ``(B, K, D_text)``, question and answer.
            said: float ``(B, J, D_text)``, sentences.
            real: bool ``(B, J)``: sentences that are there, the first ones.
            frames: what ``watch.frame`` gives; None: there is no video.
            allowed: bool ``(B, J, L)``: which frames a sentence attends to.
        """
        K, J = asked.shape[1], said.shape[1]  # noqa: N806
        a = self.asked(asked)[:, :, None].expand(-1, -1, J, -1)
        s = self.said(said)[:, None].expand(-1, K, -1, -1)
        parts = self.pair(torch.cat([a, s, a * s], -1))
        if self.watch is not None:
            assert frames is not None and allowed is not None
            seen = self.watch(F.gelu(parts), frames, allowed)
            parts = torch.cat([parts, seen, a * seen], -1)
        each = F.gelu(self.norm(self.fuse(parts)))
        lengths = real.sum(1).repeat_interleave(K)
        states = (each + self.rnn(each.flatten(0, 1), lengths).view_as(each)).masked_fill(
            ~real[:, None, :, None], float("-inf")
        )
        nothing = ~real.any(1)[:, None, None, None]
        highest: Tensor = states.masked_fill(nothing, 0.0).amax(2)
        return highest

    def scores(self, candidates: Tensor) -> Tensor:
        """``(B, K, width)`` to ``(B, K)``."""
        out: Tensor = self.score(candidates)[..., 0]
        return out


class FrameMatch(nn.Module):
    """Logits of frames lying inside the span of an answer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.candidate, self.frame = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, candidate: Tensor, frames: Tensor) -> Tensor:
        """``(B, width)`` and ``(B, L, width)`` to ``(B, L)``."""
        matched: Tensor = (self.frame(frames) @ self.candidate(candidate)[:, :, None])[:, :, 0]
        return matched / math.sqrt(candidate.shape[-1])
