"""What the ledger of the run that tonight's is compared with says of each object that it listed."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.output import commit
from pipeline.past.comparable import those_that_stand
from pipeline.schema import EARLIER, LEDGER
from pipeline.store import Store


def write_earlier(store: Store, record: Mapping[str, Any], folder: Path) -> list[str]:
    """One ``schema.EARLIER`` file for each file of the run's ledger. The runs whose verdicts nobody can look up any
    more, so that they count as none. Raises UsageError when its own tables are gone."""
    for number, file in enumerate(commit.files_of("ledger", record["files"])):
        try:
            body = store.read(file["path"], file["sha256"])
        except FileNotFoundError:
            raise UsageError(
                f"--since {record['run_id']}: {file['path']} is gone, so nobody knows what that run has judged; name "
                "another run, or scan without --since"
            ) from None
        pq.write_table(_earlier_rows(body, record["run_id"]), folder / f"{number:06d}.parquet")
    return _forget_lost(store, folder)


def _earlier_rows(body: bytes, run_id: str) -> pa.Table:
    columns = [
        "image_id", "source_uri", "outcome", "skip_reason", "judged_run_id", "judged_outcome", "sha256",
        "match_ignored",
    ]  # fmt: skip
    ledger = pq.read_table(io.BytesIO(body), columns=columns, schema=LEDGER)  # files of version 1 lack the last four
    # What an earlier scan injected itself is no object of the source.
    canary = pc.starts_with(ledger["skip_reason"], "canary").fill_null(False)
    ledger = ledger.filter(pc.invert(canary))
    # Also of content that it knew: its own tables have the rows of this object.
    own = pc.is_in(ledger["outcome"], pa.array(["cleared", "flagged"]))
    # Who matched a bank and was cleared all the same is asked again, and no content to be known by.
    own = pc.and_(
        own, pc.invert(pc.and_(pc.equal(ledger["outcome"], "cleared"), ledger["match_ignored"].fill_null(False)))
    )
    return pa.table(
        {
            "image_id": ledger["image_id"],
            "uri": ledger["source_uri"],
            "judged_run_id": pc.if_else(own, run_id, ledger["judged_run_id"]),
            "judged_outcome": pc.if_else(own, ledger["outcome"], ledger["judged_outcome"]),
            "sha256": ledger["sha256"],
        }
    ).cast(EARLIER)


def _forget_lost(store: Store, folder: Path) -> list[str]:
    """A verdict that nobody can look up any more is none: its run's record or tables are gone, so it is made anew.
    Names of these runs."""
    files = sorted(folder.iterdir())
    named: set[str] = set()
    for path in files:
        named.update(pq.read_table(path, columns=["judged_run_id"])["judged_run_id"].unique().drop_null().to_pylist())
    lost_runs = sorted(named - those_that_stand(store, named))
    if not lost_runs:
        return []
    lost = pa.array(lost_runs, pa.string())
    for path in files:
        table = pq.read_table(path)
        gone = pc.is_in(table["judged_run_id"], lost)
        for name in ("judged_run_id", "judged_outcome"):
            column = pc.if_else(gone, pa.scalar(None, pa.string()), table[name])
            table = table.set_column(EARLIER.get_field_index(name), EARLIER.field(name), column)
        pq.write_table(table, path)
    return lost_runs
