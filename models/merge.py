"""Merging the features of a group's members into one, without parameters and with holes.

Shapes: G groups, M members, C channels, H x W positions; ``present_GM`` is False at holes.
A hole equals its absence: it takes part in nothing, whatever its features hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Merge = Callable[[Tensor, Tensor], Tensor]


def merge_max(features_GMCHW: Tensor, present_GM: Tensor) -> Tensor:
    """Element-wise maximum over the members (Liang and Zou 2021, design 2); zero for an empty group."""
    lowest = torch.finfo(features_GMCHW.dtype).min
    mask_GM111 = present_GM[:, :, None, None, None]
    merged_GCHW = features_GMCHW.masked_fill(~mask_GM111, lowest).amax(dim=1)
    return merged_GCHW.masked_fill(~present_GM.any(dim=1)[:, None, None, None], 0)


def merge_mean(features_GMCHW: Tensor, present_GM: Tensor) -> Tensor:
    """Mean over the members present; zero for an empty group."""
    mask_GM111 = present_GM[:, :, None, None, None]
    total_GCHW = features_GMCHW.masked_fill(~mask_GM111, 0).sum(dim=1)
    return total_GCHW / present_GM.sum(dim=1).clamp(min=1)[:, None, None, None]


MERGES: dict[str, Merge] = {"max": merge_max, "mean": merge_mean}
