"""Merges, group nets and their files: holes are absences, retests equal tests, costs are counted.

What holds for every trunk is in ``test_trunks.py``.
"""

from __future__ import annotations

import io
import json
import math
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save as save_safetensors
from torchvision.models import _api, get_model

from models.backbone import Trunk
from models.card import ZOO, read_card
from models.cost import gmac_per_test, segment_gmac
from models.group_net import GroupNet, Kept, MergePoint
from models.merge import MERGES, SHARPNESS
from models.weights import load_net, parse_state, save_net, start_from, torchvision_state

POINTS = (MergePoint(cut="layer1", size=4), MergePoint(cut="layer2", size=4))


def make(trunk: str = "late_resnet", merge: str = "max", points: tuple[MergePoint, ...] = POINTS) -> GroupNet:
    torch.manual_seed(3)
    return GroupNet(Trunk(trunk, 2), points, merge).eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def everyone(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool)


@pytest.mark.parametrize("shape", [(5,), (3, 7), (4, 3, 2)], ids=["U", "TD", "CHW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge", MERGES)
def test_one_member_is_itself_bit_for_bit_and_a_hole_is_its_absence(merge, dtype, shape):
    features = 3 * torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    function = MERGES[merge]
    everyone = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(function(features[:, :1], everyone[:, :1]), features[:, 0])
    holed = features.clone()
    holed[:, 1], holed[:, 3] = torch.nan, 1e4
    present = torch.tensor([[True, False, True, False], [False, False, True, False]])
    merged = function(holed, present)
    assert torch.equal(merged[:1], function(features[:1, [0, 2]], everyone[:1, :2]))
    assert torch.equal(merged[1], features[1, 2])
    assert torch.equal(function(holed, ~everyone), torch.zeros_like(features[:, 0]))
    huge = torch.tensor([[3e38, -3e38, -1.0, 0.0]]).to(dtype)
    assert torch.isfinite(function(huge, everyone[:1])).all()


def test_merges_are_what_they_are_called():
    features = torch.tensor([[[1.0, -2.0], [4.0, -1.0], [3.0, -6.0]]])
    everyone = torch.ones(1, 3, dtype=torch.bool)
    merged = {name: merge(features, everyone)[0] for name, merge in MERGES.items()}
    assert merged["max"].tolist() == [4, -1]
    assert merged["mean"].tolist() == pytest.approx([8 / 3, -3])
    assert merged["top_mean"].tolist() == [3.5, -1.5]
    smooth = (features[0].double() * SHARPNESS).exp().mean(dim=0).log() / SHARPNESS
    assert merged["log_sum_exp"].tolist() == pytest.approx(smooth.tolist(), abs=1e-6)
    assert (merged["max"] - math.log(3) / SHARPNESS <= merged["log_sum_exp"] + 1e-6).all()


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


# GMAC per test at 224 px as published (Liang and Zou 2021), with norms and activations: ours leave them out.
@pytest.mark.parametrize(
    ("points", "size", "published"),
    [
        ((), 1, 16.5),
        ((("pixels", 2),), 2, 16.5),
        ((("pixels", 16),), 16, 16.5),
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
    with torch.device("meta"):
        trunk = Trunk("resnext101_32x8d", 1000)
    net = GroupNet(trunk, tuple(MergePoint(cut=cut, size=of) for cut, of in points))
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
    pixels = make(points=(MergePoint(cut="pixels", size=4),))
    assert (
        gmac_per_test(pixels, 64, 4)
        == gmac_per_test(pixels, 64, 1, reused_from=4)
        == pytest.approx(sum(costs.values()))
    )


def test_group_sizes_are_the_products_of_the_merges():
    net = make()
    assert net.group_sizes == (1, 4, 16)
    with pytest.raises(ValueError, match=r"group size 8 is not one of"):
        net.depth_of(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": POINTS[::-1]}, "must follow the trunk's order"),
        ({"points": (MergePoint(cut="layer4", size=4),)}, "has no cut 'layer4'; its cuts are pixels, stem, layer1"),
        ({"points": (MergePoint(cut="layer1", size=1),)}, "its size must be at least 2"),
        ({"merge": "median"}, "merge 'median' is unknown; known are max, mean"),
        ({"trunk": "alexnet"}, "trunk 'alexnet' is unknown"),
    ],
)
def test_a_net_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


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


def file_of(state: dict[str, torch.Tensor], suffix: str) -> bytes:
    if suffix == ".safetensors":
        return save_safetensors(state)
    body = io.BytesIO()
    torch.save(state, body)
    return body.getvalue()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_net_starts_from_a_file_of_weights_but_keeps_a_head_of_its_own_size(suffix):
    theirs = Trunk("late_resnet_mini", 5).classifier.state_dict()
    net = make("late_resnet_mini")
    fresh = net.trunk.classifier.fc.weight.clone()
    start_from(net, parse_state(file_of(theirs, suffix), "net" + suffix))
    mine = net.trunk.classifier.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs if not key.startswith("fc."))
    assert torch.equal(mine["fc.weight"], fresh)
    same = GroupNet(Trunk("late_resnet_mini", 5))
    start_from(same, parse_state(file_of(theirs, suffix), "net" + suffix))
    assert torch.equal(same.trunk.classifier.fc.weight, theirs["fc.weight"])


def test_weights_that_do_not_fit_are_refused_and_change_nothing():
    net = make("late_resnet_mini")
    before = {key: value.clone() for key, value in net.trunk.classifier.state_dict().items()}
    counters = [key for key in before if key.endswith("num_batches_tracked")]
    start_from(net, {key: value for key, value in before.items() if key not in counters})
    lacking = {key: value for key, value in before.items() if not key.startswith("layer2.")}
    wider = {
        key: 1 + value if value.dim() < 2 else value.repeat(1, 2, *[1] * (value.dim() - 2))
        for key, value in before.items()
    }
    prefixed = before | {f"module.{index}": torch.zeros(1) for index in range(4)}
    for state, message in (
        (lacking, r"lack layer2\.0\.bn1\.bias, layer2\.0\.bn1\.running_mean, .* and \d+ more"),
        (wider, r"have other shapes of layer1\.0\.conv1\.weight"),
        (prefixed, r"have unknown module\.0, module\.1, module\.2 and 1 more"),
    ):
        with pytest.raises(ValueError, match=message):
            start_from(net, state)
        after = net.trunk.classifier.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)


class Trap:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_are_no_weights_are_refused(capsys):
    pickled = io.BytesIO()
    torch.save({"weight": Trap()}, pickled)
    for body, name, message in (
        (b"x", "net.onnx", "end in '.onnx'; .safetensors, .pth and .pt can be read"),
        (b"x" * 50, "net.safetensors", "cannot be read"),
        (b"x" * 50, "net.pth", "cannot be read"),
        (b"", "net.pt", "cannot be read"),
        (file_of({}, ".pth")[:-40], "net.pth", "cannot be read"),
        (pickled.getvalue(), "net.pth", "cannot be read"),
        (file_of({"model": {}}, ".pth"), "net.pth", "are not a state dict"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_state(body, name)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(card.stem for card in ZOO.glob("*.json") if "int8" not in card.stem))
def test_cards_tell_what_the_counter_counts(name):
    net, card = load_net(name)
    told = net.counted_gmac.pop(card.input_size)
    assert told == pytest.approx(segment_gmac(net, card.input_size), rel=1e-9)


def test_a_net_starts_from_torchvisions_weights(monkeypatch):
    published = get_model("resnet18", weights=None).state_dict()
    asked = []
    monkeypatch.setattr(
        _api, "load_state_dict_from_url", lambda url, **options: asked.append((url, options)) or published
    )
    net = make("resnet18")
    start_from(net, torchvision_state("resnet18", "IMAGENET1K_V1"))
    assert torch.equal(net.trunk.classifier.conv1.weight, published["conv1.weight"])
    assert net.trunk.classifier.fc.weight.shape == (2, 512)
    assert "resnet18" in asked[0][0] and asked[0][1]["weights_only"] and asked[0][1]["check_hash"]

    def unreachable(url, **options):
        raise URLError("no route")

    monkeypatch.setattr(_api, "load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=r"could not be fetched .*no route.*: try again, or fetch the file elsewhere"):
        torchvision_state("resnet18")
    with pytest.raises(ValueError, match="known are IMAGENET1K_V1, DEFAULT"):
        torchvision_state("resnet18", "V9")
    with pytest.raises(ValueError, match="is not torchvision's"):
        torchvision_state("late_resnet")


def test_the_zoo_is_small_and_its_cards_tell_what_was_measured():
    cards = sorted(ZOO.glob("*.json"))
    assert sum(path.stat().st_size for path in ZOO.iterdir()) < 20_000_000
    assert {path.stem for path in cards} == {
        "emblem",
        "emblem-int8",
        "emblem-mini",
        "emblem-mini-int8",
        "cifar-single",
        "cifar-mini",
        "cifar-pixel",
        "cifar-feature",
        "cifar-tree",
    }
    for path in cards:
        card = read_card(path.stem)
        load_net(path.stem)
        for row in card.facts["measured"]:
            low, high = row["recall_interval"]
            assert low <= row["recall"] <= high and row["positives"] >= 90
        if card.int8:
            assert card.made_of is not None
            source = read_card(card.made_of.rpartition("@")[0])
            assert card.made_of == source.version and card.segment_gmac == source.segment_gmac
            continue
        assert card.facts["training"]["seconds"] > 0
        assert "/" not in json.dumps(card.facts["hardware"])
