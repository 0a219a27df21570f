"""The earlier runs that a night is compared with, and the word of a person that one which looked odd was right."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import UsageError
from pipeline.listing.inventory import scope
from pipeline.output import commit
from pipeline.past.comparable import compares
from pipeline.past.gates import MOST_RUNS, judge, rates
from pipeline.past.records import PastRuns
from pipeline.store import Store

DECIDES = ("plan_version", "weights_sha256", "banks_sha256")


def drift(past: PastRuns, tonight: Mapping[str, Any], alarms: float | None) -> dict[str, Any]:
    """The fields ``gates`` and ``suspect`` of tonight's record; see ``gates.judge``. Without ``alarms``, no gates."""
    if alarms is None or tonight["parent_run_id"]:
        note = "gates were switched off" if alarms is None else "a run that takes up errors is like no other"
        return {"gates": {"runs": [], "alarms": alarms, "verdicts": [], "note": note}, "suspect": []}
    return judge(tonight, earlier_runs(past, tonight), alarms)


def earlier_runs(past: PastRuns, tonight: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The newest complete runs before tonight's that compare with it, newest first; ``gates.MOST_RUNS`` at most.

    Of the same source, plan, nets and banks; incremental ones with incremental ones, whose images are new, and whole
    ones with whole ones. Runs that took up errors are none, and a suspect one is none until it is accepted.
    """
    comparable = []
    for run_id, record in past.newest(MOST_RUNS, lambda _, record: _compares(past, record, tonight)):
        if isinstance(record, Exception):
            # A night that is done must not fail for what somebody has done to another's record.
            logging.getLogger("dorfman").warning("%s is no run record: gates leave it out", commit.record_key(run_id))
        else:
            comparable.append(record)
    return comparable


def _compares(past: PastRuns, record: Mapping[str, Any], tonight: Mapping[str, Any]) -> bool:
    """Raises one of BROKEN for what is no record, or one without rates."""
    compares_with = bool(
        record["started_at"] < tonight["started_at"] and _alike(record, tonight) and not past.stands_suspect(record)
    )
    if compares_with:
        [rate.events / rate.trials for rate in rates(record) if rate.trials > 0]
    return compares_with


def _alike(record: Mapping[str, Any], tonight: Mapping[str, Any]) -> bool:
    return (
        record["parent_run_id"] is None
        and scope(record["source"]) == scope(tonight["source"])
        and bool(record.get("increment")) == bool(tonight.get("increment"))
        and compares(record, {name: tonight.get(name) or {} for name in DECIDES})
    )


def stands_suspect(store: Store, record: Mapping[str, Any]) -> bool:
    """Whether gates found something in this complete run that nobody has accepted."""
    return bool(record.get("suspect")) and not store.exists(commit.accepted_key(record["run_id"]))


def accept(store: Store, run_id: str) -> None:
    """Says that a suspect run is right as it is: it ends with 0 from now on, and later ones are compared with it.

    Raises UsageError.
    """
    record = commit.read_record(store, run_id)
    if record is None:
        raise UsageError(f"--accept {run_id}: no complete run of that name in {store.name}")
    if not record.get("suspect"):
        raise UsageError(f"--accept {run_id}: that run is not suspect, so there is nothing to accept")
    # Beside the record, which never changes; a second word says the same.
    store.create(commit.accepted_key(run_id), commit.json_bytes({"accepted_at": datetime.now(UTC).isoformat()}))


def describe(record: Mapping[str, Any], output: str) -> str:
    """What the gates found, in one line."""
    found = "; ".join(finding["words"] for finding in record["suspect"])
    return (
        f"run {record['run_id']!r} is complete but suspect: {found}; look at its report, then keep it with "
        f"python -m jobs.status --output {output} --accept {record['run_id']}"
    )
