"""Augmentation of token numbers: swap, delete, mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmcl.media.device_hash import device_uniform

_SWAP_SIDE, _SWAP, _DELETE, _MASK, _MASK_KIND, _MASK_VALUE = range(6)


def augment_tokens(
    ids: Tensor,
    mask: Tensor,
    params: Mapping[str, Tensor],
    *,
    mask_id: int = 0,
    special_ids: Sequence[int] = (),
    vocabulary: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids int64 ``(B, L)`` and mask bool ``(B, L)``, changed, and what stood at the masked places (elsewhere −1).

    How far a row is padded changes nothing. ``special_ids`` (start, end, …) keep their place among the others and are
    never swapped, deleted or masked. Wei & Zou 2019 (arXiv 1901.11196) for swap and deletion, of which every row keeps
    at least one token; Devlin et al. 2019 (arXiv 1810.04805) for masks, some of which show a random token below
    ``vocabulary`` or the token itself.
    """
    seed = params["token_seed"][:, None]
    if "token_swap" in params:
        ids = _swap(ids, _free(ids, mask, special_ids), seed, params["token_swap"][:, None])
    if "token_delete" in params:
        ids, mask = _delete(ids, mask, _free(ids, mask, special_ids), seed, params["token_delete"][:, None])
    targets = torch.full_like(ids, -1)
    if "token_mask" in params:
        length = ids.shape[1]
        masked = (_uniform(seed, _MASK, length) < params["token_mask"][:, None]) & _free(ids, mask, special_ids)
        targets = torch.where(masked, ids, targets)
        zero = torch.zeros_like(params["token_mask"])
        at_random, kept = (params.get(name, zero)[:, None] for name in ("token_mask_random", "token_mask_keep"))
        kind = _uniform(seed, _MASK_KIND, length)
        other = (_uniform(seed, _MASK_VALUE, length) * vocabulary).long()
        other = torch.where(torch.isin(other, other.new_tensor([*special_ids, mask_id])), mask_id, other)
        shown = torch.where(kind < at_random, other, mask_id)
        ids = torch.where(masked & ~((kind >= at_random) & (kind < at_random + kept)), shown, ids)
    return ids, mask, targets


def _free(ids: Tensor, mask: Tensor, special_ids: Sequence[int]) -> Tensor:
    """bool ``(B, L)``: tokens that may be changed."""
    special = torch.tensor(list(special_ids), dtype=ids.dtype, device=ids.device)
    return mask & ~torch.isin(ids, special)


def _swap(ids: Tensor, free: Tensor, seed: Tensor, chance: Tensor) -> Tensor:
    """Pairs of neighbours, disjoint, each swapped with this chance; a row's pairs start at 0 or at 1, evenly."""
    length = ids.shape[1]
    places = torch.arange(length, device=ids.device)
    odd = (_uniform(seed, _SWAP_SIDE, 1) < 0.5).long()
    both = free[:, :-1] & free[:, 1:]
    first = both & ((places[:-1] + odd) % 2 == 0) & (_uniform(seed, _SWAP, length)[:, :-1] < chance)
    sources = places.expand_as(ids).clone()
    sources[:, :-1] += first.long()
    sources[:, 1:] -= first.long()
    return ids.gather(1, sources)


def _delete(ids: Tensor, mask: Tensor, free: Tensor, seed: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    draws = _uniform(seed, _DELETE, ids.shape[1]).masked_fill(~free, -1.0)
    # the free token with the largest number stays, whatever the chance
    gone = free & (draws < chance) & (draws < draws.amax(1, keepdim=True))
    kept = mask & ~gone
    order = (~kept).long().argsort(dim=1, stable=True)
    kept = kept.gather(1, order)
    return ids.gather(1, order) * kept, kept


def _uniform(seed: Tensor, purpose: int, length: int) -> Tensor:
    """float64 ``(B, length)``: one number for each position."""
    return device_uniform(seed, purpose, torch.arange(length, device=seed.device))
