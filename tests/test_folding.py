"""Folding changes no score of any trunk beyond rounding, and leaves no norm behind a convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.backbone import Trunk
from models.folding import fold_norms
from models.group_net import GroupNet, MergePoint

# One of each family: its other members are built of the same blocks.
FAMILIES = {
    "late_resnet": "layer1", "late_resnet_32_mini": "layer1", "resnet18": "layer1", "resnet50": "layer2",
    "resnext50_32x4d": "layer1", "regnet_y_400mf": "block1", "efficientnet_b0": "features2",
    "efficientnet_v2_s": "features2", "mobilenet_v3_small": "features2",
}  # fmt: skip
WITHOUT = ("convnext_tiny", "vit_b_32", "swin_t")


def with_statistics(name: str, points: tuple[MergePoint, ...]) -> GroupNet:
    """A net whose norms have means and variances as if they had learnt."""
    torch.manual_seed(3)
    net = GroupNet(Trunk(name, 4), points)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return net.eval().double()


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_folded_net_scores_as_before(name):
    net = with_statistics(name, (MergePoint(cut=FAMILIES[name], size=2),))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    folded = fold_norms(copy.deepcopy(net))
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert norms > 5 and left == 0
    images, present = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.tensor([True, True, True, False])
    for size in (1, 2):
        before, kept = net.test(images, present, size)
        after, kept_after = folded.test(images, present, size)
        assert torch.allclose(before, after, rtol=1e-7, atol=1e-7 * float(before.abs().max()))
        if size == 2:
            assert torch.allclose(net.retest(kept.units[1], 1), folded.retest(kept_after.units[1], 1), rtol=1e-6)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_net_without_such_norms_stays_as_it_is(name):
    net = GroupNet(Trunk(name, 4)).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    after = fold_norms(net).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
