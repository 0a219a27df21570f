"""What a run takes over from earlier ones and what it tests anew, in numbers and words: the same ones when it starts,
when it ends, in its report, in the list of runs and in metrics.

``record``: of a run, its status, or as it was frozen. Records of older versions say less.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.reporting.events import Events

ANEW = {
    "new": "new",
    "changed": "changed",
    "unjudged": "without a verdict, as after an error",
}
"""Why an object is tested, by the field of ``Increment`` that counts it."""


def flagged_before(record: Mapping[str, Any]) -> int | None:
    """Unchanged images that earlier runs flagged. None where nobody has counted them."""
    increment = record.get("increment")
    if not increment:
        return 0
    return sum(increment["flagged_by"].values()) if "flagged_by" in increment else None


def standing(record: Mapping[str, Any]) -> int | None:
    """Flagged images of the source: those of this run, as far as it is, and those that earlier ones flagged and that
    are unchanged. None where nobody knows, as of a run that took up errors and looked at nothing else."""
    before = None if record.get("parent_run_id") else flagged_before(record)
    return None if before is None else before + record["counts"]["flagged"]


def taken_over(record: Mapping[str, Any]) -> str | None:
    """In one line, for a run with ``--since``: how many images are taken over, how many are tested, and why."""
    if not record.get("since"):
        return None
    parts = list(_taken(record)) if record.get("increment") else [f"all {record['listed']:,} images are to be tested"]
    return f"--since {record['since']}: {'; '.join([*parts, *record.get('since_notes', [])])}"


def _taken(record: Mapping[str, Any]) -> Iterator[str]:
    increment = record["increment"]
    before = flagged_before(record)
    flagged = "" if before is None else f", {before:,} of them flagged"
    since = f"since run {increment['run_id']}"
    yield f"{increment['unchanged']:,} images are unchanged {since} and keep their verdict{flagged}"
    anew = {why: increment[name] for name, why in ANEW.items()}
    why = ", ".join(f"{images:,} {words}" for words, images in anew.items())
    yield f"{sum(anew.values()):,} are to be tested: {why}"
    if increment["deleted"]:
        yield f"{increment['deleted']:,} are gone"
    if increment["judged_otherwise"]:
        yield f"{increment['judged_otherwise']:,} of the unchanged were judged by another plan, net or bank"
    if increment.get("under_other_policy"):
        yield f"{increment['under_other_policy']:,} of the flagged keep the action of another policy"


def tell_taken_over(events: Events, record: Mapping[str, Any]) -> None:
    """At the start. A warning when somebody should know: nothing is taken over, or not from the newest run."""
    line = taken_over(record)
    if line is None:
        return
    increment, notes = record["increment"], record["since_notes"]
    level = logging.WARNING if notes or not increment else logging.INFO
    counts = {name: increment[name] for name in ("unchanged", *ANEW, "deleted")} if increment else {}
    events.tell("taken_over", line, level, since=record["since"], flagged=flagged_before(record), notes=notes, **counts)
