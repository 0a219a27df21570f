"""The last operator: windows become table rows, in attempt files that nobody reads yet.

An attempt's name is unique, so a call that Ray repeats leaves a second file that no receipt names.
"""

from __future__ import annotations

import io
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.output.policy import REVIEW_ALL, Policy
from pipeline.output.sample import Sampler
from pipeline.plan import Plan, StageSpec
from pipeline.store import Store, digest
from pipeline.window import OUTCOMES, GroupTest, Image, Window, Work

OPERATOR = "write"


def table_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_index=True)
    return buffer.getvalue()


class Sink:
    """``windows -> receipts``: one per shard among the windows. ``models``: stage to (version, sha256)."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        run_id: str,
        plan: Plan,
        models: dict[str, tuple[str, str]],
        salt: str,
        policy: Policy = REVIEW_ALL,
    ) -> None:
        self.store = store
        self.prefix = prefix
        self.rows = Rows(run_id, plan, models, salt, policy)

    def __call__(self, windows: list[Window]) -> list[dict[str, Any]]:
        shards: dict[int, list[Window]] = defaultdict(list)
        for window in windows:
            shards[window.shard].append(window)
        return [self._write(shard, members) for shard, members in shards.items()]

    def _write(self, shard: int, windows: list[Window]) -> dict[str, Any]:
        began = time.perf_counter()
        attempt = f"{self.prefix}/shard-{shard:05d}/{windows[0].window:08d}-{uuid.uuid4().hex}"
        now = datetime.now(UTC)
        tables = {name: rows for name, rows in self.rows.of_windows(windows, now).items() if rows}
        files = []
        for name, rows in tables.items():
            body = table_bytes(pa.Table.from_pylist(rows, schema.TABLES[name]))
            self.store.write(f"{attempt}/{name}.parquet", body)
            files.append({"table": name, "sha256": digest(body)})
        outcomes = [image.counted_as for window in windows for image in window.images]
        work = [work for window in windows for work in window.work]
        work.append(Work(operator=OPERATOR, images_in=len(outcomes), seconds=time.perf_counter() - began))
        return {
            "shard": shard,
            "windows": [window.window for window in windows],
            "attempt": attempt,
            "files": files,
            "outcomes": [{"outcome": kind, "images": outcomes.count(kind)} for kind in OUTCOMES],
            "work": [{name: getattr(one, name) for name in schema.WORK.names} for one in work],
        }


class Rows:
    """Table rows from decided images."""

    def __init__(
        self,
        run_id: str,
        plan: Plan,
        models: dict[str, tuple[str, str]],
        salt: str,
        policy: Policy = REVIEW_ALL,
    ) -> None:
        self.run_id = run_id
        self.plan = plan
        self.models = models
        self.policy = policy
        self.sampler = Sampler(plan.audit, salt)
        self.specs: dict[str, StageSpec] = {stage.name: stage for stage in plan.stages}

    def of_windows(self, windows: list[Window], now: datetime) -> dict[str, list[dict[str, Any]]]:
        """Rows by table name."""
        tables: dict[str, list[dict[str, Any]]] = {"ledger": [], "flagged": [], "errors": [], "audit": []}
        for window in windows:
            for offset, image in enumerate(window.images):
                ordinal = window.first_ordinal + offset
                tables["ledger"].append(self._ledger(image, window.shard, ordinal))
                if image.counted_as == "flagged":
                    tables["flagged"] += self._flagged(image, now)
                elif image.counted_as == "error":
                    tables["errors"].append(self._error(image, window.shard, ordinal, now))
                elif image.counted_as == "cleared":
                    tables["audit"] += self._audited(image, window.shard, ordinal, now)
        return tables

    def _ledger(self, image: Image, shard: int, ordinal: int) -> dict[str, Any]:
        assert image.outcome is not None, f"{image.uri} reached the sink without an outcome"
        row: dict[str, Any] = {
            "run_id": self.run_id,
            "image_id": image.image_id,
            "source_uri": image.uri,
            "outcome": image.counted_as,
            "error_code": None if image.canary else image.error_code,
            "skip_reason": image.skip_reason,
            "burst": any(test.burst for test in image.tests) if image.tests else None,
            "shard": shard,
            "ordinal": ordinal,
            "sha256": image.sha256,
            "judged_run_id": image.judged_run_id,
            "match_ignored": image.match_ignored or None,
        }
        if image.judged_run_id is not None:
            row["judged_outcome"] = "flagged" if image.findings else "cleared"
        if image.findings:
            first = image.findings[0]
            row |= {name: first[name] for name in ("decided_stage", "category", "score")}
        elif image.outcome in ("cleared", "flagged"):
            # Nothing unseen is ever cleared: an outcome without a test behind it must not exist.
            test = image.tests[-1]
            category = self._nearest_category(test)
            score = test.scores[category]
            row |= {
                "decided_stage": test.stage,
                "decided_round": test.round,
                "group_id": test.group_id,
                "group_size": test.group_size,
                "group_score": score,
                "score": score if self._is_individual(test) else None,
                "category": self.plan.categories[category] if image.outcome == "flagged" else None,
            }
        return row

    def _thresholds(self, test: GroupTest) -> list[float]:
        spec = self.specs[test.stage]
        return [spec.thresholds[category][test.round] for category in self.plan.categories]

    def _nearest_category(self, test: GroupTest) -> int:
        """The category whose score lies highest above, or least below, its threshold."""
        return int(np.argmax(np.array(test.scores) - self._thresholds(test)))

    def _is_individual(self, test: GroupTest) -> bool:
        return self.specs[test.stage].rounds[test.round] == 1

    def _flagged(self, image: Image, now: datetime) -> Iterator[dict[str, Any]]:
        """One row for each finding."""
        for finding in image.findings or self._reached(image):
            yield finding | {
                "run_id": self.run_id,
                "image_id": image.image_id,
                "source_uri": image.uri,
                "etag": image.etag,
                "size_bytes": image.size_bytes,
                "source_modified_at": image.modified_at,
                "scanned_at": now,
                "image_format": image.format,
                "width": image.width,
                "height": image.height,
                "recommended_action": self.policy.action(finding["category"], finding["score"]),
                "judged_run_id": image.judged_run_id,
            }

    def _reached(self, image: Image) -> Iterator[dict[str, Any]]:
        """A finding for each category that reached its threshold in the deciding test."""
        last = image.tests[-1]
        for index, (category, threshold) in enumerate(zip(self.plan.categories, self._thresholds(last), strict=True)):
            if last.scores[index] >= threshold:
                yield {
                    "category": category,
                    "score": last.scores[index],
                    "threshold": threshold,
                    "decided_stage": last.stage,
                    "stages": [self._history(test, index) for test in image.tests],
                    "plan_version": self.plan.version,
                    "weights_sha256": self.models[last.stage][1],
                }

    def _history(self, test: GroupTest, category: int) -> dict[str, Any]:
        return {
            "stage": test.stage,
            "round": test.round,
            "group_id": test.group_id,
            "group_size": test.group_size,
            "score": test.scores[category],
            "threshold": self._thresholds(test)[category],
            "model_version": self.models[test.stage][0],
        }

    def _audited(self, image: Image, shard: int, ordinal: int, now: datetime) -> Iterator[dict[str, Any]]:
        """A row when the image is drawn."""
        test = image.tests[-1]
        probability = self.sampler.probability(test.scores, self._thresholds(test))
        if self.sampler.draw(image.image_id) < probability:
            yield {
                "run_id": self.run_id,
                "image_id": image.image_id,
                "source_uri": image.uri,
                "etag": image.etag,
                "probability": probability,
                "decided_stage": test.stage,
                "decided_round": test.round,
                "group_id": test.group_id,
                "group_size": test.group_size,
                "scores": test.scores,
                "shard": shard,
                "ordinal": ordinal,
                "scanned_at": now,
            }

    def _error(self, image: Image, shard: int, ordinal: int, now: datetime) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "image_id": image.image_id,
            "source_uri": image.uri,
            "etag": image.etag,
            "size_bytes": image.size_bytes,
            "error_code": image.error_code,
            "error_detail": image.error_detail,
            "shard": shard,
            "ordinal": ordinal,
            "scanned_at": now,
        }
