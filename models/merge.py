"""Merging the features of a group's members into one, without parameters and with holes.

Shapes: G groups, M members; X is whatever shape one member's features have, so that every merge works
on maps, on tokens and on pixels, element by element. ``present_GM`` is False at holes.
A hole equals its absence: it takes part in nothing, whatever its features hold. One member alone is
returned bit for bit; an empty group gives zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Merge = Callable[[Tensor, Tensor], Tensor]

SHARPNESS = 8.0
"""Of ``merge_log_sum_exp``: how close it comes to the maximum. Below it by at most log(M) / SHARPNESS."""


def merge_max(features_GMX: Tensor, present_GM: Tensor) -> Tensor:
    """Element-wise maximum over the members (Liang and Zou 2021, design 2)."""
    return _zero_if_empty(_lower_holes(features_GMX, present_GM).amax(dim=1), present_GM)


def merge_mean(features_GMX: Tensor, present_GM: Tensor) -> Tensor:
    """Mean over the members present."""
    total_GX = features_GMX.masked_fill(_beside(~present_GM, features_GMX), 0).sum(dim=1)
    return total_GX / _beside(present_GM.sum(dim=1).clamp(min=1), total_GX)


def merge_log_sum_exp(features_GMX: Tensor, present_GM: Tensor) -> Tensor:
    """Smooth maximum: log(mean(exp(SHARPNESS * x))) / SHARPNESS over the members present.

    Unlike the maximum it has a gradient for every member.
    """
    lowered_GMX = _lower_holes(features_GMX, present_GM)
    highest_GX = lowered_GMX.amax(dim=1)
    # Beside the highest no term exceeds one, and a hole's is zero.
    total_GX = (SHARPNESS * (lowered_GMX - highest_GX.unsqueeze(1))).exp().sum(dim=1)
    count_GX = _beside(present_GM.sum(dim=1).clamp(min=1), total_GX)
    return _zero_if_empty(highest_GX + (total_GX / count_GX).log() / SHARPNESS, present_GM)


def merge_top_mean(features_GMX: Tensor, present_GM: Tensor) -> Tensor:
    """Mean of the two largest of the members present: one outlier counts half."""
    lowered_GMX = _lower_holes(features_GMX, present_GM)
    top_GMX = lowered_GMX.topk(min(2, lowered_GMX.shape[1]), dim=1).values
    highest_GX, second_GX = top_GMX[:, 0], top_GMX[:, -1]
    both_GX = _beside(present_GM.sum(dim=1) > 1, highest_GX)
    return _zero_if_empty(torch.where(both_GX, (highest_GX + second_GX) / 2, highest_GX), present_GM)


def _beside(flags: Tensor, features: Tensor) -> Tensor:
    """``flags`` with as many axes as the features they are combined with."""
    return flags.reshape(flags.shape + (1,) * (features.ndim - flags.ndim))


def _lower_holes(features_GMX: Tensor, present_GM: Tensor) -> Tensor:
    return features_GMX.masked_fill(_beside(~present_GM, features_GMX), torch.finfo(features_GMX.dtype).min)


def _zero_if_empty(merged_GX: Tensor, present_GM: Tensor) -> Tensor:
    return merged_GX.masked_fill(_beside(~present_GM.any(dim=1), merged_GX), 0)


MERGES: dict[str, Merge] = {
    "max": merge_max,
    "mean": merge_mean,
    "log_sum_exp": merge_log_sum_exp,
    "top_mean": merge_top_mean,
}
