"""What a test costs, counted by torch's own FLOP counter: convolutions and matrix products, in GMAC.

Norms and activations are left out, as everywhere in this field; a MAC is two FLOPs. A group's cost
is counted for all its slots: a hole is computed like an image.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.card import MergePoint, group_sizes

if TYPE_CHECKING:
    from models.group_net import GroupNet


def segment_gmac(net: GroupNet, input_size: int) -> dict[str, float]:
    """GMAC of each segment and of the head, for one unit of an input of ``input_size`` squared.

    Counted, which takes seconds (torch's counter imports its compiler), unless the net's card has told.
    """
    if input_size in net.counted_gmac:
        return net.counted_gmac[input_size]
    import torch  # noqa: PLC0415  what is told needs neither
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    # On the meta device shapes flow but nothing is computed: the largest trunk is counted in no time. Attention
    # there takes the written-out path, whose products are seen; the fused kernel of a real device hides them.
    trunk = copy.deepcopy(net.trunk).to("meta").eval()
    x = torch.empty(1, 3, input_size, input_size, device="meta")
    costs: dict[str, float] = {}
    previous = None
    with torch.no_grad():
        for cut in trunk.cuts:
            with FlopCounterMode(display=False) as counter:
                x = trunk.features(x, after=previous, upto=cut)
            costs[cut] = counter.get_total_flops() / 2e9
            previous = cut
        with FlopCounterMode(display=False) as counter:
            trunk.head(x)
        costs["head"] = counter.get_total_flops() / 2e9
    return costs


@dataclass(frozen=True)
class NetCost:
    """What tests cost, by what the segments do: ``segments`` as of ``segment_gmac``, in the order of the cuts."""

    segments: dict[str, float]
    merge_points: tuple[MergePoint, ...]

    def embedding(self) -> float:
        """GMAC for one image of the layers before the first merge: what ``GroupNet.regroup`` saves for each slot."""
        cuts = list(self.segments)
        return sum(self.segments[cut] for cut in cuts[: cuts.index(self.merge_points[0].cut) + 1])

    def per_test(self, group_size: int, reused_from: int | None = None) -> float:
        """GMAC of one test of ``group_size``; less when a test of ``reused_from`` has kept its features.

        Only the net's own larger test can be reused: then all that is left is the part behind the merge
        that the smaller test leaves out.
        """
        depth = self._depth_of(group_size)
        points = self.merge_points[:depth]
        units = float(group_size)
        start = 0
        cuts = [cut for cut in self.segments if cut != "head"]
        if reused_from is not None:
            if self._depth_of(reused_from) <= depth:
                raise ValueError(f"a test of {group_size} cannot reuse one of {reused_from}: it must be larger")
            units, start, points = 1.0, cuts.index(self.merge_points[depth].cut) + 1, ()
        total = 0.0
        for cut in cuts[start:]:
            total += units * self.segments[cut]
            for point in points:
                if point.cut == cut:
                    units /= point.size
        return total + self.segments["head"]

    def _depth_of(self, group_size: int) -> int:
        sizes = group_sizes(self.merge_points)
        if group_size not in sizes:
            raise ValueError(f"group size {group_size} is not one of this net's sizes {sizes}")
        return sizes.index(group_size)


def gmac_per_test(net: GroupNet, input_size: int, group_size: int, reused_from: int | None = None) -> float:
    """As ``NetCost.per_test``, of a net that is at hand."""
    return NetCost(segment_gmac(net, input_size), net.merge_points).per_test(group_size, reused_from)
