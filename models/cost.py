"""What a test costs, counted by torch's own FLOP counter: convolutions and matrix products, in GMAC.

Norms and activations are left out, as everywhere in this field; a MAC is two FLOPs. A group's cost
is counted for all its slots: a hole is computed like an image.
"""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.group_net import GroupNet


def segment_gmac(net: GroupNet, input_size: int) -> dict[str, float]:
    """GMAC of each segment and of the head, for one unit of an input of ``input_size`` squared.

    Counted, which takes seconds (torch's counter imports its compiler), unless the net's card has told.
    """
    if input_size in net.counted_gmac:
        return net.counted_gmac[input_size]
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


def embedding_gmac(net: GroupNet, input_size: int) -> float:
    """GMAC for one image of the layers before the first merge: what ``GroupNet.regroup`` saves for each slot."""
    costs = segment_gmac(net, input_size)
    cuts = net.trunk.cuts
    return sum(costs[cut] for cut in cuts[: cuts.index(net.merge_points[0].cut) + 1])


def gmac_per_test(net: GroupNet, input_size: int, group_size: int, reused_from: int | None = None) -> float:
    """GMAC of one test of ``group_size``; less when a test of ``reused_from`` has kept its features.

    Only the net's own larger test can be reused: then all that is left is the part behind the merge
    that the smaller test leaves out.
    """
    costs = segment_gmac(net, input_size)
    depth = net.depth_of(group_size)
    points = net.merge_points[:depth]
    units = float(group_size)
    start = 0
    cuts = list(net.trunk.cuts)
    if reused_from is not None:
        if net.depth_of(reused_from) <= depth:
            raise ValueError(f"a test of {group_size} cannot reuse one of {reused_from}: it must be larger")
        units, start, points = 1.0, cuts.index(net.merge_points[depth].cut) + 1, ()
    total = 0.0
    for cut in cuts[start:]:
        total += units * costs[cut]
        for point in points:
            if point.cut == cut:
                units /= point.size
    return total + costs["head"]
