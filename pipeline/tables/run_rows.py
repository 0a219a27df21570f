"""Complete runs as rows: the view ``runs``, from their records and audits."""

from __future__ import annotations

from collections.abc import Container
from datetime import date, datetime
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.listing.inventory import scope
from pipeline.output import commit
from pipeline.past.history import Audit, read_audits
from pipeline.past.records import PastRuns

SCAN_DATE = pa.field("scan_date", pa.date32())
"""Of every table: the name of its folder, and no column of its files."""

RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("parent_run_id", pa.string()),  # the run whose errors were scanned again: null for a run over a whole source
        ("source", pa.string()),  # as it was given
        ("scope", pa.string()),  # what the source has in common with that of other nights: of a report all but its date
        ("since", pa.string()),  # what an incremental run went on from: null for a run that looked at everything
        SCAN_DATE,
        ("started_at", schema.TIMESTAMP),
        ("completed_at", schema.TIMESTAMP),
        ("nth", pa.int64()),  # place among the complete runs of the output by start, from 0
        ("newest", pa.bool_()),  # whether it is its scope's newest run over the whole source
        ("plan", pa.string()),
        ("plan_version", pa.string()),
        ("schema_version", pa.int32()),
        ("listed", pa.int64()),
        ("cleared", pa.int64()),
        ("flagged", pa.int64()),
        ("error", pa.int64()),
        ("skipped", pa.int64()),
        ("relative_cost", pa.float64()),  # of testing every image alone
        ("seconds", pa.float64()),  # of the driver that finished it
        ("suspect", pa.bool_()),  # whether drift gates found what nobody has accepted: null where there were no gates
        ("gates_found", pa.list_(pa.string())),  # of the gates, accepted or not, in words
        ("cost", pa.float64()),  # by the price table that the run was started with: null without one
        ("currency", pa.string()),  # of that table
        ("policy", pa.string()),  # name of the policy that recommended actions: null where all was to be reviewed
        ("policy_version", pa.string()),
        ("audited_recall", pa.float64()),  # what reviews say of it, of all categories together: null without an audit
        ("audited_recall_low", pa.float64()),  # ends of its interval
        ("audited_recall_high", pa.float64()),
        ("audited_runs", pa.int32()),  # that the audit took together: it stands in the row of the first that it named
    ]
)


def runs_table(records: list[dict[str, Any]], past: PastRuns) -> pa.Table:
    """``records`` in the order of their start."""
    audits = read_audits(past, [record["run_id"] for record in records], {})
    newest = {scope(record["source"]): record["run_id"] for record in records if record["parent_run_id"] is None}
    rows = [
        {
            **{name: record[name] for name in ("run_id", "parent_run_id", "source", "plan_version")},
            # Records of version 1 say nothing of these.
            "since": record.get("since"),
            "schema_version": record.get("schema_version", 1),
            "scan_date": date.fromisoformat(record["scan_date"]),
            "started_at": datetime.fromisoformat(record["started_at"]),
            "completed_at": datetime.fromisoformat(record["updated_at"]),
            "nth": nth,
            "scope": scope(record["source"]),
            "newest": newest.get(scope(record["source"])) == record["run_id"],
            "plan": record["plan"]["name"],
            **{name: record["counts"][name] for name in ("listed", "cleared", "flagged", "error", "skipped")},
            **{name: record[name] for name in ("relative_cost", "seconds")},
            **_found_by_gates(record, past.found),
            **_owners(record),
            **_audited(audits.get(record["run_id"])),
        }
        for nth, record in enumerate(records)
    ]
    return pa.Table.from_pylist(rows, RUNS)


def _found_by_gates(record: dict[str, Any], there: Container[str]) -> dict[str, Any]:
    """Nothing is known of a run of a version without gates, nor of one whose gates were switched off."""
    compared = (record.get("gates") or {}).get("verdicts")
    found = record.get("suspect")
    if found is None or not (compared or found):
        return {"suspect": None, "gates_found": None}
    accepted = commit.accepted_key(record["run_id"]) in there
    return {"suspect": bool(found) and not accepted, "gates_found": [finding["words"] for finding in found]}


def _owners(record: dict[str, Any]) -> dict[str, Any]:
    """By the files of its owner. Records of older versions have neither."""
    cost, policy = record.get("cost") or {}, record.get("policy") or {}
    return {
        "cost": cost.get("total"),
        "currency": cost.get("currency"),
        "policy": policy.get("name"),
        "policy_version": policy.get("version"),
    }


def _audited(audit: Audit | None) -> dict[str, Any]:
    recall = audit.recall if audit else None
    if audit is None or recall is None:
        return dict.fromkeys(("audited_recall", "audited_recall_low", "audited_recall_high", "audited_runs"))
    return {
        "audited_recall": recall.value,
        "audited_recall_low": recall.low,
        "audited_recall_high": recall.high,
        "audited_runs": len(audit.run_ids),
    }
