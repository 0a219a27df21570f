"""The benchmark of group testing nets: mixing equals scanning, thresholds never see what they are judged on."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from PIL import Image

from jobs.benchmark import COMMANDS
from jobs.cli import run_command
from models.backbone import Trunk
from models.group_net import GroupNet, MergePoint
from models.weights import load_net, save_net
from pipeline.bench.group_plans import ALGORITHMS, Fitting, Net, group_threshold, load_nets, make_entries
from pipeline.bench.models import ModelsConfig, bench_models, plot_models
from pipeline.bench.prevalence import Effort, Judge, Judged, StageRun
from pipeline.errors import UsageError
from pipeline.labels.examples import LabelledPictures, split_off
from pipeline.labels.splits import LabelledPixels, read_splits
from pipeline.plan import Plan, StageSpec, WindowSpec, load_plan, parse_plan
from pipeline.planning.calibration import highest_keeping
from pipeline.steps.stages import GroupStage
from pipeline.window import Image as WindowImage
from pipeline.window import Window

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32


def draw(positive: bool, rng: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """Noise over a grey of its own; a positive has a bright red patch, smaller or larger."""
    picture = rng.integers(40, 120) + rng.integers(0, 60, (side, side, 3))
    if positive:
        reach, top, left = rng.integers(side // 4, side * 3 // 4), rng.integers(side // 2), rng.integers(side // 2)
        picture[top : top + reach, left : left + reach] = (250, 10, 10)
    return picture.astype(np.uint8)


def drawn(positives: int, negatives: int, seed: int, side: int = SIDE) -> LabelledPixels:
    rng = np.random.default_rng(seed)
    positive_N = np.arange(positives + negatives) < positives
    return LabelledPixels(
        pixels_NSS3=np.stack([draw(bool(positive), rng, side) for positive in positive_N]), positive_N=positive_N
    )


def write_tar(path: Path, train: int = 40, test: int = 16, classes: tuple[str, ...] = CLASSES) -> Path:
    rng = np.random.default_rng(5)
    with tarfile.open(path, "w:xz", preset=0) as archive:
        for part, count in (("train", train), ("test", test)):
            for name in classes:
                for number in range(count):
                    body = io.BytesIO()
                    Image.fromarray(draw(name == "automobile", rng)).save(body, "JPEG", quality=95)
                    member = tarfile.TarInfo(f"{part}/{name}/{number:04}.jpg")
                    member.size = len(body.getvalue())
                    archive.addfile(member, io.BytesIO(body.getvalue()))
    return path


def make_net(folder: Path, name: str, points: tuple[tuple[str, int], ...] = (), side: int = SIDE, seed: int = 2) -> str:
    """A net that was never trained, its head turned and scaled so that red patches score higher."""
    torch.manual_seed(seed)
    net = GroupNet(
        Trunk("late_resnet_mini", 2), tuple(MergePoint(cut=cut, size=size) for cut, size in points), "max"
    ).eval()
    seen = drawn(20, 60, 77, side)
    x = net.trunk.normalise(torch.from_numpy(seen.pixels_NSS3))
    with torch.no_grad():
        features = net.trunk.classifier.pool(net.trunk.features(x)).flatten(1)
        apart = features[:20].mean(0) - features[20:].mean(0)
        logits = features @ apart
        net.trunk.classifier.fc.weight.copy_(torch.stack([torch.zeros_like(apart), apart / logits.std()]))
        net.trunk.classifier.fc.bias.copy_(torch.tensor([0.0, float(-logits.mean() / logits.std()) - 1]))
    save_net(net, folder, name, categories=("truck", "automobile"), input_size=side, facts={})
    return str(folder / f"{name}.json")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    make_net(folder, "cifar-single")
    make_net(folder, "cifar-mini", seed=3)
    make_net(folder, "cifar-pixel", (("stem", 4),))
    make_net(folder, "cifar-feature", (("layer1", 4),))
    make_net(folder, "cifar-tree", (("stem", 2), ("layer1", 2)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar(tmp_path_factory.mktemp("data") / "tiny.tar.xz")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command("jobs.benchmark", COMMANDS)
    return ended.value.code


def test_the_command_line_compares_every_algorithm_with_every_design(zoo, data, tmp_path, monkeypatch, capsys):
    file, plans = tmp_path / "out" / "models.json", tmp_path / "plans"
    arguments = ("--zoo", zoo, "--json", file, "--plans", plans, "--prevalences", 0.01, 0.05)
    arguments += ("--target-recall", 0.9, "--passes", 1, "--redraws", 2)
    assert run(monkeypatch, "models", "--data", data, *arguments) == 0
    shown = capsys.readouterr().out
    assert "prevalence 1.000%" in shown and "prevalence 5.000%" in shown
    assert "tree merge" in shown and "one-round, retested" in shown

    result = json.loads(file.read_text())
    assert result["benchmark"] == "models"
    assert result["machine"]["cpus"] >= 1 and result["machine"]["torch_threads"] == 1
    assert set(result["versions"]) >= {"python", "torch"}
    assert (result["positives"], result["negatives"]) == (16, 144)
    rows = [row for row in result["rows"] if row["prevalence"] == 0.01]
    assert len(result["rows"]) == 2 * len(rows)
    assert [row["name"] for row in rows] == [
        "cifar-single", "cifar-mini", "cifar-mini-1-1",
        "cifar-pixel-4-1", "cifar-pixel-4-1-1", "cifar-pixel-4x2", "cifar-pixel-4x2-1",
        "cifar-feature-4-1", "cifar-feature-4-1-1", "cifar-feature-4x2", "cifar-feature-4x2-1",
        "cifar-tree-4-1", "cifar-tree-4-2-1-1", "cifar-tree-4x2", "cifar-tree-4x2-1",
    ]  # fmt: skip
    single = rows[0]
    assert single["relative_cost"] == single["relative_recall"] == single["tests_per_image"] == 1
    for row in rows:
        plan = parse_plan(row["plan"], row["name"])
        assert load_plan(str(plans / f"{row['name']}.yaml")) == plan and plan.version == row["plan_version"]
        assert row["recall_interval"][0] <= row["recall"] <= row["recall_interval"][1]
        assert row["relative_cost"] == pytest.approx(row["gmac_per_image"] / single["gmac_per_image"])
        assert row["relative_recall"] == pytest.approx(row["recall"] / single["recall"])
        assert row["images_per_s"] == pytest.approx(1000 / row["seconds_per_1000_images"])
        if row["rounds"][-1] == 1 and row["name"] != "cifar-mini":
            # The individual net stands behind every group and the cascade: it cannot flag more than alone.
            assert row["recall"] <= single["recall"] + 1e-9
            assert row["false_positive_rate"] <= single["false_positive_rate"] + 1e-9
    by_name = {row["name"]: row for row in rows}
    assert by_name["cifar-tree-4x2"]["tests_per_image"] == pytest.approx(0.5)
    assert by_name["cifar-tree-4-2-1-1"]["rounds"] == [4, 2, 1, 1]
    assert by_name["cifar-mini-1-1"]["tests_per_image"] > 1
    more = {row["name"]: row for row in result["rows"] if row["prevalence"] == 0.05}
    assert more["cifar-tree-4-1"]["tests_per_image"] > by_name["cifar-tree-4-1"]["tests_per_image"]


def test_mistakes_are_one_line_and_exit_2(zoo, data, tmp_path, monkeypatch, capsys):
    def expect(*arguments: object, words: tuple[str, ...]) -> None:
        assert run(monkeypatch, *arguments) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.strip()]
        assert len(lines) == 1, captured.err
        for word in words:
            assert word in lines[0]

    expect(words=("give one of capacity, decode, fetch, models",))
    expect("modles", words=("'modles'", "give one of capacity, decode, fetch, models"))
    expect("models", words=("--data",))
    expect("models", "--data", tmp_path / "none.tar", "--zoo", zoo, words=("none.tar", "No such file"))
    expect("models", "--data", data, "--zoo", tmp_path, words=("cifar-single", "is missing"))
    expect("models", "--data", data, "--zoo", zoo, "--nets", "cifar-dog", words=("cifar-dog", "cifar-tree"))
    expect("models", "--data", data, "--zoo", zoo, "--category", "truck", "--prevalences", "2", words=("prevalences",))
    expect("models", "--data", data, "--zoo", zoo, "--category", "frog", words=("truck", "'frog'"))
    noise = tmp_path / "noise.tar"
    noise.write_bytes(b"no tar at all" * 100)
    expect("models", "--data", noise, "--zoo", zoo, words=("noise.tar", "neither"))
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(data.read_bytes()[:-20_000])
    expect("models", "--data", cut, "--zoo", zoo, words=("cut.tar.xz", "whole tar"))
    others = write_tar(tmp_path / "others.tar.xz", 2, 2, ("cat", "dog"))
    expect("models", "--data", others, "--zoo", zoo, words=("train/automobile/", "cat, dog"))


def test_a_folder_and_a_tar_give_the_same_pictures_held_out_by_name(data, tmp_path):
    with tarfile.open(data) as archive:
        archive.extractall(tmp_path, filter="data")
        names = [name for name in archive.getnames() if name.startswith("train/")]
    held, judged = read_splits(data, "automobile", SIDE)
    for mine, other in zip((held, judged), read_splits(tmp_path, "automobile", SIDE), strict=True):
        assert np.array_equal(mine.pixels_NSS3, other.pixels_NSS3)
        assert np.array_equal(mine.positive_N, other.positive_N)
    # A training that reads the folder elsewhere keeps the same ones from the net.
    uris = [f"/elsewhere/{name}" for name in names]
    _, kept = split_off(LabelledPictures(uris=uris, labels_NK=np.ones((len(uris), 1), dtype=bool)), 0.1)
    assert len(held.positive_N) == len(kept.uris) and len(judged.positive_N) == 160
    assert held.positive_N.sum() == sum("/automobile/" in uri for uri in kept.uris)


def test_thresholds_follow_the_pictures_they_are_given(zoo, data):
    held, judged = read_splits(data, "automobile", SIDE)
    fitting = Fitting(category="automobile", target_recall=0.9, kept_share=0.99, redraws=4, seed=1)
    nets = load_nets(zoo, ("cifar-tree",), "automobile")

    def thresholds(pictures: LabelledPixels) -> list[tuple[float, ...]]:
        entries = make_entries(fitting, nets, pictures)
        return [stage.thresholds["automobile"] for entry in entries for stage in entry.plan.stages]

    # Were test/ looked at, the next test would notice: other pictures give other thresholds.
    assert thresholds(held) == thresholds(held)
    assert all(mine != other for mine, other in zip(thresholds(held), thresholds(judged), strict=True))


def test_other_test_pictures_change_no_threshold(zoo, data, tmp_path):
    folder = tmp_path / "pictures"
    with tarfile.open(data) as archive:
        archive.extractall(folder, filter="data")
    cars, cats = folder / "test/automobile", folder / "test/cat"
    quick = {"zoo": zoo, "nets": ("cifar-tree",), "prevalences": (0.01,), "passes": 1, "redraws": 1}
    before = bench_models(ModelsConfig(data=folder, **quick), lambda line: None)
    cars.rename(folder / "swap")
    cats.rename(cars)
    (folder / "swap").rename(cats)
    after = bench_models(ModelsConfig(data=folder, **quick), lambda line: None)
    assert [row["plan"] for row in after["rows"]] == [row["plan"] for row in before["rows"]]
    assert after["rows"][0]["recall"] < before["rows"][0]["recall"]


def test_the_plot_has_every_net_at_the_first_prevalence(tmp_path):
    def row(net: str, prevalence: float, *rounds: int, groupings: int = 1) -> dict:
        told = {"net": net, "prevalence": prevalence, "rounds": rounds, "groupings": groupings}
        rate = (0.3, 0.4) if groupings == 2 else (0.01, 0.02)
        told |= {"recall": 1.0000000000000002, "recall_interval": (0.95, 1.0), "false_positive_rate_interval": rate}
        return told | {"relative_cost": 1 / rounds[0]}

    rows = [row("single", 0.001, 1), row("tree", 0.001, 4, 2), row("tree", 0.001, 4, groupings=2), row("late", 0.01, 8)]
    with rc_context({"svg.fonttype": "none"}):
        plot_models(tmp_path / "new" / "models.svg", {"rows": rows})
    drawn = (tmp_path / "new" / "models.svg").read_text()
    words = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert {"single", "tree", "4 &gt; 2", "2 x 4"} <= set(words) and not {"late", "8"} & set(words)
    assert words.count("1") == 2, "individual testing, and the tick below it"
    assert any(word.startswith("prevalence 0.1%") for word in words)
    markers = re.findall(r'<use [^>]*style="fill: (#[0-9a-f]{6}); stroke: (#[0-9a-f]{6})"', drawn)
    # Three rows, one of them with more false positives, and the legend's two nets.
    assert [fill == stroke for fill, stroke in markers] == [True, True, False, True, True]
    with pytest.raises(UsageError, match="cannot write"):
        plot_models(tmp_path / "new" / "models.svg" / "below.svg", {"rows": rows})


def test_the_highest_threshold_that_keeps_a_share():
    scores = np.arange(20) / 20
    assert highest_keeping(scores, 0.95) == scores[1]
    assert highest_keeping(scores, 0.96) == scores[0]
    assert highest_keeping(scores, 1.0) == scores[0]
    assert highest_keeping(scores, 0.001) == scores[19]
    for share in (0.3, 0.5, 0.7, 0.9, 0.99):
        threshold = highest_keeping(scores, share)
        assert (scores >= threshold).mean() >= share > (scores > threshold).mean()


def test_two_groupings_ask_for_less_of_each(zoo):
    held = drawn(12, 120, 4)
    fitting = Fitting(category="automobile", target_recall=0.9, kept_share=0.9, redraws=6, seed=1)
    net = load_nets(zoo, ("cifar-feature",), "automobile")["cifar-feature"]
    once, twice = (group_threshold(fitting, net, held, held.positive_N, 4, groupings) for groupings in (1, 2))
    assert twice < once


def stage_run(groupings: int) -> StageRun:
    """Negatives pass in 1 of 4 clean, 3 of 4 hosted appearances; in both groups hosted always."""
    companions = [0] * 4 + [1] * 4 + ([2] * 2 if groupings == 2 else [])
    passed = [1, 0, 0, 0, 1, 1, 1, 0] + ([1, 1] if groupings == 2 else [])
    return StageRun(
        size=4,
        groupings=groupings,
        negative_A=np.arange(len(passed)),
        companions_A=np.array(companions),
        negative_passed_A=np.array(passed, dtype=bool),
        positive_A=np.array([50, 50, 50, 51]),
        positive_passed_A=np.array([True, True, False, False]),
        clean=Effort(0.25, 1.0, 2.0),
        hosted=Effort(0.75, 3.0, 2.0),
    )


def test_mixing_by_hand():
    one = stage_run(1)
    share = 1 - 0.9**3
    weights = one.negative_weights(0.1)
    assert weights.sum() == pytest.approx(1)
    assert weights @ one.negative_passed_A == pytest.approx((1 - share) / 4 + share * 3 / 4)
    two = stage_run(2)
    passed = (1 - share) ** 2 / 4 + 2 * share * (1 - share) * 3 / 4 + share**2
    assert two.negative_weights(0.1) @ two.negative_passed_A == pytest.approx(passed)
    # A positive that was hosted three times counts no more than one hosted once.
    assert one.positive_weights() @ one.positive_passed_A == pytest.approx((2 / 3 + 0) / 2)
    hosted = 1 - 0.9**4
    assert one.effort(0.1) == pytest.approx((0.25 + 0.5 * hosted, 1 + 2 * hosted, 2))


def scan_directly(plan: Plan, pictures: LabelledPixels, prevalence: float, windows: int) -> dict[str, np.ndarray]:
    """Of pictures drawn as they would come: per window the tests, the GMAC, and what was flagged of which."""
    rng = np.random.default_rng(12)
    count = plan.window.images
    positive_VW = rng.random((windows, count)) < prevalence
    chosen_VW = rng.choice(np.flatnonzero(~pictures.positive_N), (windows, count))
    chosen_VW[positive_VW] = rng.choice(np.flatnonzero(pictures.positive_N), int(positive_VW.sum()))
    scanned = [
        Window(
            shard=0,
            window=number,
            first_ordinal=number * count,
            images=[WindowImage(image_id=str(place), uri="") for place in range(count)],
            pixels=pictures.pixels_NSS3[chosen_W],
        )
        for number, chosen_W in enumerate(chosen_VW)
    ]
    for number, spec in enumerate(plan.stages):
        scanned = GroupStage(spec, plan.categories, final=number == len(plan.stages) - 1)(scanned)
    flagged_VW = np.array([[image.outcome == "flagged" for image in window.images] for window in scanned])
    return {
        "tests": np.array([sum(work.tests for work in window.work) for window in scanned]),
        "gmac": np.array([sum(work.gmac for work in window.work) for window in scanned]),
        "images": np.full(windows, count),
        "hits": (flagged_VW & positive_VW).sum(axis=1),
        "positives": positive_VW.sum(axis=1),
        "false": (flagged_VW & ~positive_VW).sum(axis=1),
        "negatives": (~positive_VW).sum(axis=1),
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("small")
    return {
        "single": make_net(folder, "single", side=16),
        "tree": make_net(folder, "tree", (("stem", 2), ("layer1", 2)), side=16),
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_mixing_agrees_with_a_direct_scan(small, algorithm):
    prevalence = 0.05
    pictures = drawn(60, 600, 9, side=16)
    # Low enough for false positives to compare.
    fitting = Fitting(category="automobile", target_recall=0.95, kept_share=0.95, redraws=2, seed=3)
    rounds = (4, 2, 1) if algorithm.all_sizes else (4,)

    def threshold(model: str, size: int) -> float:
        net, card = load_net(model)
        return group_threshold(
            fitting, Net(model=model, net=net, card=card, column=1), pictures, pictures.positive_N, size, 1
        )

    group = StageSpec(
        name="group",
        model=small["tree"],
        rounds=rounds,
        groupings=algorithm.groupings,
        thresholds={"automobile": tuple(threshold(small["tree"], size) for size in rounds)},
        input_size=16,
        batch_images=256,
        windows_per_call=16,
    )
    single = StageSpec(
        name="single",
        model=small["single"],
        rounds=(1,),
        thresholds={"automobile": (threshold(small["single"], 1),)},
        input_size=16,
        windows_per_call=16,
    )
    plan = Plan(
        name="mixed",
        categories=("automobile",),
        window=WindowSpec(images=64),
        stages=(group, single) if algorithm.retest else (group,),
    )
    judge = Judge(pictures.pixels_NSS3, pictures.positive_N, passes=12, redraws=8, seed=1, threads=1)
    scanned = scan_directly(plan, pictures, prevalence, windows=150)

    def deviations(judged: Judged) -> dict[str, float]:
        """In standard errors of the scan's ratios, over windows."""
        pairs = {
            "recall": (judged.recall, "hits", "positives"),
            "fpr": (judged.false_positive_rate, "false", "negatives"),
            "tests": (judged.effort.tests, "tests", "images"),
            "gmac": (judged.effort.gmac, "gmac", "images"),
        }
        found = {}
        for name, (mixed, part, whole) in pairs.items():
            ratio = scanned[part].sum() / scanned[whole].sum()
            residual_V = scanned[part] - ratio * scanned[whole]
            error = residual_V.std() / np.sqrt(len(residual_V)) / scanned[whole].mean()
            found[name] = abs(mixed - ratio) / max(error, 1e-6 * ratio)
        return found

    found = deviations(judge.judge(plan, prevalence))
    assert scanned["false"].sum() > 20
    assert max(found.values()) < 4, found
    # The comparison can tell: without hosted groups in the mixture it fails.
    assert max(deviations(judge.judge(plan, 1e-9)).values()) > 4


def test_a_plan_that_groups_survivors_is_refused(small):
    group = {"model": small["tree"], "rounds": (4,), "thresholds": {"automobile": (0.3,)}, "input_size": 16}
    stages = tuple(StageSpec(name=name, **group) for name in ("first", "second"))
    plan = Plan(name="twice", categories=("automobile",), window=WindowSpec(images=64), stages=stages)
    pictures = drawn(4, 40, 1, side=16)
    judge = Judge(pictures.pixels_NSS3, pictures.positive_N, passes=1, redraws=1, seed=1, threads=1)
    with pytest.raises(ValueError, match="'second' has rounds"):
        judge.judge(plan, 0.01)


@pytest.mark.parametrize(("groupings", "companions"), [(1, {0, 1}), (2, {0, 1, 2})])
def test_each_positive_is_hosted_often_enough_and_alone(small, groupings, companions):
    pictures = drawn(7, 80, 1, side=16)
    group = StageSpec(
        name="group",
        model=small["tree"],
        rounds=(4,),
        groupings=groupings,
        thresholds={"automobile": (0.3,)},
        input_size=16,
    )
    plan = Plan(name="one", categories=("automobile",), window=WindowSpec(images=32), stages=(group,))
    run = Judge(pictures.pixels_NSS3, pictures.positive_N, passes=2, redraws=5, seed=1, threads=1).run(plan, group)
    pictured, times = np.unique(run.positive_A, return_counts=True)
    assert pictured.tolist() == list(range(7)) and times.min() >= 5
    assert set(run.companions_A.tolist()) == companions
    clean = 2 * (80 // 32 * 32)
    assert not run.companions_A[:clean].any()
    if groupings == 1:
        # One positive in each group: three negatives to one, all of them beside it.
        assert len(run.companions_A) - clean == 3 * len(run.positive_A) and run.companions_A[clean:].all()
