"""Nets: group size 1 is individual testing, holes are absences, retests equal tests, costs are counted."""

from __future__ import annotations

import json

import pytest
import torch

from models.backbone import TRUNKS, Trunk
from models.cost import gmac_per_test, segment_gmac
from models.group_net import GroupNet, Kept, MergePoint
from models.merge import MERGES
from models.weights import ZOO, load_net, read_card, save_net

POINTS = (MergePoint(cut="layer1", size=4), MergePoint(cut="layer2", size=4))
SMALL = ["late_resnet", "resnet18"]


def make(trunk: str = "late_resnet", merge: str = "max", points: tuple[MergePoint, ...] = POINTS) -> GroupNet:
    torch.manual_seed(3)
    return GroupNet(Trunk(trunk, 2), points, merge).eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def everyone(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool)


@pytest.mark.parametrize("trunk", SMALL)
@pytest.mark.parametrize("merge", MERGES)
@torch.inference_mode()
def test_groups_of_one_are_individual_testing_bit_for_bit(trunk, merge):
    net = make(trunk, merge)
    x = images(3)
    assert torch.equal(
        net(x, everyone(3), 1),
        net.trunk.classifier(x) if trunk != "late_resnet" else net.trunk.head(net.trunk.features(x)),
    )


@pytest.mark.parametrize("merge", MERGES)
@torch.inference_mode()
def test_whole_parts_and_members_of_a_part_can_change_places(merge):
    net = make(merge=merge)
    x = images(16)
    score = net(x, everyone(16), 16)
    within = torch.cat([x[:4].flip(0), x[4:]])
    parts = x.view(4, 4, *x.shape[1:]).flip(0).reshape(x.shape)
    assert torch.allclose(net(within, everyone(16), 16), score, atol=1e-5)
    assert torch.allclose(net(parts, everyone(16), 16), score, atol=1e-5)
    assert not torch.allclose(net(torch.cat([images(1, 9), x[1:]]), everyone(16), 16), score, atol=1e-5)


@pytest.mark.parametrize("merge", MERGES)
@torch.inference_mode()
def test_a_hole_takes_part_in_nothing(merge):
    net = make(merge=merge)
    x, present = images(16), everyone(16)
    present[5] = present[12:16] = False
    score = net(x, present, 16)
    x[5], x[12:16] = 1e3, torch.nan
    assert torch.equal(net(x, present, 16), score)
    alone = images(4)
    only_first = torch.tensor([True, False, False, False])
    assert torch.allclose(net(alone, only_first, 4), net(alone[:1], everyone(1), 1), atol=1e-5)


@torch.inference_mode()
def test_a_retest_of_kept_features_equals_a_fresh_test():
    net = make()
    x = images(48)
    _, kept = net.test(x, everyone(48), 16)
    chosen = kept.take(torch.tensor([2, 0]), 16)
    again = torch.cat([x[32:48], x[:16]])
    assert torch.allclose(net.retest(chosen.units[4], 4), net(again, everyone(32), 4), atol=1e-5)
    assert torch.allclose(net.retest(chosen.units[1], 1), net(again, everyone(32), 1), atol=1e-5)
    part = chosen.take(torch.tensor([5]), 4)
    assert list(part.units) == [1]
    assert torch.allclose(net.retest(part.units[1], 1), net(again[20:24], everyone(4), 1), atol=1e-5)
    joined = Kept.join([part, part])
    assert joined.present[1].shape == (8,)


def test_no_parameter_is_added():
    for name in SMALL:
        assert make(name).trunk.classifier.state_dict().keys() == TRUNKS[name].build(2).state_dict().keys()
        assert {key.removeprefix("trunk.classifier.") for key in make(name).state_dict()} == TRUNKS[name].build(
            2
        ).state_dict().keys()


@torch.inference_mode()
def test_scores_are_finite_in_bfloat16():
    net = make().to(torch.bfloat16)
    assert torch.isfinite(net(images(16).bfloat16(), everyone(16), 16)).all()


# GMAC per test at 224 px as published (Liang and Zou 2021), with norms and activations: ours leave them out.
@pytest.mark.parametrize(
    ("points", "size", "published"),
    [
        ((), 1, 16.5),
        ((("layer1", 2),), 2, 17.95),
        ((("layer1", 8),), 8, 26.64),
        ((("layer1", 16),), 16, 38.23),
        ((("layer2", 4),), 4, 27.46),
        ((("layer2", 16),), 16, 71.27),
        ((("layer1", 2), ("layer2", 2)), 4, 23.05),
        ((("layer1", 2), ("layer2", 4)), 8, 33.25),
        ((("layer1", 2), ("layer2", 8)), 16, 53.65),
    ],
)
def test_costs_of_resnext_101_are_the_published_ones_within_one_and_a_half_percent(points, size, published):
    net = GroupNet(Trunk("resnext101_32x8d", 1000), tuple(MergePoint(cut=cut, size=of) for cut, of in points))
    assert gmac_per_test(net, 224, size) == pytest.approx(published, rel=0.015)


def test_a_reused_test_costs_what_is_left_behind_its_merge():
    net = make()
    costs = segment_gmac(net, 64)
    assert gmac_per_test(net, 64, 4, reused_from=16) == pytest.approx(costs["layer3"] + costs["head"])
    assert gmac_per_test(net, 64, 1, reused_from=16) == pytest.approx(costs["layer2"] + costs["layer3"] + costs["head"])
    parts = 16 * (costs["stem"] + costs["layer1"]) + 4 * costs["layer2"] + costs["layer3"] + costs["head"]
    assert gmac_per_test(net, 64, 16) == pytest.approx(parts)
    with pytest.raises(ValueError, match="must be larger"):
        gmac_per_test(net, 64, 16, reused_from=4)


def test_group_sizes_are_the_products_of_the_merges():
    net = make()
    assert net.group_sizes == (1, 4, 16)
    with pytest.raises(ValueError, match=r"group size 8 is not one of"):
        net.depth_of(8)
    with pytest.raises(ValueError, match="must follow the trunk's order"):
        make(points=POINTS[::-1])


def test_weights_survive_the_disk_and_are_checked(tmp_path):
    net = make()
    card = save_net(net, tmp_path, "net", categories=("a", "b"), input_size=64, facts={"seed": 1})
    loaded, read = load_net(str(tmp_path / "net.json"))
    assert read == card and read.categories == ("a", "b") and read.merge_points == POINTS
    with torch.inference_mode():
        assert torch.equal(loaded(images(16), everyone(16), 16), net(images(16), everyone(16), 16))
    body = bytearray((tmp_path / "net.safetensors").read_bytes())
    body[-1] ^= 1
    (tmp_path / "net.safetensors").write_bytes(body)
    with pytest.raises(ValueError, match="has sha256"):
        load_net(str(tmp_path / "net.json"))
    with pytest.raises(ValueError, match="is missing: no card"):
        load_net("absent")


def test_the_zoo_is_small_and_its_cards_tell_what_was_measured():
    cards = sorted(ZOO.glob("*.json"))
    assert sum(path.stat().st_size for path in ZOO.iterdir()) < 20_000_000
    assert len(cards) >= 2
    for path in cards:
        card = read_card(path.stem)
        load_net(path.stem)
        for row in card.facts["measured"]:
            low, high = row["recall_interval"]
            assert low <= row["recall"] <= high and row["positives"] >= 100
        assert card.facts["training"]["seconds"] > 0
        assert "/" not in json.dumps(card.facts["hardware"])
