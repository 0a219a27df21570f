"""The audit: what is drawn, what canaries become, what reviews say of recall, and when the alarm is raised."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import binom, chi2

from jobs import audit as job
from jobs.cli import run_job
from models.intervals import Weighted, interval, weighted_count_interval, weighted_share_interval
from pipeline import schema
from pipeline.errors import RunError, UsageError
from pipeline.labels.examples import read_labels
from pipeline.output import commit
from pipeline.output.commit import Attempt, Ledger
from pipeline.output.sample import Sampler
from pipeline.output.sink import Rows, Sink
from pipeline.plan import Audit, parse_plan
from pipeline.review.audit import audit, audit_table, thresholds_table
from pipeline.review.estimate import (
    NOT_REVIEWED,
    Reviewed,
    estimate,
    lacking_canaries,
    lacking_reviews,
    recall_at_most,
    share_to_review,
)
from pipeline.review.evidence import Evidence
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.store import Store
from pipeline.tables.erase import Subject, erase
from tests.conftest import GROUPS, small_plan
from tests.nights import World, night, pooled
from tests.test_commit import Run
from tests.test_jobs import expect
from tests.test_plan import content

NOW = datetime(2026, 1, 1, tzinfo=UTC)
IDS = [f"{number:032x}" for number in range(20_000)]


def plan_with(**rates: float):
    return parse_plan(content(window={"images": 16}, audit=rates), "test")


ALL_DRAWN = plan_with(rate=1, near_rate=1)


def within(successes: int, trials: int, share: float) -> bool:
    """Whether a binomial count is one of those that all but a millionth of the cases give."""
    low, high = binom.interval(1 - 1e-6, trials, share)
    return low <= successes <= high


# What is drawn


def drawn(windows: list, salt: str = "s") -> set[tuple[str, float]]:
    rows = Rows("r", plan_with(rate=0.2, near_rate=0.6), {"one": ("m@1", "d")}, salt)
    return {(row["image_id"], row["probability"]) for row in rows.of_windows(windows, NOW)["audit"]}


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> list:
    windows = Run(tmp_path_factory.mktemp("decided"), images=160).windows()
    for number, image in enumerate(image for window in windows for image in window.images):
        image.tests[-1].scores = [0.5 if number % 3 else 0.001]
    return windows


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_sample_does_not_depend_on_calls_or_their_order(decided, data):
    whole = drawn(decided)
    shuffled = data.draw(st.permutations(decided))
    cut = data.draw(st.integers(0, len(shuffled)))
    assert drawn(shuffled[:cut]) | drawn(shuffled[cut:]) == whole == drawn(decided)
    assert {probability for _, probability in whole} == {0.2, 0.6} and drawn(decided, "another salt") != whole


def test_the_sample_does_not_depend_on_the_size_of_shards(tmp_path):
    small, large = Run(tmp_path / "a", shard_size=16), Run(tmp_path / "b", shard_size=80)
    assert len(small.manifest.shards) == 5 and len(large.manifest.shards) == 1
    assert drawn(small.windows()) == drawn(large.windows()) != set()


def test_images_are_drawn_with_their_probability_wherever_they_stand(tmp_path):
    sampler = Sampler(Audit(rate=0.1, near_rate=0.1), "salt")
    lots = np.array([sampler.draw(image) for image in IDS])
    assert within((lots < 0.1).sum(), len(lots), 0.1) and within((lots < 0.001).sum(), len(lots), 0.001)
    assert lots.min() >= 0 and lots.max() < 1
    # The place in the run comes from a hash with the same salt: it must say nothing of the lot.
    run = Run(tmp_path, images=6000, shard_size=6000, salt="salt")
    in_order = pq.read_table(pa.BufferReader(run.store.read(run.manifest.shards[0].key)))["image_id"].to_pylist()
    drawn_first = sum(sampler.draw(image) < 0.1 for image in in_order[:3000])
    assert within(drawn_first, 3000, 0.1)


def test_near_a_threshold_is_a_tenth_of_it_in_any_category():
    sampler = Sampler(Audit(rate=0.001, near_rate=0.01), "s")
    assert sampler.probability([0.029, 0.0], [0.3, 0.6]) == 0.001
    assert sampler.probability([0.0301, 0.0], [0.3, 0.6]) == sampler.probability([0.0, 0.06], [0.3, 0.6]) == 0.01


def test_rates_and_certificate_leave_the_version_alone_and_are_checked():
    certificate = {"recall": {"a": 0.95}, "confidence": 0.95}
    plan = parse_plan(content(audit={"rate": 0.5, "near_rate": 0.5}, certificate=certificate), "a")
    assert plan.version == parse_plan(content(), "b").version
    for changes, words in (
        ({"audit": {"rate": 0.1, "near_rate": 0.01}}, r"near_rate is 0\.01, below rate 0\.1"),
        ({"audit": {"rate": 0}}, r"audit\.rate is 0, but more than 0 is wanted"),
        ({"certificate": {"recall": {"b": 0.9}, "confidence": 0.9}}, r"bounds for \['b'\]"),
        ({"certificate": {"recall": {"a": 95}, "confidence": 0.9}}, "not all in 0..1"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_plan(content(**changes), "here")


# What is committed


def audited_run(folder: Path) -> Run:
    run = Run(folder)
    run.sink = Sink(run.store, commit.attempts_prefix("r"), "r", ALL_DRAWN, {"one": ("m@1", "d")}, "s")
    return run


def test_every_shard_has_an_audit_table_and_it_holds_cleared_images_only(tmp_path):
    run = audited_run(tmp_path)
    ledger = run.ledger()
    for receipt in run.receipts(run.windows()):
        ledger.add(receipt)
    table, cleared = run.table("audit"), run.table("ledger").to_pylist()
    assert table.schema.equals(schema.AUDIT) and table.num_rows == 70
    assert set(table["image_id"].to_pylist()) == {row["image_id"] for row in cleared if row["outcome"] == "cleared"}
    assert table["scores"].to_pylist() == [[pytest.approx(0.7)]] * 70
    plain = Run(tmp_path / "plain")  # draws one in a hundred, and so perhaps nothing
    plain.ledger().add(plain.receipts(plain.windows())[0])
    assert len(plain.store.sizes("audit")) == 1 and plain.table("audit").schema.equals(schema.AUDIT)


@pytest.mark.parametrize("damage", ["a flagged image", "rows twice"])
def test_an_audit_table_with_the_wrong_rows_is_never_marked(tmp_path, monkeypatch, damage):
    run = audited_run(tmp_path)
    merge = Ledger._merge
    merged: dict[str, pa.Table] = {}

    def merge_wrongly(self: Ledger, name: str, files: list[Attempt]) -> pa.Table:
        merged[name] = table = merge(self, name, files)
        if name != "audit":
            return table
        if damage == "rows twice":
            return pa.concat_tables([table, table])
        flagged = merged["flagged"]["image_id"][0].as_py()
        ids = [flagged, *table["image_id"].to_pylist()[1:]]
        return table.set_column(1, "image_id", pa.array(ids))

    monkeypatch.setattr(Ledger, "_merge", merge_wrongly)
    with pytest.raises(RunError, match=r"does not count as cleared|audit holds rows twice"):
        run.ledger().add(run.receipts(run.windows())[0])
    assert not run.store.sizes("_state/r/markers")


# Intervals


def test_with_equal_weights_the_interval_of_a_count_is_garwoods():
    for seen in (0, 1, 7):
        low, high = weighted_count_interval(Weighted(weights=np.full(seen, 100.0), largest=100), 0.9)
        assert low == pytest.approx(50 * chi2.ppf(0.05, 2 * seen) if seen else 0)
        assert high == pytest.approx(50 * chi2.ppf(0.95, 2 * seen + 2))


def test_with_weights_of_one_the_interval_of_a_share_is_clopper_and_pearsons():
    for found, missed in ((0, 0), (0, 4), (9, 0), (95, 5), (60, 40)):
        parts = (Weighted(weights=np.ones(count), largest=1) for count in (found, missed))
        assert weighted_share_interval(*parts, 0.9) == pytest.approx(interval(found, found + missed, 0.9))


def test_the_rarest_image_that_was_not_seen_sets_the_upper_limit():
    few = weighted_count_interval(Weighted(weights=np.full(3, 10.0), largest=10))
    rare = weighted_count_interval(Weighted(weights=np.full(3, 10.0), largest=1000))
    assert rare[0] == few[0] and rare[1] > 3000 > few[1]
    nothing = weighted_count_interval(Weighted(weights=np.empty(0), largest=1000))
    assert nothing == (0.0, pytest.approx(1000 * -np.log(0.025)))


def sample(**changes: Any) -> Reviewed:
    """Ten flagged, eight violating; six drawn of 2,000 cleared, one near miss."""
    fields: dict[str, Any] = {
        "name": "a",
        "flagged_F": np.repeat([1, 0], [8, 2]),
        "audited_A": np.array([1, 0, 0, 0, 0, 0]),
        "probability_A": np.array([0.01, 0.01, 0.01, 0.01, 0.001, 0.001]),
        "stage_A": np.array(["one"] * 5 + ["two"], object),
        "cleared": 2000,
        "rates": (0.001, 0.01),
    }
    return Reviewed(**(fields | changes))


def test_a_miss_counts_one_over_its_probability_and_its_strata_share_of_reviews():
    whole = estimate(sample(), 0.95)
    assert whole.missed.value == pytest.approx(100) and whole.recall.value == pytest.approx(8 / 108)
    assert whole.false_omission_rate.value == pytest.approx(100 / 2000)
    assert whole.prevalence.value == pytest.approx(108 / 2010)
    assert whole.found.interval == (8, 8)
    assert {stage: figure.value for stage, figure in whole.missed_by_stage.items()} == {"one": 100, "two": 0}
    assert whole.missed_by_stage["two"].interval == (0, 2000), "an image of weight 1,000 may have been missed"
    half = estimate(sample(audited_A=np.array([1, 0, NOT_REVIEWED, NOT_REVIEWED, 0, NOT_REVIEWED])), 0.95)
    assert half.missed.value == pytest.approx(200) and half.audited_reviewed == 3


def test_what_was_found_is_scaled_up_when_not_all_flagged_were_reviewed():
    figures = estimate(sample(flagged_F=np.array([1, 1, 1, 0, *[NOT_REVIEWED] * 6])), 0.95)
    assert figures.found.value == pytest.approx(7.5) and figures.flagged_reviewed == 4
    low, high = interval(3, 4)
    assert figures.found.interval == pytest.approx((max(3, 10 * low), min(9, 10 * high)))


def test_what_no_review_covers_is_not_estimated():
    with pytest.raises(UsageError, match=r"a: of 2 cleared images drawn with probability 0\.001 none was reviewed"):
        estimate(sample(audited_A=np.array([1, 0, 0, 0, NOT_REVIEWED, NOT_REVIEWED])), 0.95)
    with pytest.raises(UsageError, match="a: of 10 flagged none was reviewed"):
        estimate(sample(flagged_F=np.full(10, NOT_REVIEWED)), 0.95)


def test_the_reviews_that_are_said_to_be_needed_give_the_power_that_is_said():
    violating, bound = 3500.0, 0.95
    share = share_to_review(violating, bound, 0.95)
    assert share is not None
    rng = np.random.default_rng(5)
    world = World(recall=0.9, images=70_000, prevalence=0.05, rates=(share, share))
    nights = [night(world, rng).reviews for _ in range(300)]
    alarms = sum(recall_at_most(reviews, 0.95) < bound for reviews in nights)
    assert within(alarms, 300, 0.8)
    assert share_to_review(20, bound, 0.95) is None
    # Half of that share lacks as much again; the whole lacks nothing.
    for drawn, lacking in ((share / 2, 0.5), (share * 1.001, 0)):
        reviews = night(World(recall=0.95, images=70_000, prevalence=0.05, rates=(drawn, drawn)), rng).reviews
        found = estimate(reviews, 0.95)
        wanted = share_to_review(found.found.interval[1] + found.missed.value, bound, 0.95)
        assert wanted == pytest.approx(share, rel=0.2)
        assert lacking_reviews(reviews, bound, 0.95) == pytest.approx(max(0, (wanted - drawn) * reviews.cleared), abs=1)
        assert lacking_reviews(reviews, bound, 0.95) == pytest.approx(
            lacking * share * reviews.cleared, rel=0.4, abs=900
        )


def test_the_canaries_that_are_said_to_lack_give_the_power_that_is_said():
    lacking = lacking_canaries(20, 0.95, 0.95)
    assert lacking is not None

    def power(canaries: int) -> float:
        alarms = [found for found in range(canaries + 1) if interval(found, canaries, 0.9)[1] < 0.95]
        return float(binom.cdf(max(alarms), canaries, 0.9)) if alarms else 0.0

    assert power(20 + lacking) >= 0.8 > power(20 + lacking - 1) and power(20) < 0.8
    assert lacking_canaries(20 + lacking, 0.95, 0.95) == 0
    assert lacking_canaries(1000, 1.0, 0.95) is None, "a share of one leaves no room for a fall"


# Simulated weeks


def week(world: World, rng: np.random.Generator) -> Reviewed:
    return pooled([night(world, rng) for _ in range(7)]).reviews


def alarms_and_coverage(world: World, weeks: int, seed: int, bound: float = 0.95) -> tuple[int, int]:
    """How many of so many weeks raise the alarm, and in how many the interval holds the recall."""
    rng = np.random.default_rng(seed)
    alarms = covered = 0
    for _ in range(weeks):
        reviews = week(world, rng)
        alarms += recall_at_most(reviews, 0.95) < bound
        low, high = estimate(reviews, 0.95).recall.interval
        covered += low <= world.recall <= high
    return alarms, covered


def at_most(count: int, trials: int, share: float) -> bool:
    """Not more than this share, but for what chance gives once in a thousand."""
    return count <= binom.ppf(0.999, trials, share)


STEADY = (
    World(recall=0.97),
    World(recall=0.95),  # at the bound: the worst that must not raise the alarm
    World(recall=0.95, near_misses=0),
    World(recall=0.95, reviewed=0.6),
    World(recall=0.95, images=10_000, prevalence=0.01, rates=(0.3, 1)),
)


@pytest.mark.parametrize("world", STEADY, ids=str)
def test_without_drift_alarms_are_rare_and_intervals_hold(world):
    alarms, covered = alarms_and_coverage(world, weeks=100, seed=1)
    assert at_most(alarms, 100, 0.05) and at_most(100 - covered, 100, 0.05)


def test_a_new_kind_of_image_that_is_missed_raises_the_alarm():
    worse, bad = (alarms_and_coverage(World(recall=recall), weeks=60, seed=2)[0] for recall in (0.8, 0.6))
    assert worse > 24 and bad > 54


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "least_power"),
    [
        *((world, None) for world in STEADY),
        (World(recall=0.9), 0.05),
        (World(recall=0.8), 0.5),
        (World(recall=0.6), 0.95),
    ],
    ids=str,
)
def test_a_thousand_nights(world, least_power):
    """143 weeks; the figures go to docs/guarantees.md."""
    alarms, covered = alarms_and_coverage(world, weeks=143, seed=3)
    print(f"{world}: alarm in {alarms} of 143 weeks, recall inside its interval in {covered}")
    assert at_most(143 - covered, 143, 0.05)
    if least_power is None:
        assert at_most(alarms, 143, 0.05)
    else:
        assert alarms / 143 > least_power


def test_intervals_hold_about_as_often_as_they_say_where_everything_is_drawn():
    world = World(recall=0.9, images=10_000, prevalence=0.02, rates=(1, 1))
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(400):
        low, high = estimate(night(world, rng).reviews, 0.9).recall.interval
        held += low <= 0.9 <= high
    assert 0.88 < held / 400 < 0.96


# Judgement


def evidence(labels: dict[tuple[str, str], int], *, audited: Any = ("c0", "c1"), **plan: Any) -> Evidence:
    """One run with categories a and b: f0 flagged as a, f1 as both, c0 and c1 cleared and drawn."""
    record = {
        "run_id": "r",
        "counts": {"cleared": 2},
        "canaries": {"found": 0, "missed": 0, "failed": 0},
        "plan": {"categories": ["a", "b"], "audit": {"rate": 1.0, "near_rate": 1.0}, "certificate": None} | plan,
    }
    flagged = [("f0", "a"), ("f1", "a"), ("f1", "b")]
    found = Evidence(
        records=[record],
        categories=("a", "b"),
        flagged=[{"run_id": "r", "image_id": i, "source_uri": f"u/{i}", "category": c} for i, c in flagged],
        audited=[
            {"run_id": "r", "image_id": i, "source_uri": f"u/{i}", "probability": 1.0, "decided_stage": "one"}
            for i in audited
        ],
        labels=labels,
    )
    found.check()
    return found


WHOLE = {
    ("f0", "a"): 1, ("f1", "a"): 0, ("f1", "b"): 1,
    ("c0", "a"): 0, ("c0", "b"): 1, ("c1", "a"): 0, ("c1", "b"): 0,
}  # fmt: skip


def test_categories_are_estimated_apart_and_images_together():
    result = audit(evidence(WHOLE), None, 0.95)
    recalls = {name: found.recall.value for name, found in result.estimates.items()}
    assert recalls == {"a": 1, "b": 0.5, "all categories": pytest.approx(2 / 3)}
    assert result.checks == () and result.alarm is None and "nothing to raise an alarm about" in result.notes[0]


def test_the_bound_comes_from_the_certificate_or_from_the_command():
    certificate = {"recall": {"a": 0.9}, "confidence": 0.95}
    assert [(c.name, c.bound) for c in audit(evidence(WHOLE, certificate=certificate), None, 0.95).checks] == [
        ("a", 0.9)
    ]
    checks = audit(evidence(WHOLE, certificate=certificate), 0.7, 0.95).checks
    assert [(c.name, c.bound) for c in checks] == [("a", 0.7), ("b", 0.7), ("all categories", 0.7)]
    # Three checks share the 5 % of false alarms.
    assert checks[1].at_most == pytest.approx(interval(1, 2, 1 - 2 * 0.05 / 3)[1])


def said(table: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return " ".join(console.file.getvalue().split())


def test_where_no_alarm_could_have_been_raised_none_is_denied():
    result = audit(evidence(WHOLE), 0.9, 0.95)
    assert {check.verdict for check in result.checks} == {"cannot be told"} and result.alarm is None
    assert any(
        "a: whether recall is below 0.9 cannot be told from 2 reviewed cleared images, nor from more" in n
        for n in result.notes
    )
    assert "no alarm" not in said(audit_table(result)) and "cannot be told" in said(audit_table(result))
    rich = night(World(recall=0.97, rates=(1, 1)), np.random.default_rng(1)).reviews
    assert lacking_reviews(rich, 0.9, 0.95) == 0
    few = evidence(WHOLE)
    few.records[0]["canaries"] = {"found": 20, "missed": 0, "failed": 0}
    result = audit(few, 0.9, 0.95)
    check = next(check for check in result.checks if check.name == "canaries")
    assert check.verdict == "cannot be told" and check.lacking == lacking_canaries(20, 0.9, 1 - 0.05 / 4) > 0
    assert (
        f"canaries: whether the share found is below 0.9 cannot be told from 20 canaries: a fall to 0.8 would be "
        f"seen with a power of 0.8 with {check.lacking:,} more" in " ".join(result.notes)
    )
    few.records[0]["canaries"]["found"] = 2000
    checks = {check.name: check for check in audit(few, 0.9, 0.95).checks}
    assert checks["canaries"].verdict == "no alarm"


def test_where_nobody_looked_at_what_was_cleared_nothing_is_said_of_recall():
    nothing = {"audited_A": np.array([], int), "probability_A": np.array([]), "stage_A": np.array([], object)}
    found = estimate(sample(**nothing), 0.95)
    for figure in (found.recall, found.missed, found.false_omission_rate, found.prevalence):
        assert figure.value is None and figure.interval[0] < figure.interval[1]
    assert found.found.value == 8 and 0 < lacking_reviews(sample(**nothing), 0.5, 0.95) < 2000
    everything = estimate(sample(**nothing, cleared=0), 0.95)
    assert everything.recall.value == 1, "nothing was cleared, so nothing was missed"
    labels = {key: label for key, label in WHOLE.items() if not key[0].startswith("c")}
    stage = {"name": "one", "rounds": [1], "thresholds": {"a": [0.5], "b": [0.5]}}
    unseen = evidence(labels, stages=[stage], audited=[])
    for row in unseen.flagged:
        row["score"] = 0.6
    result = audit(unseen, 0.9, 0.95)
    shown = said(audit_table(result))
    assert "recall │ unknown │" in shown and "1.0000" not in shown.split("bound of")[0].split("recall")[1].split("│")[1]
    rows = {row["change"]: row for row in result.thresholds["a"]}
    assert (rows["present"]["flagged"], rows["present"]["recall"]["value"]) == (2, None)
    assert rows["-1 log-odds"]["flagged"] is None and rows["-1 log-odds"]["false_positives"]["value"] is None
    assert "2 counted" in said(thresholds_table(result)) and "unknown" in said(thresholds_table(result))


def test_canaries_raise_the_alarm_by_themselves():
    found = evidence(WHOLE)
    found.records[0]["canaries"] = {"found": 10, "missed": 10, "failed": 3}
    checks = {check.name: check for check in audit(found, 0.9, 0.95).checks}
    assert checks["canaries"].broken and checks["canaries"].at_most == pytest.approx(interval(10, 20, 0.975)[1])
    assert "the share of canaries found is at most" in audit(found, 0.9, 0.95).alarm


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({("zzz", "a"): 1}, r"1 images that are in no flagged or audit table of r, as 'zzz'"),
        ({("f0", "c"): 1}, r"categories \['c'\], but the plan's are \['a', 'b'\]"),
        ({("f1", "b"): None}, r"image 'f1' was reviewed, but not for \['b'\]: .* it is flagged as"),
        ({("c0", "a"): None}, r"image 'c0' was reviewed, but not for \['a'\]: .* the plan looks for"),
    ],
)
def test_reviews_that_do_not_fit_are_refused(changes, words):
    labels = {key: label for key, label in (WHOLE | changes).items() if label is not None}
    with pytest.raises(UsageError, match=words):
        evidence(labels)


def test_reviews_become_labels_once_each():
    labels = evidence(WHOLE).source_labels()
    assert labels.schema.equals(schema.LABELS) and labels.num_rows == 7
    assert {"uri": "u/c0", "category": "b", "label": 1} in labels.to_pylist()


# End to end


def ask(*arguments: str) -> subprocess.CompletedProcess:
    """``jobs.audit`` in this process: a new interpreter imports torch first."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["jobs.audit", *arguments])
        with pytest.raises(SystemExit) as end:
            run_job("jobs.audit", job.JobConfig, job.run)
    return subprocess.CompletedProcess(arguments, end.value.code, out.getvalue(), err.getvalue())


def write_reviews(path: Path, labels: dict[tuple[str, str], int]) -> str:
    columns = {"image_id": [i for i, _ in labels], "category": [c for _, c in labels], "label": list(labels.values())}
    pq.write_table(pa.table(columns), path)
    return str(path)


WIDE = copy.deepcopy(GROUPS)
"""Groups that lose no canary by chance: companions are drawn by the pictures' paths, which differ from run to run."""
WIDE["stages"][0]["thresholds"] = {"trefoil": [1e-6, 1e-6]}


@pytest.fixture(scope="module")
def scanned(ray_session, corpus, tmp_path_factory) -> tuple[Path, Path, dict, dict]:
    """A scan of 120 pictures that draws all it clears, with canaries: four shown elsewhere, a plain one, a missing one,
    and one that the source lists itself. With its configuration and the truth by uri."""
    folder = tmp_path_factory.mktemp("audited")
    truth = {row["uri"]: row["label"] for row in read_labels(str(corpus / "labels.parquet")).to_pylist()}
    files = sorted(uri for uri in truth)
    source = folder / "source"
    source.mkdir()
    for uri in files[:120]:
        path = Path(uri.removeprefix("file://"))
        (source / path.name).write_bytes(path.read_bytes())
    listed = {(source / Path(uri).name).as_uri(): truth[uri] for uri in files[:120]}
    later = files[120:]
    positives = [uri for uri in later if truth[uri]][:4]
    plain = next(uri for uri in later if not truth[uri])
    own = next(uri for uri, label in listed.items() if label)
    canaries = [*positives, plain, (folder / "gone.jpg").as_uri(), own]
    pq.write_table(pa.table({"uri": canaries, "category": ["trefoil"] * 7}), folder / "canaries.parquet")
    rows = [{"uri": uri, "category": "trefoil", "label": 1} for uri in canaries[:6]]
    rows += [{"uri": uri, "category": "trefoil", "label": label} for uri, label in listed.items()]
    pq.write_table(pa.Table.from_pylist(rows, schema.LABELS), folder / "labels.parquet")
    options = {
        "source": str(source),
        "output": str(folder / "out"),
        "plan": str(small_plan(folder, WIDE, audit={"rate": 1.0, "near_rate": 1.0})),
        "labels": str(folder / "labels.parquet"),
        "canaries": str(folder / "canaries.parquet"),
        "run_id": "r",
        "salt": "s",
        "shard_size": 64,
    }
    run_scan(ScanConfig(**options))
    return folder, folder / "out", options, listed


def read(output: Path, table: str) -> list[dict]:
    return pq.read_table(sorted(output.glob(f"{table}/scan_date=*/*.parquet")), partitioning=None).to_pylist()


def test_canaries_are_found_or_missed_and_stand_in_no_other_table(scanned):
    _, output, _, listed = scanned
    record = json.loads((output / "runs/r.json").read_text())
    rows = {row["source_uri"]: row for row in read(output, "ledger") if row["outcome"] == "skipped"}
    assert record["listed"] == 126 and record["counts"]["skipped"] == len(rows) == 6
    assert record["canaries"] == {"found": 4, "missed": 1, "failed": 1} and not set(rows) & set(listed)
    for row in rows.values():
        if row["skip_reason"] == "canary found":
            assert (row["decided_stage"], row["category"]) == ("single", "trefoil") and row["score"] > 0.3
        elif row["skip_reason"] == "canary missed":
            assert row["decided_stage"] and row["group_score"] is not None and row["category"] is None
        else:
            assert row["skip_reason"] == "canary failed" and row["source_uri"].endswith("gone.jpg")
            assert row["error_code"] is None and row["decided_stage"] is None
    for table in ("flagged", "errors", "audit"):
        assert not {row["source_uri"] for row in read(output, table)} & set(rows)
    assert record["errors"] == {} and record["counts"]["error"] == 0
    assert record["quality"]["positives"] == sum(listed.values()) and record["quality"]["unlabelled"] == 0
    report = (output / "runs/r/report.html").read_text()
    assert "4 canaries found, 1 missed, 1 failed" in report


def test_an_audit_of_everything_is_what_labels_say(scanned, tmp_path):
    _, output, _, listed = scanned
    audited, flagged = read(output, "audit"), read(output, "flagged")
    cleared = {row["image_id"] for row in read(output, "ledger") if row["outcome"] == "cleared"}
    assert {row["image_id"] for row in audited} == cleared and {row["probability"] for row in audited} == {1.0}
    reviews = {(row["image_id"], "trefoil"): listed[row["source_uri"]] for row in [*audited, *flagged]}
    path, labels = write_reviews(tmp_path / "reviews.parquet", reviews), tmp_path / "found.parquet"
    base = ("--output", str(output), "--run-id", "r", "--reviews", path)
    done = ask(*base, "--recall-bound", "0.5", "--labels-output", str(labels))
    assert done.returncode == 0, done.stderr
    assert "4 of 5 tested" in done.stdout and "nothing to raise" not in done.stdout
    quality = json.loads((output / "runs/r.json").read_text())["quality"]
    result = json.loads((output / "runs/r/audit.json").read_text())
    recall = result["estimates"]["trefoil"]["recall"]
    assert recall["value"] == pytest.approx(quality["recall"])
    assert recall["interval"] == pytest.approx(quality["recall_interval"])
    assert {row["uri"]: row["label"] for row in read_labels(str(labels)).to_pylist()} == listed
    assert "nothing to raise an alarm about" in ask(*base).stdout

    # As if people had found the emblem in every third cleared image.
    worse = reviews | {(row["image_id"], "trefoil"): 1 for row in audited[::3]}
    again = ask(*base[:-1], write_reviews(tmp_path / "worse.parquet", worse), "--recall-bound", "0.9")
    assert again.returncode == 1 and "alarm: recall of trefoil is at most 0." in again.stderr
    assert json.loads((output / "runs/r/audit.json").read_text())["alarm"] in " ".join(again.stderr.split())


def test_reviews_that_cannot_be_read_are_refused_in_one_line(scanned, tmp_path):
    _, output, _, _ = scanned
    image = read(output, "audit")[0]["image_id"]
    path = tmp_path / "reviews.parquet"
    base = ("--output", str(output), "--run-id", "r", "--reviews", str(path))
    expect(ask(*base), 2, "reviews", "no such file")
    write_reviews(path, {(image, "trefoil"): 2})
    expect(ask(*base), 2, "the label of", "is 2, but only 0 and 1")
    twice = {"image_id": [image, image], "category": ["trefoil"] * 2, "label": [0, 1]}
    pq.write_table(pa.table(twice), path)
    expect(ask(*base), 2, "is labelled 0 and 1")
    pq.write_table(pa.table({"image_id": [image]}), path)
    expect(ask(*base), 2, "wanted Parquet with image_id, category, label")
    write_reviews(path, {("f" * 32, "trefoil"): 1})
    expect(ask(*base), 2, "in no flagged or audit table of r")
    expect(ask(*base[:2], "--run-id", "no", *base[4:]), 2, "there is no complete run 'no'")
    expect(ask(*base, "--run-id", "r", "r"), 2, "give each run to audit once")
    expect(ask(*base, "--recall-bound", "95"), 2, "recall bound is 95")
    expect(ask(*base, "--confidence", "0.3"), 2, "confidence is 0.3")


def test_a_run_goes_on_with_its_own_canaries_and_rates(scanned, tmp_path):
    _, _, options, _ = scanned
    pq.write_table(pa.table({"uri": ["/x.jpg"], "category": ["trefoil"]}), tmp_path / "other.parquet")
    again = ScanConfig(**options)
    assert run_scan(again)["canaries"]["found"] == 4
    with pytest.raises(UsageError, match="was started with canaries of SHA-256"):
        run_scan(replace(again, canaries=str(tmp_path / "other.parquet")))
    with pytest.raises(UsageError, match="was started with canaries of SHA-256"):
        run_scan(replace(again, canaries=None))
    with pytest.raises(UsageError, match="was started with audit rates"):
        run_scan(replace(again, plan=str(small_plan(tmp_path, WIDE, audit={"rate": 0.5, "near_rate": 1.0}))))


def test_canaries_that_are_none_are_refused(scanned, tmp_path):
    _, _, options, _ = scanned
    path = tmp_path / "canaries.parquet"
    config = ScanConfig(**(options | {"canaries": str(path), "run_id": "other"}))
    for table, words in (
        ({"uri": ["/x.jpg"], "category": ["weapon"]}, r"categories \['weapon'\] are not among the plan's"),
        ({"uri": ["/x.jpg"]}, "wanted Parquet with uri, category"),
        ({"uri": [""], "category": ["trefoil"]}, "a row has no uri"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(UsageError, match=words):
            run_scan(config)
    with pytest.raises(UsageError, match="--canaries is for a scan of a whole source; leave it out"):
        ScanConfig(retry_errors="r", canaries=str(path))
    empty = tmp_path / "empty"
    empty.mkdir()
    pq.write_table(pa.table({"uri": ["/x.jpg"], "category": ["trefoil"]}), path)
    with pytest.raises(UsageError, match="holds no images"):
        run_scan(replace(config, source=str(empty)))


def test_an_erased_image_leaves_the_audit_table(scanned, tmp_path):
    _, original, _, _ = scanned
    output = tmp_path / "out"
    subprocess.run(["cp", "-r", str(original), str(output)], check=True)
    victim = read(output, "audit")[0]
    erase(Store(str(output)), Subject(image_ids=(victim["image_id"],)), dry_run=False)
    assert victim["image_id"] not in {row["image_id"] for row in read(output, "audit")}
    assert len(read(output, "audit")) == len(read(original, "audit")) - 1
