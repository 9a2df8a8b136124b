"""Ranks that want different things find out before they wait for each other."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mmcl.distributed.comm import Comm
from mmcl.distributed.pair import SIDES, Form, Pair, distinct, sides


def agree(
    pairs: Sequence[Pair], unpaired_negatives: bool, form: Form, comm: Comm, several: bool = True
) -> list[tuple[bool, bool]]:
    """Raises on all ranks if one of them cannot go on. Returns of each pair whether some rank wants a gradient, and for
    ``b``."""
    settings = [int(unpaired_negatives), *form.name.encode().ljust(24), *_bits(form)]
    kinds = _kinds(pairs)
    facts = [[*_sizes(pair), *settings, *kinds[k], *_wants(pair)] for k, pair in enumerate(pairs)]
    every = comm.gather(torch.tensor([facts], device=comm.host_device)).tolist()
    for k, own in enumerate(facts):
        if not _fits(own[:SIZES], several) or any(other[k][:-2] != own[:-2] for other in every):
            raise ValueError(
                "a must be (B, D), b (B, D) or (B, K, D), present_a (B,), present_b as b without D, groups and "
                "groups_b (B,) or (B, G) or None, pools (B,) or None, all equal on all ranks, as are their dtypes, "
                "which of them are None or one tensor, unpaired_negatives and form; these by rank, -1 for no axis: "
                f"{[other[k][: SIZES + 1] for other in every]}"
            )
    return [(any(x[k][-2] for x in every), any(x[k][-1] for x in every)) for k in range(len(pairs))]


SIZES = 21
"""of three axes of the seven tensors of a pair"""


def _sizes(pair: Pair) -> list[int]:
    numbers = [x[:, None] if x is not None and x.ndim == 1 else x for x in (pair.groups, pair.groups_b)]
    tensors = [pair.a, pair.b, *pair.masks(), *numbers, pair.pools]
    return [n for x in tensors for n in ([-1, -1, -1] if x is None else [*x.shape, -1, -1, -1][:3])]


def _kinds(pairs: Sequence[Pair]) -> list[list[int]]:
    """Of what each pair has, which tensor of all it is, −1 for None, and its dtype: rows travel as bytes."""
    given = sides(pairs)
    _, places = distinct(given)
    dtypes = [0 if x is None else zlib.crc32(str(x.dtype).encode()) for x in given]
    each = [slice(k, k + len(SIDES)) for k in range(0, len(given), len(SIDES))]
    return [places[part] + dtypes[part] for part in each]


def _wants(pair: Pair) -> tuple[int, int]:
    """Whether this rank wants a gradient, and for ``b``."""
    given = (pair.b, pair.a, pair.scale, pair.bias)
    wants = [torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in given]
    return int(any(wants)), int(wants[0])


def _fits(sizes: list[int], several: bool) -> bool:
    a, b, present_a, present_b, groups, groups_b, pools = (sizes[start : start + 3] for start in range(0, SIZES, 3))
    width = b[2] if b[2] >= 0 and several else b[1]
    return (
        a == [b[0], width, -1]
        and width >= 0
        and present_a == [a[0], -1, -1]
        and present_b == ([*b[:2], -1] if width == b[2] else [b[0], -1, -1])
        and groups[0] in (-1, a[0])
        and groups_b in ([-1, -1, -1], groups)
        and pools in ([-1, -1, -1], [a[0], -1, -1])
    )


def _bits(form: Form) -> tuple[int, ...]:
    """The numbers of a form as whole ones."""
    return struct.unpack("4q", struct.pack("4d", form.sigma, form.smoothing, form.hard_quantile, form.detach_weight))
