"""Scores of all queries against a whole gallery, a tile at a time: what both directions need comes from one product.

A tile of scores is compared with four thresholds per entry (the score of the right answer and the tenth best so far, of
its row and of its column) and forgotten. Comparisons give bytes; eight lie in one 64-bit word, so up to 255 rows are
counted by adding words, and entries for a top list are found by looking for words that are not zero.

The grid of tiles depends on the sizes alone, and every process of a group takes whole rows of it: each score is the
same number on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcl.distributed import Comm
from mmcl.evaluation.distinct import first_best

Transform: TypeAlias = Callable[[Tensor, int, int], None]

TILE_ROWS, TILE_COLUMNS = 960, 1920
"""columns: at most 8 × 255, a count of a row's words stays within a byte"""
_STRIP = 240
"""rows that are compared at once: at most 255, and what they take stays in a processor's cache"""
_SORT_ABOVE = 8
"""with more right answers per row than this, sorting a row costs less than comparing it with each of them"""
_KEPT_TILES = 32
"""tiles that hold a right answer are kept where there are no more, 236 MB, else made a second time"""
_SEED = 192
"""groups of entries whose largest give the first threshold of a top list"""


@dataclass(frozen=True, eq=False)
class Standing:
    """One direction: where the right answers stand, and the best ones."""

    better: Tensor
    """int64 ``(P,)``: entries of the pair's row (or column) above its score"""
    tied: Tensor
    """int64 ``(P,)``: entries with exactly its score, itself included"""
    top_indices: Tensor
    """int64 ``(n, K)``: by falling score, equal scores by rising number"""
    top_scores: Tensor


@dataclass(frozen=True, eq=False)
class Streamed:
    """What one pass over all scores leaves."""

    scores: Tensor
    """``(P,)``: of the pairs, as they came out of the tiles"""
    rows: Standing
    columns: Standing | None


def stream(
    queries: Tensor,
    gallery: Tensor,
    pairs: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    *,
    top: int,
    both: bool,
    comm: Comm,
    transform: Transform | None = None,
) -> Streamed:
    """Counts and top lists of ``queries (n, D)`` against ``gallery (m, D)``; with ``both`` also of the columns.

    Tiles that hold a pair come first, for the scores of the pairs, which are the thresholds; many are made again later.

    Args:
        pairs: int64 ``(P,)`` each, no pair twice: the row and the column of every right answer.
        weights: int64 ``(n,)`` and ``(m,)``: how often a row counts where it is the answer.
        comm: all its processes call this with the same arguments; each does its share, all return everything.
        transform: changes a tile in place before it is used; told its first row and column.
    """
    grid = _Grid(queries, gallery, comm, transform)
    scores = _pair_scores(grid, pairs)
    rows = _Sides(pairs[0], scores, len(queries), TILE_ROWS, min(top, len(gallery)))
    columns = _Sides(pairs[1], scores, len(gallery), TILE_COLUMNS, min(top, len(queries))) if both else None
    heavy_rows, heavy_columns = (_Heavy(each) for each in weights)
    for i in grid.stripes:
        row = rows.block(i)
        for j in range(grid.columns):
            tile = grid.tile(i, j)
            column = columns.block(j) if columns else None
            _filter(tile, row, column, (i * TILE_ROWS, j * TILE_COLUMNS))
            row.count(tile, heavy_columns.within(j * TILE_COLUMNS, TILE_COLUMNS), by_row=True)
            if column is not None:
                column.count(tile, heavy_rows.within(i * TILE_ROWS, TILE_ROWS), by_row=False)
        rows.finish(i)
    for j in range(grid.columns) if columns else ():
        assert columns is not None
        columns.block(j)
        columns.finish(j)
    return Streamed(scores, rows.standing(comm, shared=False), columns.standing(comm, shared=True) if columns else None)


def column_logsumexp(queries: Tensor, gallery: Tensor, weights: Tensor, beta: float) -> Tensor:
    """float64 ``(m,)``: of each gallery row log Σ over queries, counted by weights ``(n,)``, of exp(β · score)."""
    grid = _Grid(queries, gallery, Comm())
    total = torch.full((len(gallery),), -torch.inf, dtype=torch.float64, device=gallery.device)
    for i in grid.stripes:
        more = weights[i * TILE_ROWS : (i + 1) * TILE_ROWS, None].to(queries.dtype).log()
        for j in range(grid.columns):
            part = total[j * TILE_COLUMNS : (j + 1) * TILE_COLUMNS]
            logits = grid.tile(i, j)[:, : len(part)].mul_(beta).add_(more)
            part.copy_(torch.logaddexp(part, logits.logsumexp(0).double()))
    return total


class _Grid:
    """The tiles of the scores, each made in the same memory by the same product."""

    def __init__(self, queries: Tensor, gallery: Tensor, comm: Comm, transform: Transform | None = None) -> None:
        self.queries, self.gallery, self.comm, self.transform = queries, gallery, comm, transform
        self.columns = -(-len(gallery) // TILE_COLUMNS)
        self.stripes = range(comm.rank, -(-len(queries) // TILE_ROWS), comm.world_size)
        self._last = gallery[(self.columns - 1) * TILE_COLUMNS :]
        self._unused = -len(self._last) % 8
        self._last = F.pad(self._last, (0, 0, 0, self._unused)) if self._unused else self._last
        size = min(TILE_ROWS, len(queries)) * min(TILE_COLUMNS, len(gallery) + self._unused)
        self._memory = queries.new_empty(size)
        self._kept: dict[tuple[int, int], Tensor] = {}

    def tile(self, i: int, j: int, *, keep: bool = False) -> Tensor:
        """``(rows, columns)``, columns a multiple of 8: those too many score −∞. ``keep``: for the next call."""
        if (i, j) in self._kept:
            return self._kept.pop((i, j))
        left = self.queries[i * TILE_ROWS : (i + 1) * TILE_ROWS]
        last = j == self.columns - 1
        right = self._last if last else self.gallery[j * TILE_COLUMNS : (j + 1) * TILE_COLUMNS]
        out = self._memory[: len(left) * len(right)].view(len(left), len(right))
        torch.mm(left, right.T, out=out)
        if self.transform is not None:
            self.transform(out[:, : out.shape[1] - last * self._unused], i * TILE_ROWS, j * TILE_COLUMNS)
        if last and self._unused:
            out[:, -self._unused :] = -torch.inf
        if keep:
            self._kept[i, j] = out.clone()
        return out


def _pair_scores(grid: _Grid, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The score of each pair, taken from its tile; every process learns all."""
    rows, columns = pairs
    scores = grid.queries.new_zeros(len(rows))
    number = rows // TILE_ROWS * grid.columns + columns // TILE_COLUMNS
    number, order = number.sort()
    tiles, counts = torch.unique_consecutive(number, return_counts=True)
    for tile, ids in zip(tiles.tolist(), torch.split(order, counts.tolist()), strict=True):
        i, j = divmod(tile, grid.columns)
        if i in grid.stripes:
            scores[ids] = grid.tile(i, j, keep=len(counts) <= _KEPT_TILES)[
                rows[ids] - i * TILE_ROWS, columns[ids] - j * TILE_COLUMNS
            ]
    return shared_sum(scores, grid.comm)


def shared_sum(x: Tensor, comm: Comm) -> Tensor:
    """Sum over processes, of which one alone holds something for each entry."""
    if comm.world_size == 1:
        return x
    return comm.sum(x.to(comm.host_device)).to(x.device)


class _Heavy:
    """Rows of a side that count more than once."""

    def __init__(self, weights: Tensor) -> None:
        self._where = (weights > 1).nonzero().flatten()
        self._extra = weights[self._where] - 1

    def within(self, start: int, size: int) -> tuple[Tensor, Tensor] | None:
        """Places in a tile and how often they count besides once; None where all count once."""
        if not len(self._where):
            return None
        first, last = torch.searchsorted(self._where, self._where.new_tensor([start, start + size])).tolist()
        return (self._where[first:last] - start, self._extra[first:last]) if last > first else None


class _Sides:
    """One direction, by blocks of its rows: made when they are first needed."""

    def __init__(self, owners: Tensor, scores: Tensor, size: int, block: int, top: int) -> None:
        self._owners, self._scores, self._size, self._width, self._top = owners, scores, size, block, top
        self._order = owners.argsort(stable=True)
        edges = torch.arange(0, size + block, block, device=owners.device)
        self._starts = torch.searchsorted(owners[self._order], edges).tolist()
        self._blocks: dict[int, _Side] = {}
        self.better, self.tied = torch.zeros_like(owners), torch.zeros_like(owners)
        self.top_indices = owners.new_zeros(size, top)
        self.top_scores = scores.new_zeros(size, top)

    def block(self, number: int) -> _Side:
        if number not in self._blocks:
            start = number * self._width
            ids = self._order[self._starts[number] : self._starts[number + 1]]
            rows = min(self._width, self._size - start)
            self._blocks[number] = _Side(self._owners[ids] - start, self._scores[ids], rows, self._top)
        return self._blocks[number]

    def finish(self, number: int) -> None:
        """Keeps the outcome of a block and lets go of the rest."""
        side = self._blocks.pop(number)
        ids = self._order[self._starts[number] : self._starts[number + 1]]
        self.better[ids], self.tied[ids] = (each[side.local, side.slot] for each in (side.better, side.tied))
        where = slice(number * self._width, number * self._width + side.rows)
        self.top_indices[where], self.top_scores[where] = side.best.merged()

    def standing(self, comm: Comm, *, shared: bool) -> Standing:
        """What all processes found; ``shared``: each has seen a part of every row."""
        better, tied = shared_sum(self.better, comm), shared_sum(self.tied, comm)
        if not shared:
            return Standing(better, tied, shared_sum(self.top_indices, comm), shared_sum(self.top_scores, comm))
        if comm.world_size == 1:
            return Standing(better, tied, self.top_indices, self.top_scores)
        device = comm.host_device
        indices, scores = (
            comm.gather_by_rank(x.to(device)).view(comm.world_size, self._size, -1).transpose(0, 1).flatten(1).to(x)
            for x in (self.top_indices, self.top_scores)
        )
        indices, scores = first_best(indices, scores, self._top)
        return Standing(better, tied, indices, scores)


class _Side:
    """A block of rows (or columns): thresholds, counts so far, best so far."""

    def __init__(self, local: Tensor, scores: Tensor, rows: int, top: int) -> None:
        self.rows, self.local = rows, local
        counts = torch.bincount(local, minlength=rows)
        self.slot = torch.arange(len(local), device=local.device) - (counts.cumsum(0) - counts)[local]
        padded = -(-rows // 8) * 8
        # +∞ where there is no pair: nothing is above it, nothing equals it
        self.own = scores.new_full((padded, max(1, int(counts.max()))), torch.inf)
        self.own[local, self.slot] = scores
        self.better = torch.zeros(self.own.shape, dtype=torch.int64, device=local.device)
        self.tied = torch.zeros_like(self.better)
        self.best = _Best(rows, top, scores)

    def count(self, tile: Tensor, heavy: tuple[Tensor, Tensor] | None, *, by_row: bool) -> None:
        """Adds how many entries of each row (column) of the tile lie above the scores of its pairs, or equal them."""
        size = len(tile) if by_row else tile.shape[1]
        own = self.own[:size]
        if own.shape[1] > _SORT_ABOVE:
            counts = _count_sorted(tile if by_row else tile.T, own, None)
        else:
            slots = [_count_packed(tile, own[:, slot], by_row) for slot in range(own.shape[1])]
            counts = (torch.stack([better for better, _ in slots], 1), torch.stack([tied for _, tied in slots], 1))
        self.better[:size] += counts[0]
        self.tied[:size] += counts[1]
        if heavy is not None:
            entries = tile[:, heavy[0]] if by_row else tile[heavy[0]].T
            better, tied = _count_sorted(entries, own, heavy[1])
            self.better[:size] += better
            self.tied[:size] += tied


def _count_packed(tile: Tensor, own: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """``(rows,)`` or ``(columns,)`` each: entries above and equal to one threshold."""
    width = tile.shape[1]
    above, upto = (torch.zeros(len(own), dtype=torch.int64, device=tile.device) for _ in range(2))
    for start, strip in _strips(tile):
        limit = own[start : start + len(strip), None] if by_row else own
        rows = slice(start, start + len(strip))
        for total, equal in ((above, False), (upto, True)):
            words = _words_above(strip, limit, equal=equal)
            if by_row:
                total[rows] = words.sum(1).view(torch.uint8).view(len(strip), 8).sum(1)
            else:
                total += words.sum(0).view(torch.uint8)[:width]
    return above, upto - above


def _words_above(strip: Tensor, limit: Tensor, *, equal: bool = False) -> Tensor:
    """int64 ``(b, columns / 8)``: a byte per entry, 1 where it is above the limit, or equal to it."""
    if strip.device.type == "cpu":  # numpy compares in half the time
        compare = np.greater_equal if equal else np.greater
        return torch.from_numpy(compare(strip.numpy(), limit.numpy()).view(np.int64))
    return (strip >= limit if equal else strip > limit).view(torch.int64)


def _strips(tile: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(tile), _STRIP):
        yield start, tile[start : start + _STRIP]


def _count_sorted(entries: Tensor, own: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(b, R)`` each: entries ``(b, e)`` above and equal to the thresholds ``(b, R)``, counted by weights ``(e,)``."""
    ordered, places = entries.contiguous().sort(dim=1)
    own = own.contiguous()
    below, upto = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
    if weights is None:
        better, tied = entries.shape[1] - upto, upto - below
    else:
        sums = F.pad(weights[places].cumsum(1), (1, 0))
        better, tied = sums[:, -1:] - sums.gather(1, upto), sums.gather(1, upto) - sums.gather(1, below)
    return better, tied


class _Best:
    """The best entries of some rows, of entries that come with rising numbers."""

    def __init__(self, rows: int, top: int, like: Tensor) -> None:
        self.top = top
        self._scores = like.new_full((rows, top), -torch.inf)
        self._indices = torch.full((rows, top), -1, dtype=torch.int64, device=like.device)
        # of a multiple of 8 rows: +∞ for those too many, which nothing passes
        self.limit = like.new_full((-(-rows // 8) * 8,), torch.inf)
        self.limit[:rows] = -torch.inf
        self.seeded = False
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count = 0

    def seed(self, entries: Tensor) -> None:
        """The first limit: whatever equals the last of the best, of the largest of each group, still passes."""
        rows, groups = len(self._scores), min(_SEED, entries.shape[1])
        if not self.seeded and groups >= self.top:
            whole = entries[:rows, : entries.shape[1] // groups * groups]
            largest = torch.unflatten(whole, 1, (-1, groups)).amax(1)
            last = largest.topk(self.top, dim=1).values[:, -1]
            self.limit[:rows] = torch.nextafter(last, torch.full_like(last, -torch.inf))
        self.seeded = True

    def add(self, rows: Tensor, numbers: Tensor, scores: Tensor) -> None:
        """Entries above the limit; merged when as many wait as are kept."""
        self._waiting.append((rows, numbers, scores))
        self._count += len(rows)
        if self._count >= self._scores.numel():
            self._merge()

    def merged(self) -> tuple[Tensor, Tensor]:
        if self._count:
            self._merge()
        return self._indices, self._scores

    def _merge(self) -> None:
        rows, numbers, scores = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._count = [], 0
        order = _stable_order(rows)
        rows = rows[order]
        counts = torch.bincount(rows, minlength=len(self._scores))
        touched = counts.nonzero().flatten()
        line = ((counts > 0).cumsum(0) - 1)[rows]
        place = self.top + torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        width = self.top + int(counts.max())
        all_scores = scores.new_full((len(touched), width), -torch.inf)
        all_numbers = numbers.new_full((len(touched), width), -1)
        all_scores[:, : self.top], all_numbers[:, : self.top] = self._scores[touched], self._indices[touched]
        all_scores[line, place], all_numbers[line, place] = scores[order], numbers[order]
        # what came first comes first among equal scores
        all_scores, best = all_scores.sort(dim=1, descending=True, stable=True)
        self._scores[touched] = all_scores[:, : self.top]
        self._indices[touched] = all_numbers.gather(1, best[:, : self.top])
        self.limit[touched] = torch.maximum(self.limit[touched], self._scores[touched, -1])


def _stable_order(rows: Tensor) -> Tensor:
    """The order that groups numbers below 2¹⁵, equal ones as they came."""
    if rows.device.type == "cpu":  # numpy sorts short integers by radix
        return torch.from_numpy(rows.numpy().astype(np.int16).argsort(kind="stable"))
    return rows.argsort(stable=True)


def _filter(tile: Tensor, row: _Side, column: _Side | None, start: tuple[int, int]) -> None:
    """Hands the entries of a tile that pass the limit of their row or column to the best of it."""
    row.best.seed(tile)
    if column is not None:
        column.best.seed(tile.T)
    found = []
    for first, strip in _strips(tile):
        words = _words_above(strip, row.best.limit[first : first + len(strip), None])
        if column is not None:
            words |= _words_above(strip, column.best.limit)
        found.append(words.view(-1).nonzero().flatten() + first * (tile.shape[1] // 8))
    places = torch.cat(found)
    line, word = places // (tile.shape[1] // 8), places % (tile.shape[1] // 8)
    scores = tile.view(-1, 8)[places]
    _pass_on(row.best, scores, scores > row.best.limit[line, None], line, word, start[1], by_row=True)
    if column is not None:
        passed = scores > column.best.limit.view(-1, 8)[word]
        _pass_on(column.best, scores, passed, line, word, start[0], by_row=False)


def _pass_on(
    best: _Best, scores: Tensor, passed: Tensor, line: Tensor, word: Tensor, start: int, *, by_row: bool
) -> None:
    which, byte = passed.nonzero(as_tuple=True)
    if len(which):
        rows, columns = line[which], 8 * word[which] + byte
        best.add(rows if by_row else columns, (columns if by_row else rows) + start, scores[which, byte])
