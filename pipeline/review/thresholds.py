"""What other thresholds in the last round would have found, from reviews: of flagged images, and of cleared ones that
were drawn at random.

The audit table has the scores of every category, so each category has its own answer. Images that earlier rounds have
cleared stay cleared whatever the last one does: a laxer threshold there finds none of them, and recall says so.

Shapes: F flagged rows of a category, A rows of the audit table.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from models.intervals import Weighted, weighted_count_interval, weighted_share_interval
from pipeline.reporting.threshold_steps import short, steps
from pipeline.review.estimate import NOT_REVIEWED, Figure, Reviewed
from pipeline.review.evidence import Evidence


def at_thresholds(evidence: Evidence, confidence: float) -> dict[str, list[dict[str, Any]]]:
    """By category: the present threshold and some around it, from the laxest up, each with ``flagged``, ``counted`` or
    estimated, and ``recall`` and ``false_positives`` as estimated. Empty where the runs' last rounds differ, or ask
    twice, in two groupings."""
    last = [record["plan"]["stages"][-1] for record in evidence.records if record["plan"].get("stages")]
    alike = {str([stage["name"], stage["rounds"], stage["thresholds"]]) for stage in last}
    if len(last) < len(evidence.records) or len(alike) > 1 or last[0].get("groupings", 1) == 2:
        return {}
    return {category: _of_category(evidence, category, last[0], confidence) for category in evidence.categories}


def _of_category(evidence: Evidence, category: str, stage: dict[str, Any], confidence: float) -> list[dict[str, Any]]:
    flagged = [row["score"] for row in evidence.flagged if row["category"] == category]
    # A hash match has no score, and needs none.
    score_F = np.array([np.inf if score is None else score for score in flagged])
    places = {record["run_id"]: record["plan"]["categories"].index(category) for record in evidence.records}
    last = (stage["name"], len(stage["rounds"]) - 1)
    score_A = np.array(
        [
            row["scores"][places[row["run_id"]]] if (row["decided_stage"], row["decided_round"]) == last else -np.inf
            for row in evidence.audited
        ]
    )
    present = stage["thresholds"][category][-1]
    chosen = {present: "present"} | {short(limit, present): f"{step:+g} log-odds" for step, limit in steps(present)}
    reviewed = evidence.of_category(category)
    return [
        {"threshold": limit, "change": name} | _at(limit, present, reviewed, score_F, score_A, confidence)
        for limit, name in sorted(chosen.items())
    ]


def _at(
    threshold: float, present: float, reviewed: Reviewed, score_F: np.ndarray, score_A: np.ndarray, confidence: float
) -> dict[str, Any]:
    """A row that was reviewed stands for those that were not: each counts with its weight."""
    weights = reviewed.weights()
    seen = reviewed.flagged_reviewed
    weight_F = np.full(len(score_F), len(score_F) / seen if seen else 1.0)
    weight_A = np.array([weights[rate] for rate in reviewed.probability_A.tolist()])
    weight_N = np.concatenate([weight_F, weight_A])
    label_N = np.concatenate([reviewed.flagged_F, reviewed.audited_A])
    flagged_N = np.concatenate([score_F, score_A]) >= threshold
    # Only a laxer threshold finds cleared images, each of which could have counted the most.
    largest = max(weights.values())
    largest_found = largest if threshold < present else float(weight_F.max(initial=1.0))
    found = Weighted(weights=weight_N[flagged_N & (label_N == 1)], largest=largest_found)
    missed = Weighted(weights=weight_N[~flagged_N & (label_N == 1)], largest=largest)
    false = Weighted(weights=weight_N[flagged_N & (label_N == 0)], largest=largest_found)
    violating = found.total + missed.total
    recall = Figure(
        value=found.total / violating if violating and reviewed.misses_known else None,
        interval=weighted_share_interval(found, missed, confidence),
    )
    # At the present threshold and above only what was flagged counts, and all of that is there.
    counted = threshold >= present
    known = counted or reviewed.misses_known
    drawn = float((1 / reviewed.probability_A[score_A >= threshold]).sum())
    false_positives = Figure(value=false.total if known else None, interval=weighted_count_interval(false, confidence))
    return {
        "flagged": float((score_F >= threshold).sum()) + drawn if known else None,
        "counted": counted,
        "recall": asdict(recall),
        "false_positives": asdict(false_positives),
        "reviewed_violating": int((label_N == 1).sum()),
        "reviewed": int((label_N != NOT_REVIEWED).sum()),
    }
