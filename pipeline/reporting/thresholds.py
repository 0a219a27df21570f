"""What a stricter or a laxer threshold in a plan's last round would change, from the tables of one run.

An image is flagged when it reaches a threshold of the last stage's last round, so of the images that got there another
threshold can be tried on paper. Earlier rounds have cleared the rest: what a laxer threshold there would let through is
in no table, so below the present threshold every count is a lower bound.

A cleared image has one score in the ledger, of the category nearest its threshold, and not that category's name. With
one category that is all there is to know. With several, the score bounds those of each category from above, so a count
lies between what is known to reach a threshold and what may; the audit table, which has the scores of all categories
for a random part of what was cleared, gives an estimate between the two. Of a last stage of two groupings, where an
image has to reach the threshold twice, there are the bounds only.

Shapes: N images, P labelled ones (``labelled.py``), A rows of the audit table, K categories.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.intervals import Weighted, weighted_count_interval
from pipeline.output.sample import NEAR_SHARE
from pipeline.plan import Plan
from pipeline.reporting.labelled import Labelled, quality
from pipeline.reporting.threshold_steps import short, steps

SCORES = ["decided_stage", "decided_round", "group_score"]
AUDITED = ["decided_stage", "decided_round", "probability", "scores"]
LABELLED = [*SCORES, "image_id", "source_uri", "sha256", "outcome", "judged_run_id"]


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Of some images in one category: the score that each is known to reach, and the one that it may reach. Minus
    infinity where a score was given in no last round; infinity where none was needed, as of a hash match."""

    low_N: np.ndarray
    high_N: np.ndarray

    def at(self, threshold: float) -> tuple[int, int]:
        return int((self.low_N >= threshold).sum()), int((self.high_N >= threshold).sum())


class OtherThresholds:
    """Of one run. Is fed its tables file by file, ``flagged`` first. ``labels``: uri, category, label."""

    def __init__(self, plan: Plan, labels: pa.Table | None) -> None:
        self.plan = plan
        self.last = plan.stages[-1]
        self.present = {category: values[-1] for category, values in self.last.thresholds.items()}
        self.exact = len(plan.categories) == 1 and self.last.groupings == 1
        self.near_N = np.empty(0, np.float32)
        self.scores_AK = np.empty((0, len(plan.categories)))
        self.probability_A = np.empty(0)
        self.reached = 0
        """Images that the last round cleared."""
        self.session = duckdb.connect()
        self.session.execute("CREATE TABLE found (image_id VARCHAR, category VARCHAR, score DOUBLE)")
        self.labelled = labels is not None
        if labels is not None:
            self.session.execute(
                """CREATE TABLE labelled (
                    image_id VARCHAR, content VARCHAR, category VARCHAR, violating BOOLEAN, near DOUBLE)"""
            )
            self.session.register("labels", labels)
            self.session.execute(
                "CREATE TABLE truth AS SELECT uri, category, max(label) = 1 AS violating FROM labels GROUP BY ALL"
            )

    @property
    def columns(self) -> list[str]:
        """Of the ledger, that ``add_ledger`` wants."""
        return LABELLED if self.labelled else SCORES

    def add_flagged(self, table: pa.Table) -> None:
        """Rows that this run judged itself, with image_id, category and stages. Of two groupings the lower score
        counts: both had to reach the threshold."""
        self.session.register("flagged", table.select(["image_id", "category", "stages"]))
        self.session.execute(
            """INSERT INTO found
               SELECT image_id, category, list_min([t.score for t in stages if t.stage = $stage AND t.round = $round])
               FROM flagged""",
            {"stage": self.last.name, "round": len(self.last.rounds) - 1},
        )

    def add_ledger(self, table: pa.Table) -> None:
        """Cleared rows, or with labels all rows, with ``columns``."""
        near = self._in_last_round()
        if self.labelled:
            self._add_labelled(table)
            near &= pc.field("outcome") == "cleared"
        scores = table.filter(near)["group_score"].drop_null().to_numpy()
        self.reached += len(scores)
        self.near_N = self._worth_keeping(np.concatenate([self.near_N, scores]))

    def _worth_keeping(self, near_N: np.ndarray) -> np.ndarray:
        """Of millions of cleared images those that a threshold of the page may reach."""
        limits = self.present.values()
        laxest = min(min([limit, *(step for _, step in steps(limit))]) for limit in limits)
        floor = laxest - (max(limits) - min(limits))
        keep = max(len(scores) for scores in self._found.values())
        if keep and len(near_N) > keep:
            floor = min(floor, float(np.partition(near_N, -keep)[-keep]))
        return near_N[near_N >= floor] if keep == 0 or len(near_N) > keep else near_N

    @cached_property
    def _found(self) -> dict[str, np.ndarray]:
        """Scores of what is flagged, by category; infinite where a hash decided."""
        wanted = "SELECT coalesce(score, 'inf'::DOUBLE) AS score FROM found WHERE category = ?"
        return {
            category: np.ma.getdata(self.session.execute(wanted, [category]).fetchnumpy()["score"])
            for category in self.plan.categories
        }

    def _at_most(self, category: str, near_N: np.ndarray) -> np.ndarray:
        """What a category's score may be where the ledger has ``near_N``. That is of the category k whose score lies
        least below its threshold, so score - limit <= near - limit_k, and limit_k is one of those above near."""
        limits = np.array([*sorted(self.present.values()), np.inf])
        return self.present[category] + near_N - limits[np.searchsorted(limits[:-1], near_N, "right")]

    def _reach(self, category: str, found_N: np.ndarray, near_N: np.ndarray, other_N: np.ndarray) -> Reach:
        """``found_N``, ``near_N``: scores as flagged and as cleared in the last round, NaN where it is neither.
        ``other_N``: whether nets flagged it as something else, so that they scored this category too."""
        under = np.nextafter(self.present[category], 0)
        may_N = np.where(other_N, under, -np.inf)
        may_N = np.where(np.isnan(near_N), may_N, np.minimum(self._at_most(category, near_N), under))
        does_N = may_N if self.exact else np.full(len(may_N), -np.inf)
        is_found_N = ~np.isnan(found_N)
        return Reach(low_N=np.where(is_found_N, found_N, does_N), high_N=np.where(is_found_N, found_N, may_N))

    def add_audit(self, table: pa.Table) -> None:
        """Rows of the audit table, with ``AUDITED``. Of two groupings a score says too little."""
        if len(self.plan.categories) == 1 or self.last.groupings == 2:
            return
        rows = table.filter(self._in_last_round())
        scores_AK = np.array(rows["scores"].to_pylist(), float).reshape(len(rows), len(self.plan.categories))
        self.scores_AK = np.concatenate([self.scores_AK, scores_AK])
        self.probability_A = np.concatenate([self.probability_A, rows["probability"].to_numpy()])

    def _in_last_round(self) -> pc.Expression:
        return (pc.field("decided_stage") == self.last.name) & (pc.field("decided_round") == len(self.last.rounds) - 1)

    def _estimate(self, category: str, threshold: float, present: int) -> dict[str, Any] | None:
        """How many a laxer threshold would flag, by the cleared images that were drawn; None without any."""
        limit = self.present[category]
        if threshold >= limit or not len(self.probability_A):
            return None
        reach_A = self.scores_AK[:, self.plan.categories.index(category)] >= threshold
        audit = self.plan.audit
        rarest = audit.near_rate if threshold >= NEAR_SHARE * limit else audit.rate
        drawn = Weighted(weights=1 / self.probability_A[reach_A], largest=1 / rarest)
        low, high = weighted_count_interval(drawn)
        return {"value": present + drawn.total, "interval": (present + low, present + high)}

    def of_categories(self) -> list[dict[str, Any]]:
        """What the template shows, a table for each category."""
        return [self._of_category(category, found) for category, found in self._found.items()]

    def _of_category(self, category: str, found: np.ndarray) -> dict[str, Any]:
        row = self.session.execute(
            """SELECT count(DISTINCT image_id) FROM found WHERE score IS NOT NULL
               AND image_id NOT IN (SELECT image_id FROM found WHERE category = ?)""",
            [category],
        ).fetchone()
        assert row is not None
        others, near = int(row[0]), self.near_N.astype(float)
        nothing = np.full(others, np.nan)
        images = self._reach(
            category,
            np.concatenate([found, np.full(len(near), np.nan), nothing]),
            np.concatenate([np.full(len(found), np.nan), near, nothing]),
            np.repeat([False, True], [len(found) + len(near), others]),
        )
        judged = self._labelled_reach(category) if self.labelled else None
        return {
            "category": category,
            "exact": self.exact,
            "reached": self.reached,
            "matched": int(np.isinf(found).sum()),
            "labels": judged and {kind: labels.numbers() for kind, labels in judged.items()},
            "rows": [
                {
                    "threshold": threshold,
                    "change": change,
                    "flagged": images.at(threshold),
                    "estimate": self._estimate(category, threshold, len(found)),
                }
                | ({} if judged is None else quality(judged, threshold))
                for change, threshold in self._choose(self.present[category], found, near)
            ],
        }

    def _choose(self, present: float, found: np.ndarray, near: np.ndarray) -> list[tuple[str, float]]:
        """Thresholds by name, from the laxest up. Those at which half or twice as many are flagged are there where such
        are: a hash match is flagged at any, and only scores that are known can be counted down to."""
        chosen = {present: "present"}
        half, twice = len(found) // 2, 2 * len(found)
        wanted = [(f"{step:+g} log-odds", limit) for step, limit in steps(present)]
        if int(np.isinf(found).sum()) < half:
            wanted.append(("about half as many", float(np.sort(found)[::-1][half - 1])))
        if self.exact and len(found) and len(near) >= twice - len(found):
            wanted.append(("about twice as many", float(np.sort(near)[::-1][twice - len(found) - 1])))
        for name, limit in wanted:
            rounded = short(limit, present)
            if rounded != present:
                chosen[rounded] = f"{chosen[rounded]}, {name}" if rounded in chosen else name
        return [(name, limit) for limit, name in sorted(chosen.items())]

    def _add_labelled(self, table: pa.Table) -> None:
        """What this run judged itself and somebody has labelled: a violating image in error is a miss."""
        self.session.register("ledger", table)
        self.session.execute(
            """INSERT INTO labelled
               SELECT image_id, coalesce(sha256, image_id), category, violating,
                   CASE WHEN outcome = 'cleared' AND decided_stage = $stage AND decided_round = $round THEN group_score
                   END
               FROM ledger JOIN truth ON source_uri = uri WHERE outcome <> 'skipped' AND judged_run_id IS NULL""",
            {"stage": self.last.name, "round": len(self.last.rounds) - 1},
        )

    def _labelled_reach(self, category: str) -> dict[str, Labelled]:
        rows = self.session.execute(
            """SELECT violating, content, near, o.image_id IS NOT NULL AS other,
                   CASE WHEN f.image_id IS NOT NULL THEN coalesce(f.score, 'inf'::DOUBLE) END AS found
               FROM labelled l LEFT JOIN found f ON f.image_id = l.image_id AND f.category = l.category
               LEFT JOIN (SELECT DISTINCT image_id FROM found WHERE score IS NOT NULL) o ON o.image_id = l.image_id
               WHERE l.category = ?""",
            [category],
        ).fetchnumpy()
        found, near = (np.ma.filled(rows[name], np.nan) for name in ("found", "near"))
        reach = self._reach(category, found, near, np.ma.getdata(rows["other"]))
        _, content_P = np.unique(np.ma.getdata(rows["content"]).astype(str), return_inverse=True)
        violating = np.ma.getdata(rows["violating"])
        return {
            kind: Labelled.of(content_P[which], reach.low_N[which], reach.high_N[which])
            for kind, which in (("violating", violating), ("others", ~violating))
        }
