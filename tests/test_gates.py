"""Drift gates: a night unlike those before it is suspect, in words; one like them hardly ever is. No Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jobs import scan, status
from pipeline.output import commit
from pipeline.past.baseline import drift, earlier_runs
from pipeline.past.gates import FALSE_ALARMS, FEWEST_RUNS, MOST_RUNS, interval, judge, rates, scaled, scaled_interval
from pipeline.past.records import PastRuns
from pipeline.store import Store
from tests.conftest import QUICK, small_plan
from tests.outputs import run_here, scan_by_hand

IMAGES = 100_000


def night(
    number: int, rng: np.random.Generator, *, prevalence: float = 0.002, alike: float = 0.01, images: int = IMAGES,
    errors: float = 0.001, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A record as a screen of groups of 16 and a retest leave it. ``alike``: share of pictures that the screen takes
    for violating; a twentieth of them is flagged. Nights differ by a tenth."""
    failed = rng.binomial(images, errors * rng.lognormal(0, 0.1))
    tested = images - failed
    found = rng.binomial(tested, prevalence * rng.lognormal(0, 0.1))
    odd = rng.binomial(tested, alike * rng.lognormal(0, 0.1))
    groups = tested // 16
    positive = rng.binomial(groups, 1 - (1 - min((found + odd) / tested, 1)) ** 16)
    flagged = found + rng.binomial(odd, 0.05)
    work = {"images_out": 0, "gmac": 0.0, "seconds": 0.0, "bursts": 0}
    rounds = [{"group_size": 16, "images_in": tested, "tests": groups, "positive_tests": positive} | work]
    alone = [{"group_size": 1, "images_in": 16 * positive, "tests": 16 * positive, "positive_tests": flagged} | work]
    return {
        "run_id": f"night-{number:02d}", "parent_run_id": None, "source": "s3://b/", "plan_version": "p1",
        "weights_sha256": {"a": "b"}, "banks_sha256": {}, "started_at": f"2026-01-{number + 1:02d}T01:00:00+00:00",
        "plan": {"name": "plan", "categories": ["weapon"]}, "categories": {"weapon": flagged},
        "counts": {"listed": images, "cleared": tested - flagged, "flagged": flagged, "error": failed, "skipped": 0},
        "stages": [
            {"name": "screen", "images_in": tested, "rounds": rounds},
            {"name": "single", "images_in": 16 * positive, "rounds": alone},
        ],
    } | more  # fmt: skip


@pytest.fixture
def nights() -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    return [night(number, rng) for number in range(MOST_RUNS)]


def suspects(tonight: dict[str, Any], nights: list[dict[str, Any]]) -> dict[str, str]:
    return {finding["gate"]: finding["words"] for finding in judge(tonight, nights, FALSE_ALARMS)["suspect"]}


def test_a_night_like_the_others_passes_every_gate(nights):
    found = judge(night(20, np.random.default_rng(6)), nights, FALSE_ALARMS)
    assert found["suspect"] == [] and found["gates"]["note"] is None
    assert [verdict["gate"] for verdict in found["gates"]["verdicts"]] == [
        "flagged:weapon", "positive:screen:0", "positive:single:0", "errors",
    ]  # fmt: skip
    assert all(verdict["low"] < verdict["value"] < verdict["high"] for verdict in found["gates"]["verdicts"])


def test_twice_the_prevalence_is_suspect_in_words(nights):
    rng = np.random.default_rng(7)
    tonight = night(20, rng, prevalence=0.004)
    words = suspects(tonight, nights)["flagged:weapon"]
    flagged = tonight["counts"]["flagged"]
    assert words.startswith("share of images flagged as weapon is 0.00") and f"({flagged:,} of " in words
    assert "more than expected: 0.00" in words and words.endswith("after 14 runs")


def test_a_new_look_alike_is_suspect_where_it_costs_and_not_where_it_does_not(nights):
    found = suspects(night(20, np.random.default_rng(8), alike=0.03), nights)
    assert "positive:screen:0" in found and "more than expected" in found["positive:screen:0"]
    assert "errors" not in found


def test_a_net_that_finds_nothing_and_a_store_that_fails_are_suspect(nights):
    rng = np.random.default_rng(9)
    found = suspects(night(20, rng, prevalence=0.0, alike=0.0), nights)
    assert "less than expected" in found["flagged:weapon"] and "less than expected" in found["positive:screen:0"]
    assert "errors" in suspects(night(20, rng, errors=0.01), nights)


def test_a_small_night_is_judged_by_its_noise(nights):
    """Four flagged of a thousand where two are expected are no news."""
    tonight = night(20, np.random.default_rng(0), images=1000)
    tonight["categories"] = {"weapon": 6}
    assert suspects(tonight, nights) == {}
    tonight["categories"] = {"weapon": 30}
    assert "flagged:weapon" in suspects(tonight, nights)


def test_too_few_runs_are_named(nights):
    found = judge(night(20, np.random.default_rng(1), prevalence=0.1), nights[: FEWEST_RUNS - 1], FALSE_ALARMS)
    assert found["suspect"] == [] and "too few runs to compare: 6 complete ones over" in found["gates"]["note"]
    tonight = night(20, np.random.default_rng(1)) | {"increment": {"since": "mon"}}
    note = judge(tonight, [], FALSE_ALARMS)["gates"]["note"]
    assert "0 complete ones that took over verdicts, as tonight's does, over this source" in note


def test_skipped_images_are_in_no_rate(nights):
    """An increment of two thousand among a million."""
    rng = np.random.default_rng(3)
    tonight = night(20, rng, images=2000)
    tonight["counts"] |= {"listed": 1_000_000, "skipped": 998_000}
    assert {rate.gate: rate.trials for rate in rates(tonight)}["errors"] == 2000
    assert suspects(tonight, nights) == {}


def test_a_night_on_which_nothing_was_tested_is_compared_with_nothing(nights):
    tonight = night(20, np.random.default_rng(3))
    tonight["counts"] |= {"skipped": tonight["counts"]["listed"], "error": 0, "cleared": 0}
    tonight["stages"][0]["images_in"] = 0
    for stage in tonight["stages"]:
        stage["rounds"][0] |= {"tests": 0, "positive_tests": 0}
    found = judge(tonight, nights, FALSE_ALARMS)
    assert found["suspect"] == [] and "nothing to compare" in found["gates"]["note"]


def test_the_interval_is_the_one_that_its_sources_give():
    """By hand, for two nights: DerSimonian and Laird's variance, then Higgins and others' interval with t of 1 df."""
    events, trials = np.array([100.0, 180.0]), np.array([10_000.0, 10_000.0])
    x = np.arcsin(np.sqrt((events + 3 / 8) / (trials + 3 / 4)))
    noise = 1 / 40_002
    between = (x[0] - x[1]) ** 2 / 2 - noise  # with equal noise: the sample variance without it
    reach = 12.7062047 * np.sqrt(between + (between + noise) / 2 + 1 / 20_002)
    low, high = scaled_interval(events, trials, 5000.0, 0.05)
    assert (low, high) == pytest.approx((x.mean() - reach, x.mean() + reach), rel=1e-6)
    plain = interval(events, trials, 5000.0, 0.5)
    scale = scaled_interval(events, trials, 5000.0, 0.5)
    assert [scaled(rate * 5000, 5000) for rate in plain] == pytest.approx(list(scale))


def test_of_simulated_nights_without_drift_one_in_a_hundred_is_marked_at_most():
    """Five gates of different rates, nights of different sizes, no spread between nights and one of a third."""
    rng = np.random.default_rng(11)
    worlds = 20_000
    for spread in (0.0, 0.1, 0.3):
        marked = np.zeros(worlds, bool)
        for rate, images in ((0.0005, 1e5), (0.002, 1e5), (0.12, 6e3), (0.02, 1e4), (0.0001, 1e5)):
            trials = (images * rng.lognormal(0, 0.4, (worlds, MOST_RUNS + 1))).astype(int)
            chances = np.minimum(rate * rng.lognormal(-(spread**2) / 2, spread, trials.shape), 0.95)
            events = rng.binomial(trials, chances)
            low, high = scaled_interval(events[:, 1:], trials[:, 1:], trials[:, 0], FALSE_ALARMS / 5)
            tonight = scaled(events[:, 0], trials[:, 0])
            marked |= (tonight < low) | (tonight > high)
        print(f"spread {spread}: {marked.mean():.4f} of nights marked")
        assert marked.mean() <= 0.01


def test_twice_a_rate_is_found_where_there_is_enough_to_see():
    rng = np.random.default_rng(12)
    for rate, images, least in ((0.002, 1e5, 0.9), (0.0005, 1e5, 0.2), (0.12, 6e3, 0.95)):
        trials = (images * rng.lognormal(0, 0.4, (5000, MOST_RUNS + 1))).astype(int)
        chances = rate * rng.lognormal(0, 0.1, trials.shape)
        chances[:, 0] *= 2
        events = rng.binomial(trials, chances)
        _, high = scaled_interval(events[:, 1:], trials[:, 1:], trials[:, 0], FALSE_ALARMS / 5)
        found = (scaled(events[:, 0], trials[:, 0]) > high).mean()
        print(f"rate {rate} of {images:,.0f}: doubled is found on {found:.3f} of nights")
        assert found >= least


def test_only_runs_that_compare_are_compared_with(tmp_path, nights):
    store = Store(str(tmp_path))
    others = {
        "source": "s3://c/", "plan_version": "p2", "weights_sha256": {"a": "c"}, "banks_sha256": {"known": "d"},
        "parent_run_id": "night-01", "increment": {"run_id": "x"}, "suspect": [{"gate": "errors"}],
        "started_at": "2026-02-01T00:00:00+00:00",
    }  # fmt: skip
    for record in nights[:3]:
        commit.write_json(store, commit.record_key(record["run_id"]), record)
    for name, value in others.items():
        commit.write_json(store, commit.record_key(name), nights[3] | {"run_id": name, name: value})
    tonight = night(20, np.random.default_rng(4))
    assert [run["run_id"] for run in earlier_runs(PastRuns(store), tonight)] == ["night-02", "night-01", "night-00"]
    assert [run["run_id"] for run in earlier_runs(PastRuns(store), tonight | {"increment": {"a": 1}})] == ["increment"]
    store.create(commit.accepted_key("suspect"), b"{}")
    assert earlier_runs(PastRuns(store), tonight)[0]["run_id"] == "suspect"
    assert drift(PastRuns(store), tonight | {"parent_run_id": "x"}, 0.01)["gates"]["verdicts"] == []
    assert drift(PastRuns(store), tonight, None)["gates"]["note"] == "gates were switched off"


def test_the_newest_fourteen_are_compared_with(tmp_path, nights):
    store = Store(str(tmp_path))
    rng = np.random.default_rng(4)
    for record in [*nights, night(15, rng), night(16, rng)]:
        commit.write_json(store, commit.record_key(record["run_id"]), record)
    found = [run["run_id"] for run in earlier_runs(PastRuns(store), night(20, rng))]
    assert len(found) == MOST_RUNS and (found[0], found[-1]) == ("night-16", "night-02")


def test_what_is_no_record_is_left_out_and_named(tmp_path, nights, caplog):
    store = Store(str(tmp_path))
    commit.write_json(store, commit.record_key("night-00"), nights[0])
    lacking = {name: value for name, value in nights[1].items() if name != "started_at"}
    broken: dict[str, object] = {
        "list": [1], "text": "x", "lacks": lacking, "words": nights[1] | {"started_at": 5},
        "counts": nights[1] | {"counts": {"error": "1", "listed": 10, "skipped": 0}},
        "stages": nights[1] | {"stages": []},
    }  # fmt: skip
    for name, content in broken.items():
        commit.write_json(store, commit.record_key(name), content)  # type: ignore[arg-type]
    store.create(commit.record_key("bytes"), b"{")
    tonight = night(20, np.random.default_rng(4))
    assert [run["run_id"] for run in earlier_runs(PastRuns(store), tonight)] == ["night-00"]
    named = {record.args[0] for record in caplog.records if "gates leave it out" in record.msg}
    assert named == {commit.record_key(name) for name in (*broken, "bytes")}


@pytest.fixture(scope="module")
def drifted(tmp_path_factory):
    """Eight nights of 640 objects through the whole of ``run_scan``, of which the last has twice as many findings."""
    folder = tmp_path_factory.mktemp("drifted")
    source, output = folder / "source", folder / "out"
    source.mkdir()
    for number in range(640):
        (source / f"{number:03d}.jpg").write_bytes(b"a picture")
    stage = QUICK["stages"][0] | {"rounds": [1], "thresholds": {"automobile": [0.5]}}
    plan = small_plan(folder, QUICK, stages=[stage])

    def scan_night(run_id: str, flagged: int, **options: Any) -> dict[str, Any]:
        decide = lambda name: "flagged" if int(name[:3]) < flagged else "cleared"  # noqa: E731
        return scan_by_hand(source, str(output), plan, run_id, decide, **options)

    for number in range(7):
        scan_night(f"{number}", 60 + number)
    return source, output, plan, scan_night


def test_a_drifted_night_is_complete_and_suspect_and_ends_with_3_until_it_is_accepted(drifted):
    source, output, plan, scan_night = drifted
    store = Store(str(output))
    record = scan_night("odd", 130)
    assert record["status"] == "complete" and record["counts"]["flagged"] == 130
    (finding,) = record["suspect"]
    assert (finding["gate"], finding["runs"], finding["events"]) == ("flagged:automobile", 7, 130)
    assert finding["high"] < finding["value"] == 130 / 640
    report = (output / "runs/odd/report.html").read_text()
    assert report.index("Suspect: unlike the runs before it") < report.index("Listed")
    assert "share of images flagged as automobile is 0.203 (130 of 640), more than expected" in report

    again = ("--source", str(source), "--output", str(output), "--plan", str(plan), "--run-id", "odd")
    result = run_here(scan, *again)
    assert result.returncode == 3
    assert "run 'odd' is complete but suspect: share of images flagged" in result.stderr
    assert "--accept odd" in result.stderr and len(result.stderr.strip().splitlines()) == 1

    later = scan_night("later", 132)
    assert later["suspect"] and later["gates"]["runs"] == [str(number) for number in reversed(range(7))]
    assert run_here(status, "--output", str(output), "--accept", "odd").returncode == 0
    assert run_here(scan, *again).returncode == 0
    assert json_of(store, "odd") == record, "the record has not changed"
    assert scan_night("after", 131)["gates"]["runs"][0] == "odd"
    assert run_here(status, "--output", str(output), "--accept", "0").returncode == 2


def json_of(store: Store, run_id: str) -> dict[str, Any] | None:
    return commit.read_json(store, commit.record_key(run_id))


def test_gates_can_be_switched_off(drifted):
    _, _, _, scan_night = drifted
    record = scan_night("ungated", 300, gates=False)
    assert record["suspect"] == [] and record["gates"]["note"] == "gates were switched off"
