"""What every candidate test said of labelled images: the table that calibration writes and planning reads.

A candidate is one net at one input size and one group size. Each image is tested alone by every candidate of single
images; groups are tested in arrangements: blocks of images whose neighbours share groups, so that one block holds the
nested groups of every size. An image may stand in many blocks, with other companions.

Every image belongs to one half (they need not be of one size). A block holds images of one half only: what is searched
on one half is certified on the other.

Shapes: N images, K categories, B blocks of L places, G groups.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.schema import SCORES
from pipeline.storage import parse_uri, read_object, reason

HALVES = ("search", "certify")
Cost = Literal["gmac", "seconds"]
# Scores are float32: nearer to 0 or 1 they cannot be told apart.
EPSILON = 1e-7


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A test that a plan may consist of. Costs are of one group; ``kept``: when a larger test of the same net, just
    before, has kept its features (None where it keeps none)."""

    name: str
    model: str
    input_size: int
    size: int
    gmac: float
    gmac_kept: float | None = None
    seconds: float | None = None
    seconds_kept: float | None = None

    @property
    def net(self) -> tuple[str, int]:
        return self.model, self.input_size

    def cost(self, unit: Cost, *, kept: bool = False) -> float:
        """Of one group, decoding not included."""
        if unit == "gmac":
            found = self.gmac_kept if kept else self.gmac
        else:
            found = self.seconds_kept if kept else self.seconds
        assert found is not None, f"{self.name} has no {unit}"
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrangement:
    """Blocks of random images; ``screen``: of such only that a candidate of single images found positive."""

    image_BL: np.ndarray
    scores: Mapping[str, np.ndarray]
    """By candidate (B, L / size, K)."""
    screen: str | None = None
    screen_thresholds: tuple[float, ...] = ()
    """One score a category: an image with any of them at or above stands in these blocks."""

    @property
    def screen_logits_K(self) -> np.ndarray:
        return to_logits(np.array(self.screen_thresholds))


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    categories: tuple[str, ...]
    candidates: Mapping[str, Candidate]
    uris: list[str]
    labels_NK: np.ndarray
    half_N: np.ndarray
    """Index into HALVES."""
    cluster_N: np.ndarray
    """Pictures of one number are versions of one: of the positives among them one counts."""
    single: Mapping[str, np.ndarray]
    """By candidate of size 1 (N, K)."""
    arrangements: tuple[Arrangement, ...] = ()
    decode_seconds: Mapping[int, float] = field(default_factory=dict)
    """Of one image by input size; without them seconds are those of the nets alone."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_halves(self.categories, self.labels_NK, self.half_N)
        for name, scores_NK in self.single.items():
            self._check(name, scores_NK, np.arange(len(self.uris))[:, None])
        for arrangement in self.arrangements:
            for name, scores_BGK in arrangement.scores.items():
                members_GM = arrangement.image_BL.reshape(-1, self.candidates[name].size)
                self._check(name, scores_BGK.reshape(-1, len(self.categories)), members_GM)

    def _check(self, name: str, scores_GK: np.ndarray, members_GM: np.ndarray) -> None:
        if scores_GK.shape != (len(members_GM), len(self.categories)):
            raise UsageError(
                f"scores: candidate {name!r} has {scores_GK.shape[0]} tests of {scores_GK.shape[1]} categories, not "
                f"{len(members_GM)} of {len(self.categories)}"
            )
        bad = np.flatnonzero(~((scores_GK >= 0) & (scores_GK <= 1)).all(axis=1))
        if bad.size:
            uri = self.uris[members_GM[bad[0], 0]]
            raise UsageError(
                f"scores: candidate {name!r} scored {scores_GK[bad[0]].tolist()} for {uri}, "
                f"and {bad.size - 1} such more: scores lie between 0 and 1; leave it out, or look at its weights"
            )

    def unique_positives(self, half: str) -> list[int]:
        """By category."""
        mine_N = self.half(half)
        return [len(np.unique(self.cluster_N[labels_N & mine_N])) for labels_N in self.labels_NK.T]

    def half(self, name: str) -> np.ndarray:
        return np.equal(self.half_N, HALVES.index(name))


def check_halves(categories: Sequence[str], labels_NK: np.ndarray, half_N: np.ndarray) -> None:
    """Raises UsageError when a half has no positive of a category."""
    for category, labels_N in zip(categories, labels_NK.T, strict=True):
        for index, half in enumerate(HALVES):
            if not labels_N[half_N == index].any():
                raise UsageError(
                    f"labels: category {category!r} has no positive in the {half} half: nothing can be said of its "
                    "recall; label more of it, or leave it out of --categories"
                )


def to_logits(scores: np.ndarray) -> np.ndarray:
    """Thresholds move on this scale: there a step means as much near 0 as near 1."""
    clipped = np.clip(np.asarray(scores, dtype=np.float64), EPSILON, 1 - EPSILON)
    return np.log(clipped) - np.log1p(-clipped)


def to_scores(logits: np.ndarray) -> np.ndarray:
    """The inverse, ends included: whatever lies at the clip or beyond it is 0, so that no image is below it."""
    scores = 1 / (1 + np.exp(-np.asarray(logits, dtype=np.float64)))
    return np.where(scores <= EPSILON, 0.0, np.minimum(scores, 1 - EPSILON))


def scores_bytes(scores: Scores) -> bytes:
    """A Parquet file: a row per test (``schema.SCORES``), costs and screens in its metadata."""
    tables = [_rows(scores, 0, scores.single, np.arange(len(scores.uris))[:, None])]
    for number, arrangement in enumerate(scores.arrangements, start=1):
        tables.append(_rows(scores, number, arrangement.scores, arrangement.image_BL))
    described = {
        "categories": scores.categories,
        "candidates": [asdict(candidate) for candidate in scores.candidates.values()],
        "screens": [{"screen": a.screen, "thresholds": a.screen_thresholds} for a in scores.arrangements],
        "decode_seconds": {str(side): seconds for side, seconds in scores.decode_seconds.items()},
        "facts": dict(scores.facts),
    }
    table = pa.concat_tables(tables).replace_schema_metadata({"dorfman": json.dumps(described)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _rows(scores: Scores, number: int, tests: Mapping[str, np.ndarray], image_BL: np.ndarray) -> pa.Table:
    uris = np.array(scores.uris, dtype=object)
    parts = []
    for name, found in tests.items():
        size = scores.candidates[name].size
        members_GM = image_BL.reshape(-1, size)
        groups = len(members_GM)
        scores_GK = found.reshape(groups, -1)
        labels_GK = scores.labels_NK[members_GM].any(axis=1)
        columns = {
            "arrangement": np.full(groups, number, np.int32),
            "block": (np.arange(groups) // (image_BL.shape[1] // size)).astype(np.int64),
            "candidate": np.full(groups, name),
            "half": np.array(HALVES, dtype=object)[scores.half_N[members_GM[:, 0]]],
            "clusters": _lists(scores.cluster_N[members_GM], pa.int64()),
            "uris": _lists(uris[members_GM], pa.string()),
            "labels": _lists(labels_GK.astype(np.int8), pa.int8()),
            "scores": _lists(scores_GK.astype(np.float32), pa.float32()),
        }
        parts.append(pa.table(columns).cast(SCORES))
    return pa.concat_tables(parts) if parts else SCORES.empty_table()


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel(), kind))


def read_scores(uri: str, endpoint_url: str | None = None) -> Scores:
    """Raises UsageError when it is not such a file, or when a score is no number."""
    try:
        table = pq.read_table(io.BytesIO(read_object(parse_uri(uri), endpoint_url)))
        described = json.loads((table.schema.metadata or {})[b"dorfman"])
        table = table.select(SCORES.names).cast(SCORES)
    except FileNotFoundError as error:
        raise UsageError(f"scores {uri}: no such file; jobs.calibrate writes one") from error
    except (KeyError, ValueError, OSError, pa.ArrowException) as error:
        raise UsageError(f"scores {uri}: not a file of jobs.calibrate: {reason(error)}") from error
    candidates = {entry["name"]: Candidate(**entry) for entry in described["candidates"]}
    single = dict(_tests(table, 0, len(described["categories"])))
    if not single:
        raise UsageError(f"scores {uri}: no image was tested alone")
    first = _select(table, 0, next(iter(single)))
    uris = [names[0] for names in first["uris"].to_pylist()]
    row_of = {name: row for row, name in enumerate(uris)}
    arrangements = []
    for number, screen in enumerate(described["screens"], start=1):
        tests = dict(_tests(table, number, len(described["categories"])))
        groups = _select(table, number, next(iter(tests)))
        blocks = len(groups["block"].unique())
        members = [row_of[name] for names in groups["uris"].to_pylist() for name in names]
        arrangements.append(
            Arrangement(
                image_BL=np.array(members, dtype=np.int64).reshape(blocks, -1),
                scores={name: found.reshape(blocks, -1, found.shape[1]) for name, found in tests.items()},
                screen=screen["screen"],
                screen_thresholds=tuple(screen["thresholds"]),
            )
        )
    return Scores(
        categories=tuple(described["categories"]),
        candidates=candidates,
        uris=uris,
        labels_NK=np.array(first["labels"].to_pylist(), dtype=bool),
        half_N=np.array([HALVES.index(half) for half in first["half"].to_pylist()]),
        cluster_N=np.array([numbers[0] for numbers in first["clusters"].to_pylist()], dtype=np.int64),
        single=single,
        arrangements=tuple(arrangements),
        decode_seconds={int(side): seconds for side, seconds in described["decode_seconds"].items()},
        facts=described["facts"],
    )


def _select(table: pa.Table, number: int, name: str) -> pa.Table:
    mask = np.logical_and(table["arrangement"].to_numpy() == number, table["candidate"].to_numpy() == name)
    return table.filter(pa.array(mask))


def _tests(table: pa.Table, number: int, categories: int) -> Iterator[tuple[str, np.ndarray]]:
    of_arrangement = table.filter(pa.array(table["arrangement"].to_numpy() == number))
    for name in of_arrangement["candidate"].unique().to_pylist():
        rows = of_arrangement.filter(pa.array(of_arrangement["candidate"].to_numpy() == name))
        yield name, rows["scores"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, categories)
