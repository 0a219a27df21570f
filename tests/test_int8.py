"""Nets in int8 score nearly as their nets in floats do, wherever their groups merge, and alike on every processor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from safetensors.torch import load as load_safetensors

from models.card import ZOO, read_card
from models.group_net import GroupNet, MergePoint
from models.int8 import OnnxPiece, PieceTrunk, quantise
from models.training import TrainingConfig, score_groups
from models.weights import load_net, save_graphs, save_net
from pipeline.bench.scan import in_floats
from pipeline.errors import UsageError
from pipeline.plan import StageSpec
from pipeline.planning.job import PlanConfig, _check_nets
from pipeline.rivals.net import Classifier, preprocess
from pipeline.steps.nets import check_stage
from pipeline.steps.stages import GroupStage
from pipeline.training.calibrate import find_candidates
from pipeline.training.fit import TrainConfig
from pipeline.training.quantise import QuantiseConfig, run_quantise
from pipeline.window import Image, Window
from tests.test_folding import with_statistics
from tests.test_training import folder_per_class
from tests.test_training import net as two_categories

POINTS = (MergePoint(cut="stem", size=2), MergePoint(cut="layer1", size=2))
FAMILIES = {"resnet18": ("layer1", 64), "regnet_y_400mf": ("block1", 64)}
SLOW = {"convnext_tiny": ("features2", 64), "swin_t": ("features2", 224), "vit_b_32": ("encoder3", 224)}


def pictures(count: int, side: int = 32) -> np.ndarray:
    """Patches of an eighth of the side, each picture with a brightness and a contrast of its own."""
    rng = np.random.default_rng(1)
    shape = (count, 8, 8, 3)
    patches = rng.uniform(-1, 1, shape) * rng.uniform(20, 120, (count, 1, 1, 1)) + rng.uniform(
        40, 215, (count, 1, 1, 3)
    )
    return patches.clip(0, 255).astype(np.uint8).repeat(side // 8, axis=1).repeat(side // 8, axis=2)


def in_int8(net: GroupNet, pixels: np.ndarray) -> GroupNet:
    pieces = {end: OnnxPiece(graph) for end, graph in quantise(net, pixels).items()}
    return GroupNet(PieceTrunk(net.trunk.name, net.num_categories, pieces), net.merge_points, net.merge_name).eval()


@pytest.fixture(scope="module")
def nets() -> tuple[GroupNet, GroupNet]:
    """One in floats and the same in int8."""
    net = with_statistics("late_resnet_mini", POINTS).float()
    return net, in_int8(net, pictures(64))


def logits(net: GroupNet, pixels: np.ndarray, present: torch.Tensor, size: int) -> torch.Tensor:
    with torch.inference_mode():
        return net(net.trunk.normalise(torch.from_numpy(pixels)), present, size)


def agree(before: torch.Tensor, after: torch.Tensor, *, share: float) -> bool:
    """Whether logits differ in the mean by less than ``share`` of what tells pictures apart."""
    return float((before - after).abs().mean()) < share * float(before.std(dim=0).mean())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_size_scores_as_in_floats(nets, size):
    small = nets[1]
    others = pictures(80)[64:]
    everyone = torch.ones(16, dtype=torch.bool)
    before, after = (logits(which, others, everyone, size) for which in nets)
    assert after.shape == before.shape == (16 // size, 4) and small.group_sizes == (1, 2, 4)
    assert agree(before, after, share=0.25) and not torch.equal(before, after)


def test_what_a_test_keeps_is_retested_and_regrouped_as_in_floats(nets):
    net, small = nets
    everyone = torch.ones(16, dtype=torch.bool)
    with torch.inference_mode():
        for which in nets:
            assert set(which.test(which.trunk.normalise(torch.from_numpy(pictures(16))), everyone, 4)[1].units) == {
                1,
                2,
            }
        _, before = net.test(net.trunk.normalise(torch.from_numpy(pictures(16))), everyone, 4)
        _, after = small.test(torch.from_numpy(pictures(16)), everyone, 4)
        for part in (1, 2):
            assert agree(net.retest(before.units[part], part), small.retest(after.units[part], part), share=0.25)
        # Retested features are those of a fresh test of that size: no second rounding lies between.
        assert torch.equal(small.retest(after.units[1], 1), small(torch.from_numpy(pictures(16)), everyone, 1))
        again = small.regroup(after.units[1], everyone, 4)
        assert torch.equal(again, small(torch.from_numpy(pictures(16)), everyone, 4))


def test_pictures_that_merge_before_the_net_are_normalised_once():
    net = with_statistics("late_resnet_mini", (MergePoint(cut="pixels", size=2),)).float()
    small = in_int8(net, pictures(64))
    for size in (1, 2):
        before, after = (
            logits(which, pictures(80)[64:], torch.ones(16, dtype=torch.bool), size) for which in (net, small)
        )
        assert agree(before, after, share=0.25)


def test_a_hole_is_its_absence(nets):
    _, small = nets
    present = torch.tensor([True, False, True, True])
    one, other = pictures(4), pictures(4)
    other[1] = 255 - other[1]
    assert torch.equal(logits(small, one, present, 4), logits(small, other, present, 4))
    everyone = torch.ones(4, dtype=torch.bool)
    assert not torch.equal(logits(small, one, everyone, 4), logits(small, other, everyone, 4))


def test_a_score_depends_neither_on_the_batch_nor_on_the_threads(nets):
    net, _ = nets
    pixels = pictures(48)
    graphs = quantise(net, pictures(64))
    found = []
    before = torch.get_num_threads()
    try:
        for threads, batch in ((1, 48), (1, 4), (2, 16)):
            torch.set_num_threads(threads)
            pieces = {end: OnnxPiece(graph) for end, graph in graphs.items()}
            small = GroupNet(PieceTrunk(net.trunk.name, 4, pieces), net.merge_points, net.merge_name).eval()
            everyone = torch.ones(batch, dtype=torch.bool)
            parts = [logits(small, pixels[start : start + batch], everyone, 2) for start in range(0, 48, batch)]
            found.append(torch.cat(parts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_weights_have_seven_bits_so_that_no_processor_saturates(nets):
    """Two products of uint8 and seven bits add up to less than 2**15; of eight bits they need not."""
    net, _ = nets
    for graph in quantise(net, pictures(64)).values():
        tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(graph).graph.initializer]
        kernels = [tensor for tensor in tensors if tensor.dtype == np.int8 and tensor.ndim > 1]
        assert kernels and all(np.abs(kernel.astype(int)).max() <= 64 for kernel in kernels)


def check_family(name: str, cut: str, side: int) -> None:
    net = with_statistics(name, (MergePoint(cut=cut, size=2),)).float()
    # A head of zeros, as ViT's is before it learns, tells nothing apart.
    torch.nn.init.normal_(net.trunk.classifier.get_submodule(net.trunk.head_module).weight, std=0.1)
    small = in_int8(net, pictures(32, side))
    others, everyone = pictures(48, side)[32:], torch.ones(16, dtype=torch.bool)
    for size in (1, 2):
        before, after = (logits(which, others, everyone, size) for which in (net, small))
        # Weights of chance tell categories apart, but hardly any pictures: of them what is left must still be alike.
        assert float((before - after).abs().mean()) < 0.2 * float(before.std())
        centred = [(found - found.mean(dim=0)).flatten().double() for found in (before, after)]
        assert float(torch.corrcoef(torch.stack(centred))[0, 1]) > 0.8


@pytest.mark.parametrize("name", FAMILIES)
def test_other_trunks(name):
    check_family(name, *FAMILIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_trunks_with_attention_and_large_kernels(name):
    check_family(name, *SLOW[name])


@pytest.fixture(scope="module")
def saved(nets, tmp_path_factory) -> tuple[Path, Path]:
    """Cards of both nets."""
    folder = tmp_path_factory.mktemp("nets")
    net, _ = nets
    told = {"categories": ("a", "b", "c", "d"), "input_size": 32, "facts": {}}
    card = save_net(net, folder, "floats", **told)
    save_graphs(quantise(net, pictures(64)), folder, "small", source=card, facts={})
    return folder / "floats.json", folder / "small.json"


def stage(model: Path, **changes) -> StageSpec:
    spec = {
        "name": "groups", "model": str(model), "rounds": (4, 2, 1), "input_size": 32,
        "thresholds": dict.fromkeys("abcd", (0.4, 0.45, 0.5)),
    }  # fmt: skip
    return StageSpec(**spec | changes)


def test_a_stage_runs_it_and_tells_the_same_cost(nets, saved):
    """Verdicts of the stage are those of the net alone: a threshold between its scores parts them."""
    _, small = nets
    pixels = pictures(24)
    scores_NK = score_groups(small, pixels, np.arange(24)[:, None])
    threshold = float(np.sort(scores_NK[:, 0])[12])
    never = dict.fromkeys("bcd", (1.0,))
    spec = stage(saved[1], rounds=(1,), thresholds={"a": (threshold,)} | never)
    images = [Image(image_id=f"{n:032x}", uri=f"file:///{n}") for n in range(24)]
    window = Window(shard=0, window=0, first_ordinal=0, images=images)
    window.pixels = pixels
    GroupStage(spec, tuple("abcd"), final=True)([window])
    flagged = [image.outcome == "flagged" for image in images]
    expected = (scores_NK[:, 0] >= threshold) | (scores_NK[:, 1:] >= 1.0).any(axis=1)
    assert flagged == expected.tolist() and sum(flagged) == 12
    costs = [GroupStage(stage(model), tuple("abcd"), final=False).cost for model in saved]
    assert costs[0] == costs[1] and costs[0].rounds[0] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_size": 48}, "input_size is 48.*pictures of 32 pixels: give input_size 32"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16.*give dtype float32"),
        ({"num_gpus": 0.5}, "num_gpus is 0.5.*give num_gpus 0, or the model that it was made of"),
    ],
)
def test_a_stage_that_it_cannot_serve_is_refused(saved, changes, words):
    card = read_card(str(saved[1]))
    check_stage(stage(saved[1]), tuple("abcd"), card)
    with pytest.raises(ValueError, match=words):
        check_stage(stage(saved[1], **changes), tuple("abcd"), card)


def test_calibration_takes_it_at_its_own_size_and_on_cpus(saved):
    model = str(saved[1])
    _, found = find_candidates([model])
    assert [candidate.name for candidate in found] == ["small@32", "small@32x2", "small@32x4"]
    assert found[0].gmac == find_candidates([str(saved[0])])[1][0].gmac
    with pytest.raises(UsageError, match="leave out @48, or give the model"):
        find_candidates([f"{model}@48"])
    with pytest.raises(UsageError, match="leave out --gpu, or give the model"):
        find_candidates([model], gpu=True)


def test_it_neither_learns_nor_teaches(saved):
    told = {"name": "x", "labels": ("y",), "categories": tuple("abcd"), "trunk": "late_resnet_mini", "input_size": 32}
    with pytest.raises(UsageError, match="a net in int8, which cannot learn"):
        TrainConfig(**told, init=str(saved[1])).build_net()
    teaching = TrainingConfig(distillation=0.5)
    with pytest.raises(UsageError, match=r"teacher .* is a net in int8: give the one it was made of"):
        TrainConfig(**told, teacher=str(saved[1]), training=teaching).load_teacher()
    assert TrainConfig(**told, teacher=str(saved[0]), training=teaching).load_teacher() is not None


def test_rivals_test_with_the_net_that_it_was_made_of(saved, tmp_path):
    floats, small = map(str, saved)
    assert in_floats(floats) == in_floats(small) == floats
    assert in_floats("emblem-mini-int8") == in_floats("emblem-mini") == "emblem-mini"
    for path in saved[1].parent.glob("small.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "floats.json").write_text(saved[0].read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(UsageError, match="say with --net what template and loader test with"):
        in_floats(str(tmp_path / "small.json"))


@pytest.mark.parametrize("which", [0, 1])
def test_a_rival_scores_as_the_net_does(nets, saved, which):
    pixels = pictures(8)
    seen = torch.stack([preprocess(str(saved[which]), 32)(picture) for picture in pixels])
    expected = score_groups(nets[which], pixels, np.arange(8)[:, None])[:, 1:3]
    scores = Classifier(str(saved[which]), ["b", "c"], threads=torch.get_num_threads(), device="cpu")(seen)
    assert np.allclose(scores.numpy(), expected, atol=2e-3)


def test_plans_for_gpus_have_none(saved):
    plan = SimpleNamespace(stages=[stage(saved[0]), stage(saved[1])])
    config = PlanConfig(scores="s.parquet", prevalence=("0.01",), gpus=1)
    with pytest.raises(UsageError, match=r"--gpus 1: the best plan has .*small.json', a net in int8, for CPUs"):
        _check_nets(config, plan)
    _check_nets(replace(config, gpus=0), plan)
    _check_nets(config, SimpleNamespace(stages=[stage(saved[0]), stage(saved[1].with_name("gone.json"))]))


def test_a_batch_without_memory_is_told_as_such():
    piece = OnnxPiece(b"")
    piece.__dict__["_session"] = SimpleNamespace(run=_fails_with("Failed to allocate memory for requested buffer"))
    with pytest.raises(torch.OutOfMemoryError, match="Failed to allocate"):
        piece(torch.zeros(1))
    piece.__dict__["_session"] = SimpleNamespace(run=_fails_with("invalid node"))
    with pytest.raises(RuntimeException, match="invalid node"):
        piece(torch.zeros(1))


def _fails_with(words: str):
    def run(*_):
        raise RuntimeException(words)

    return run


def onnx_texts(weights: Path) -> bytes:
    """What notes stand in the graphs: docs and metadata, of which there are to be none."""
    found = b""
    for graph in load_safetensors(weights.read_bytes()).values():
        model = onnx.load_from_string(graph.numpy().tobytes())
        for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
            found += part.doc_string.encode() + str(list(part.metadata_props)).encode()
    return found.replace(b"[]", b"")


@pytest.mark.parametrize("name", ["emblem-int8", "emblem-mini-int8"])
def test_shipped_graphs_tell_nothing_of_the_machine_that_made_them(name):
    assert onnx_texts(ZOO / f"{name}.safetensors") == b""


def test_a_changed_graph_is_refused(saved, tmp_path):
    for path in saved[1].parent.glob("small.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    body = bytearray((tmp_path / "small.safetensors").read_bytes())
    body[-100] ^= 1
    (tmp_path / "small.safetensors").write_bytes(body)
    with pytest.raises(ValueError, match="has sha256"):
        load_net(str(tmp_path / "small.json"))


def test_the_job_makes_one_and_says_how_far_it_is_from_its_net(tmp_path, ray_session):
    told = {"name": "floats", "categories": ("a", "b"), "input_size": 32, "facts": {}}
    save_net(two_categories().eval(), tmp_path, **told)
    told = {
        "name": "made", "model": str(tmp_path / "floats.json"), "pictures": 40, "redraws": 1,
        "labels": (str(folder_per_class(tmp_path / "data", 120)),), "output": tmp_path / "zoo",
        "cache": tmp_path / "cache",
    }  # fmt: skip
    said: list[str] = []
    made = run_quantise(QuantiseConfig(**told), said.append)
    facts = json.loads((tmp_path / "zoo" / "made.json").read_text())["facts"]
    assert facts["ranges"]["pictures"] == 40 and facts["validation"]["pictures"] == 80
    assert facts["scores"]["pictures"] == 80 and 0 < facts["scores"]["mean_difference"] < 0.1
    assert [row["group_size"] for row in facts["measured"]] == [row["group_size"] for row in made.before]
    net, card = load_net(str(tmp_path / "zoo" / "made.json"))
    assert card == made.card and net.group_sizes == (1, 2, 4) and card.int8
    assert card.made_of == read_card(told["model"]).version and card.segment_gmac
    assert onnx_texts(tmp_path / "zoo" / "made.safetensors") == b""
    assert said == ["ranges of 40 pictures, 80 others judge"]
    for changes, words in (
        ({"model": str(tmp_path / "zoo" / "made.json")}, "is a net in int8 already"),
        ({"model": "nonesuch"}, "nonesuch"),
        ({"pictures": 120}, "120 pictures, of which 120 are for ranges"),
        ({"pictures": 100}, "a half of the 20 pictures that measure a net has 0 with [ab]"),
        ({"name": "floats", "output": tmp_path}, "is that of the net in floats, which it would replace"),
    ):
        with pytest.raises(UsageError, match=words):
            run_quantise(QuantiseConfig(**told | changes), said.append)
    with pytest.raises(UsageError, match="at least 32"):
        QuantiseConfig(**told | {"pictures": 8})
