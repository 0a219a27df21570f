"""Any number of listed objects in the order of the manifest, in little memory.

Objects are sorted as they come, some thousand at a time, and written to disk; then the whole is read slice by slice.
Ranks are hashes, so that equal ranges of them hold about as many objects each: no range has to be looked for, and in a
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

from pipeline.schema import RANKED

RUN_ROWS = 200_000
"""Rows of a sorted file."""
SLICE_ROWS = 500_000
ROW_GROUP = 2000
ORDER = [("rank", "ascending"), ("image_id", "ascending"), ("uri", "ascending")]
UNJUDGED, JUDGED = "unjudged", "judged"
"""Judged objects come last: what is tested fills whole windows."""


class Sorter:
    """Takes tables of ``schema.RANKED``, then gives all their rows in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = {UNJUDGED: 0, JUDGED: 0}
        self.waiting: list[pa.Table] = []
        for kind in self.rows:
            (folder / kind).mkdir(parents=True)

    def add(self, table: pa.Table) -> None:
        self.waiting.append(table)
        if sum(map(len, self.waiting)) >= RUN_ROWS:
            self._write()

    def _write(self) -> None:
        run = pa.concat_tables([RANKED.empty_table(), *self.waiting])
        self.waiting = []
        judged = run["judged_run_id"].is_valid()
        for kind, mine in ((UNJUDGED, run.filter(pc.invert(judged))), (JUDGED, run.filter(judged))):
            if mine.num_rows:
                # By rows so far: no name twice.
                path = self.folder / kind / f"{self.rows[kind]:012d}.parquet"
                pq.write_table(mine.sort_by(ORDER), path, row_group_size=ROW_GROUP)
                self.rows[kind] += mine.num_rows

    def read(self) -> Iterator[pa.Table]:
        """Slices of about ``SLICE_ROWS``; rows of one rank are in one slice."""
        self._write()
        for kind, rows in self.rows.items():
            files = ds.dataset(self.folder / kind, schema=RANKED, format="parquet")
            slices = math.ceil(rows / SLICE_ROWS)
            edges = [-(2**63) + number * 2**64 // slices for number in range(slices)]
            for low, high in zip(edges, [*(edge - 1 for edge in edges[1:]), 2**63 - 1], strict=False):
                inside = (pc.field("rank") >= low) & (pc.field("rank") <= high)
                # Nothing ahead: what is read early waits in memory.
                reader = files.scanner(filter=inside, use_threads=False, batch_readahead=0, fragment_readahead=1)
                yield reader.to_table().sort_by(ORDER)
