"""Decoders: each token of a row from those before it, and the likelihood that they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcl.distributed import Comm
from mmcl.layers import CausalBlock, sinusoids
from mmcl.objectives.generative.options import DecoderOptions
from mmcl.objectives.generative.targets import Targets
from mmcl.objectives.transformers import in_chunks
from mmcl.types import TextSpec, TowerInfo, ViewBatch


class Decoder(nn.Module):
    """A causal transformer whose place t holds what is known of the tokens before t, behind a learned start.

    Args:
        outputs: numbers to say of each token; those of ids are logits, one for each id.
        memory: width of the vectors that every place sees; None: there are none.
        vectors: width of the vectors that stand for the tokens before: tokens that are vectors themselves, or a causal
            tower's; None: tokens are ids, which are embedded.
    """

    def __init__(
        self, outputs: int, options: DecoderOptions, *, memory: int | None = None, vectors: int | None = None
    ) -> None:
        super().__init__()
        width = options.width
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.before = nn.Embedding(outputs, width) if vectors is None else nn.Linear(vectors, width)
        self.memory = None if memory is None else nn.Linear(memory, width)
        self.layers = nn.ModuleList(
            CausalBlock(width, options.heads, options.hidden, options.dropout, memory=memory is not None)
            for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        # all tokens are equally likely at first: log V nats each; all numbers the same Gaussian
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def hidden(self, before: Tensor, real: Tensor, memory: Tensor | None = None) -> Tensor:
        """States before the last linear map, ``(b, L, width)``; place t sees nothing of place t or later.

        ``before``: ids int64 ``(b, L)``, or vectors ``(b, L, D)``; ``real`` bool ``(b, L)``; ``memory``
        ``(b, M, D)``.
        """
        earlier = before[:, :-1]
        earlier = self.before(earlier if isinstance(self.before, nn.Embedding) else earlier.to(self.start.dtype))
        x = torch.cat([self.start.to(earlier.dtype).expand(len(earlier), 1, -1), earlier], 1)
        x = x + sinusoids(x.shape[1], x.shape[2], x)
        seen = F.pad(real[:, :-1], (1, 0), value=True)
        held = None if self.memory is None or memory is None else self.memory(memory.to(self.start.dtype))
        for layer in self.layers:
            x = layer(x, held, seen)
        out: Tensor = self.norm(x)
        return out

    def logits(self, before: Tensor, real: Tensor, memory: Tensor | None = None) -> Tensor:
        """``(b, L, outputs)``, float32 or float64; arguments as of :meth:`hidden`."""
        logits: Tensor = self.head(self.hidden(before, real, memory))
        return logits if logits.dtype == torch.float64 else logits.float()


class Bottleneck(nn.Module):
    """A few learned queries that attend to a tower's tokens: all that a decoder gets to see of them."""

    def __init__(self, tower: int, width: int, heads: int, latents: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(latents, width))
        self.tokens = nn.Sequential(nn.Linear(tower, width), nn.LayerNorm(width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """``(b, L, D)`` to ``(b, latents, width)``; ``real`` bool ``(b, L)``, of the tower's tokens."""
        keys = self.tokens(tokens.to(self.queries.dtype))
        hidden = ~real & real.any(1, keepdim=True)  # attention over no token at all would be NaN
        queries = self.queries.to(keys.dtype).expand(len(keys), -1, -1)
        out: Tensor = self.norm(self.attention(queries, keys, keys, key_padding_mask=hidden, need_weights=False)[0])
        return out


@dataclass(frozen=True, eq=False)
class Likelihood:
    """What a decoder thinks of the rows of this rank."""

    targets: Targets
    nats: Tensor
    """``(B,)``: −log p of all tokens of a row; 0 for rows that do not take part"""
    tokens: Tensor
    """int64 ``(B,)``"""

    @property
    def per_token(self) -> Tensor:
        return self.nats / self.tokens.clamp_min(1)

    def bits_per_dim(self, comm: Comm) -> Tensor:
        """Bits for each number of the data that the tokens of all ranks stand for, 0-d; 0 where no token is.

        Of a density: bits that it takes to write a number down to its step, at the most; see :class:`PatchValues`.
        """
        nats, tokens = comm.sum(self.nats.detach().sum()), comm.sum(self.tokens.sum())
        bits = nats / tokens.clamp_min(1) / (math.log(2) * self.targets.dims)
        return torch.where(tokens > 0, bits - math.log2(self.targets.step), bits)


def likelihood(
    targets: Targets, decode: Callable[..., Tensor], view: ViewBatch, present: Tensor, chunk: int, *seen: Tensor
) -> Likelihood:
    """Of the tokens of a view, in the rows that are ``present (B,)``.

    Args:
        decode: takes the tokens, which of them are real, and ``seen``, of the rows of a chunk; gives what it says of
            each token, ``(b, L, outputs)``.
        chunk: rows at once.
    """
    tokens, real = targets(view)
    real = real & present[:, None]

    def nats(tokens: Tensor, real: Tensor, *parts: Tensor) -> Tensor:
        each = targets.nats(decode(tokens, real, *parts), tokens)
        return each.masked_fill(~real, 0).sum(1)

    return Likelihood(targets, over_rows(nats, present, chunk, tokens, real, *seen), real.sum(1))


def over_rows(run: Callable[..., Tensor], present: Tensor, chunk: int, *parts: Tensor) -> Tensor:
    """``run`` on the rows of ``parts (B, …)`` that are present, at most ``chunk`` at once; the others get zeros.

    A rank without any runs a row of zeros, joined with weight 0, so that every rank uses every parameter.
    """
    rows = present.nonzero()[:, 0]
    some = [torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in parts] if len(rows) == 0 else list(parts)
    numbers = rows.new_full((1,), len(present)) if len(rows) == 0 else rows
    found = in_chunks(lambda picked: run(*(x[picked] for x in some)), numbers, chunk)
    out = found.new_zeros(len(present), *found.shape[1:])
    if len(rows) == 0:
        return out + 0.0 * (found.sum() + sum(x.sum() for x in parts if x.is_floating_point()))
    return out.index_copy(0, rows, found)


def token_mask(tower: TowerInfo, mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Which of a tower's tokens ``(B, L, D)`` are real: a text's as its tokenizer says, all of picture and sound."""
    if mask is None or not isinstance(tower.spec, TextSpec):
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return mask
