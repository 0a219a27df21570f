"""Other thresholds from reviews: by hand, and against a truth that reviews see a random part of."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from models.intervals import Weighted, weighted_share_interval
from pipeline.review.audit import audit, thresholds_table
from pipeline.review.evidence import Evidence
from pipeline.review.thresholds import at_thresholds

STAGE = {"name": "last", "rounds": [1], "thresholds": {"a": [0.5], "b": [0.2]}}


def evidence(
    flagged: list[tuple[str, str, float | None]],
    audited: list[tuple[str, list[float], float]],
    labels: dict[tuple[str, str], int],
    *,
    cleared: int = 1000,
    rate: float = 0.1,
    stages: tuple[dict[str, Any], ...] = (STAGE,),
) -> Evidence:
    """A run for each of ``stages``; the rows are the first one's. Drawn images are named ``e...`` where an earlier
    stage has cleared them."""
    plan = {"categories": ["a", "b"], "audit": {"rate": rate, "near_rate": rate}, "certificate": None}
    records = [
        {"run_id": f"r{number}", "counts": {"cleared": cleared}, "plan": plan | {"stages": [stage]}}
        for number, stage in enumerate(stages)
    ]
    rows = [{"run_id": "r0", "image_id": i, "source_uri": i, "category": c, "score": score} for i, c, score in flagged]
    drawn = [
        {
            "run_id": "r0",
            "image_id": image,
            "source_uri": image,
            "probability": probability,
            "decided_stage": "first" if image.startswith("e") else "last",
            "decided_round": 0,
            "scores": scores,
        }
        for image, scores, probability in audited
    ]
    return Evidence(records=records, categories=("a", "b"), flagged=rows, audited=drawn, labels=labels)


def by_change(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["change"]: row for row in rows}


FLAGGED = [("f0", "a", 0.9), ("f1", "a", 0.6), ("f2", "a", 0.55), ("m", "a", None), ("g", "b", 0.3)]
DRAWN = [("c0", [0.4, 0.05], 0.1), ("c1", [0.1, 0.19], 0.1), ("e0", [0.45, 0.19], 0.1)]
LABELS = {
    ("f0", "a"): 1, ("f1", "a"): 0, ("f2", "a"): 1, ("m", "a"): 1, ("g", "b"): 1,
    ("c0", "a"): 1, ("c1", "a"): 0, ("e0", "a"): 1, ("c0", "b"): 0, ("c1", "b"): 0, ("e0", "b"): 0,
}  # fmt: skip


def test_counts_by_hand():
    found = at_thresholds(evidence(FLAGGED, DRAWN, LABELS), 0.95)
    a, b = by_change(found["a"]), by_change(found["b"])
    assert [row["threshold"] for row in found["a"]] == [0.119, 0.269, 0.5, 0.731, 0.881]
    # Two drawn misses stand for ten each; one of them was cleared before the last round, and stays so.
    assert a["present"]["recall"]["value"] == pytest.approx(3 / 23) and a["present"]["flagged"] == 4
    assert a["-1 log-odds"]["recall"]["value"] == pytest.approx(13 / 23) and a["-1 log-odds"]["flagged"] == 14
    assert a["+1 log-odds"]["recall"]["value"] == pytest.approx(2 / 23), "the first, and what a hash has matched"
    assert [row["false_positives"]["value"] for row in found["a"]] == [1, 1, 1, 0, 0]
    parts = Weighted(weights=np.ones(3), largest=1.0), Weighted(weights=np.array([10.0, 10.0]), largest=10.0)
    assert a["present"]["recall"]["interval"] == weighted_share_interval(*parts, 0.95)
    # One of the two that nearly reached b's threshold never got to it.
    assert b["-1 log-odds"]["flagged"] == 1 + 10 and b["-1 log-odds"]["false_positives"]["value"] == 10


def test_what_was_not_reviewed_is_stood_for_by_what_was():
    labels = {key: label for key, label in LABELS.items() if key not in {("f1", "a"), ("f2", "a")}}
    a = by_change(at_thresholds(evidence(FLAGGED, DRAWN, labels), 0.95)["a"])
    assert a["present"]["recall"]["value"] == pytest.approx(4 / 24)
    assert a["+1 log-odds"]["recall"]["value"] == pytest.approx(4 / 24)


@pytest.mark.parametrize(
    "stages",
    [
        (STAGE, STAGE | {"thresholds": {"a": [0.4], "b": [0.2]}}),
        (STAGE | {"groupings": 2, "rounds": [4]},),
    ],
)
def test_runs_of_other_thresholds_and_two_groupings_have_no_answer(stages):
    assert at_thresholds(evidence(FLAGGED, DRAWN, LABELS, stages=stages), 0.95) == {}
    assert set(at_thresholds(evidence(FLAGGED, DRAWN, LABELS, stages=(STAGE, STAGE)), 0.95)) == {"a", "b"}


def test_a_table_for_people():
    console = Console(file=io.StringIO(), width=140)
    console.print(thresholds_table(audit(evidence(FLAGGED, DRAWN, LABELS), None, 0.95)))
    said = console.file.getvalue()
    assert "0.269 (-1 log-odds)" in said and "0.565217" in said and "0.5 (present)" in said


def test_intervals_hold_the_truth_as_often_as_they_say():
    """A thousand images near the threshold; a tenth of the cleared is drawn, half of the flagged reviewed."""
    rng = np.random.default_rng(5)
    held = {"recall": 0, "false_positives": 0}
    for _ in range(200):
        violating = rng.random(1000) < 0.4
        score = 1 / (1 + np.exp(-rng.normal(np.where(violating, 1.0, -1.5), 1.2)))
        is_flagged = score >= 0.5
        flagged = [(f"f{n}", "a", float(score[n])) for n in np.flatnonzero(is_flagged)]
        drawn = [(f"c{n}", [float(score[n]), 0.0], 0.1) for n in np.flatnonzero(~is_flagged) if rng.random() < 0.1]
        labels = {(name, "a"): int(violating[int(name[1:])]) for name, *_ in flagged if rng.random() < 0.5}
        labels |= {(name, "a"): int(violating[int(name[1:])]) for name, *_ in drawn}
        labels |= {(name, "b"): 0 for name, *_ in drawn}
        found = by_change(at_thresholds(evidence(flagged, drawn, labels), 0.95)["a"])["-1 log-odds"]
        truth = {
            "recall": (score[violating] >= 0.269).mean(), "false_positives": (score[~violating] >= 0.269).sum()
        }  # fmt: skip
        for name, value in truth.items():
            low, high = found[name]["interval"]
            held[name] += low <= value <= high
    assert all(count >= 190 for count in held.values()), held
