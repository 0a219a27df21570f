"""Stores and networks that break: fetch alone, and whole scans with a fault proxy before their store."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.plan import Preparation
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.steps import fetch as module
from pipeline.steps.fetch import Fetcher
from pipeline.storage import s3_client
from pipeline.store import Store
from pipeline.window import Image, Window
from tests.conftest import QUICK, small_plan, upload
from tests.faults import PASSING, Faults, fault_proxy

FAST = Preparation(fetch_seconds=3)
BUCKET = "faulty"


@pytest.fixture(scope="module")
def bucket(s3_endpoint: str) -> str:
    s3_client(s3_endpoint).create_bucket(Bucket=BUCKET)
    return s3_endpoint


def put(endpoint: str, key: str, body: bytes, **options: str) -> Image:
    """Uploads an object and lists it."""
    answer = s3_client(endpoint).put_object(Bucket=BUCKET, Key=key, Body=body, **options)
    uri = f"s3://{BUCKET}/{key}"
    return Image(image_id=uri, uri=uri, size_bytes=len(body), etag=answer["ETag"].strip('"'))


def put_in_parts(endpoint: str, key: str, body: bytes) -> Image:
    client = s3_client(endpoint)
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
    part = client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=body)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    etag = client.complete_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload, MultipartUpload=parts)["ETag"]
    assert "-" in etag
    return Image(image_id=key, uri=f"s3://{BUCKET}/{key}", size_bytes=len(body), etag=etag.strip('"'))


def fetch(endpoint: str, *images: Image, limits: Preparation = FAST) -> list[Image]:
    window = Window(shard=0, window=0, first_ordinal=0, images=list(images))
    return Fetcher(None, endpoint, limits).fetch(window).images


@pytest.mark.parametrize("key", ["plain.jpg", "by//boto3.jpg"])
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_nothing(bucket, fault, key):
    image = put(bucket, f"{fault}/{key}", b"the whole picture" * 50)
    faults = Faults(share={fault: 1.0}, stall_seconds=3)
    faults.matches = lambda method, _: method == "GET" and not faults.hits[fault]
    with fault_proxy(bucket, faults) as url:
        (fetched,) = fetch(url, image)
    assert faults.hits[fault] == 1
    assert (fetched.outcome, fetched.payload) == (None, b"the whole picture" * 50)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("503", "fetch_throttled"),
        ("500", "fetch_failed"),
        ("reset", "fetch_failed"),
        ("short", "fetch_failed"),
        ("stall", "fetch_timeout"),
        ("flip", "fetch_corrupt"),
        ("403", "fetch_denied"),
        ("404", "fetch_not_found"),
    ],
)
@pytest.mark.parametrize("key", ["plain.jpg", "by//boto3.jpg"])
def test_a_fault_that_stays_is_an_error_with_its_code_before_the_deadline(bucket, fault, code, key):
    image = put(bucket, f"always/{fault}/{key}", os.urandom(600))
    faults = Faults(share={fault: 1.0}, stall_seconds=3)
    began = time.monotonic()
    with fault_proxy(bucket, faults) as url:
        (fetched,) = fetch(url, image)
    assert (fetched.outcome, fetched.error_code) == ("error", code)
    assert time.monotonic() - began < FAST.fetch_seconds + 3
    tried_again = code not in ("fetch_denied", "fetch_not_found")
    assert (faults.hits[fault] > 1) == tried_again


def test_pauses_between_tries_differ_and_grow_and_do_not_end_before_the_deadline(bucket):
    images = [put(bucket, f"pauses/{number}", b"x") for number in range(24)]
    moments: dict[str, list[float]] = {}

    def note(method: str, key: str) -> bool:
        moments.setdefault(key, []).append(time.monotonic())
        return len(moments[key]) <= 4

    with fault_proxy(bucket, Faults(share={"503": 1.0}, matches=note)) as url:
        fetched = fetch(url, *images, limits=Preparation(fetch_seconds=20))
    assert [image.payload for image in fetched] == [b"x"] * 24
    pauses = np.diff(np.array(list(moments.values())), axis=1)
    assert pauses.shape == (24, 4), "five tries each"
    assert (pauses.max(axis=0) - pauses.min(axis=0) > 0.05).all()
    # Drawn up to 0.25, 0.5, 1 and 2 seconds: the last are longer by more than chance could make the first.
    assert pauses[:, 3].mean() > 2 * pauses[:, 0].mean()


@pytest.mark.parametrize("key", ["replaced", "by//replaced"])
@pytest.mark.parametrize("parts", [False, True])
def test_an_object_replaced_after_listing_is_not_judged_under_its_old_name(bucket, key, parts):
    image = put_in_parts(bucket, key, b"one") if parts else put(bucket, key, b"one")
    put(bucket, key, b"two")
    (fetched,) = fetch(bucket, image)
    assert fetched.error_code == "fetch_changed" and fetched.payload is None


def test_an_etag_is_compared_where_the_store_keeps_no_checksum(bucket):
    image = put(bucket, "by//unchecked", b"the whole picture" * 50)
    faults = Faults(share={"flip": 1.0}, hides_checksums=True)
    with fault_proxy(bucket, faults) as url:
        (fetched,) = fetch(url, image)
    assert fetched.error_code == "fetch_corrupt" and faults.hits["flip"] > 1


def test_etags_under_a_kms_key_are_no_digests(bucket):
    body = b"encrypted at rest"
    image = put(bucket, "kms", body, ServerSideEncryption="aws:kms", SSEKMSKeyId="key")
    # moto's etag is an MD5 all the same; that of AWS is not.
    image.etag = None
    faults = Faults()
    fetcher = Fetcher(None, bucket, FAST)
    agrees = module._agrees
    module._agrees = lambda payload, etag: False
    try:
        fetcher.fetch(Window(shard=0, window=0, first_ordinal=0, images=[image]))
    finally:
        module._agrees = agrees
    assert image.payload == body and fetcher.encrypted == {BUCKET} and not faults.hits


def test_an_object_in_parts_is_fetched_by_who_can_check_its_checksum(bucket):
    body = b"part of it" * 100
    image = put_in_parts(bucket, "parts", body)
    asked: list[str | None] = []
    faults = Faults(watches=lambda request: asked.append(request.headers.get("x-amz-checksum-mode")))
    with fault_proxy(bucket, faults) as url:
        (fetched,) = fetch(url, image)
    assert fetched.payload == body and asked == ["ENABLED"]


@pytest.mark.parametrize("algorithm", ["CRC32", "SHA256", "CRC64NVME"])
def test_a_checksum_that_the_store_keeps_is_compared_where_the_etag_tells_nothing(bucket, monkeypatch, algorithm):
    monkeypatch.setattr(module, "_agrees", lambda payload, etag: True)
    image = put(bucket, f"by//{algorithm}", b"the whole picture" * 50, ChecksumAlgorithm=algorithm)
    faults = Faults(share={"flip": 1.0})
    faults.matches = lambda method, _: method == "GET" and not faults.hits["flip"]
    with fault_proxy(bucket, faults) as url:
        (fetched,) = fetch(url, image)
    assert faults.hits["flip"] == 1 and fetched.payload == b"the whole picture" * 50


def test_requests_that_stall_leave_room_for_three_within_the_deadline(bucket):
    image = put(bucket, "thrice", b"x" * 100)
    faults = Faults(share={"stall": 1.0}, stall_seconds=4)
    began = time.monotonic()
    with fault_proxy(bucket, faults) as url:
        (fetched,) = fetch(url, image)
        seconds = time.monotonic() - began
    assert fetched.error_code == "fetch_timeout" and faults.hits["stall"] == 3
    assert 0.8 * FAST.fetch_seconds < seconds < FAST.fetch_seconds + 0.5


@pytest.mark.parametrize("key", ["many", "by//many"])
def test_slow_answers_do_not_take_the_time_of_those_that_wait(bucket, key):
    images = [put(bucket, f"{key}/{number}", b"x" * 100) for number in range(36)]
    faults = Faults(share={"slow": 1.0}, slow_seconds=0.6)
    with fault_proxy(bucket, faults) as url:
        # 3 s a try: six at a time, as many threads as asyncio brings on two cores, would be 3.6 s.
        fetched = fetch(url, *images, limits=Preparation(fetch_seconds=9, fetch_concurrency=36))
    assert [image.error_code for image in fetched] == [None] * 36 and faults.hits["slow"] == 36


def test_a_server_that_dribbles_holds_nobody_beyond_the_deadline(bucket):
    image = put(bucket, "by//dribble", b"x" * 4000)
    began = time.monotonic()
    with fault_proxy(bucket, Faults(share={"dribble": 1.0}, slow_seconds=8)) as url:
        (fetched,) = fetch(url, image)
        seconds = time.monotonic() - began
    assert fetched.error_code == "fetch_timeout" and seconds < FAST.fetch_seconds + 0.5


def test_a_service_that_has_no_credentials_for_a_moment_is_waited_for(bucket, monkeypatch):
    image = put(bucket, "moment", b"x")
    failures = iter(range(2))
    opened = module.open_bucket

    def open_bucket(*args: object):
        if next(failures, None) is not None:
            raise ValueError("Received None from session.get_credentials")
        return opened(*args)

    monkeypatch.setattr(module, "open_bucket", open_bucket)
    (fetched,) = fetch(bucket, image)
    assert fetched.payload == b"x"


def test_a_key_with_a_newline_is_fetched_and_is_no_other_key(bucket):
    put(bucket, "stands-for-newline.jpg", b"the newline one")
    put(bucket, "line", b"another")
    key = "a\nb/line"
    faults = Faults(renamed={f"/{BUCKET}/a%0Ab/line": f"/{BUCKET}/stands-for-newline.jpg"})
    with fault_proxy(bucket, faults) as url:
        (fetched,) = fetch(url, Image(image_id="n", uri=f"s3://{BUCKET}/{key}"))
    assert fetched.payload == b"the newline one"


def test_a_key_of_1024_bytes_is_fetched(bucket):
    key = "ü" * 510 + ".jpg"
    assert len(key.encode()) == 1024
    (fetched,) = fetch(bucket, put(bucket, key, b"long"))
    assert fetched.payload == b"long"


def test_a_store_that_hangs_does_not_hold_a_window_for_ever(bucket, monkeypatch):
    monkeypatch.setattr(module, "HASTE_SECONDS", 0.3)
    images = [put(bucket, f"hang/{number}", b"x") for number in range(24)]
    began = time.monotonic()
    with fault_proxy(bucket, Faults(share={"stall": 1.0}, stall_seconds=4)) as url:
        fetched = fetch(url, *images, limits=Preparation(fetch_seconds=3, fetch_concurrency=4))
    assert {image.error_code for image in fetched} == {"fetch_timeout"}
    # One round of four for 3 s, five more for 0.3 s.
    assert time.monotonic() - began < 3 + 5 * 0.3 + 4


class Weather:
    """A corpus in S3, and what an undisturbed scan says of it. ``plan``: changes to the quick plan."""

    def __init__(self, endpoint: str, bucket: str, folder: Path, name: str = "calm", **plan: object) -> None:
        self.endpoint, self.bucket = endpoint, bucket
        # Time for six requests that stall: three in a row happen to two pictures in a hundred at a share of a fifth.
        preparation = QUICK["preparation"] | {"fetch_seconds": 24}
        self.plan = str(small_plan(folder, QUICK, window={"images": 32}, preparation=preparation, **plan))
        self.calm = self.scan(endpoint, name)

    def scan(self, endpoint: str, output: str) -> pa.Table:
        """The ledger, which is read past the faults and compared with the run record."""
        config = ScanConfig(
            source=f"s3://{self.bucket}/all/", output=f"s3://{self.bucket}/{output}", endpoint_url=endpoint,
            plan=self.plan, salt="s", run_id="r", shard_size=64, output_patience=60,
        )  # fmt: skip
        record = run_scan(config)
        store = Store(f"s3://{self.bucket}/{output}", self.endpoint)
        assert sum(record["counts"][kind] for kind in ("cleared", "flagged", "error")) == record["counts"]["listed"]
        for file in record["files"]:
            assert hashlib.sha256(store.read(file["path"])).hexdigest() == file["sha256"]
        paths = [file["path"] for file in record["files"] if file["path"].startswith("ledger/")]
        assert sorted(paths) == sorted(store.sizes("ledger"))
        tables = [pq.read_table(pa.BufferReader(store.read(path))) for path in paths]
        ledger = pa.concat_tables(tables).sort_by("ordinal")
        assert ledger["ordinal"].to_pylist() == list(range(320))
        return ledger

    def scan_through(self, faults: Faults, output: str, upstream: str | None = None) -> pa.Table:
        began = time.monotonic()
        with fault_proxy(upstream or self.endpoint, faults) as url:
            ledger = self.scan(url, output)
        broken = sum(faults.hits.values()) - faults.hits["passed"]
        print(f"{output}: {broken} of {sum(faults.hits.values())} requests broke, {time.monotonic() - began:.1f} s")
        assert broken > 1 and faults.hits["passed"] > 100
        return ledger


@pytest.fixture(scope="module")
def pictures(ray_session, s3_endpoint, corpus) -> str:
    upload(corpus, s3_endpoint, "weather")
    return s3_endpoint


@pytest.fixture(scope="module")
def grouped(pictures, tmp_path_factory) -> Weather:
    return Weather(pictures, "weather", tmp_path_factory.mktemp("grouped"))


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory) -> Weather:
    """Every image is tested alone: whoever fails changes no other's verdict."""
    (stage,) = QUICK["stages"]
    single = stage | {"rounds": [1], "thresholds": {"automobile": [0.007]}}
    return Weather(pictures, "weather", tmp_path_factory.mktemp("alone"), "alone", stages=[single])


def any_object(method: str, key: str) -> bool:
    """Of the scan's own files and the pictures. Listings, which have no key, carry no digest: see the next test."""
    return bool(key)


def test_a_scan_in_bad_weather_is_the_scan_of_a_calm_day(alone):
    faults = Faults(share=dict.fromkeys(PASSING, 0.02), matches=any_object, stall_seconds=4, seed=1)
    listings = Faults(share=dict.fromkeys(("503", "500", "reset", "lost", "short"), 0.04), seed=4)
    listings.matches = lambda method, key: method == "GET" and not key
    with fault_proxy(alone.endpoint, listings) as url:
        assert alone.scan_through(faults, "bad", url).equals(alone.calm)
    assert listings.hits.total() - listings.hits["passed"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("fault", PASSING)
def test_each_fault_at_each_share_changes_no_row(grouped, fault, share):
    faults = Faults(share={fault: share}, matches=any_object, stall_seconds=4, seed=2)
    assert grouped.scan_through(faults, f"{fault}-{share}").equals(grouped.calm)


@pytest.mark.parametrize("share", [0.05, pytest.param(0.2, marks=pytest.mark.slow)])
def test_what_was_refused_is_an_error_and_nothing_else_changes(alone, share):
    faults = Faults(share={"403": share, "404": share}, seed=3)
    faults.matches = lambda method, key: method == "GET" and key.startswith("all/")
    ledger = alone.scan_through(faults, f"refused-{share}")
    codes = {"403": "fetch_denied", "404": "fetch_not_found"}
    # The last draw counts: preflight has asked for a few before.
    refused = {f"s3://weather/{key}": codes[kinds[-1]] for key, kinds in faults.by_key.items() if kinds[-1]}
    assert len(refused) > 10
    for found, calm in zip(ledger.to_pylist(), alone.calm.to_pylist(), strict=True):
        code = refused.get(found["source_uri"])
        if code:
            assert (found["outcome"], found["error_code"]) == ("error", code)
        else:
            # Another place in the device batch moves a score by less than 1e-5.
            for score in ("score", "group_score"):
                assert found.pop(score) == pytest.approx(calm.pop(score), abs=1e-5)
            assert found == calm
