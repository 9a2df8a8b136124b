"""Sums over all negatives, tile by tile: the N × N logits never exist, and one block serves both directions.

A contrastive loss is a function of few positives and of one sum over the negatives of each row; the sums are here, the
losses in ``contrastive``. Ranks hold own rows × all columns, so the sums of rows are whole; those of columns are
partial and joined. Upstream gradients are those of :meth:`Comm.share`: ``world_size`` × own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.distributed.candidates import Candidates, gather_columns_of
from mmcl.distributed.comm import reduce_scatter, reduce_scatter_together


class Unit(torch.autograd.Function):
    """Rows of length 1; those that are not ``present``, and zero rows, are 0 with zero gradients.

    One tensor forward and two backward, where ``F.normalize`` after a mask makes six.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, present: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1)
        nothing = (~present | (norm < 1e-12))[..., None]
        norm = norm[..., None].masked_fill(nothing, torch.inf)
        unit: Tensor = (x / norm).masked_fill_(nothing, 0.0)
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        unit, norm = ctx.saved_tensors
        along = (gradient * unit).sum(-1, keepdim=True)
        return torch.addcmul(gradient, unit, along, value=-1).div_(norm), None


class LogSums(torch.autograd.Function):
    """log Σ exp of the negatives of own rows of ``a`` and of own rows of ``b``; −inf where there is none.

    Takes an anchor, blocks, whether some rank wants a gradient for each ``b``, and ``a``, ``b``, ``scale`` of each
    block in turn; gives the sums of ``a`` and of ``b`` of each in turn. Several blocks make the exchanges of one.

    Forward keeps only the sums, backward makes each tile again: four matrix products, where a block for each direction
    takes six. ``b`` None: ``a`` meets itself, and only its rows' sums are of use; the block is its own transpose, so
    their sums over all ranks are those of the columns.

    ``anchor`` wants a gradient where some rank wants one: ranks meet in backward as well, and one whose own inputs are
    constants has to come too.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, blocks: Sequence[Candidates], b_wants: Sequence[bool], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        sides = _by_block(tensors)
        everyone = gather_columns_of(blocks, [a if b is None else b for a, b, _ in sides])
        row_sums, partial = [], []
        for block, (a, b, scale), columns in zip(blocks, sides, everyone, strict=True):
            rows = block.pick_rows(a)
            of_rows, of_columns = (a.new_full((len(x),), -torch.inf) for x in (rows, columns))
            for i, j in block.tiles():
                logits = block.logits(rows, columns, scale, i, j)
                of_rows[i] = torch.logaddexp(of_rows[i], block.for_rows(logits, i).logsumexp(1))
                if b is not None:
                    of_columns[j] = torch.logaddexp(of_columns[j], block.for_columns(logits, j).logsumexp(0))
            row_sums.append(of_rows)
            partial.append(of_columns if b is not None else block.put_back(of_rows, block.rows, len(a), -torch.inf))
        comm = blocks[0].comm
        column_sums = [
            block.pick_columns(x) if b is None else _joined(x.view(comm.world_size, len(x) // comm.world_size))
            for block, (_, b, _), x in zip(blocks, sides, comm.gather_together(partial), strict=True)
        ]
        ctx.save_for_backward(*(x for a, _, scale in sides for x in (a, scale)), *everyone, *row_sums, *column_sums)
        ctx.blocks, ctx.b_wants = blocks, b_wants
        ctx.sizes_b = [None if b is None else len(b) for _, b, _ in sides]
        found = []
        for block, (a, b, _), of_rows, of_columns in zip(blocks, sides, row_sums, column_sums, strict=True):
            found.append(block.put_back(of_rows, block.rows, len(a), -torch.inf))
            found.append(block.own_part(of_columns, len(a if b is None else b), -torch.inf))
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        blocks: Sequence[Candidates] = ctx.blocks
        count = len(blocks)
        saved = ctx.saved_tensors
        sides, (everyone, row_sums, column_sums) = saved[: 2 * count], _split(saved[2 * count :], 3)
        itself = [size is None for size in ctx.sizes_b]
        weights = gather_columns_of(blocks, [gradients[2 * k + (not itself[k])] for k in range(count)])
        found: list[Tensor | None] = []
        d_everyone: dict[int, Tensor] = {}
        with torch.autocast(sides[0].device.type, enabled=False):
            for k, block in enumerate(blocks):
                a, scale = sides[2 * k : 2 * k + 2]
                rows, columns = block.pick_rows(a), everyone[k]
                d_rows = torch.zeros_like(rows)
                d_columns = torch.zeros_like(columns) if ctx.b_wants[k] and not itself[k] else None
                row_weights = block.pick_rows(gradients[2 * k])[:, None]
                # +inf: the softmax over nothing is 0 everywhere
                sums = [x.masked_fill(x.isneginf(), torch.inf) for x in (row_sums[k], column_sums[k])]
                for i, j in block.tiles():
                    logits = block.logits(rows, columns, scale, i, j)
                    softmax = (block.for_rows(logits, i) - sums[0][i, None]).exp_().mul_(row_weights[i])
                    softmax.addcmul_(block.for_columns(logits, j).sub_(sums[1][j]).exp_(), weights[k][j])
                    _add_products(softmax, rows, columns, d_rows, d_columns, i, j)
                d_a = block.put_back(d_rows, block.rows, len(a))
                # until it is scaled, Σ a·d_a is the gradient by scale; a block with itself holds each pair twice
                d_scale = (d_a * a).sum() / (2 if itself[k] else 1)
                found += [d_a.mul_(scale), None, d_scale]
                if d_columns is not None:
                    d_everyone[k] = _of_all_ranks(d_columns, block, ctx.sizes_b[k])
            own = reduce_scatter_together(list(d_everyone.values()), blocks[0].comm)
            for k, d_b in zip(d_everyone, own, strict=True):
                found[3 * k + 1] = d_b.mul_(sides[2 * k + 1])
            return None, None, None, *found


def _by_block(tensors: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True))


def _split(xs: Sequence[Tensor], parts: int) -> list[Sequence[Tensor]]:
    size = len(xs) // parts
    return [xs[k * size : (k + 1) * size] for k in range(parts)]


class WeightedTotal(torch.autograd.Function):
    """Σ over own rows × all columns of ``(u_i + v_j) · f(logit + bias)`` over the negatives, f the softplus or nothing.

    ``u`` counts a negative for its row and ``v`` for its column, each only above the floor of that direction; None for
    both: every negative counts 1. What gradients weigh is known at once, so forward makes them with the tiles: three
    matrix products. Their upstream gradient must be equal on all ranks, as it is for one loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        weights: tuple[Tensor, Tensor] | None,
        block: Candidates,
        b_wants_gradient: bool | None,
    ) -> Tensor:
        rows, columns = block.pick_rows(a), block.gather_columns(b)
        if weights is not None:
            weights = block.pick_rows(weights[0])[:, None], block.gather_columns(weights[1])
        wanted = b_wants_gradient is not None
        d_rows = torch.zeros_like(rows)
        d_columns = torch.zeros_like(columns) if b_wants_gradient else None
        total, d_bias = a.new_zeros(()), a.new_zeros(())
        for i, j in block.tiles():
            logits = block.logits(rows, columns, scale, i, j)
            weight = None if weights is None else _tile_weight(logits, weights, block, i, j)
            if bias is None:
                values, slope = logits.masked_fill(logits.isneginf(), 0.0), torch.ones_like(logits)
                total += values.sum() if weight is None else values.mul_(weight).sum()
            else:
                logits += bias
                for number, part in enumerate(torch.split(logits, CHUNK)):  # small enough to stay in the cache
                    values = _softplus(part)
                    total += (values if weight is None else values.mul_(weight[number * CHUNK :][:CHUNK])).sum()
                slope = logits.sigmoid_()
            if wanted:
                slope = slope if weight is None else slope.mul_(weight)
                d_bias += slope.sum()
                _add_products(slope, rows, columns, d_rows, d_columns, i, j)
        del columns  # the ranks' sum below takes as much memory as the columns did
        if wanted:
            d_a = block.put_back(d_rows, block.rows, len(a))
            d_scale = (d_a * a).sum()
            d_b = None
            if d_columns is not None:
                d_b = reduce_scatter(_of_all_ranks(d_columns, block, len(b)), block.comm).mul_(scale)
            ctx.gradients = (d_a.mul_(scale), d_b, d_scale, None if bias is None else d_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else gradient * x for x in ctx.gradients), None, None, None


CHUNK = 64
"""rows of a tile at a time"""


def _softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ) to the last bits, 0 at −∞, in a third of the time that ``log1p`` takes on CPUs."""
    small = x.abs().neg_().exp_()
    above_one = small + 1
    logs = above_one.log().mul_(small)
    above_one -= 1  # what of ``small`` the sum kept; log(1 + y) ≈ y · log(u)/(u − 1) with u the rounded 1 + y
    return torch.where(above_one == 0, small, logs.div_(above_one)).add_(x.clamp_min(0))


def _tile_weight(logits: Tensor, weights: tuple[Tensor, Tensor], block: Candidates, i: slice, j: slice) -> Tensor:
    """u_i + v_j where the logit counts in that direction."""
    seen = ~block.for_rows(logits, i).isneginf(), ~block.for_columns(logits, j).isneginf()
    return weights[0][i] * seen[0] + weights[1][j] * seen[1]


def _add_products(
    slope: Tensor, rows: Tensor, columns: Tensor, d_rows: Tensor, d_columns: Tensor | None, i: slice, j: slice
) -> None:
    d_rows[i].addmm_(slope, columns[j])
    if d_columns is not None:
        d_columns[j].addmm_(slope.T, rows[i])


def _of_all_ranks(d_columns: Tensor, block: Candidates, size: int) -> Tensor:
    """Gradients of the candidates among all rows of ``b``; a rank's own are the sum over ranks."""
    return block.put_back(d_columns, block.columns, size * block.comm.world_size)


def _joined(partial: Tensor) -> Tensor:
    """log Σ exp over ranks ``(world_size, N)``, elementwise."""
    top = partial.amax(0)
    top = top.masked_fill(top.isneginf(), 0.0)
    return top + (partial - top).exp().sum(0).log()


@torch.no_grad()
def count_negatives(block: Candidates, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """How many negatives own rows of ``a`` and of ``b`` have on all ranks, above the floors."""
    rows, columns = block.pick_rows(a), block.gather_columns(b)
    of_rows, of_columns = (torch.zeros(len(x), dtype=torch.int64, device=a.device) for x in (rows, columns))
    for i, j in block.tiles():
        logits = block.logits(rows, columns, scale, i, j)
        of_rows[i] += (~block.for_rows(logits, i).isneginf()).sum(1)
        of_columns[j] += (~block.for_columns(logits, j).isneginf()).sum(0)
    of_columns = block.comm.sum(of_columns)
    return block.put_back(of_rows, block.rows, len(a)), block.own_part(of_columns, len(b), 0)


DIGIT = 256
"""values of one digit of a float32 key: four digits, so four passes"""


@torch.no_grad()
def with_hardest(block: Candidates, a: Tensor, b: Tensor | None, scale: Tensor, share: float) -> Candidates:
    """The block with floors that leave each row and column ⌈share · M⌉ of its M negatives on all ranks, the largest.

    Exact over ranks and tiles without keeping a row: the digits of the floor, as a sortable integer, are found one
    after the other from histograms (radix selection). Ties at the floor, up to rounding, all count. ``b`` None: ``a``
    meets itself.
    """
    rows, columns = block.pick_rows(a), block.gather_columns(a if b is None else b)
    prefixes = [torch.zeros(len(x), dtype=torch.int64, device=a.device) for x in (rows, columns)]
    left: list[Tensor] = []
    for shift in (24, 16, 8, 0):
        counts = [torch.zeros(len(x), DIGIT + 1, dtype=torch.int64, device=a.device) for x in (rows, columns)]
        for i, j in block.tiles():
            logits = block.logits(rows, columns, scale, i, j)
            keys = _sortable(logits.float())
            for axis, (part, prefix, count) in enumerate(zip((i, j), prefixes, counts, strict=True)):
                if axis == 1 and b is None:
                    continue
                known = prefix[part, None] if axis == 0 else prefix[part]
                counted = ((keys >> (shift + 8)) == known) & ~logits.isneginf()
                digit = torch.where(counted, (keys >> shift) & (DIGIT - 1), DIGIT)  # the last is not looked at
                digit = digit if axis == 0 else digit.T
                count[part].scatter_add_(1, digit, torch.ones_like(digit))
        if b is not None:
            counts[1] = block.comm.sum(counts[1])
        found = [count[:, :DIGIT] for count in counts]
        if not left:
            left = [(share * x.sum(1) - 1e-9).ceil().clamp_min(1).long() for x in found]
        for number, count in enumerate(found):
            from_above = count.flip(1).cumsum(1).flip(1)  # negatives of this digit or a higher one
            digit = (from_above >= left[number][:, None]).sum(1).sub(1).clamp_min(0)
            left[number] -= F.pad(from_above, (0, 1)).gather(1, digit[:, None] + 1)[:, 0]
            prefixes[number] = prefixes[number] * DIGIT + digit
    # the same cosine can come out of another tile with another rounding
    floors = [_from_sortable(prefix) - 1e-6 * float(scale) for prefix in prefixes]
    if b is None:
        floors[1] = block.gather_columns(block.put_back(floors[0], block.rows, len(a)))
    return block.with_floors(*floors)


def _sortable(x: Tensor) -> Tensor:
    """float32 to int64 in [0, 2³²) of the same order."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() + 2**31


def _from_sortable(keys: Tensor) -> Tensor:
    bits = (keys - 2**31).to(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
