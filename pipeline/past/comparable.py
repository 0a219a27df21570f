"""The run that tonight's is compared with: which one, why that one, and who judged what it takes over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UsageError
from pipeline.listing.inventory import scope
from pipeline.output import commit
from pipeline.output.record import fault
from pipeline.past.records import PastRuns
from pipeline.store import Store

LAST = "last"
SUSPECT = "is suspect and nobody has accepted it"


@dataclass(frozen=True, kw_only=True)
class Found:
    """``record``: of the run to compare with, with its files; None when there is none. ``notes``: in words, why it is
    not the newest or why there is none, and which records are none any more."""

    record: dict[str, Any] | None
    notes: tuple[str, ...] = ()


def find_earlier(store: Store, since: str, source: str, decides: Mapping[str, Any]) -> Found:
    """The run that ``since`` means: one by its name, or for ``last`` the newest one that compares.

    That is a complete run over the same source, by whose record the same ``decides`` (plan, nets, banks) and whose
    tables are there, and which is not suspect, or was accepted: a night that judged wrongly must not have its verdicts
    kept night after night. A file that is no run record, because it was cut off or written over, is passed over and
    named. A run that is named is taken whatever its plan was, and suspect or not. Runs that took up errors listed a few
    objects only, so none of them compares. Raises UsageError.
    """
    if since != LAST:
        return Found(record=_named(store, since))
    past = PastRuns(store)
    contents = [(run_id, content) for run_id, content in past.read(commit.recorded(past.found)) if content is not None]
    notes = [
        f"{commit.record_key(run_id)} is no run record, so nothing that it may have said is taken over: put it back "
        "from a copy, or take it away"
        for run_id, content in contents
        if not _is_record(content)
    ]
    records = [
        content
        for _, content in contents
        if _is_record(content) and content.get("parent_run_id") is None and scope(content["source"]) == scope(source)
    ]
    passed: list[str] = []
    for candidate in sorted(records, key=lambda record: record["started_at"], reverse=True):
        why = _against(past, candidate, decides)
        record = None if why else read_record(store, candidate["run_id"])  # with its files
        if record is not None and stands(store, record):
            return Found(record=record, notes=(*notes, *_most_telling(passed)))
        passed.append(f"run over this source, {candidate['run_id']}, {why or 'has lost tables'}")
    if not passed:
        notes.append("there is no complete run over this source")
    return Found(record=None, notes=(*notes, *_most_telling(passed)))


def _against(past: PastRuns, record: Mapping[str, Any], decides: Mapping[str, Any]) -> str | None:
    """In words: why a run over the same source is not compared with, and what would have its verdicts kept."""
    run_id = record["run_id"]
    named = f"--since {run_id}"
    if why := differences(record, decides):
        return f"{why} (to keep its verdicts all the same: {named})"
    if past.stands_suspect(record):
        return f"{SUSPECT} (to keep its verdicts: python -m jobs.status --accept {run_id}, or once {named})"
    return None


def _most_telling(passed: Sequence[str]) -> list[str]:
    """Of the runs that were passed over, newest first, the newest one, and the newest that a person's word would have
    compared with."""
    suspect = [words for words in passed if SUSPECT in words]
    told = [f"the newest {words}" for words in passed[:1]]
    return told + [f"a {words}" for words in suspect[:1] if words != passed[0]]


def _named(store: Store, run_id: str) -> dict[str, Any]:
    record = read_record(store, run_id)
    if record is None and store.exists(commit.record_key(run_id)):
        raise UsageError(
            f"--since {run_id}: {commit.record_key(run_id)} is no run record; put it back from a copy, or give another "
            "run, or 'last'"
        )
    if record is None:
        raise UsageError(f"--since {run_id}: no complete run of that name in {store.uri}; give another, or 'last'")
    if record.get("parent_run_id"):
        raise UsageError(
            f"--since {run_id}: that run took up the errors of {record['parent_run_id']} and lists nothing else; "
            "name a run over the whole source"
        )
    return record


def read_record(store: Store, run_id: str) -> dict[str, Any] | None:
    """None where there is none, or no run record."""
    try:
        return commit.read_record(store, run_id)
    except UsageError:
        return None


def _is_record(content: Any) -> bool:
    if isinstance(content, OSError):
        raise content  # it may be there, and whole
    return fault(content) is None


def differences(record: Mapping[str, Any], decides: Mapping[str, Any]) -> str | None:
    """In words: what of that which decides a verdict was another in this run; None where all is the same."""
    if compares(record, decides):
        return None
    if record["plan_version"] != decides["plan_version"]:
        return f"was judged by plan version {record['plan_version']}, and this is {decides['plan_version']}"
    what = "nets" if record.get("weights_sha256") != decides["weights_sha256"] else "banks"
    return f"was judged by other {what}"


def compares(record: Mapping[str, Any], decides: Mapping[str, Any]) -> bool:
    """Whether a run was judged by the same plan, nets and banks."""
    return all(record.get(name, {}) == now for name, now in decides.items())  # older records know no banks


Records = Mapping[str, dict[str, Any] | None]
"""By run; None where there is none, or no run record."""


def records_of(store: Store, run_ids: Iterable[str], *, with_files: bool = False) -> Records:
    """Of runs that judged what tonight's may take over: there may be as many as nights, so many at a time."""
    past = PastRuns(store, with_files=with_files)
    return {run_id: content if _is_record(content) else None for run_id, content in past.read(run_ids)}


def judged_otherwise(records: Records, judged_by: Mapping[str, int], decides: Mapping[str, Any]) -> int:
    """Of objects by the run that judged them: how many were judged by other plans, nets or banks than ``decides``."""
    return sum(
        images
        for run_id, images in judged_by.items()
        if (record := records[run_id]) is None or not compares(record, decides)
    )


def under_other_policy(records: Records, flagged_by: Mapping[str, int], policy: Mapping[str, Any] | None) -> int:
    """Of findings by the run that made them: how many have the action of another policy than ``policy``, whole or None
    for that which has everything reviewed."""
    return sum(
        images
        for run_id, images in flagged_by.items()
        if (record := records[run_id]) is None or _policy(record) != _sha256(policy)
    )


def _policy(record: Mapping[str, Any]) -> str | None:
    return _sha256(record.get("policy"))  # older records know none


def _sha256(policy: Mapping[str, Any] | None) -> str | None:
    return policy["sha256"] if policy else None


def those_that_stand(store: Store, run_ids: Iterable[str]) -> set[str]:
    """Those of the runs whose record is there with all of its ledgers and findings."""
    records = records_of(store, run_ids, with_files=True)
    return {run_id for run_id, record in records.items() if record is not None and stands(store, record)}


def stands(store: Store, record: Mapping[str, Any]) -> bool:
    files = [file for table in ("ledger", "flagged") for file in commit.files_of(table, record["files"])]
    there = {key for folder in {file["path"].rsplit("/", 1)[0] for file in files} for key in store.sizes(folder)}
    return all(file["path"] in there for file in files)
