"""Content that earlier runs have judged, found again by the SHA-256 of its bytes whatever it is called now.

Made when a run is frozen, of what ``increment.py`` compares with, in parts that are sorted by digest; each process
that fetches holds the parts that it has looked into, 34 bytes a content, and what the flagged ones were flagged for.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import commit
from pipeline.schema import CONTENTS, FINDING, FLAGGED
from pipeline.source import JOIN
from pipeline.store import Store, digest

PART_ROWS = 2_000_000
CONTENTS_FILE = "contents-"
"""How the names of the parts begin."""
# Of each content one verdict: where its copies disagree, as their companions may make them, it was flagged.
_JUDGED = """
    SELECT DISTINCT ON (sha256) sha256, judged_run_id AS run_id, judged_outcome AS outcome, image_id
    FROM '{folder}/*.parquet' WHERE sha256 IS NOT NULL AND judged_run_id IS NOT NULL
    ORDER BY sha256, judged_outcome = 'flagged' DESC, image_id
"""


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
    parts: list[Part] = []
    with duckdb.connect(config=JOIN | {"temp_directory": f"{earlier}/sort"}) as connection:
        for rows in _batches(connection.sql(_JUDGED.format(folder=earlier))):
            table = _with_findings(rows, store)
            if not table.num_rows:
                continue
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            key = f"{prefix}/{CONTENTS_FILE}{len(parts):05d}.parquet"
            store.write(key, buffer.getvalue())
            parts.append(Part(key=key, sha256=digest(buffer.getvalue()), first=table["sha256"][0].as_py()))
    return tuple(parts)


def _batches(relation: duckdb.DuckDBPyRelation) -> Iterator[pa.Table]:
    """``PART_ROWS`` at a time: DuckDB's own batches may be smaller."""
    waiting: list[pa.RecordBatch] = []
    for batch in relation.to_arrow_reader(PART_ROWS):
        waiting.append(batch)
        if sum(len(part) for part in waiting) >= PART_ROWS:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)


def _with_findings(rows: pa.Table, store: Store) -> pa.Table:
    """Without flagged content whose findings nobody has any more: that is tested again."""
    is_flagged = pc.equal(rows["outcome"], "flagged")
    found = _findings(store, rows.filter(is_flagged))
    place = pc.index_in(rows["image_id"], pa.array(list(found), pa.string()))
    findings = pa.array(list(found.values()), pa.list_(FINDING)).take(place)
    table = pa.table([rows["sha256"], rows["run_id"], rows["outcome"], findings], schema=CONTENTS)
    return table.filter(pc.or_(pc.invert(is_flagged), pc.is_valid(table["findings"])))


def _findings(store: Store, flagged: pa.Table) -> Mapping[str, list[dict[str, Any]]]:
    """By image id, from the tables of the runs that flagged them."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run_id in flagged["run_id"].unique().to_pylist():
        wanted = flagged.filter(pc.equal(flagged["run_id"], run_id))["image_id"].combine_chunks()
        record = commit.read_json(store, commit.record_key(run_id))
        for file in commit.files_of("flagged", record["files"]) if record else []:
            body = io.BytesIO(store.read(file["path"], file["sha256"]))
            rows = pq.read_table(body, schema=FLAGGED, filters=pc.is_in(pc.field("image_id"), wanted))
            for row in rows.to_pylist():
                found[row["image_id"]].append({field.name: row[field.name] for field in FINDING})
    return found
