"""Augmentation of a batch on the device that it lies on: rows are changed as their parameters say, and only so.

Parameters by name, one row each (``mmcl.media.augmentation_draws`` draws them):

video, uint8 ``(B, T, C, H, W)``, the same for all frames of a row, in this order
    ``crop_box`` int64 ``(B, 4)`` top, left, height, width in pixels · ``flip`` bool · ``turns`` int64 quarters and
    ``rotation_degrees`` float32, counter-clockwise · ``brightness``, ``contrast``, ``saturation`` float32 factors ·
    ``hue`` float32 in full circles · ``grey`` bool · ``blur_sigma`` float32 pixels · ``erase_frame`` int64 ·
    ``erase_strength`` float32
motion, float32 ``(B, T, 2, S, S)``: by what the augmentation does to pictures, of that only
    ``crop_share`` float32 ``(B, 4)`` top, left, height, width as shares of the picture · ``flip`` bool
audio, float32 ``(B, S)``
    ``gain`` float32 factor · ``shift_samples`` int64 · ``frequency_masks`` float32 ``(B, n, 2)`` lowest and highest Hz
    · ``time_masks`` int64 ``(B, n, 2)`` start and length in samples
text, int64 ``(B, L)``; of questions ``(B, K + J, L)``, without ``token_targets``
    ``token_seed`` int64 · ``token_swap``, ``token_delete``, ``token_mask``, and of the masked ones
    ``token_mask_random``, ``token_mask_keep``, float32 probabilities; afterwards also
    ``token_targets`` int64 ``(B, L)``: the token that a masked place had, −1 elsewhere

Mixing with other rows comes after all of these: ``mmcl.media.mixing``.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mmcl.media.augment_audio import augment_audio
from mmcl.media.augment_tokens import augment_tokens
from mmcl.media.augment_video import augment_motion, augment_video, background_erase
from mmcl.media.augmentation import mask_id, vocabulary
from mmcl.types import READ, AudioSpec, Batch, MotionSpec, QuestionSpec, TextSpec, VectorSpec, View, ViewBatch

__all__ = ["augment", "augment_audio", "background_erase"]


@torch.no_grad()
def augment(batch: Batch) -> Batch:
    """The batch with the changes that the parameters of its views ask for; a new one, nothing is modified.

    Video comes out as uint8 of the view's size. Rows that are absent stay zero.
    """
    return replace(batch, views={view: _augment_view(view, values) for view, values in batch.views.items()})


def _augment_view(view: View, values: ViewBatch) -> ViewBatch:
    spec = view.spec
    if isinstance(spec, READ) and "token_seed" not in values.params:
        return values
    if isinstance(spec, QuestionSpec):
        return _augment_questions(spec, values)
    if isinstance(spec, TextSpec):
        assert values.mask is not None
        special = tuple(getattr(spec.tokenizer, "special_ids", ()))
        ids, mask, targets = augment_tokens(
            values.data,
            values.mask,
            values.params,
            mask_id=mask_id(spec) or 0,
            special_ids=special,
            vocabulary=vocabulary(spec) or 0,
        )
        params = dict(values.params)
        if "token_mask" in params:
            params["token_targets"] = targets.masked_fill(~values.present[:, None], -1)
        return replace(values, data=ids * values.present[:, None], mask=mask, params=params)
    if isinstance(spec, AudioSpec):
        return replace(values, data=augment_audio(values.data, values.params, sample_rate_hz=spec.sample_rate_hz))
    if isinstance(spec, VectorSpec):
        return values
    if isinstance(spec, MotionSpec):
        return replace(
            values, data=augment_motion(values.data, values.params, side=spec.side, corrected=spec.corrected)
        )
    return replace(values, data=augment_video(values.data, values.params, size=spec.size))


def _augment_questions(spec: QuestionSpec, values: ViewBatch) -> ViewBatch:
    """All texts of a row draw the same numbers: what candidates share, the question, is changed alike."""
    assert values.mask is not None
    ids, mask, _ = augment_tokens(
        values.data.flatten(0, 1),
        values.mask.flatten(0, 1),
        {
            name: x.repeat_interleave(values.data.shape[1])
            for name, x in values.params.items()
            if name.startswith("token_")
        },
        mask_id=mask_id(spec) or 0,
        special_ids=tuple(getattr(spec.tokenizer, "special_ids", ())),
        vocabulary=vocabulary(spec) or 0,
    )
    return replace(
        values,
        data=ids.view_as(values.data) * values.present[:, None, None],
        mask=mask.view_as(values.mask),
    )
