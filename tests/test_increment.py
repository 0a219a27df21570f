"""Night after night: what is tested again, what keeps its verdict, and what a run may cost."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from pipeline import commit
from pipeline.contents import Contents, write_contents
from pipeline.earlier import find_earlier, write_earlier
from pipeline.errors import RunStopped, UsageError
from pipeline.increment import Increment
from pipeline.inventory import scope
from pipeline.limits import Budget, Limits
from pipeline.plan import WindowSpec
from pipeline.scan import ScanConfig, run_scan
from pipeline.schema import EARLIER
from pipeline.source import Shard, build_manifest, list_source
from pipeline.storage import s3_client
from pipeline.store import Store
from pipeline.tally import Tally
from tests.conftest import QUICK, small_plan

ALONE = {
    "name": "mini", "model": "cifar-mini", "rounds": [1], "thresholds": {"automobile": [0.006]}, "input_size": 32,
    "num_cpus": 0.3,
}  # fmt: skip
WINDOWS = {"window": {"images": 128}, "batch_images": 64}
LISTED, NEW, CHANGED, DELETED = 1000, 50, 20, 10


# Two nights


def draw(folder: Path, names: list[str], seed: int) -> None:
    """Small pictures of coloured patches, of which one in fifteen is flagged at the thresholds here."""
    rng = np.random.default_rng(seed)
    for name in names:
        patches = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Pillow.fromarray(patches).resize((48, 48), Pillow.Resampling.BICUBIC).save(folder / name, quality=90)


@pytest.fixture(scope="module")
def second_night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders: a thousand pictures, and what a day has made of them."""
    root = tmp_path_factory.mktemp("nights")
    first, second = root / "first" / "in", root / "second" / "in"
    first.mkdir(parents=True)
    draw(first, [f"{number:04d}.jpg" for number in range(LISTED)], seed=1)
    second.parent.mkdir()
    shutil.copytree(first, second)  # with the times that stand in for etags
    draw(second, [f"new-{number:02d}.jpg" for number in range(NEW)], seed=2)
    draw(second, [f"{number:04d}.jpg" for number in range(CHANGED)], seed=3)
    for number in range(DELETED):
        (second / f"{LISTED - 1 - number:04d}.jpg").unlink()
    return first, second


class Nights:
    """Scans of one folder whose content changes between them, so that uris stay."""

    def __init__(self, folder: Path, plan: Path) -> None:
        self.source, self.output, self.plan = folder / "source", folder / "out", plan

    def scan(self, content: Path, **config: Any) -> dict[str, Any]:
        if self.source.exists() or self.source.is_symlink():
            self.source.unlink()
        self.source.symlink_to(content)
        defaults = {"source": str(self.source), "output": str(self.output), "plan": str(self.plan), "salt": "s"}
        return run_scan(ScanConfig(**defaults | config))

    def ledger(self, run_id: str) -> dict[str, dict[str, Any]]:
        (path,) = {path.parent for path in self.output.glob(f"ledger/*/{run_id}-*.parquet")}
        table = pq.read_table(sorted(path.glob(f"{run_id}-*.parquet")), partitioning=None)
        return {row["source_uri"].rsplit("/", 1)[1]: row for row in table.to_pylist()}


def verdicts(ledger: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: row["judged_outcome"] or row["outcome"] for name, row in ledger.items()}


def compare_nights(nights: Nights, first: Path, second: Path) -> Counter[str]:
    """Scans two nights, the second one as an increment and in full; how the verdicts of these two differ."""
    before = nights.scan(first, run_id="one", since="last")
    assert before["increment"] is None and before["counts"]["skipped"] == 0, "there is nothing to compare with"
    record = nights.scan(second, run_id="two", since="last", shard_size=300)
    full = nights.scan(second, run_id="full")

    tested = NEW + CHANGED
    unchanged = LISTED - CHANGED - DELETED
    increment = record["increment"]
    assert {name: increment[name] for name in ("run_id", "unchanged", "new", "changed", "unjudged", "deleted")} == {
        "run_id": "one", "unchanged": unchanged, "new": NEW, "changed": CHANGED, "unjudged": 0, "deleted": DELETED,
    }  # fmt: skip
    assert increment["judged_by"] == {"one": unchanged}
    assert record["counts"]["listed"] == full["counts"]["listed"] == LISTED + NEW - DELETED
    assert record["counts"]["skipped"] == record["skips"]["unchanged"] == unchanged
    assert record["stages"][0]["images_in"] == tested
    assert [operator["images_in"] for operator in record["operators"] if operator["operator"] == "fetch"] == [tested]

    mine, theirs, old = (nights.ledger(run_id) for run_id in ("two", "full", "one"))
    assert {row["image_id"] for row in mine.values()} == {row["image_id"] for row in theirs.values()}
    for name, row in mine.items():
        if row["outcome"] == "skipped":
            assert (row["skip_reason"], row["judged_run_id"]) == ("unchanged", "one")
            assert (row["judged_outcome"], row["sha256"]) == (old[name]["outcome"], old[name]["sha256"])
            assert row["image_id"] == old[name]["image_id"] and row["decided_stage"] is None
        else:
            assert row["judged_run_id"] is None and row["judged_outcome"] is None and row["decided_stage"]
            assert row["sha256"] == hashlib.sha256((second / name).read_bytes()).hexdigest()
    assert sum(row["outcome"] != "skipped" for row in mine.values()) == tested
    assert 20 < Counter(verdicts(theirs).values())["flagged"] < 500
    pairs = ((verdicts(mine)[name], verdicts(theirs)[name]) for name in theirs)
    return Counter(f"{one} instead of {other}" for one, other in pairs if one != other)


def test_the_second_night_tests_what_is_new_or_changed(ray_session, second_night, tmp_path):
    """Under a plan that tests images alone the verdicts are those of a full scan."""
    nights = Nights(tmp_path, small_plan(tmp_path, QUICK, stages=[ALONE], **WINDOWS))
    assert compare_nights(nights, *second_night) == Counter()

    # A third night on which nothing has changed needs no Ray; verdicts are still the first night's.
    idle = nights.scan(second_night[1], run_id="three", since="last")
    assert idle["increment"]["run_id"] == "two" and idle["increment"]["unchanged"] == idle["counts"]["listed"]
    assert idle["operators"] == [] and idle["relative_cost"] is None
    assert idle["increment"]["judged_by"] == {"one": LISTED - CHANGED - DELETED, "two": NEW + CHANGED}
    assert verdicts(nights.ledger("three")) == verdicts(nights.ledger("two"))
    page = (nights.output / "runs/three/report.html").read_text()
    assert "unchanged since" in page and "two" in page

    # Another plan is another question: everything is tested, unless the run is named.
    other = small_plan(tmp_path, QUICK, stages=[ALONE | {"thresholds": {"automobile": [0.007]}}], **WINDOWS)
    store = Store(str(nights.output))
    weights = idle["weights_sha256"]
    assert find_earlier(store, "last", str(nights.source), "another version", weights) is None
    assert find_earlier(store, "last", str(nights.source), idle["plan_version"], {"mini": "other"}) is None
    named = Nights(tmp_path, other).scan(second_night[1], run_id="four", since="three")
    assert named["skips"] == {"unchanged": named["counts"]["listed"]} and named["plan_version"] != idle["plan_version"]


@pytest.mark.slow
def test_under_a_plan_with_groups_other_companions_are_counted(ray_session, second_night, tmp_path):
    """Seventy pictures meet others than they would among a thousand: near a threshold that can turn a verdict."""
    nights = Nights(tmp_path, small_plan(tmp_path, QUICK, **WINDOWS))
    differences = compare_nights(nights, *second_night)
    print(
        f"\nof {NEW + CHANGED} images tested in the increment, against a full scan: {dict(differences) or 'none differ'}"
    )
    assert sum(differences.values()) <= 0.3 * (NEW + CHANGED)


# What a listing is compared with


MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def listed(names: dict[str, str | None]) -> list[dict[str, Any]]:
    return [
        {"uri": f"s3://b/{name}", "size_bytes": 1, "etag": etag, "modified_at": MOMENT} for name, etag in names.items()
    ]


def earlier_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, EARLIER), folder / "0.parquet")
    return folder


def manifest_rows(store: Store, manifest) -> list[dict[str, Any]]:
    tables = [pq.read_table(pa.BufferReader(store.read(shard.key))) for shard in manifest.shards]
    return pa.concat_tables(tables).to_pylist()


STATES = st.sampled_from(["new", "same", "changed", "error", "untold", "deleted"])


@settings(max_examples=40, deadline=None)
@given(
    states=st.lists(STATES, min_size=1, max_size=80), images=st.integers(1, 9), shard_size=st.integers(1, 30),
    repeated=st.booleans(),
)  # fmt: skip
def test_every_object_is_counted_as_what_it_is(tmp_path_factory, states, images, shard_size, repeated):
    """A model of the join: each object in one of six states, in any mixture."""
    folder = tmp_path_factory.mktemp("m")
    store = Store(str(folder / "out"))
    now = {f"{n}": None if state == "untold" else "e" for n, state in enumerate(states) if state != "deleted"}
    then = {f"{n}": ("old" if s == "changed" else now.get(f"{n}", "e"), s) for n, s in enumerate(states) if s != "new"}
    rows = [
        {
            "image_id": commit_id(name, etag),
            "uri": f"s3://b/{name}",
            "judged_run_id": None if state == "error" else "r1",
            "judged_outcome": None if state == "error" else "cleared",
            "sha256": None,
        }
        for name, (etag, state) in then.items()
    ]
    listing = listed(now) + (listed(now)[:1] if repeated else [])
    manifest = build_manifest(
        listing, store, "m", salt="s", window=WindowSpec(images=images), shard_size=shard_size,
        earlier=earlier_folder(folder / "earlier", rows),
    )  # fmt: skip
    count = Counter(states)
    if not now:
        assert manifest.images == 0
        return
    assert manifest.increment == Increment(
        unchanged=count["same"],
        new=count["new"],
        changed=count["changed"]
        + count["untold"]
        - sum(1 for n, s in enumerate(states) if s == "untold" and f"{n}" not in then),
        unjudged=count["error"],
        deleted=count["deleted"],
        judged_by={"r1": count["same"]} if count["same"] else {},
    )
    assert manifest.duplicates == int(repeated)
    found = manifest_rows(store, manifest)
    assert sorted(row["uri"] for row in found) == sorted(f"s3://b/{name}" for name in now)
    assert [row["ordinal"] for row in found] == list(range(len(now)))
    judged = [row["judged_run_id"] is not None for row in found]
    assert judged == sorted(judged) and sum(judged) == count["same"], "what is tested comes first"
    for shard in manifest.shards:
        assert {row["judged_run_id"] is not None for row in found if row["shard"] == shard.index} == {shard.judged}
    # What is tested fills windows as if nothing else were listed.
    tested = [row for row in found if row["judged_run_id"] is None]
    alone = build_manifest(
        [row for row in listing if f"s3://b/{row['uri']}" and states[int(row["uri"].rsplit("/", 1)[1])] != "same"],
        store, "alone", salt="s", window=WindowSpec(images=images), shard_size=shard_size,
    )  # fmt: skip
    if tested:
        assert [(r["image_id"], r["window"]) for r in tested] == [
            (r["image_id"], r["window"]) for r in manifest_rows(store, alone)
        ]


def commit_id(name: str, etag: str | None) -> str:
    from pipeline.source import image_id

    return image_id(f"s3://b/{name}", etag)
