"""A shard's ledger as one file, from its attempts or, where earlier runs have judged it all, from its manifest.

It is made some rows at a time: all of a million would take most of a gigabyte. What is kept of every row is what the
shard is reconciled by.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.schema import LEDGER, SORT_KEYS
from pipeline.window import UNCHANGED

GROUP_ROWS = 1 << 15
"""Rows that are written at one time."""
CHECKED = ["image_id", "outcome", "error_code", "skip_reason", "judged_run_id"]


def in_order(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of all parts by their ordinals. ``parts``: each begins no later than those behind it.

    What is below a part's first row is complete. Windows mostly come in order, so little has to be held.
    """
    held = LEDGER.empty_table()
    for part in parts:
        below = pc.less(held["ordinal"], pc.min(part["ordinal"]))
        yield held.filter(below)
        # Filtered rows are copies, where slices would hold on to the tables they are of.
        held = pa.concat_tables([held.filter(pc.invert(below)), part]).sort_by(SORT_KEYS["ledger"])
    yield held


def unchanged_rows(manifest: pa.Table, run_id: str) -> pa.Table:
    """Ledger rows of objects whose earlier verdict stands."""
    rows = manifest.num_rows
    there = ("image_id", "shard", "ordinal", "sha256", "judged_run_id", "judged_outcome")
    given = {name: manifest[name] for name in there} | {"source_uri": manifest["uri"]}
    for name, value in (("run_id", run_id), ("outcome", "skipped"), ("skip_reason", UNCHANGED)):
        given[name] = pa.repeat(value, rows)
    columns = [given.get(field.name, pa.nulls(rows, field.type)) for field in LEDGER]
    return pa.table(columns, schema=LEDGER)


def write_ledger(rows: Iterable[pa.Table]) -> tuple[bytes, pa.Table]:
    """The file, and the columns ``CHECKED`` of all rows. ``rows``: in the order of the file."""
    buffer = io.BytesIO()
    checked = [LEDGER.empty_table().select(CHECKED)]
    with pq.ParquetWriter(buffer, LEDGER, compression="zstd", write_page_index=True) as file:
        for group in _grouped(rows):
            file.write_table(group)
            checked.append(group.select(CHECKED))
    return buffer.getvalue(), pa.concat_tables(checked)


def _grouped(rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for part in rows:
        waiting.append(part)
        if sum(map(len, waiting)) >= GROUP_ROWS:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    yield pa.concat_tables([LEDGER.empty_table(), *waiting]).combine_chunks()
