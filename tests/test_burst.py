"""Bursts: a window whose first groups are positive tests the others in smaller ones, whatever else is in the call."""

from __future__ import annotations

import copy
import re
from datetime import UTC, datetime
from fractions import Fraction
from math import comb

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from models.backbone import Trunk
from models.cost import gmac_per_test, segment_gmac
from models.group_net import GroupNet, MergePoint
from models.weights import save_net
from pipeline.bench.prevalence import Judge
from pipeline.errors import UsageError
from pipeline.output.sink import Rows
from pipeline.output.tally import Tally, stage_rows
from pipeline.plan import PLANS, BurstRule, Plan, StageSpec, load_plan, parse_plan
from pipeline.planning.burst import burst_rule
from pipeline.reporting.progress import closing_table
from pipeline.steps.stages import GroupStage
from pipeline.window import Image, Window, windows_from_table, windows_to_table

SIDE = 64
THRESHOLD = 0.57
"""With these weights of chance a group scores 0.62 and more when it holds a violating picture, and 0.53 at most
when it holds none, in groups of every size: so a test knows which groups are positive."""
RULE = BurstRule(first_groups=2, positive=2, group_size=4)


@pytest.fixture(scope="module")
def net() -> GroupNet:
    torch.manual_seed(1)
    points = (MergePoint(cut="layer1", size=4), MergePoint(cut="layer2", size=4))
    return GroupNet(Trunk("late_resnet", 2), points)


@pytest.fixture(scope="module")
def model(net, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("nets")
    save_net(net, folder, "net", categories=("other", "violating"), input_size=SIDE, facts={})
    return str(folder / "net.json")


def spec(model: str, rounds: tuple[int, ...] = (16, 4, 1), burst: BurstRule | None = RULE, **changes) -> StageSpec:
    thresholds = {"violating": [THRESHOLD] * len(rounds)}
    base = {"name": "s", "model": model, "rounds": rounds, "input_size": SIDE, "batch_images": 32}
    return StageSpec(**(base | {"thresholds": thresholds, "burst": burst} | changes))


def stage(spec: StageSpec) -> GroupStage:
    return GroupStage(spec, ("violating",), final=True)


def picture(number: int, place: int, violating: bool) -> np.ndarray:
    rng = np.random.default_rng([3, number, place])
    if violating:
        return rng.integers(0, 2, (SIDE, SIDE, 3), dtype=np.uint8) * 255
    return rng.integers(110, 140, (SIDE, SIDE, 3), dtype=np.uint8)


def window(
    images: int, violating: set[int], *, number: int = 0, errors: set[int] = frozenset(), first: int = 0
) -> Window:
    """``first``: where it begins among the pictures of its number, whose places ``violating`` and ``errors`` name."""
    places = range(first, first + images)
    members = [Image(image_id=f"{number}-{place}", uri=f"file:///{number}/{place}", payload=b"x") for place in places]
    for image, place in zip(members, places, strict=True):
        if place in errors:
            image.fail("truncated", "")
    pixels = [picture(number, place, place in violating) for place in places if place not in errors]
    return Window(shard=0, window=number, first_ordinal=first, images=members, pixels=np.array(pixels))


def verdicts(images: list[Image]) -> list[tuple]:
    return [(image.outcome, [(test.round, test.group_id, test.group_size) for test in image.tests]) for image in images]


def scores(images: list[Image]) -> list[float]:
    return [score for image in images for test in image.tests for score in test.scores]


def counts(window: Window) -> list[tuple]:
    return [(work.images_in, work.tests, work.positive_tests, work.images_out, work.bursts) for work in window.work]


def gmac(window: Window) -> list[float]:
    return [work.gmac for work in window.work]


BURST = {3, 20, 40, 41, 70}
"""In 96 images: both first groups are positive, and of the four others two."""


def test_the_first_groups_go_on_as_planned_and_the_others_are_tested_in_smaller_ones(model):
    (found,) = stage(spec(model))([window(96, BURST)])
    (first,) = stage(spec(model, burst=None))([window(32, BURST)])
    (others,) = stage(spec(model, rounds=(4, 1), burst=None))([window(64, BURST, first=32)])
    assert {place for place, image in enumerate(found.images) if image.outcome == "flagged"} == BURST
    assert verdicts(found.images[:32]) == verdicts(first.images)
    assert [image.outcome for image in found.images[32:]] == [image.outcome for image in others.images]
    assert [[test.group_size for test in image.tests] for image in found.images[32:]] == [
        [test.group_size for test in image.tests] for image in others.images
    ]
    assert scores(found.images) == pytest.approx(scores(first.images) + scores(others.images), abs=1e-5)
    assert [[test.burst for test in image.tests] for image in found.images[:32]] == [
        [False] * len(image.tests) for image in first.images
    ]
    assert {test.burst for image in found.images[32:] for test in image.tests} == {True}


def test_every_test_of_a_fallback_is_counted_in_the_round_of_its_size(model, net):
    (found,) = stage(spec(model))([window(96, BURST)])
    # Retests of two groups of 16 and 16 fresh groups of 4; 40 and 41 share one of the four positive ones.
    assert counts(found) == [(96, 2, 2, 96, 1), (96, 8 + 16, 4, 16, 0), (16, 16, 5, 5, 0)]
    cost = {size: gmac_per_test(net, SIDE, size) for size in (16, 4)}
    again = {size: gmac_per_test(net, SIDE, size, reused_from=16) for size in (4, 1)}
    assert gmac(found) == pytest.approx([2 * cost[16], 8 * again[4] + 16 * cost[4], 16 * again[1]])


def test_a_window_can_fall_back_to_single_tests(model, net):
    single = BurstRule(first_groups=1, positive=1, group_size=1)
    (found,) = stage(spec(model, burst=single))([window(40, {3, 20})])
    assert {place for place, image in enumerate(found.images) if image.outcome == "flagged"} == {3, 20}
    assert counts(found) == [(40, 1, 1, 40, 1), (40, 4, 1, 28, 0), (28, 4 + 24, 2, 2, 0)]
    again = gmac_per_test(net, SIDE, 1, reused_from=16)
    assert gmac(found)[2] == pytest.approx(4 * again + 24 * gmac_per_test(net, SIDE, 1))
    assert {image.tests[0].group_size for image in found.images[16:]} == {1}


def test_a_calm_window_beside_a_burst_is_tested_as_without_the_rule(model):
    # One positive first group is not enough, however many there are behind.
    calm = {3, 40, 60, 70, 90}
    loud, quiet = stage(spec(model))([window(96, BURST), window(96, calm, number=1)])
    (expected,) = stage(spec(model, burst=None))([window(96, calm, number=1)])
    assert [work.bursts for work in loud.work + quiet.work] == [1, 0, 0, 0, 0, 0]
    assert verdicts(quiet.images) == verdicts(expected.images)
    assert scores(quiet.images) == pytest.approx(scores(expected.images), abs=1e-5)
    assert counts(quiet) == counts(expected) and gmac(quiet) == gmac(expected)
    assert not any(test.burst for image in quiet.images for test in image.tests)


def test_a_window_of_first_groups_only_never_falls_back(model):
    everything = set(range(32))
    (found,) = stage(spec(model))([window(32, everything)])
    (expected,) = stage(spec(model, burst=None))([window(32, everything)])
    assert verdicts(found.images) == verdicts(expected.images) and counts(found) == counts(expected)
    assert gmac(found) == gmac(expected)


POOL = [
    window(96, BURST, number=0),
    window(96, {3, 40}, number=1),
    window(60, {0, 17, 59}, number=2, errors={1, 33, 34, 35, 36}),
    window(33, {0, 31}, number=3),
    window(20, set(range(20)), number=4),
]


@pytest.fixture(scope="module")
def alone(model) -> dict[int, Window]:
    """What becomes of each window of the pool in a call of its own."""
    tester = stage(spec(model, batch_images=16))
    return {window.window: tester([copy.deepcopy(window)])[0] for window in POOL}


@settings(deadline=None, max_examples=12)
@given(company=st.permutations(range(5)), width=st.integers(1, 5), batch=st.sampled_from([4, 16, 48, 128]))
def test_whether_a_window_falls_back_does_not_depend_on_company_order_or_batch(model, alone, company, width, batch):
    called = [copy.deepcopy(POOL[number]) for number in company[:width]]
    for found in stage(spec(model, batch_images=batch))(called):
        expected = alone[found.window]
        assert verdicts(found.images) == verdicts(expected.images)
        assert scores(found.images) == pytest.approx(scores(expected.images), abs=1e-5)
        assert counts(found) == counts(expected) and gmac(found) == gmac(expected)


def test_the_pool_holds_bursts_and_calm_windows(alone):
    assert {number: window.work[0].bursts for number, window in alone.items()} == {0: 1, 1: 0, 2: 1, 3: 1, 4: 0}


def test_holes_keep_their_places_in_a_fallback_and_parts_of_holes_only_are_no_tests(model):
    # The first 16 could not be read: the first groups are the next two. Of the others one part is lost altogether.
    lost = {*range(16), 17, 49, *range(52, 56)}
    (found,) = stage(spec(model))([window(80, {20, 40, 50}, errors=lost)])
    assert found.work[0].bursts == 1 and found.work[0].tests == 2
    members: dict[str, list[int]] = {}
    for place, image in enumerate(found.images[48:], start=48):
        if image.tests:
            members.setdefault(image.tests[0].group_id, []).append(place)
    assert list(members.values()) == [
        [48, 50, 51],
        *([start, start + 1, start + 2, start + 3] for start in range(56, 80, 4)),
    ]
    assert found.work[1].tests == 2 * 4 + 7
    assert {place for place, image in enumerate(found.images) if image.outcome == "flagged"} == {20, 40, 50}
    assert {place for place, image in enumerate(found.images) if image.outcome == "error"} == lost


@pytest.mark.parametrize(("fails_at", "failed"), [(16, [32, 32]), (4, [64, 48])])
def test_a_device_that_runs_out_of_memory_in_a_burst_begins_again_with_the_same_verdicts(model, fails_at, failed):
    roomy, tight = stage(spec(model, batch_images=96)), stage(spec(model, batch_images=96))
    test, failures = tight.net.test, []

    def cramped(images_NCHW, present_N, group_size):
        if group_size == fails_at and len(images_NCHW) > 24:
            failures.append(len(images_NCHW))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return test(images_NCHW, present_N, group_size)

    tight.net.test = cramped
    expected, found = roomy([window(96, BURST)]), tight([window(96, BURST)])
    assert failures == failed
    assert verdicts(found[0].images) == verdicts(expected[0].images)
    assert counts(found[0]) == counts(expected[0]) and gmac(found[0]) == gmac(expected[0])


@pytest.mark.parametrize(("group_size", "left_out"), [(4, {"behind": 1}), (1, {"middle": 4, "behind": 5})])
def test_a_burst_saves_work_where_everything_is_positive(model, net, group_size, left_out):
    everything = set(range(96))
    rule = BurstRule(first_groups=2, positive=2, group_size=group_size)
    (found,) = stage(spec(model, burst=rule))([window(96, everything)])
    (planned,) = stage(spec(model, burst=None))([window(96, everything)])
    assert {image.outcome for w in (found, planned) for image in w.images} == {"flagged"}
    # Of each of the four other groups only what its larger tests compute behind their merges is saved: the smaller
    # ones would have begun from the features before.
    costs = segment_gmac(net, SIDE)
    parts = {"middle": costs["layer2"], "behind": costs["layer3"] + costs["head"]}
    saved = sum(gmac(planned)) - sum(gmac(found))
    assert saved == pytest.approx(4 * sum(times * parts[part] for part, times in left_out.items()))
    assert saved / sum(gmac(planned)) == pytest.approx({4: 0.0237, 1: 0.1431}[group_size], abs=1e-4)


def plan_of(model: str, burst: BurstRule | None = RULE) -> Plan:
    return Plan(name="p", categories=("violating",), window={"images": 96}, stages=(spec(model, burst=burst),))


def test_ledger_and_record_say_which_images_and_how_many_windows(model):
    plan = plan_of(model)
    windows = stage(plan.stages[0])([window(96, BURST, errors={95}), window(96, {3}, number=1)])
    windows = windows_from_table(windows_to_table(windows))
    rows = Rows("r", plan, {"s": ("net@1", "d")}, "salt").of_windows(windows, datetime.now(UTC))["ledger"]
    assert [row["burst"] for row in rows] == [False] * 32 + [True] * 63 + [None] + [False] * 96
    tally = Tally()
    for done in windows:
        tally.add_work([{name: getattr(work, name) for name in work.__slots__} for work in done.work])
    (summary,) = stage_rows(Tally.from_json(tally.to_json()), plan)
    assert summary["bursts"] == 1 and (summary["images_in"], summary["images_out"]) == (191, 6)
    assert stage_rows(tally, plan_of(model, None))[0]["bursts"] is None
    console = Console(width=120)
    with console.capture() as capture:
        console.print(closing_table(record([summary])))
    assert re.search(r"s, windows that fell back +│ +1 of 2 ", capture.get())
    assert re.search(r"decode:s, time at work +│ +3\.0 s, 75%", capture.get())
    assert re.search(r" s, time at work +│ +1\.0 s, 25%", capture.get())


def record(stages: list[dict]) -> dict:
    counts = {"listed": 192, "cleared": 185, "flagged": 6, "error": 1, "skipped": 0}
    facts = {"run_id": "r", "status": "complete", "counts": counts, "errors": {"truncated": 1}, "windows": 2}
    times = {"seconds": 1.0, "startup_seconds": 0.5, "images_per_s": 192.0}
    work = [
        {"operator": "decode:s", "round": None, "images_in": 192, "seconds": 3.0},
        {"operator": "s", "round": 0, "images_in": 191, "seconds": 0.6},
        {"operator": "s", "round": 1, "images_in": 32, "seconds": 0.4},
    ]
    return facts | times | {"stages": stages, "operators": work, "relative_cost": 0.5, "quality": None}


def test_a_plan_is_judged_as_if_no_window_were_in_a_burst(model):
    # Judging puts a positive into every group of a window, which no prevalence would.
    positive_N = np.arange(112) < 16
    pixels_NSS3 = np.array([picture(0, place, bool(hit)) for place, hit in enumerate(positive_N)])
    judge = Judge(pixels_NSS3, positive_N, passes=1, redraws=1, seed=0, threads=1)
    with_rule, without = (judge.judge(plan_of(model, burst), 0.01) for burst in (RULE, None))
    assert with_rule.effort == without.effort and with_rule.recall == without.recall == 1.0


def content(burst: dict | None = None, **changes) -> dict:
    one = {"name": "one", "model": "m", "rounds": [16, 4, 1], "thresholds": {"a": [0.5] * 3}, "input_size": 64}
    return {"name": "p", "categories": ["a"], "stages": [one | ({"burst": burst} if burst else {}) | changes]}


GOOD = {"first_groups": 4, "positive": 2, "group_size": 4}


@pytest.mark.parametrize(
    ("burst", "changes", "words"),
    [
        (GOOD | {"positive": 5}, {}, "positive is 5, but only 4 first groups are looked at; give 1 to 4"),
        (GOOD | {"positive": 0}, {}, "burst.positive is 0, but at least 1 is wanted$"),
        (GOOD | {"first_groups": 0}, {}, "burst.first_groups is 0, but at least 1 is wanted$"),
        (GOOD | {"group_size": 16}, {}, r"group_size is 16, but the rounds behind the first are of \[4, 1\]"),
        (GOOD | {"group_size": 2}, {}, r"group_size is 2, but the rounds behind the first are of \[4, 1\]"),
        (GOOD, {"rounds": [4], "thresholds": {"a": [0.5]}}, r"the rounds behind the first are of \[\]"),
        (GOOD, {"rounds": [4], "thresholds": {"a": [0.5]}, "groupings": 2}, "needs rounds to fall back to, and 2"),
        (GOOD | {"first_groups": 16}, {}, "first_groups is 16, but a window has no more than 16 groups"),
        (GOOD | {"surprise": 1}, {}, "surprise is no field; known there: "),
    ],
)
def test_a_rule_that_cannot_work_is_refused(burst, changes, words):
    with pytest.raises(UsageError, match=words):
        parse_plan(content(burst, **changes), "here")


def test_a_rule_is_part_of_the_version_and_a_plan_without_one_keeps_its_own(tmp_path):
    # As versions were before there were rules or banks: runs that have begun under such plans still resume.
    for name, version, *thresholds in (
        ("emblem", "d0282c7789cd", {"trefoil": [0.004]}, {"trefoil": [0.5]}),
        ("emblems", "c2fb8aaecbd7", {"trefoil": [0.0043], "star": [0.0089], "bolt": [0.0057]},
         {"trefoil": [0.43], "star": [0.094], "bolt": [0.31]}),
    ):  # fmt: skip
        shipped = yaml.safe_load((PLANS / f"{name}.yaml").read_text())
        for stage, former in zip(shipped["stages"], thresholds, strict=True):
            stage["thresholds"] = former
            stage["model"] = stage["model"].removesuffix("-int8")
        assert parse_plan(shipped, name).version == version
    versions = {parse_plan(content(burst), "a").version for burst in (None, GOOD, GOOD | {"positive": 3})}
    assert len(versions) == 3
    plan = parse_plan(content(GOOD), "a")
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    assert load_plan(str(file)) == plan and plan.stages[0].burst == BurstRule(**GOOD)


def tail(least: int, groups: int, rate: Fraction) -> Fraction:
    """Chance of ``least`` or more positive ones among so many groups, in exact fractions."""
    return sum(
        (comb(groups, hits) * rate**hits * (1 - rate) ** (groups - hits) for hits in range(least, groups + 1)),
        Fraction(0),
    )


@pytest.mark.parametrize(
    ("first_groups", "calm", "break_even", "positive"),
    [
        (4, Fraction(1, 62), Fraction(7, 10), 3),  # 0.0016 is one in a thousand and more: two are not enough
        (4, Fraction(1, 100), Fraction(7, 10), 2),
        (8, Fraction(1, 10), Fraction(6, 10), 5),
        (1, Fraction(1, 2000), Fraction(1, 2), 1),
    ],
)
def test_a_calm_window_seldom_reaches_the_count_that_is_a_burst(first_groups, calm, break_even, positive):
    assert tail(positive, first_groups, calm) <= Fraction(1, 1000) < tail(positive - 1, first_groups, calm)
    assert tail(positive, first_groups, break_even) >= Fraction(1, 2)
    rule = burst_rule((16, 4, 1), calm_rate=float(calm), break_even_rate=float(break_even), first_groups=first_groups)
    assert rule == BurstRule(first_groups=first_groups, positive=positive, group_size=4)


def test_there_is_no_rule_where_the_first_groups_cannot_tell():
    rates = {"calm_rate": 0.0161, "break_even_rate": 0.5}
    assert tail(3, 4, Fraction(1, 2)) == Fraction(5, 16)
    assert burst_rule((16, 4), first_groups=4, **rates) is None
    assert burst_rule((16, 4), first_groups=8, **rates) == BurstRule(first_groups=8, positive=3, group_size=4)
    assert burst_rule((16,), first_groups=8, **rates) is None
    assert burst_rule((16, 4), first_groups=8, calm_rate=0.9, break_even_rate=0.95) is None
    assert burst_rule((16, 4, 1), first_groups=8, group_size=1, **rates).group_size == 1
    with pytest.raises(ValueError, match=r"break_even_rate is 1\.5, not in 0\.\.1; give the share"):
        burst_rule((16, 4), first_groups=4, calm_rate=0.1, break_even_rate=1.5)
