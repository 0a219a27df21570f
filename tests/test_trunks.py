"""Every trunk: groups of one are the bare classifier, for every design and merge; costs are torchvision's own."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, regnet
from torchvision.transforms import functional

from models.backbone import TRUNKS, Trunk
from models.cost import segment_gmac
from models.group_net import GroupNet, MergePoint
from models.merge import MERGES

OURS = [name for name in TRUNKS if name.startswith("late_")]
THEIRS = [name for name in TRUNKS if name not in OURS]
FAMILIES = [
    *OURS,
    "resnet18",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_32",
    "swin_t",
    "swin_v2_t",
]
DESIGNS = ["pixel merge", "feature merge", "tree merge"]
EVERYONE = torch.ones(4, dtype=torch.bool)
# Each family meets every design, and over the families every design meets every merge.
PAIRS = [
    (family, list(MERGES)[(row + column) % len(MERGES)], design)
    for row, family in enumerate(FAMILIES)
    for column, design in enumerate(DESIGNS)
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def images(name: str) -> Tensor:
    side = 224 if name.startswith("vit") else 32
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(5))


@functools.cache
@torch.no_grad()
def trunk(name: str) -> Trunk:
    """With weights that let every picture show: as built, some families start with next to nothing but zeros."""
    torch.manual_seed(3)
    built = Trunk(name, 2).eval()
    for key, parameter in built.classifier.named_parameters():
        if key.endswith("layer_scale"):
            parameter.fill_(0.5)
    built.classifier.get_submodule(built.head_module).weight.normal_(std=0.1)
    norms = [module for module in built.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    built.features(images(name))
    for hook in hooks:
        hook.remove()
    return built


def _take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
    # The scale of the whole layer: a channel that hardly varies would be blown up, and rounding with it.
    norm.running_var.fill_(inputs[0].square().mean())


@functools.cache
def trunk_as(name: str, dtype: torch.dtype) -> Trunk:
    return copy.deepcopy(trunk(name)).to(dtype)


@functools.cache
@torch.inference_mode()
def bare_logits(name: str, count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    net, x = trunk_as(name, dtype).classifier, images(name)[:count].to(dtype)
    if name not in OURS:
        return net(x)
    x = net.layer3(net.layer2(net.layer1(net.stem(x))))
    return net.fc(net.pool(x).flatten(1))


def near(logits_K: Tensor, expected_K: Tensor) -> bool:
    """For scores in float64: deep nets with weights of chance blow float32's rounding up to one percent of a score."""
    return bool((logits_K - expected_K).abs().max() < 1e-6 * (1 + expected_K.abs().max()))


def make(name: str, merge: str, design: str, dtype: torch.dtype = torch.float32) -> GroupNet:
    """Tests groups of four: (1, 4), or (1, 2, 4) in a tree."""
    cuts = trunk(name).cuts[1:]
    early, late = cuts[len(cuts) // 3], cuts[2 * len(cuts) // 3]
    points = {"pixel merge": (("pixels", 4),), "feature merge": ((early, 4),), "tree merge": ((early, 2), (late, 2))}
    merge_points = tuple(MergePoint(cut=cut, size=size) for cut, size in points[design])
    return GroupNet(trunk_as(name, dtype), merge_points, merge)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_groups_of_one_are_the_bare_classifier_bit_for_bit(name, merge, design):
    assert torch.equal(make(name, merge, design)(images(name)[:1], EVERYONE[:1], 1), bare_logits(name, 1))


@pytest.mark.parametrize(("name", "merge", "design"), PAIRS)
@torch.inference_mode()
def test_retests_are_tests_bit_for_bit(name, merge, design):
    net, x = make(name, merge, design), images(name)
    _, kept = net.test(x, EVERYONE, 4)
    # What a test has kept is what it saw: no later step has written into it.
    assert torch.equal(net.retest(kept.units[1], 1), bare_logits(name))
    if design == "tree merge":
        assert torch.equal(net.retest(kept.units[2], 2), net(x, EVERYONE, 2))


@pytest.mark.parametrize(("name", "merge", "design"), PAIRS)
@torch.inference_mode()
def test_members_can_change_places(name, merge, design):
    net, x = make(name, merge, design, torch.float64), images(name).double()
    # In a tree members may change places inside a part, and whole parts may.
    moved = x[[3, 2, 0, 1]] if design == "tree merge" else x[[2, 0, 3, 1]]
    other = torch.cat([x[:3], x[3:].flip(3)])
    score, score_moved, score_other = net(torch.cat([x, moved, other]), EVERYONE.repeat(3), 4)
    assert near(score_moved, score)
    assert not near(score_other, score)


@pytest.mark.parametrize(("name", "merge", "design"), PAIRS)
@torch.inference_mode()
def test_a_hole_equals_its_absence_whatever_its_pixels(name, merge, design):
    net, x = make(name, merge, design, torch.float64), images(name).double()
    nothing = torch.full_like(x, torch.nan)
    present = torch.tensor([True, False, False, False, True, True, True, False])
    alone, beside_nan = net(torch.cat([x[:1], nothing[:3], x[:3], nothing[:1]]), present, 4)
    beside_other = net(x, present[4:], 4)[0]
    assert near(alone, bare_logits(name, dtype=torch.float64)[0])
    assert near(beside_nan, beside_other)


@pytest.mark.parametrize(("name", "merge", "design"), PAIRS)
@torch.inference_mode()
def test_scores_are_finite_in_bfloat16(name, merge, design):
    net = make(name, merge, design, torch.bfloat16)
    logits = net(images(name).bfloat16(), torch.tensor([True, True, False, True]), 4)
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


@functools.cache
def without_numbers(name: str) -> Trunk:
    """On the meta device, where the largest is built in no time; as torchvision numbers it, of 1,000 categories."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        _let_regnets_compute_their_widths(patch)
        return Trunk(name, 1000)


def _let_regnets_compute_their_widths(patch: pytest.MonkeyPatch) -> None:
    from_init_params = regnet.BlockParams.from_init_params

    def on_the_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return from_init_params(*args, **kwargs)

    patch.setattr(regnet.BlockParams, "from_init_params", on_the_cpu)


@pytest.mark.parametrize("name", TRUNKS)
def test_segments_and_head_share_out_the_classifiers_parameters(name):
    built = without_numbers(name)
    shared_out = [id(parameter) for cut in built.cuts for parameter in built.segment_parameters(cut)]
    for step in built.spec.head:
        if isinstance(step, str):
            shared_out += map(id, built.classifier.get_submodule(step).parameters())
    assert sorted(shared_out) == sorted(map(id, built.classifier.parameters()))
    scores = built.classifier.get_submodule(built.head_module)
    assert isinstance(scores, nn.Linear) and scores.out_features == 1000


@pytest.mark.parametrize("name", THEIRS)
def test_the_state_dict_is_torchvisions_own(name):
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        _let_regnets_compute_their_widths(patch)
        theirs = get_model(name, weights=None, num_classes=1000).state_dict()
    ours = GroupNet(without_numbers(name)).state_dict()
    assert {key.removeprefix("trunk.classifier."): value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }


@pytest.mark.parametrize("name", THEIRS)
def test_segments_cost_what_torchvision_publishes_for_the_whole(name):
    weights = list(get_model_weights(name))[-1]
    costs = segment_gmac(GroupNet(without_numbers(name)), weights.transforms().crop_size[0])
    assert list(costs) == ["pixels", *TRUNKS[name].segments, "head"]
    assert costs["pixels"] == 0 and min(costs[cut] for cut in TRUNKS[name].segments) > 0
    assert sum(costs.values()) == pytest.approx(weights.meta["_ops"], abs=6e-4)  # published to three digits


@pytest.mark.parametrize("name", ["late_resnet", "resnet18"])
def test_pixels_are_normalised_as_the_weights_expect(name):
    pixels = torch.randint(0, 256, (2, 8, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    normalised = trunk(name).normalise(pixels)
    assert normalised.dtype == torch.float32 and normalised.is_contiguous(memory_format=torch.channels_last)
    planes = pixels.permute(0, 3, 1, 2)
    if name in OURS:
        assert torch.equal(normalised, (planes.float() - 127.5) / 64.0)
    else:
        theirs = functional.normalize(planes / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        assert torch.allclose(normalised, theirs, atol=1e-5)


@torch.inference_mode()
def test_a_trunk_of_fixed_size_says_so():
    with pytest.raises(ValueError, match="have 4 patches, but this trunk has positions for 49"):
        trunk("vit_b_32").features(torch.zeros(1, 3, 64, 64))
