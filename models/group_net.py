"""A net that tests groups: a trunk, and the seams at which members are merged.

Shapes: U units, X whatever shape one unit's features have; a unit is an image before the first merge,
a merged part of a group behind it. N images, G groups, M members, K categories. ``present`` is False
at holes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.backbone import Trunk
from models.card import MergePoint, group_sizes
from models.merge import MERGES


@dataclass(frozen=True)
class Kept:
    """What a test leaves behind for smaller groups: by group size, features just before they merge on.

    ``units[size]`` is (U, X) and ``present[size]`` (U,), U counting the parts of that size in
    the tested groups, in their order.
    """

    units: dict[int, Tensor] = field(default_factory=dict)
    present: dict[int, Tensor] = field(default_factory=dict)

    def take(self, groups_G: Tensor, size: int) -> Kept:
        """Only what belongs to these groups of ``size``, and only the parts smaller than they are."""
        units, present = {}, {}
        for part, features in self.units.items():
            if part < size:
                width = size // part
                rows = (groups_G[:, None] * width + torch.arange(width, device=groups_G.device)).flatten()
                units[part], present[part] = features[rows], self.present[part][rows]
        return Kept(units, present)

    @staticmethod
    def join(parts: list[Kept]) -> Kept:
        """One behind the other. Tests that kept nothing, because there were none, are left out."""
        parts = [part for part in parts if part.units]
        if len(parts) < 2:
            return parts[0] if parts else Kept()
        sizes = list(parts[0].units)
        return Kept(
            {size: torch.cat([part.units[size] for part in parts]) for size in sizes},
            {size: torch.cat([part.present[size] for part in parts]) for size in sizes},
        )


class GroupNet(nn.Module):
    """Tree merge (Liang and Zou 2021, design 3); one merge point makes it design 2, none a plain net.

    A merge point at the cut ``pixels`` is design 1: the members are merged before the net sees them.

    With merge points of sizes (4, 4) it tests groups of 16, 4 and 1 with the same weights: the
    prefix products of the sizes. A test of 4 stops merging after the first point. Retesting the
    4 quarters of a group of 16 starts from features the larger test has already computed.
    """

    def __init__(self, trunk: Trunk, merge_points: tuple[MergePoint, ...] = (), merge: str = "max") -> None:
        super().__init__()
        if merge not in MERGES:
            raise ValueError(f"merge {merge!r} is unknown; known are {', '.join(MERGES)}")
        for point in merge_points:
            if point.cut not in trunk.cuts:
                raise ValueError(f"trunk {trunk.name!r} has no cut {point.cut!r}; its cuts are {', '.join(trunk.cuts)}")
            if point.size < 2:
                raise ValueError(f"{point} merges nothing: its size must be at least 2")
        order = [trunk.cuts.index(point.cut) for point in merge_points]
        if order != sorted(order):
            raise ValueError(f"merge points {merge_points} must follow the trunk's order {trunk.cuts}")
        self.trunk = trunk
        self.merge_points = merge_points
        self.merge = MERGES[merge]
        self.merge_name = merge
        self.counted_gmac: dict[int, dict[str, float]] = {}
        """By input size, what ``models/cost.py`` would count: a card brings it along."""

    @property
    def num_categories(self) -> int:
        return self.trunk.num_categories

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Group sizes the net can test, by depth: the number of merges they take."""
        return group_sizes(self.merge_points)

    def depth_of(self, group_size: int) -> int:
        if group_size not in self.group_sizes:
            raise ValueError(f"group size {group_size} is not one of this net's sizes {self.group_sizes}")
        return self.group_sizes.index(group_size)

    def forward(self, images_NCHW: Tensor, present_N: Tensor, group_size: int) -> Tensor:
        """Logits (N / group_size, K) of consecutive groups."""
        return self.test(images_NCHW, present_N, group_size)[0]

    def test(self, images_NCHW: Tensor, present_N: Tensor, group_size: int) -> tuple[Tensor, Kept]:
        """Logits (G, K) of consecutive groups, and the features that ``retest`` needs."""
        return self._test(images_NCHW, present_N, None, group_size)

    def regroup(self, units_NX: Tensor, present_N: Tensor, group_size: int) -> Tensor:
        """Logits (G, K) of consecutive groups of images whose own features (``Kept.units[1]``) an earlier test kept."""
        return self._test(units_NX, present_N, self.merge_points[0].cut, group_size)[0]

    def _test(self, units: Tensor, present: Tensor, cut: str | None, group_size: int) -> tuple[Tensor, Kept]:
        """From ``units`` as they are behind ``cut``."""
        kept = Kept()
        for depth, point in enumerate(self.merge_points[: self.depth_of(group_size)]):
            units = self._run(units, cut, point.cut)
            kept.units[self.group_sizes[depth]] = units
            kept.present[self.group_sizes[depth]] = present
            units, present = self._merge(units, present, point.size)
            cut = point.cut
        return self.trunk.head(self._run(units, cut, None)), kept

    def retest(self, units_UX: Tensor, group_size: int) -> Tensor:
        """Logits (U, K) of parts of ``group_size`` whose features a larger test has kept."""
        point = self.merge_points[self.depth_of(group_size)]
        return self.trunk.head(self._run(units_UX, point.cut, None))

    def _run(self, units: Tensor, after: str | None, upto: str | None) -> Tensor:
        if after is not None and after == upto:
            return units  # two merges at one cut: nothing lies between them
        return self.trunk.features(units, after=after, upto=upto)

    def _merge(self, units_UX: Tensor, present_U: Tensor, size: int) -> tuple[Tensor, Tensor]:
        present_GM = present_U.view(-1, size)
        units_GMX = units_UX.view(-1, size, *units_UX.shape[1:])
        return self.merge(units_GMX, present_GM), present_GM.any(dim=1)
