"""Recall and false-positive rate of a run whose images are labelled."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.intervals import interval
from pipeline.schema import LEDGER
from pipeline.store import Store


@dataclass(frozen=True, kw_only=True)
class Quality:
    """An image is violating when any category is. A violating image that ended in an error is a miss.

    Intervals are Clopper and Pearson's at 95 %. ``unlabelled`` images count nowhere.
    """

    recall: float | None
    recall_interval: tuple[float, float]
    false_positive_rate: float | None
    false_positive_rate_interval: tuple[float, float]
    positives: int
    negatives: int
    unlabelled: int
    unlisted_positives: int
    """Violating uris among the labels that the run did not list, or not judge: they count nowhere either."""
    missed: list[str]
    """The first hundred uris of violating images that were not flagged."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judge_run(store: Store, ledgers: list[dict[str, Any]], labels: pa.Table) -> Quality:
    """Joins the ledger, file by file as the run record names them, with labels (uri, category, label)."""
    counts = dict.fromkeys(("positives", "hits", "negatives", "false", "unlabelled"), 0)
    missed: list[str] = []
    with duckdb.connect() as connection:
        connection.register("labels", labels)
        connection.execute("CREATE TABLE truth AS SELECT uri, max(label) AS violating FROM labels GROUP BY uri")
        for file in ledgers:
            columns = ["source_uri", "outcome"]
            body = io.BytesIO(store.read(file["path"], file["sha256"]))
            # What was skipped was not judged: a canary that was found is no hit, and none is a miss.
            # Nor a copy of what an earlier run had flagged: copies of its misses are skipped.
            judged = (pc.field("outcome") != "skipped") & pc.field("judged_run_id").is_null()
            connection.register("ledger", pq.read_table(body, columns=columns, filters=judged, schema=LEDGER))
            joined = "ledger LEFT JOIN truth ON source_uri = uri"
            row = connection.execute(
                f"""SELECT count(*) FILTER (violating = 1), count(*) FILTER (violating = 1 AND outcome = 'flagged'),
                           count(*) FILTER (violating = 0), count(*) FILTER (violating = 0 AND outcome = 'flagged'),
                           count(*) FILTER (violating IS NULL) FROM {joined}"""
            ).fetchone()
            assert row is not None
            for key, value in zip(counts, row, strict=True):
                counts[key] += value
            misses = (
                f"SELECT source_uri FROM {joined} WHERE violating = 1 AND outcome <> 'flagged' ORDER BY 1 LIMIT 100"
            )
            missed += [uri for (uri,) in connection.execute(misses).fetchall()]
        row = connection.execute("SELECT count(*) FROM truth WHERE violating = 1").fetchone()
        assert row is not None
        violating_labels: int = row[0]
    positives, negatives = counts["positives"], counts["negatives"]
    return Quality(
        recall=counts["hits"] / positives if positives else None,
        recall_interval=interval(counts["hits"], positives),
        false_positive_rate=counts["false"] / negatives if negatives else None,
        false_positive_rate_interval=interval(counts["false"], negatives),
        positives=positives,
        negatives=negatives,
        unlabelled=counts["unlabelled"],
        unlisted_positives=violating_labels - positives,
        missed=missed[:100],
    )
