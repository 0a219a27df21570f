"""Any number of rows in the order of a hash, in little memory.

Rows are sorted as they come, some thousand at a time, and written to disk; then the whole is read slice by slice.
Ranks are hashes, so that equal ranges of them hold about as many rows each: no range has to be looked for, and in a
file that is sorted by rank Parquet's statistics tell where one lies. DuckDB's sort on disk wants memory that grows with
the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

RUN_ROWS = 200_000
"""Rows of a sorted file."""
SLICE_ROWS = 500_000
ROW_GROUP = 2000
Order = tuple[tuple[str, str], ...]
"""Columns, each ``ascending`` or ``descending``."""


class Sorter:
    """Takes tables of one schema, with a column ``rank`` of hashes (int64), then gives all their rows in order.

    ``order``: among rows of one rank. ``folder`` is made, and holds as much as the tables.
    """

    def __init__(self, folder: Path, schema: pa.Schema, order: Order) -> None:
        self.folder, self.schema = folder, schema
        self.order = [("rank", "ascending"), *order]
        self.rows = 0
        self.waiting: list[pa.Table] = []
        folder.mkdir(parents=True)

    def add(self, table: pa.Table) -> None:
        self.waiting.append(table)
        if sum(map(len, self.waiting)) >= RUN_ROWS:
            self._write()

    def _write(self) -> None:
        run = pa.concat_tables([self.schema.empty_table(), *self.waiting])
        self.waiting = []
        if run.num_rows:
            # By rows so far: no name twice.
            path = self.folder / f"{self.rows:012d}.parquet"
            pq.write_table(run.sort_by(self.order), path, row_group_size=ROW_GROUP)
            self.rows += run.num_rows

    def read(self) -> Iterator[pa.Table]:
        """Slices of about ``SLICE_ROWS``; rows of one rank are in one slice."""
        self._write()
        files = ds.dataset(self.folder, schema=self.schema, format="parquet")
        slices = math.ceil(self.rows / SLICE_ROWS)
        edges = [-(2**63) + number * 2**64 // slices for number in range(slices)]
        for low, high in zip(edges, [*(edge - 1 for edge in edges[1:]), 2**63 - 1], strict=False):
            inside = (pc.field("rank") >= low) & (pc.field("rank") <= high)
            # Nothing ahead: what is read early waits in memory.
            reader = files.scanner(filter=inside, use_threads=False, batch_readahead=0, fragment_readahead=1)
            yield reader.to_table().sort_by(self.order)
