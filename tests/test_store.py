"""The scan's own store: conditional PUT or a promise, patience with outages, encryption, nothing half-seen."""

from __future__ import annotations

import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import StoreError, UsageError
from pipeline.storage import reason, redact, s3_client
from pipeline.store import Store, check_writable
from tests.faults import Faults, fault_proxy

BUCKET = "stores"


@pytest.fixture(scope="module")
def endpoint(s3_endpoint: str) -> str:
    s3_client(s3_endpoint).create_bucket(Bucket=BUCKET)
    return s3_endpoint


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path, endpoint) -> Store:
    if request.param == "folder":
        return Store(str(tmp_path))
    return Store(f"s3://{BUCKET}/{tmp_path.name}", endpoint)


def test_the_store_around_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, folder in (("a.parquet", tmp_path), (f"{tmp_path}/b/a.parquet", tmp_path / "b")):
        around, key = Store.around(file, None, patience=1)
        assert (around.name, key, around.patience) == (str(folder), "a.parquet", 1)
    around, key = Store.around("s3://b/c/a.parquet", "http://e", patience=1)
    assert (around.uri, around.endpoint_url, key) == ("s3://b/c", "http://e", "a.parquet")


def test_create_decides_once(store):
    assert store.create("a/b", b"first") and not store.create("a/b", b"second")
    assert store.read("a/b") == b"first" and store.exists("a/b") and not store.exists("a/c")


def test_what_is_replaced_is_the_version_that_was_read(store):
    store.write("a/b", b"first")
    body, version = store.read_version("a/b")
    second = store.replace("a/b", b"second", version)
    assert body == b"first" and second == store.read_version("a/b")[1] != version
    assert store.replace("a/b", b"late", version) is None and store.read("a/b") == b"second"
    # Heard at its second try only: the answer to the first was lost.
    assert store.replace("a/b", b"second", version) == second
    assert store.replace("a/b", b"third", second) and store.read("a/b") == b"third"
    assert store.replace("a/c", b"gone", version) is None and not store.exists("a/c")


def test_what_is_gone_already_keeps_nothing_from_being_deleted(store):
    for key in ("d/1", "d/3"):
        store.write(key, b"x")
    store.delete(["d/0", "d/1", "d/2", "d/3"])
    assert store.sizes("d") == {}


def test_of_many_who_replace_one_version_one_does(store):
    store.write("race", b"0")
    _, version = store.read_version("race")
    replaced: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: store.replace("race", b"%d" % n, version) and replaced.append(n))
        for n in range(1, 13)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replaced) == 1 and store.read("race") == b"%d" % replaced[0]


def test_of_many_who_create_at_once_one_does(store):
    created: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: store.create("race", b"%d" % n) and created.append(n)) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1 and store.read("race") == b"%d" % created[0]


def test_publishing_twice_leaves_one_file(store):
    store.write("attempt", b"rows")
    for _ in range(3):
        store.publish("attempt", "table/file.parquet")
    store.delete(["attempt"])
    assert store.read("table/file.parquet") == b"rows"
    with pytest.raises(FileNotFoundError):
        store.publish("attempt", "table/other.parquet")
    location = Path(store.uri.removeprefix("file://"))
    if location.is_dir():
        assert [path.name for path in (location / "table").iterdir()] == ["file.parquet"]


def test_a_store_travels(store):
    store.write("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"


def test_folders_and_ages_are_listed(store):
    store.write("top/one/x", b"12")
    store.write("top/two/deep/y", b"3")
    assert store.folders("top") == ["one", "two"] and store.folders("none") == []
    assert store.sizes("top") == {"top/one/x": 2, "top/two/deep/y": 1}
    assert all(abs(moment.timestamp() - time.time()) < 60 for _, moment in store.objects("top").values())


def test_reading_by_digest_refuses_other_bytes(store):
    store.write("x", b"right")
    wrong = "0" * 64
    with pytest.raises(OSError, match="x: what came is not what was written"):
        store.read("x", wrong)


def test_a_store_that_overwrites_is_refused_and_allowed_on_a_promise(endpoint, monkeypatch):
    ignorant = Faults(forgets_conditions=True)
    with fault_proxy(endpoint, ignorant) as url:
        store = Store(f"s3://{BUCKET}/ignorant", url)
        with pytest.raises(UsageError, match=r"overwrites what a conditional PUT .* promise with --single-driver"):
            check_writable(store)
        promised = replace(store, conditional=False)
        check_writable(promised)
        assert promised.create("marker", b"1") and not promised.create("marker", b"2")
        assert promised.read("marker") == b"1"


def test_a_store_that_says_it_knows_no_condition_is_refused_to_scans_and_looked_at_first_by_others(endpoint):
    modest = Faults(refuses_conditions=True)
    with fault_proxy(endpoint, modest) as url:
        store = Store(f"s3://{BUCKET}/modest", url, patience=60.0)
        began = time.monotonic()
        with pytest.raises(UsageError, match=r"overwrites what a conditional PUT .* promise with --single-driver"):
            check_writable(store)
        assert store.create("lease", b"1") and not store.create("lease", b"2")
        body, version = store.read_version("lease")
        second = store.replace("lease", b"second", version)
        assert body == b"1" and second == store.read_version("lease")[1] != version
        assert store.replace("lease", b"late", version) is None and store.read("lease") == b"second"
        assert store.replace("gone", b"late", version) is None and not store.exists("gone")
        asked = modest.hits["501"]
        promised = replace(store, conditional=False)
        check_writable(promised)
        assert promised.replace("lease", b"third", second) and not promised.create("lease", b"4")
    # Once each: it is an answer, and no outage to wait for.
    assert asked == modest.hits["501"] == 6 and time.monotonic() - began < 30


def test_an_outage_is_waited_for_and_no_longer_than_patience(endpoint):
    over = threading.Event()
    faults = Faults(share={"403": 1.0}, matches=lambda method, key: not over.is_set())
    with fault_proxy(endpoint, faults) as url:
        store = Store(f"s3://{BUCKET}/outage", url)
        with pytest.raises(StoreError, match="403"):
            replace(store, patience=1.0).write("x", b"1")
        refused, began = faults.hits["403"], time.monotonic()
        threading.Timer(4, over.set).start()
        patient = replace(store, patience=30.0)
        patient.write("x", b"1")
        assert patient.read("x") == b"1" and faults.hits["403"] > refused > 1
    assert 4 < time.monotonic() - began < 25


def test_what_a_store_answers_is_not_asked_again(endpoint):
    faults = Faults(matches=lambda method, key: True)
    with fault_proxy(endpoint, faults) as url:
        store = Store(f"s3://{BUCKET}/answers", url, patience=60.0)
        assert not store.exists("nothing")
        with pytest.raises(FileNotFoundError):
            store.read("nothing")
        assert store.create("x", b"1") and not store.create("x", b"2")
    # A PUT that is refused looks whether it was for an object that is there.
    assert faults.hits["passed"] == 5


def test_what_is_written_is_encrypted_with_the_key_that_was_asked_for(endpoint):
    store = Store(f"s3://{BUCKET}/kms", endpoint, kms_key="arn:aws:kms:us-east-1:1:key/k")
    store.write("written", b"1")
    store.create("created", b"2")
    store.publish("written", "published")
    for name in ("written", "created", "published"):
        head = s3_client(endpoint).head_object(Bucket=BUCKET, Key=f"kms/{name}")
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "arn:aws:kms:us-east-1:1:key/k")


def test_a_key_for_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="leave --kms-key out"):
        check_writable(Store(str(tmp_path), kms_key="k"))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>AKIAX</AWSAccessKeyId>", "SignatureDoesNotMatch"),
        ("403 for AKIAIOSFODNN7EXAMPLE: denied", "denied"),
        ("GET http://h/b/k?X-Amz-Credential=AKIDX%2F2026&X-Amz-Signature=abcdef0123&x=1", "x=1"),
        ("<StringToSign>AWS4-HMAC-SHA256 secretish</StringToSign> rest", "rest"),
        ("cut off <StringToSign>AWS4-HMAC-SHA256 secretish", "cut off"),
        ("https://user:secretish@store.example/bucket", "store.example/bucket"),
        ("Authorization: AWS4-HMAC-SHA256 Credential=AKIDX/2026, Signature=abcdef0123", "AWS4"),
    ],
)
def test_errors_lose_what_they_say_of_credentials(text, kept):
    found = reason(ValueError(text))
    assert kept in found and "[redacted]" in found
    assert not any(word in found for word in ("AKI", "secretish", "abcdef0123"))
    assert redact("an ordinary line, s3://bucket/key@2") == "an ordinary line, s3://bucket/key@2"
