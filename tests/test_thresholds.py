"""What other thresholds would change: against every score that a plan's last round gave, which no table holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from models.intervals import interval
from pipeline import schema
from pipeline.plan import Audit, Plan
from pipeline.reporting.threshold_steps import short
from pipeline.reporting.thresholds import AUDITED, OtherThresholds

LIMITS = {"gore": 0.4, "weapon": 0.1, "hate": 0.6}


def plan_of(*categories: str, groupings: int = 1) -> Plan:
    last = {"name": "last", "model": "n", "rounds": [4 if groupings == 2 else 1], "groupings": groupings}
    first = {"name": "first", "model": "n", "rounds": [4, 2], "input_size": 32}
    return Plan.model_validate(
        {
            "name": "plan",
            "categories": list(categories),
            "stages": [
                first | {"thresholds": {name: [0.01, 0.01] for name in categories}},
                last | {"input_size": 32, "thresholds": {name: [LIMITS[name]] for name in categories}},
            ],
        }
    )


def flagged_row(image: str, category: str, *scores: float, stage: str = "last") -> dict[str, Any]:
    tests = [{"stage": "first", "round": 1, "score": 0.02}, *({"stage": stage, "round": 0, "score": s} for s in scores)]
    return {"image_id": image, "category": category, "stages": tests if scores else []}


def ledger_row(image: str, outcome: str, score: float | None = None, **values: Any) -> dict[str, Any]:
    decided = {"decided_stage": "last", "decided_round": 0, "group_score": score} if score is not None else {}
    return {"image_id": image, "source_uri": f"u/{image}", "sha256": image, "outcome": outcome} | decided | values


def fed(
    plan: Plan,
    flagged: list[dict],
    ledger: list[dict],
    labels: list[tuple[str, str, int]] | None = None,
    parts: int = 1,
) -> list[dict[str, Any]]:
    """The tables of the page. ``labels``: image, category, label."""
    columns = ("uri", "category", "label")
    rows = None if labels is None else [dict(zip(columns, (f"u/{i}", c, v), strict=True)) for i, c, v in labels]
    others = OtherThresholds(plan, None if rows is None else pa.Table.from_pylist(rows, schema.LABELS))
    others.add_flagged(pa.Table.from_pylist(flagged, schema.FLAGGED))
    for part in range(parts):
        table = pa.Table.from_pylist(ledger[part::parts], schema.LEDGER)
        if labels is None:
            table = table.filter(pa.compute.equal(table["outcome"], "cleared"))
        others.add_ledger(table.select(others.columns))
    return others.of_categories()


def rows_of(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By each of its names."""
    return {name: row for row in table["rows"] for name in row["change"].split(", ")}


def logit(score: float) -> float:
    return math.log(score / (1 - score))


def one_category(rng: np.random.Generator, flagged: int, cleared: int) -> tuple[list[dict], list[dict], np.ndarray]:
    above = rng.uniform(0.4, 1, flagged).astype(np.float32)
    under = rng.uniform(0, 0.3999, cleared).astype(np.float32)
    found = [flagged_row(f"f{n}", "gore", float(score)) for n, score in enumerate(above)]
    ledger = [ledger_row(f"c{n}", "cleared", float(score)) for n, score in enumerate(under)]
    ledger += [ledger_row(f"f{n}", "flagged", float(score)) for n, score in enumerate(above)]
    ledger += [ledger_row(f"e{n}", "cleared", 0.005, decided_stage="first", decided_round=1) for n in range(50)]
    return found, ledger, np.concatenate([above, under])


@pytest.mark.parametrize(("flagged", "cleared", "parts"), [(60, 500, 1), (60, 500, 7), (5, 3000, 4), (40, 10, 2)])
def test_of_one_category_counts_are_exact_at_every_threshold(flagged, cleared, parts):
    found, ledger, scores = one_category(np.random.default_rng(flagged), flagged, cleared)
    (table,) = fed(plan_of("gore"), found, ledger, parts=parts)
    assert table["exact"] and table["reached"] == cleared and table["labels"] is None
    assert [row["threshold"] for row in table["rows"]] == sorted(row["threshold"] for row in table["rows"])
    for row in table["rows"]:
        expected = int((scores >= row["threshold"]).sum())
        assert row["flagged"] == (expected, expected), row
    named = rows_of(table)
    assert named["present"]["threshold"] == 0.4 and named["present"]["flagged"] == (flagged, flagged)
    for step in (-2, -1, 1, 2):
        assert logit(named[f"{step:+d} log-odds"]["threshold"]) == pytest.approx(logit(0.4) + step, abs=0.02)
    assert abs(named["about half as many"]["flagged"][0] - flagged / 2) <= 1
    if cleared >= flagged:
        assert abs(named["about twice as many"]["flagged"][0] - 2 * flagged) <= 2
    else:
        assert "about twice as many" not in named, "there are not so many that the last round has seen"


def test_what_the_page_shows_is_what_was_counted():
    """A threshold of few digits, on its own side of the present one."""
    found, ledger, _ = one_category(np.random.default_rng(3), 40, 400)
    (table,) = fed(plan_of("gore"), found, ledger)
    for row in table["rows"]:
        assert float(f"{row['threshold']:.10g}") == row["threshold"]
    assert [short(limit, 0.4) for limit in (0.123456, 0.987654, 0.99987654, 0.4001234, 0.3999)] == [
        0.123, 0.9877, 0.999877, 0.40012, 0.3999
    ]  # fmt: skip


def test_a_hash_match_is_flagged_at_any_threshold():
    found = [flagged_row("m1", "gore"), flagged_row("m2", "gore"), flagged_row("f", "gore", 0.5)]
    (table,) = fed(plan_of("gore"), found, [ledger_row("c", "cleared", 0.399)])
    assert table["matched"] == 2
    assert {row["flagged"][0] for row in table["rows"] if row["threshold"] > 0.55} == {2}
    # Half of three is one, and no threshold goes below the two.
    assert "about half as many" not in rows_of(table)


def test_a_run_that_flagged_nothing_has_its_steps_all_the_same():
    (table,) = fed(plan_of("gore"), [], [ledger_row("c", "cleared", 0.2), ledger_row("d", "cleared", 0.01)])
    assert [row["flagged"][0] for row in table["rows"]] == [1, 1, 0, 0, 0]
    (table,) = fed(plan_of("gore"), [], [])
    assert [row["flagged"] for row in table["rows"]] == [(0, 0)] * 5


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_threshold_at_an_end_has_steps_on_one_side_only(monkeypatch, limit):
    monkeypatch.setitem(LIMITS, "gore", limit)
    (table,) = fed(plan_of("gore"), [flagged_row("f", "gore", 1.0)], [])
    assert table["rows"][0 if limit == 0 else -1]["change"] == "present"
    assert all(0 <= row["threshold"] <= 1 for row in table["rows"]) and len(table["rows"]) == 3


def several(rng: np.random.Generator, images: int) -> tuple[Plan, np.ndarray, list[dict], list[dict]]:
    """Scores (N, K) that the nets gave, and the tables that a sink makes of them."""
    plan = plan_of("gore", "weapon", "hate")
    limits = np.array([LIMITS[name] for name in plan.categories])
    scores = rng.beta(0.4, 1.2, (images, 3)).astype(np.float32)
    found, ledger = [], []
    for number, row in enumerate(scores):
        hits = [k for k in range(3) if row[k] >= limits[k]]
        nearest = int(np.argmax(row - limits))
        found += [flagged_row(f"{number}", plan.categories[k], float(row[k])) for k in hits]
        ledger.append(ledger_row(f"{number}", "flagged" if hits else "cleared", float(row[nearest])))
    return plan, scores, found, ledger


@pytest.mark.parametrize("seed", range(4))
def test_of_several_categories_the_truth_lies_between_what_is_certain_and_what_is_possible(seed):
    rng = np.random.default_rng(seed)
    plan, scores, found, ledger = several(rng, 800)
    labels = [(f"{n}", name, int(rng.random() < 0.3)) for n in range(400) for name in plan.categories]
    tables = fed(plan, found, ledger, labels, parts=3)
    assert [table["category"] for table in tables] == list(plan.categories)
    for k, table in enumerate(tables):
        truth = np.array([label for n, (_, name, label) in enumerate(labels) if name == table["category"]], bool)
        assert not table["exact"] and "about twice as many" not in rows_of(table)
        for row in table["rows"]:
            hits = scores[:, k] >= row["threshold"]
            low, high = row["flagged"]
            assert low <= hits.sum() <= high
            assert row["recall"][0] - 1e-9 <= hits[:400][truth].mean() <= row["recall"][1] + 1e-9
            assert row["false_positives"][0] <= hits[:400][~truth].sum() <= row["false_positives"][1]
            if row["threshold"] >= LIMITS[table["category"]]:
                assert low == high, "at stricter thresholds everything is known"
    weapon = rows_of(tables[1])["-1 log-odds"]
    assert weapon["flagged"][1] < 800, "of the lowest threshold the bound says something"


def test_the_audits_sample_says_what_lies_between_the_bounds():
    rng = np.random.default_rng(11)
    plan, scores, found, _ = several(rng, 4000)
    plan = plan.model_copy(update={"audit": Audit(rate=0.2, near_rate=0.2)})
    others = OtherThresholds(plan, None)
    others.add_flagged(pa.Table.from_pylist(found, schema.FLAGGED))
    cleared = np.flatnonzero((scores < np.array([LIMITS[name] for name in plan.categories])).all(axis=1))
    drawn = [n for n in cleared if rng.random() < 0.2]
    rows = [
        {"decided_stage": "last", "decided_round": 0, "probability": 0.2, "scores": scores[n].tolist()} for n in drawn
    ]
    rows.append(rows[0] | {"decided_stage": "first", "scores": [0.399, 0.099, 0.599]})  # never got to the last round
    for part in (rows[:100], rows[100:], []):
        others.add_audit(pa.Table.from_pylist(part, schema.AUDIT).select(AUDITED))
    for k, table in enumerate(others.of_categories()):
        for row in table["rows"]:
            if row["threshold"] >= LIMITS[table["category"]]:
                assert row["estimate"] is None
                continue
            present = sum(found_row["category"] == table["category"] for found_row in found)
            reach = int((scores[cleared, k] >= row["threshold"]).sum())
            expected = sum(scores[n, k] >= row["threshold"] for n in drawn) / 0.2
            assert row["estimate"]["value"] == pytest.approx(present + expected)
            low, high = row["estimate"]["interval"]
            # 24 intervals at 95 %, of one draw that is fixed: all of them hold.
            assert low <= present + reach <= high and high - low < 0.8 * reach + 100


def test_two_groupings_have_to_be_reached_twice():
    found = [flagged_row("f", "gore", 0.9, 0.5), flagged_row("g", "gore", 0.6, 0.95)]
    (table,) = fed(plan_of("gore", groupings=2), found, [ledger_row("c", "cleared", 0.39)])
    named = rows_of(table)
    assert named["+1 log-odds"]["threshold"] == 0.644 and named["+1 log-odds"]["flagged"] == (0, 0)
    assert not table["exact"] and named["-1 log-odds"]["flagged"] == (2, 3), "its other group may have cleared it"


# Against labels


def test_recall_and_false_positives_at_each_threshold_with_intervals():
    found = [flagged_row("p1", "gore", 0.9), flagged_row("p2", "gore", 0.5), flagged_row("n1", "gore", 0.7)]
    ledger = [
        *(ledger_row(name, "flagged", 0.9) for name in ("p1", "p2", "n1")),
        ledger_row("p3", "cleared", 0.3), ledger_row("n2", "cleared", 0.35), ledger_row("n3", "cleared", 0.01),
        ledger_row("p4", "error"), ledger_row("p5", "cleared", 0.001, decided_stage="first"),
        # Neither is this run's word: a copy of earlier findings, and a canary.
        ledger_row("p6", "flagged", judged_run_id="old"), ledger_row("p7", "skipped"),
    ]  # fmt: skip
    labels = [(row["image_id"], "gore", int(row["image_id"].startswith("p"))) for row in ledger]
    labels += [("nobody", "gore", 1), ("p1", "other", 0)]
    (table,) = fed(plan_of("gore"), found, ledger, labels)
    assert table["labels"] == {"violating": {"images": 5, "unique": 5}, "others": {"images": 3, "unique": 3}}
    named = rows_of(table)
    assert named["present"]["recall"] == (0.4, 0.4) and named["present"]["recall_interval"] == interval(2, 5)
    assert named["-1 log-odds"]["recall"] == (0.6, 0.6) and named["-1 log-odds"]["false_positives"] == (2, 2)
    assert named["-1 log-odds"]["false_positive_rate_interval"] == interval(2, 3)
    assert named["+1 log-odds"]["recall"] == (0.2, 0.2) and named["+1 log-odds"]["false_positives"] == (1, 1)
    assert named["+2 log-odds"]["recall"] == (0.2, 0.2) and named["+2 log-odds"]["false_positives"] == (0, 0)


def test_copies_of_one_content_are_one_observation():
    found = [flagged_row("a1", "gore", 0.9), flagged_row("a2", "gore", 0.45), flagged_row("b", "gore", 0.9)]
    ledger = [
        ledger_row("a1", "flagged", 0.9, sha256="a"), ledger_row("a2", "flagged", 0.45, sha256="a"),
        ledger_row("b", "flagged", 0.9), ledger_row("c", "cleared", 0.1, sha256=None),
    ]  # fmt: skip
    (table,) = fed(plan_of("gore"), found, ledger, [(name, "gore", 1) for name in ("a1", "a2", "b", "c")])
    assert table["labels"]["violating"] == {"images": 4, "unique": 3}
    named = rows_of(table)
    assert named["present"]["recall"][0] == pytest.approx(2 / 3)
    # One of its two copies is found: half an observation of three.
    assert named["+1 log-odds"]["recall"][0] == pytest.approx(1.5 / 3)
    assert named["+1 log-odds"]["recall_interval"] == interval(1.5, 3)


def test_labels_that_name_nobody_give_no_figures():
    (table,) = fed(plan_of("gore"), [], [ledger_row("c", "cleared", 0.2)], [("x", "gore", 1)])
    assert table["labels"]["violating"]["unique"] == 0 and rows_of(table)["present"]["recall"] is None
