"""Which rows meet which columns: own rows × the rows of all ranks, as tiles of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmcl.distributed.comm import Comm


@dataclass(frozen=True, eq=False)
class Candidates:
    """Own candidates of side ``a`` × candidates of side ``b`` of all ranks, rank after rank.

    A sample may have several rows on a side, one after the other. Rows and columns that take no part are left out, not
    masked: an absent row equals a deleted one. What is not a negative (the sample's own columns, and those of equal
    group) is −inf in every tile: positives are few and are computed where the loss is.
    """

    comm: Comm
    tile: int
    rows: Tensor
    """int64: the own rows of ``a`` that are candidates"""
    columns: Tensor
    """int64: the gathered rows of ``b`` that are candidates"""
    own_columns: Tensor
    """int64 ``(rows, K)``: where among ``columns`` the row's own sample stands; −1: it does not"""
    groups: tuple[tuple[Tensor, Tensor], ...]
    """numbers of the rows and of the columns; equal ones are not each other's negatives"""
    pools: tuple[Tensor, Tensor] | None = None
    """numbers of the rows and of the columns; only equal ones are each other's negatives"""
    whole: bool = False
    """whether every row of ``b`` is a candidate"""
    row_floor: Tensor | None = None
    """float32: negatives of a row below it do not count for the row"""
    column_floor: Tensor | None = None

    @classmethod
    def of(
        cls,
        takes_part_a: Tensor,
        takes_part_b: Tensor,
        numbers: Sequence[tuple[Tensor, Tensor]],
        tile: int,
        comm: Comm,
        pools: Tensor | None = None,
    ) -> Candidates:
        """From bool ``(B, K)`` of own rows of ``a``, bool ``(B · world_size, K)`` of the rows of ``b`` of all ranks,
        int64 numbers of all ranks from :func:`meeting`, and ``pools`` ``(B,)`` of own samples, −1: none.
        """
        batch, per_row = takes_part_a.shape
        per_column = takes_part_b.shape[1]
        everyone = takes_part_b.flatten()
        rows, columns = takes_part_a.flatten().nonzero()[:, 0], everyone.nonzero()[:, 0]
        row_samples = rows // per_row
        place = torch.full_like(everyone, -1, dtype=torch.int64)
        place[columns] = torch.arange(len(columns), device=columns.device)
        own = place.view(-1, per_column)[comm.rank * batch + row_samples]
        mine = slice(comm.rank * batch, (comm.rank + 1) * batch)
        return cls(
            comm=comm,
            tile=tile,
            rows=rows,
            columns=columns,
            own_columns=own,
            whole=len(columns) == len(everyone),
            # −1 on one side and −2 on the other: no number equals no number nowhere
            groups=tuple(
                (x[mine][row_samples].sub(x[mine][row_samples].lt(0).long()), y[columns // per_column])
                for x, y in numbers
            ),
            pools=None
            if pools is None
            else (
                pools[row_samples].sub(pools[row_samples].lt(0).long()),
                comm.gather_by_rank(pools)[columns // per_column],
            ),
        )

    def with_floors(self, row_floor: Tensor, column_floor: Tensor) -> Candidates:
        return replace(self, row_floor=row_floor, column_floor=column_floor)

    def tiles(self) -> list[tuple[slice, slice]]:
        """(rows, columns) of each tile."""
        return [(i, j) for j in _slices(len(self.columns), self.tile) for i in _slices(len(self.rows), self.tile)]

    def logits(self, rows: Tensor, columns: Tensor, scale: Tensor, i: slice, j: slice) -> Tensor:
        """One tile, −inf where the column is no negative of the row."""
        logits = (rows[i] @ columns[j].T).mul_(scale)
        width = logits.shape[1]
        if self.whole and width == len(self.columns):
            return self._unmet(logits.scatter_(1, self.own_columns[i], -torch.inf), i, j)
        for own in (self.own_columns[i] - j.start).unbind(1):
            # a number per row, not a mask of the tile; places outside keep what they have
            outside = ((own < 0) | (own >= width))[:, None]
            place = own.clamp(0, width - 1)[:, None]
            logits.scatter_(1, place, logits.gather(1, place).where(outside, -torch.inf))
        return self._unmet(logits, i, j)

    def _unmet(self, logits: Tensor, i: slice, j: slice) -> Tensor:
        """The tile with −inf where numbers say so."""
        for row, column in self.groups:
            logits.masked_fill_(row[i, None] == column[j], -torch.inf)
        if self.pools is not None:
            logits.masked_fill_(self.pools[0][i, None] != self.pools[1][j], -torch.inf)
        return logits

    def for_rows(self, logits: Tensor, i: slice) -> Tensor:
        """The tile as the rows see it."""
        return logits if self.row_floor is None else above(logits, self.row_floor[i, None])

    def for_columns(self, logits: Tensor, j: slice) -> Tensor:
        """The tile as the columns see it."""
        return logits if self.column_floor is None else above(logits, self.column_floor[j])

    def pick_rows(self, x: Tensor) -> Tensor:
        """Of own rows of ``a`` ``(B·K, …)`` the candidates."""
        return x if len(self.rows) == len(x) else x[self.rows]

    def gather_columns(self, x: Tensor) -> Tensor:
        """Of own rows of ``b`` ``(B·K, …)`` the candidates of all ranks."""
        return self.pick_columns(self.comm.gather_by_rank(x))

    def pick_columns(self, x: Tensor) -> Tensor:
        """Of rows of ``b`` of all ranks the candidates."""
        return x if len(self.columns) == len(x) else x[self.columns]

    def put_back(self, x: Tensor, index: Tensor, size: int, fill: float = 0.0) -> Tensor:
        """Values of candidates among all ``size`` rows, ``fill`` where there is none."""
        return x if len(x) == size else x.new_full((size, *x.shape[1:]), fill).index_copy_(0, index, x)

    def own_part(self, x: Tensor, size: int, fill: float) -> Tensor:
        """Values of ``columns`` for this rank's ``size`` rows of ``b``."""
        whole = self.put_back(x, self.columns, size * self.comm.world_size, fill)
        return whole[self.comm.rank * size : (self.comm.rank + 1) * size]


def above(logits: Tensor, floor: Tensor) -> Tensor:
    """−inf where a logit lies below ``floor``, compared in float32."""
    return logits.masked_fill(logits.float() < floor, -torch.inf)


def gather_columns_of(blocks: Sequence[Candidates], xs: Sequence[Tensor]) -> list[Tensor]:
    """:meth:`Candidates.gather_columns` for several blocks of the same ranks, together."""
    everyone = blocks[0].comm.gather_together(xs)
    return [block.pick_columns(x) for block, x in zip(blocks, everyone, strict=True)]


def meeting(rows: Tensor, columns: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """The columns of ``(N, G)`` numbers, −1: none, in which two samples meet; the others would mask nothing."""
    if rows is columns:  # a sample meets itself anyway, so another one is needed: two equal numbers in a column
        ordered = rows.sort(0).values
        twice = ((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).any(0).tolist()
        return tuple((rows[:, k], rows[:, k]) for k, met in enumerate(twice) if met)
    found = []
    for x, y in zip(rows.unbind(1), columns.unbind(1), strict=True):
        values, inverse = torch.unique(torch.cat([x, y]), return_inverse=True)
        counts = [torch.bincount(part, minlength=len(values)) for part in inverse.view(2, -1)]
        equal = (counts[0] * counts[1])[values >= 0].sum() - ((x == y) & (x >= 0)).sum()
        if bool(equal):
            found.append((x, y))
    return tuple(found)


def _slices(size: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, size)) for start in range(0, size, tile)]
