"""From labels to a plan that scans: the file of scores, the job that plans, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.stats import binom

from pipeline.errors import UsageError
from pipeline.flow import pools
from pipeline.labels.examples import LabelledPictures, read_labelled
from pipeline.plan import load_plan
from pipeline.planning.field import Field
from pipeline.planning.file import to_plan
from pipeline.planning.job import PlanConfig, plan_from_scores
from pipeline.planning.padding import holes, padding
from pipeline.planning.proposal import Request, propose
from pipeline.planning.routes import routes
from pipeline.planning.scores import (
    HALVES,
    Arrangement,
    Candidate,
    Scores,
    read_scores,
    scores_bytes,
    to_logits,
    to_scores,
)
from pipeline.steps.layout import padded, windows_per_call
from pipeline.training.blocks import draw_blocks, find_versions, split
from pipeline.training.calibrate import CalibrateConfig, find_candidates, read_pictures, run_calibrate
from tests.simulated import PREVALENCE, World, calibrate

WANTED = {"prevalence": ("0.005",), "recall": ("0.9",), "cpus": 2.0}


@pytest.fixture(scope="module")
def scores() -> Scores:
    return calibrate(World(11), 300, 6000)


@pytest.fixture(scope="module")
def scores_file(scores: Scores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.parquet"
    path.write_bytes(scores_bytes(scores))
    return path


def test_a_file_of_scores_is_read_as_it_was_written(scores, scores_file):
    found = read_scores(str(scores_file))
    assert found.candidates == scores.candidates and found.categories == scores.categories
    assert found.uris == scores.uris
    for name in ("labels_NK", "half_N", "cluster_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(scores, name))
    for name, scores_NK in scores.single.items():
        np.testing.assert_array_equal(found.single[name], scores_NK.astype(np.float32))
    assert len(found.arrangements) == len(scores.arrangements) == 3
    for mine, theirs in zip(found.arrangements, scores.arrangements, strict=True):
        assert (mine.screen, mine.screen_thresholds) == (theirs.screen, theirs.screen_thresholds)
        np.testing.assert_array_equal(mine.image_BL, theirs.image_BL)
        for name, scores_BGK in theirs.scores.items():
            np.testing.assert_array_equal(mine.scores[name], scores_BGK.astype(np.float32))
    table = pq.read_table(scores_file)
    assert set(table["half"].unique().to_pylist()) == set(HALVES)


def test_a_plan_is_written_with_its_reasons_and_loads(scores_file, tmp_path):
    output = tmp_path / "found.yaml"
    planned = plan_from_scores(PlanConfig(scores=str(scores_file), output=output, cost="seconds", **WANTED))
    plan = load_plan(str(output))
    assert plan == planned.plan
    chosen = planned.proposal.chosen
    assert [size for stage in plan.stages for size in stage.rounds] == [step.size for step in chosen.route.steps]
    written = [value for stage in plan.stages for value in stage.thresholds["a"]]
    certified = to_scores(chosen.thresholds_SK[:, 0])
    assert (np.array(written) <= certified).all(), "rounding must not lose a positive"
    np.testing.assert_allclose(written, certified, rtol=2e-5)
    assert plan.certificate is not None
    assert plan.certificate.recall["a"] >= 0.9 and plan.certificate.prevalence == {"a": 0.005}
    assert plan.fused is not None and plan.fused.num_cpus == 1, "without GPUs an actor does all of it"
    page = output.with_suffix(".md").read_text()
    for words in ("recall certified", f"{plan.certificate.recall['a']:.4f}", chosen.route.name, "Groups pay"):
        assert words in page
    for picture in ("found-cost-recall.svg", "found-cost-prevalence.svg"):
        assert picture in page and (tmp_path / picture).read_text().startswith("<?xml")


def test_what_a_proposal_says_is_of_the_certifying_half(scores):
    asked = Request(recall_K=(0.9,), confidence=0.95, prevalence=PREVALENCE, max_fpr=0.01)
    proposal = propose(scores, asked)
    chosen, request = proposal.chosen, proposal.request
    held = Field(scores, chosen.route, "certify", request.prevalence)
    assert chosen.spent.cost == held.spend(chosen.thresholds_SK).cost
    assert list(chosen.recall_K) == held.recalls(chosen.thresholds_SK)
    # The bound holds on the first draw of each unique positive, which is what it was computed from.
    (draws,) = held.draws
    passed_P = draws.passed_D(chosen.thresholds_SK[:, 0])[draws.first_P]
    assert len(passed_P) == proposal.positives_K[0]
    assert passed_P.mean() >= proposal.bound_K[0]


def test_groups_that_do_not_pay_are_left_out_and_it_says_so(scores, tmp_path):
    """With a cheap net that errs little there is nothing for groups to save."""
    positive_N = scores.labels_NK[:, 0]
    rng = np.random.default_rng(2)
    sharp_NK = to_scores(np.where(positive_N, 3, -7) + rng.normal(size=len(positive_N)))[:, None]
    path = tmp_path / "sharp.parquet"
    path.write_bytes(scores_bytes(replace(scores, single={**scores.single, "mini": sharp_NK.astype(np.float32)})))
    planned = plan_from_scores(PlanConfig(scores=str(path), output=tmp_path / "sharp.yaml", **WANTED))
    assert planned.proposal.chosen.route.size == 1
    assert "**Grouping does not pay here**" in (tmp_path / "sharp.md").read_text()


def test_a_cheaper_plan_of_the_other_kind_that_was_not_certified_is_told_of(scores_file, tmp_path):
    planned = plan_from_scores(PlanConfig(scores=str(scores_file), output=tmp_path / "found.yaml", **WANTED))
    report, without = planned.report, planned.report.best_without
    assert planned.proposal.chosen.kind == "groups" and without is not None and report.best_groups is not None
    cost = 0.9 * report.best_groups.spent.cost
    report.best_without = replace(without, spent=replace(without.spent, cost=cost))
    page = report.markdown([])
    assert f"`{without.route.name}`, without groups, costs 0.90 times as much" in page
    assert "not certified" in page and "**Groups pay**" not in page


def test_the_more_violating_images_the_less_groups_save(scores):
    """At a prevalence of a half nearly every image is tested in every round."""
    planned = [route for route in routes(scores, "gmac") if route.name == "group-16 > group-4 > group-1"]
    thresholds_SK = to_logits(np.full((3, 1), 0.2))
    field = Field(scores, planned[0], "certify", PREVALENCE)
    costs = [spent.cost for spent in field.spend_at(thresholds_SK, (1e-4, 1e-2, 0.1, 0.5))]
    assert costs == sorted(costs) and costs[0] < 0.2
    # All of a group's members are tested in every round: 1.6 / 16 + 0.4 / 4 + 0.4.
    assert costs[-1] == pytest.approx(0.6, rel=0.1)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"prevalence": ("0",)}, "prevalences are .* each must be above 0"),
        ({"prevalence": ("much",)}, "write a number, or CATEGORY=NUMBER"),
        ({"recall": ("1",)}, "recall is 1, but only a share above 0 and below 1"),
        ({"recall": ("b=0.9",)}, r"recall is given for \['b'\], but the scores are of \['a'\]"),
        ({"recall": ("0.999",)}, "needs 2995 unique positives in the certifying half"),
        ({"confidence": 0.2}, "confidence is 0.2: give one of at least 0.5"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_with_the_remedy(scores_file, tmp_path, wanted, words):
    with pytest.raises(UsageError, match=words):
        plan_from_scores(PlanConfig(**{"scores": str(scores_file), "output": tmp_path / "p.yaml"} | WANTED | wanted))
    assert not (tmp_path / "p.yaml").exists()


def test_a_plan_that_begins_with_groups_knows_a_burst(scores):
    """Its rule hardly ever fires at the prevalence planned for, and mostly where the first round stops to pay."""
    without = {name: found for name, found in scores.single.items() if name != "mini"}
    candidates = {name: candidate for name, candidate in scores.candidates.items() if name != "mini"}
    scores = replace(scores, single=without, candidates=candidates, arrangements=scores.arrangements[:1])
    proposal = propose(scores, Request(recall_K=(0.9,), confidence=0.95, prevalence=PREVALENCE, max_fpr=0.01))
    plan = to_plan(scores, proposal, "groups", cpus=8, gpus=1)
    stage, chosen = plan.stages[0], proposal.chosen
    assert stage.rounds[:2] == (16, 4) and stage.burst is not None
    assert stage.burst.group_size in stage.rounds[1:]

    def fires(total: float) -> float:
        (spent,) = Field(scores, chosen.route, "certify", PREVALENCE).spend_at(chosen.thresholds_SK, [total])
        reached_S = spent.reached_S
        return float(binom.sf(stage.burst.positive - 1, stage.burst.first_groups, reached_S[1] / reached_S[0]))

    assert fires(PREVALENCE.total) <= 0.001
    assert fires(0.3) > 0.5
    assert sum(stage.num_gpus for stage in plan.stages) <= 1


def test_nets_that_cannot_keep_the_false_positive_rate_are_told_so(scores):
    alone = replace(scores, single={"mini": scores.single["mini"]}, arrangements=())
    alone = replace(alone, candidates={"mini": scores.candidates["mini"]})
    asked = Request(recall_K=(0.9,), confidence=0.95, prevalence=PREVALENCE, max_fpr=0.001)
    with pytest.raises(
        UsageError, match=r"no certified plan keeps the false-positive rate at 0\.001: the best .* mini, has 0"
    ):
        propose(alone, asked)


def test_scores_that_are_no_numbers_are_refused_by_candidate_and_picture(scores, tmp_path):
    broken = {name: found.copy() for name, found in scores.single.items()}
    broken["large"][7] = np.nan
    with pytest.raises(UsageError, match=rf"candidate 'large' scored \[nan\] for {scores.uris[7]}, and 0 such more"):
        replace(scores, single=broken)
    path = tmp_path / "broken.parquet"
    table = pq.read_table(_written(scores, tmp_path))
    values = table["scores"].to_pylist()
    values[3] = [float("nan")]
    column = table.schema.get_field_index("scores")
    pq.write_table(table.set_column(column, table.schema.field(column), pa.array(values, pa.list_(pa.float32()))), path)
    with pytest.raises(UsageError, match=r"scored \[nan\]"):
        read_scores(str(path))


def _written(scores: Scores, folder: Path) -> Path:
    path = folder / "written.parquet"
    path.write_bytes(scores_bytes(scores))
    return path


def test_a_category_without_positives_is_refused(scores):
    with pytest.raises(UsageError, match="category 'a' has no positive in the certify half"):
        replace(scores, labels_NK=scores.labels_NK & (scores.half_N == 0)[:, None])


def test_contradictory_labels_are_refused(tmp_path):
    rows = [("s3://b/a.jpg", "weapon", 1), ("s3://b/a.jpg", "weapon", 0), ("s3://b/c.jpg", "weapon", 0)]
    columns = dict(zip(("uri", "category", "label"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    with pytest.raises(UsageError, match=r"a\.jpg is labelled both with and without category 'weapon'"):
        read_labelled((str(tmp_path / "labels.parquet"),), ("weapon",))
    pictures = LabelledPictures(uris=["a", "b", "c"], labels_NK=np.array([[True], [False], [False]]))
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    pixels[1] = 1
    with pytest.raises(UsageError, match="a and c, which show the same pixels, are labelled differently"):
        find_versions(pixels, pictures)


def test_halves_keep_versions_together_and_reviews_never_certify():
    rng = np.random.default_rng(1)
    cluster_N = rng.integers(0, 300, 1000)
    labels_NK = np.stack([cluster_N % 5 == 0, cluster_N % 7 == 0], axis=1)
    biased_N = rng.random(1000) < 0.2
    half_N = split(cluster_N, labels_NK, biased_N, 0.4, seed=1)
    for cluster in np.unique(cluster_N):
        assert len(set(half_N[cluster_N == cluster].tolist())) == 1
    only_biased = np.setdiff1d(cluster_N, cluster_N[~biased_N])
    assert (half_N[np.isin(cluster_N, only_biased)] == 0).all()
    for labels_N in labels_NK.T:
        fair = np.setdiff1d(cluster_N[labels_N], only_biased)
        certified = np.unique(cluster_N[labels_N & (half_N == 1)])
        assert len(certified) / len(fair) == pytest.approx(0.6, abs=0.05)


def test_blocks_are_of_one_half_and_host_every_positive():
    rng = np.random.default_rng(1)
    positive_N = rng.random(400) < 0.1
    half_N = rng.integers(0, 2, 400)
    there_N = rng.random(400) < 0.9
    image_BL = draw_blocks(positive_N, half_N, there_N, 16, redraws=3, passes=2, rng=rng)
    assert (half_N[image_BL] == half_N[image_BL[:, :1]]).all() and there_N[image_BL].all()
    assert positive_N[image_BL].sum(axis=1).max() == 1
    hosted = image_BL[positive_N[image_BL]]
    counts = dict(zip(*np.unique(hosted, return_counts=True), strict=True))
    assert counts == dict.fromkeys(np.flatnonzero(positive_N & there_N).tolist(), 3)
    assert all(len(set(block.tolist())) == 16 for block in image_BL)
    with pytest.raises(ValueError, match="negatives of the search half do not fill a block of 512"):
        draw_blocks(positive_N, half_N, there_N, 512, redraws=1, passes=1, rng=rng)


def test_positives_beside_too_few_companions_certify_nothing():
    """They would all stand beside the same ones: no groups, and a line that says so."""
    positive_N = np.arange(400) < 40
    half_N = np.arange(400) % 2
    drawing = {"length": 16, "redraws": 1, "passes": 1, "rng": np.random.default_rng(1)}
    there_N = np.ones(400, dtype=bool)
    assert len(draw_blocks(positive_N, half_N, there_N, **drawing, companions=180))
    with pytest.raises(ValueError, match="180 negatives of the search half are fewer than 181 companions"):
        draw_blocks(positive_N, half_N, there_N, **drawing, companions=181)


def test_labels_of_several_files_are_put_together_and_gaps_are_left_out(tmp_path):
    """A file for each category, a picture of which one was never said, a review that agrees and one that does not."""
    write_labels(tmp_path / "star.parquet", [("a", "star", 1), ("b", "star", 0), ("c", "star", 0), ("d", "star", 0)])
    write_labels(tmp_path / "bolt.parquet", [("a", "bolt", 0), ("b", "bolt", 1), ("c", "bolt", 0)])
    write_labels(tmp_path / "review.parquet", [("a", "bolt", 0), ("e", "star", 1), ("e", "bolt", 1)])
    both = (str(tmp_path / "star.parquet"), str(tmp_path / "bolt.parquet"))
    config = CalibrateConfig(labels=both, models=("emblem",), search_labels=(str(tmp_path / "review.parquet"),))
    said: list[str] = []
    pictures, biased_N = read_pictures(config, ("star", "bolt"), said.append)
    rows = {
        uri[-1]: (*labels_K.tolist(), bool(biased))
        for uri, labels_K, biased in zip(pictures.uris, pictures.labels_NK, biased_N, strict=True)
    }
    assert rows == {
        "a": (True, False, False),
        "b": (False, True, False),
        "c": (False, False, False),
        "e": (True, True, True),
    }
    (line,) = said
    assert "1 of 5 pictures are left out" in line and "/d of bolt" in line
    write_labels(tmp_path / "review.parquet", [("a", "star", 0)])
    with pytest.raises(
        UsageError, match=r"review\.parquet, .*star\.parquet: .*/a is labelled both with and without category 'star'"
    ):
        read_pictures(config, ("star", "bolt"), said.append)
    write_labels(tmp_path / "star.parquet", [("a", "star", 1), ("a", "trefoil", 0)])
    alone = replace(config, labels=both[:1], search_labels=())
    with pytest.raises(UsageError, match="no picture shows trefoil, so nothing can be said of its recall"):
        read_pictures(alone, ("star", "trefoil"), said.append)


def write_labels(path: Path, rows: list[tuple[str, str, int]]) -> None:
    columns = zip(*((f"s3://b/{name}", category, label) for name, category, label in rows), strict=True)
    pq.write_table(pa.table(dict(zip(("uri", "category", "label"), columns, strict=True))), path)


def test_rare_images_are_planned_for(scores_file, tmp_path):
    """A quantile of a prevalence of one in a million is no image at all."""
    wanted = WANTED | {"prevalence": ("0.000001",)}
    planned = plan_from_scores(PlanConfig(scores=str(scores_file), output=tmp_path / "rare.yaml", **wanted))
    assert 0 < planned.proposal.relative_cost < 0.3


def test_sizes_that_do_not_divide_each_other_are_read_back(tmp_path):
    """Groups of 4 and of 6 in blocks of 12."""
    sizes = {"m": 1, "m4": 4, "m6": 6}
    candidates = {n: Candidate(name=n, model="m", input_size=64, size=size, gmac=1.0) for n, size in sizes.items()}
    image_BL = np.arange(48).reshape(4, 12)
    rng = np.random.default_rng(1)
    arrangement = Arrangement(image_BL=image_BL, scores={n: rng.random((4, 12 // sizes[n], 1)) for n in ("m4", "m6")})
    scores = Scores(
        categories=("a",), candidates=candidates, uris=[str(n) for n in range(48)],
        labels_NK=(np.arange(48) % 12 == 0)[:, None], half_N=np.repeat([0, 1], 24), cluster_N=np.arange(48),
        single={"m": rng.random((48, 1))}, arrangements=(arrangement,),
    )  # fmt: skip
    (tmp_path / "s.parquet").write_bytes(scores_bytes(scores))
    (found,) = read_scores(str(tmp_path / "s.parquet")).arrangements
    np.testing.assert_array_equal(found.image_BL, image_BL)
    for name in ("m4", "m6"):
        np.testing.assert_allclose(found.scores[name], arrangement.scores[name], rtol=1e-6)


def test_too_few_negatives_show_no_false_positive_rate(scores):
    asked = Request(recall_K=(0.9,), confidence=0.95, prevalence=PREVALENCE, max_fpr=0.0001)
    with pytest.raises(UsageError, match=r"at most 0\.0001 is not seen in \d+ negatives .* at least 10,000 pictures"):
        propose(scores, asked)


@pytest.mark.parametrize(("cpus", "gpus"), [(2, 0), (64, 0), (16, 1), (16, 2), (16, 5)])
def test_pools_are_what_ray_and_machines_can_give(scores, cpus, gpus):
    proposal = propose(scores, Request(recall_K=(0.9,), confidence=0.95, prevalence=PREVALENCE, max_fpr=0.01))
    plan = to_plan(replace(scores, decode_seconds={64: 0.004}), proposal, "p", cpus=cpus, gpus=gpus)
    needed = pools(plan)
    assert all(pool.num_cpus <= 1 for pool in needed)
    assert sum(pool.num_cpus * pool.actors.max for pool in needed) <= cpus
    assert len(needed) == 1 if gpus == 0 else plan.preparation.decode.actors.max > 3, "many children, not a large one"
    if gpus == 0:
        assert needed[0].actors.max == cpus and needed[0].windows_per_call <= 2
    shares = [stage.num_gpus for stage in plan.stages]
    assert sum(shares) <= gpus and all(share < 1 or share == int(share) for share in shares)
    assert gpus == 0 or min(shares) > 0
    for stage, reached in zip(plan.stages, proposal.chosen.spent.reached_S, strict=False):
        assert stage.windows_per_call >= 1 and (reached < 1 or stage.windows_per_call == 1)


def test_what_is_padded_and_what_is_empty_is_paid_for():
    assert [padded(count, 64) for count in (0, 1, 2, 3, 17, 33, 64, 65, 128, 130)] == [
        0, 1, 2, 4, 32, 64, 64, 65, 128, 130,
    ]  # fmt: skip
    assert [padded(count, 6) for count in (5, 6, 11)] == [6, 6, 12], "never wider than a full batch"
    rng = np.random.default_rng(1)
    for reached, size in ((0.12, 1), (0.01, 1), (0.3, 4)):
        calls = windows_per_call(reached, 256)
        images = rng.poisson(reached * 256 * calls / size, 20_000)
        drawn = sum(padded(int(count), 64 // size) for count in images) / images.sum()
        assert padding(reached, size, 256, reached) == pytest.approx(drawn, rel=0.02)
    survivors = rng.poisson(0.01 * 1024, 20_000)
    drawn = (-(-survivors // 16) * 16).sum() / survivors.sum()
    assert holes(0.01, 16, 1024) == pytest.approx(drawn, rel=0.02) and drawn > 1.5
    assert padding(1.0, 1, 256, 1.0) == 1


def test_candidates_are_every_size_of_every_net_at_every_input_size():
    categories, found = find_candidates(["emblem-mini@64", "emblem"], ["star"])
    assert categories == ("star",)
    assert [c.name for c in found] == ["emblem-mini@64", "emblem@160", "emblem@160x4", "emblem@160x16"]
    by_name = {candidate.name: candidate for candidate in found}
    assert by_name["emblem@160x16"].gmac_kept is None
    kept = by_name["emblem@160x4"].gmac_kept
    assert kept is not None and kept < by_name["emblem@160x4"].gmac
    for models, words in ((["emblem@big"], "write NAME@PIXELS"), (["nosuch"], "nosuch"), (["cifar-mini"], "not")):
        with pytest.raises(UsageError, match=words):
            find_candidates(models, ["star"])


def test_a_corpus_is_calibrated_planned_and_scanned(ray_session, corpus, tmp_path):
    """The whole way with real nets: the plan's verdicts are those its scores foretold."""
    from pipeline.run.scan import ScanConfig, run_scan

    labels = str(corpus / "labels.parquet")
    path = tmp_path / "scores.parquet"
    config = CalibrateConfig(
        labels=(labels,), models=("emblem-mini", "emblem@80"), categories=("trefoil",), redraws=1, passes=1,
        companions=90, cache=tmp_path / "cache", output=str(path),
    )  # fmt: skip
    said: list[str] = []
    scores = run_calibrate(config, said.append)
    assert [len(scores.single), len(scores.arrangements[0].scores)] == [2, 2]
    assert all(c.seconds and c.seconds > 0 for c in scores.candidates.values()) and scores.decode_seconds[80] > 0
    assert sum(scores.unique_positives("search") + scores.unique_positives("certify")) == 40
    output = tmp_path / "plan.yaml"
    wanted = PlanConfig(
        scores=str(path), prevalence=("0.125",), recall=("0.8",), max_fpr=0.9, cost="seconds", output=output
    )
    planned = plan_from_scores(wanted)
    record = run_scan(ScanConfig(source=str(corpus), output=str(tmp_path / "out"), plan=str(output), labels=labels))
    assert record["counts"]["error"] == 0
    assert record["quality"]["recall"] >= 0.8
    # What the certifying half says of the cost is about what the scan does: 320 pictures, another grouping.
    assert yaml.safe_load(output.read_text())["certificate"]["recall"]["trefoil"] >= 0.8
    tests = sum(stage["tests"] for stage in record["stages"]) / 320
    steps = zip(planned.proposal.chosen.route.steps, planned.proposal.chosen.spent.reached_S, strict=True)
    assert tests == pytest.approx(sum(reached / step.size for step, reached in steps), rel=0.25)
