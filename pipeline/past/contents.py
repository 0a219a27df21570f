"""Content that earlier runs have judged, found again by the SHA-256 of its bytes whatever it is called now.

Made when a run is frozen, of what ``increment.py`` compares with, in parts that are sorted by digest; each process
that fetches holds the parts that it has looked into, 34 bytes a content, and what the flagged ones were flagged for.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.listing.ordering import RUN_ROWS, Sorter
from pipeline.output import commit
from pipeline.schema import CONTENTS, EARLIER, FINDING, FLAGGED, RANKED_CONTENT
from pipeline.store import Store, digest

CONTENTS_FILE = "contents-"
"""How the names of the parts begin."""
ORDER = ("sha256", "ascending"), ("outcome", "descending"), ("image_id", "ascending")
"""Of each content the first counts: where its copies disagree, as their companions may make them, it was flagged."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """``findings``: what it was flagged for; none when it was cleared."""

    run_id: str
    findings: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """``first``: the lowest digest in it."""

    key: str
    sha256: str
    first: str


@dataclass(frozen=True)
class Contents:
    """A value that travels to the actors; what it has read is each process's own."""

    store: Store
    parts: tuple[Part, ...]

    def find(self, sha256: str) -> Known | None:
        number = bisect_right(self.parts, sha256, key=lambda part: part.first) - 1
        return _open(self.store, self.parts[number]).find(sha256) if number >= 0 else None


class _OpenPart:
    def __init__(self, table: pa.Table) -> None:
        digests = b"".join(bytes.fromhex(value) for value in table["sha256"].to_pylist())
        # As numbers of the other byte order they would not be sorted.
        self.digest_N4 = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 4)
        runs = table["run_id"].combine_chunks().dictionary_encode()
        self.run_ids = runs.dictionary.to_pylist()
        self.run_N = runs.indices.to_numpy().astype(np.uint16)
        # As Python objects they would take a hundred times the memory, in every process that fetches.
        self.finding_N = table["findings"].combine_chunks()

    def find(self, sha256: str) -> Known | None:
        wanted_4 = np.frombuffer(bytes.fromhex(sha256), ">u8").astype(np.uint64)
        first, last = (int(np.searchsorted(self.digest_N4[:, 0], wanted_4[0], side)) for side in ("left", "right"))
        for row in range(first, last):
            if (self.digest_N4[row] == wanted_4).all():
                return Known(run_id=self.run_ids[self.run_N[row]], findings=tuple(self.finding_N[row].as_py() or ()))
        return None


@lru_cache(maxsize=4096)
def _open(store: Store, part: Part) -> _OpenPart:
    return _OpenPart(pq.read_table(io.BytesIO(store.read(part.key, part.sha256))))


def write_contents(earlier: Path, store: Store, prefix: str) -> tuple[Part, ...]:
    """``earlier``: a folder of ``schema.EARLIER`` files. Writes the parts below ``prefix``."""
    findings = _Findings.read(earlier, store)
    sorter = Sorter(earlier / "sort", RANKED_CONTENT, ORDER)
    for rows in _judged(earlier):
        sorter.add(_ranked(rows))
    parts: list[Part] = []
    for rows in sorter.read():
        table = _with_findings(_once(rows), findings)
        if not table.num_rows:
            continue
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        key = f"{prefix}/{CONTENTS_FILE}{len(parts):05d}.parquet"
        store.write(key, buffer.getvalue())
        parts.append(Part(key=key, sha256=digest(buffer.getvalue()), first=table["sha256"][0].as_py()))
    return tuple(parts)


def _judged(earlier: Path, outcome: str | None = None) -> Iterator[pa.Table]:
    """Rows of content that somebody has judged, some at a time. ``outcome``: of this one only."""
    wanted = pc.is_valid(pc.field("sha256")) & pc.is_valid(pc.field("judged_run_id"))
    if outcome is not None:
        wanted &= pc.field("judged_outcome") == outcome
    files = ds.dataset(sorted(map(str, earlier.glob("*.parquet"))), schema=EARLIER, format="parquet")
    # Nothing ahead: what is read early waits in memory.
    reader = files.scanner(
        filter=wanted, batch_size=RUN_ROWS, use_threads=False, batch_readahead=0, fragment_readahead=1
    )
    return (pa.Table.from_batches([batch]) for batch in reader.to_batches())


def _ranked(rows: pa.Table) -> pa.Table:
    """``schema.RANKED_CONTENT``: digests are uniform as they are, and their first eight bytes sort as all of them."""
    heads = "".join(pc.utf8_slice_codeunits(rows["sha256"], 0, 16).to_pylist())
    rank_N = (np.frombuffer(bytes.fromhex(heads), ">u8").astype(np.uint64) ^ np.uint64(1 << 63)).view(np.int64)
    columns = [pa.array(rank_N), *(rows[name] for name in ("sha256", "judged_run_id", "judged_outcome", "image_id"))]
    return pa.table(columns, schema=RANKED_CONTENT)


def _once(rows: pa.Table) -> pa.Table:
    """Of rows in order the first of each content."""
    digests = rows["sha256"]
    other = pc.not_equal(digests.slice(1), digests.slice(0, max(0, len(rows) - 1)))
    return rows.filter(pa.chunked_array([pa.array([True] * min(1, len(rows))), *other.chunks], pa.bool_()))


def _with_findings(rows: pa.Table, findings: _Findings) -> pa.Table:
    """Without flagged content whose findings nobody has any more: that is tested again."""
    is_flagged = pc.equal(rows["outcome"], "flagged")
    found = findings.of(pc.if_else(is_flagged, rows["image_id"], pa.scalar(None, pa.string())))
    table = pa.table([rows["sha256"], rows["run_id"], rows["outcome"], found], schema=CONTENTS)
    return table.filter(pc.or_(pc.invert(is_flagged), pc.is_valid(table["findings"])))


@dataclass(frozen=True)
class _Findings:
    """What each flagged image was flagged for, by the tables of the run that did."""

    image_id: pa.Array
    findings: pa.ListArray

    @staticmethod
    def read(earlier: Path, store: Store) -> _Findings:
        """Each run's files once, however many parts there will be."""
        empty = pa.table({"run_id": pa.array([], pa.string()), "image_id": pa.array([], pa.string())})
        flagged = pa.concat_tables(
            [empty, *(pa.table({"run_id": rows["judged_run_id"], "image_id": rows["image_id"]})
                      for rows in _judged(earlier, "flagged"))]
        )  # fmt: skip
        tables = [FLAGGED.empty_table().select(["image_id", *FINDING.names])]
        for run_id in flagged["run_id"].unique().to_pylist():
            wanted = flagged.filter(pc.equal(flagged["run_id"], run_id))["image_id"].combine_chunks()
            tables += _rows_of(store, run_id, wanted)
        return _Findings._of_rows(pa.concat_tables(tables))

    @staticmethod
    def _of_rows(rows: pa.Table) -> _Findings:
        rows = rows.take(pc.sort_indices(rows, [("image_id", "ascending")])).combine_chunks()  # stable
        counts = rows["image_id"].value_counts()  # in the order in which they come
        offsets = np.concatenate([[0], np.cumsum(counts.field("counts"))]).astype(np.int32)
        columns = [rows[name].combine_chunks() for name in FINDING.names]
        each = pa.StructArray.from_arrays(columns, fields=list(FINDING))
        return _Findings(counts.field("values"), pa.ListArray.from_arrays(pa.array(offsets), each))

    def of(self, image_id: pa.ChunkedArray) -> pa.ChunkedArray:
        """A list for each; null where there is none."""
        return self.findings.take(pc.index_in(image_id, self.image_id, skip_nulls=True))


def _rows_of(store: Store, run_id: str, wanted: pa.Array) -> Iterator[pa.Table]:
    """Rows of the run's findings on these images."""
    record = commit.read_record(store, run_id)
    for file in commit.files_of("flagged", record["files"]) if record else []:
        body = io.BytesIO(store.read(file["path"], file["sha256"]))
        rows = pq.read_table(body, schema=FLAGGED, filters=pc.is_in(pc.field("image_id"), wanted))
        yield rows.select(["image_id", *FINDING.names])
