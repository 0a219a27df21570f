"""Listing and manifest: every legal key once, in an order that depends on the salt alone."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.flow import window_refs
from pipeline.listing import ordering
from pipeline.listing.manifest import _JudgedLast, build_manifest
from pipeline.listing.source import image_id, list_source
from pipeline.plan import Preparation, WindowSpec
from pipeline.schema import RANKED
from pipeline.steps.fetch import Fetcher
from pipeline.storage import is_plain_key, parse_uri, s3_client
from pipeline.store import Store

EXCLUDE = ("_*", ".*", "*.parquet")
# Legal S3 keys that clients like to spoil.
ODD_KEYS = [
    "plain/a.jpg",
    "with space/b c.jpg",
    "üñí/ço∂é 图.jpg",
    "a//b.jpg",
    "/leading.jpg",
    "dots/../c.jpg",
    "./d.jpg",
    "percent%2Fe.jpg",
    "plus+and&and=.jpg",
    "quote'\".jpg",
    "hash#question?.jpg",
    "tilde~back\\slash.jpg",
    "star*[x]{y}|<z>^`.jpg",
    "l" * 1020 + ".jpg",
    "no folder/",
]


@pytest.fixture(scope="module")
def odd_bucket(s3_endpoint):
    client = s3_client(s3_endpoint)
    client.create_bucket(Bucket="odd")
    for number, key in enumerate(ODD_KEYS):
        client.put_object(Bucket="odd", Key=f"top/{key}", Body=b"body %d" % number)
    client.put_object(Bucket="odd", Key="top/folder/", Body=b"")
    for key in ("top/_SUCCESS", "top/.hidden", "top/x/labels.parquet", "beside.jpg"):
        client.put_object(Bucket="odd", Key=key, Body=b"no picture")
    return s3_endpoint


def rows(*names: str, size: int = 10) -> list[dict]:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    return [{"uri": f"s3://b/{name}", "size_bytes": size, "etag": "e", "modified_at": moment} for name in names]


def read(store: Store, manifest) -> list[dict]:
    return [
        row for shard in manifest.shards for row in pq.read_table(pa.BufferReader(store.read(shard.key))).to_pylist()
    ]


def build(tmp_path, listed, *, salt="s", shard_size=1000, **window):
    store = Store(str(tmp_path))
    return store, build_manifest(listed, store, "m", salt=salt, window=WindowSpec(**window), shard_size=shard_size)


def test_every_legal_key_is_listed_once_and_folders_and_patterns_are_not(odd_bucket):
    listed = [row["uri"] for row in list_source("s3://odd/top/", EXCLUDE, odd_bucket)]
    assert sorted(listed) == sorted(f"s3://odd/top/{key}" for key in ODD_KEYS)


def test_more_keys_than_a_page_holds_are_listed_at_every_depth(s3_endpoint):
    client = s3_client(s3_endpoint)
    client.create_bucket(Bucket="deep")
    places = ("", "1/2/3/4/5/", "1/")
    keys = [f"{place}{number:04d}.jpg" for place in places for number in range(1001 if place != "1/" else 2)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: client.put_object(Bucket="deep", Key=key, Body=b""), keys))
    listed = [row["uri"] for row in list_source("s3://deep/", EXCLUDE, s3_endpoint)]
    assert sorted(listed) == sorted(f"s3://deep/{key}" for key in keys)


def test_every_legal_key_is_fetched_as_it_is(odd_bucket, tmp_path):
    store, manifest = build(tmp_path, list_source("s3://odd/top/", EXCLUDE, odd_bucket))
    refs = window_refs(store, list(manifest.shards)).to_pylist()
    fetcher = Fetcher(Store(str(tmp_path)), odd_bucket, Preparation())
    # The manifest lies in a local folder here, so the endpoint is only asked for the pictures.
    (window,) = fetcher(refs)
    assert {image.uri: image.payload for image in window.images} == {
        f"s3://odd/top/{key}": b"body %d" % number for number, key in enumerate(ODD_KEYS)
    }


def test_some_keys_go_through_boto3_and_most_do_not():
    assert sum(is_plain_key(key) for key in ODD_KEYS) == len(ODD_KEYS) - 5
    assert not any(is_plain_key(key) for key in ("a//b", "/a", "a/../b", "./a", "a\nb", ""))


def test_fetch_errors_have_names(odd_bucket, tmp_path):
    client = s3_client(odd_bucket)
    client.create_bucket(Bucket="moving")
    for name in ("gone", "changed", "short", "large", "fine"):
        client.put_object(Bucket="moving", Key=name, Body=name.encode())
    listed = list(list_source("s3://moving/", EXCLUDE, odd_bucket))
    for row in listed:
        if row["uri"].endswith("short"):
            row["size_bytes"] = 99
        if row["uri"].endswith("large"):
            row["size_bytes"] = 2_000_000
    store, manifest = build(tmp_path, listed)
    client.delete_object(Bucket="moving", Key="gone")
    client.put_object(Bucket="moving", Key="changed", Body=b"other")
    (window,) = Fetcher(Store(str(tmp_path)), odd_bucket, Preparation(max_megabytes=1))(
        window_refs(store, list(manifest.shards)).to_pylist()
    )
    assert {image.uri.rsplit("/", 1)[1]: image.error_code for image in window.images} == {
        "gone": "fetch_not_found",
        "changed": "fetch_changed",
        "short": "fetch_short",
        "large": "too_large",
        "fine": None,
    }


def test_local_names_of_any_bytes_survive(tmp_path):
    names = [b"a b.jpg", "ü.jpg".encode(), b"not-utf8-\xff.jpg", b"new\nline.jpg", b"per%20cent.jpg"]
    folder = tmp_path / "in"
    folder.mkdir()
    for name in names:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(name)
    (folder / "_skipped.jpg").write_bytes(b"")
    store, manifest = build(tmp_path / "out", list_source(str(folder), EXCLUDE, None))
    (window,) = Fetcher(Store(str(tmp_path / "out")), None, Preparation())(
        window_refs(store, list(manifest.shards)).to_pylist()
    )
    assert sorted(image.payload for image in window.images) == sorted(names)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.none(), st.integers(0, 5_000_000)), min_size=1, max_size=120),
    images=st.integers(1, 20),
    megabytes=st.integers(1, 8),
    shard_size=st.integers(1, 50),
)
def test_windows_keep_their_bounds_and_shards_are_whole_windows(tmp_path_factory, sizes, images, megabytes, shard_size):
    listed = [rows(f"{number}.jpg")[0] | {"size_bytes": size} for number, size in enumerate(sizes)]
    store, manifest = build(
        tmp_path_factory.mktemp("m"), listed, shard_size=shard_size, images=images, megabytes=megabytes
    )
    found = read(store, manifest)
    assert sorted(row["uri"] for row in found) == sorted(row["uri"] for row in listed)
    assert [row["ordinal"] for row in found] == list(range(len(sizes)))
    windows: dict[int, list[dict]] = {}
    for row in found:
        windows.setdefault(row["window"], []).append(row)
    assert list(windows) == list(range(len(windows)))
    weights = {number: sum(row["size_bytes"] or 0 for row in members) for number, members in windows.items()}
    for number, members in windows.items():
        assert len(members) <= images
        assert weights[number] <= megabytes * 1_000_000 or len(members) == 1
        assert len({row["shard"] for row in members}) == 1
    assert manifest.largest_window_bytes == max(weights.values())
    refs = window_refs(store, list(manifest.shards)).to_pylist()
    assert [(ref["window"], ref["rows"]) for ref in refs] == [(number, len(windows[number])) for number in windows]
    for shard in manifest.shards:
        mine = {row["window"] for row in found if row["shard"] == shard.index}
        assert (shard.images, shard.windows) == (sum(row["shard"] == shard.index for row in found), len(mine))
        assert shard.images >= shard_size or shard is manifest.shards[-1]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 150),
    images=st.integers(1, 20),
    first=st.integers(1, 60),
    second=st.integers(1, 60),
    repeated=st.booleans(),
)
def test_shard_size_and_listing_order_never_change_a_window(tmp_path_factory, count, images, first, second, repeated):
    names = [f"{number}.jpg" for number in range(count)]
    listings = [rows(*names), rows(*names[::-1], *(names[:1] if repeated else []))]
    results = []
    for listing, shard_size in zip(listings, (first, second), strict=True):
        store, manifest = build(tmp_path_factory.mktemp("m"), listing, shard_size=shard_size, images=images)
        content = read(store, manifest)
        assert manifest.images == len(content) == count
        assert [row["ordinal"] for row in content] == list(range(count))
        for shard in manifest.shards:
            mine = [row for row in content if row["shard"] == shard.index]
            assert len(mine) == shard.images and len({row["window"] for row in mine}) == shard.windows
            # Whole windows: as few as reach the wanted size.
            assert len(mine) < shard_size + images
        results.append([(row["image_id"], row["window"]) for row in content])
    assert results[0] == results[1]
    assert manifest.duplicates == int(repeated)


def test_another_salt_is_another_order(tmp_path):
    names = [f"{number}.jpg" for number in range(100)]
    first, second = (
        [row["uri"] for row in read(*build(tmp_path / salt, rows(*names), salt=salt))] for salt in ("a", "b")
    )
    assert sorted(first) == sorted(second) and first != second and first != sorted(first)


def test_a_window_closes_before_it_holds_too_many_bytes(tmp_path):
    store, manifest = build(tmp_path, rows(*"abcdefg", size=400_000), images=100, megabytes=1)
    windows = [row["window"] for row in read(store, manifest)]
    assert windows == [0, 0, 1, 1, 2, 2, 3]


def test_window_refs_point_at_the_rows_of_their_window(tmp_path):
    store, manifest = build(tmp_path, rows(*map(str, range(45))), shard_size=20, images=8)
    for ref in window_refs(store, list(manifest.shards)).to_pylist():
        table = pq.read_table(pa.BufferReader(store.read(ref["key"]))).slice(ref["first_row"], ref["rows"])
        assert set(table["window"].to_pylist()) == {ref["window"]} and table.num_rows == ref["rows"]


def test_a_table_of_uris_is_a_source(tmp_path):
    pq.write_table(pa.table({"uri": ["s3://b/x.jpg", "s3://b/y.jpg"], "other": [1, 2]}), tmp_path / "list.parquet")
    (tmp_path / "list.csv").write_text("uri,size_bytes\ns3://b/x.jpg,5\n")
    listed = list(list_source(str(tmp_path / "list.parquet"), EXCLUDE, None))
    assert [row["uri"] for row in listed] == ["s3://b/x.jpg", "s3://b/y.jpg"] and listed[0]["etag"] is None
    (row,) = list_source(str(tmp_path / "list.csv"), EXCLUDE, None)
    assert row["size_bytes"] == 5
    # A column of others is read by nobody, whatever becomes of it behind the first block.
    lines = "".join(f"s3://b/{number}.jpg,{number}\n" for number in range(200_000))
    (tmp_path / "long.csv").write_text("uri,note\n" + lines + "s3://b/last.jpg,free text\n")
    *_, last = list_source(str(tmp_path / "long.csv"), EXCLUDE, None)
    assert last["uri"] == "s3://b/last.jpg"
    (tmp_path / "bad.csv").write_text("url\nx\n")
    with pytest.raises(UsageError, match="no column 'uri'"):
        list(list_source(str(tmp_path / "bad.csv"), EXCLUDE, None))


def test_ids_change_with_uri_and_version_only():
    assert image_id("s3://b/k", "e1") == image_id("s3://b/k", "e1") != image_id("s3://b/k", "e2")
    assert image_id("s3://b/k", None) != image_id("s3://b/k2", None)
    assert len(image_id("s3://b/k", "e")) == 32


def test_uris_survive_parsing():
    assert parse_uri("s3://b/a//b%2F c").key == "a//b%2F c"
    location = parse_uri("/tmp/ä b%20.jpg")
    assert parse_uri(location.uri) == location
    with pytest.raises(UsageError, match="names no bucket"):
        parse_uri("s3:///x")


def test_rows_come_in_order_whatever_slice_and_file_they_are_in(tmp_path, monkeypatch):
    monkeypatch.setattr(ordering, "RUN_ROWS", 100)
    monkeypatch.setattr(ordering, "SLICE_ROWS", 70)
    rng = np.random.default_rng(5)
    ranks = [*rng.integers(-(2**63), 2**63 - 1, 997).tolist(), -(2**63), 2**63 - 1, 2**63 - 1]
    judged = rng.random(1000) < 0.3
    rows = [
        dict.fromkeys(RANKED.names)
        | {"uri": f"s3://b/{number}", "image_id": f"{number % 990:04d}", "canary": False, "rank": rank}
        | ({"judged_run_id": "r", "judged_outcome": "cleared"} if judged[number] else {})
        for number, rank in enumerate(ranks)
    ]
    sorter = _JudgedLast(tmp_path)
    for start in range(0, 1000, 30):
        sorter.add(pa.Table.from_pylist(rows[start : start + 30], RANKED))
    parts = list(sorter.read())
    assert len(parts) > 10 and pa.concat_tables(parts).to_pylist() == sorted(
        rows, key=lambda row: (row["judged_run_id"] is not None, row["rank"], row["image_id"], row["uri"])
    )
    assert not list(_JudgedLast(tmp_path / "empty").read())
