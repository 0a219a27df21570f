"""What is wrong is said before a run begins, with the value, the limit and the remedy."""

from __future__ import annotations

import re
import time

import pytest

from pipeline.errors import RunError, UsageError
from pipeline.plan import Actors, Preparation
from pipeline.plan import Pool as PlanPool
from pipeline.run import cluster, preflight
from pipeline.run.preflight import check_apart, check_output, check_outside, check_readable
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.storage import s3_client
from pipeline.store import Store
from tests.conftest import QUICK, small_plan
from tests.faults import Faults, fault_proxy
from tests.test_source import build, rows


@pytest.fixture(scope="module")
def listed(s3_endpoint, tmp_path_factory):
    """A bucket with five objects and the manifest that lists them."""
    client = s3_client(s3_endpoint)
    client.create_bucket(Bucket="readable")
    entries = rows(*(f"{number}.jpg" for number in range(5)))
    for entry in entries:
        key = entry["uri"].rsplit("/", 1)[1]
        entry["uri"] = f"s3://readable/{key}"
        entry["etag"] = client.put_object(Bucket="readable", Key=key, Body=b"0123456789")["ETag"].strip('"')
    return s3_endpoint, *build(tmp_path_factory.mktemp("listed"), entries)


def test_a_source_that_can_be_listed_and_not_read(listed):
    endpoint, store, manifest = listed
    check_readable(store, manifest.shards[0], Preparation(), endpoint)
    with (
        fault_proxy(endpoint, Faults(share={"403": 1.0})) as url,
        pytest.raises(UsageError, match=r"listed but not read: s3://readable/\d.jpg: .*403.*; allow s3:GetObject"),
    ):
        check_readable(store, manifest.shards[0], Preparation(), url)


def test_one_object_that_may_not_be_read_stops_nothing(listed):
    endpoint, store, manifest = listed
    faults = Faults(share={"403": 1.0})
    faults.matches = lambda method, key: method == "GET" and not faults.hits["403"]
    with fault_proxy(endpoint, faults) as url:
        check_readable(store, manifest.shards[0], Preparation(), url)
    assert faults.hits["403"] == 1


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("MIN_OUTPUT_BYTES", r"bytes free and the output need 1,000,000,000,000,000: make room there, or give another"),
        ("MIN_SCRATCH_BYTES", r"bytes free and listings and what Ray spills need .* or set TMPDIR"),
    ],
)
def test_a_disk_without_room(tmp_path, monkeypatch, limit, words):
    check_output(Store(str(tmp_path)))
    monkeypatch.setattr(preflight, limit, 10**15)
    with pytest.raises(UsageError, match=words):
        check_output(Store(str(tmp_path)))


@pytest.mark.usefixtures("ray_session")
def test_windows_that_no_object_store_holds_and_pools_that_no_cluster_has():
    from pipeline.run.cluster import ray_session

    pool = PlanPool(num_cpus=0.1, actors=Actors(min=1, max=1))
    with ray_session([pool], "plan 'x'", row_bytes=1_000_000):
        pass
    with (
        pytest.raises(RunError, match=r"windows of up to 1,000,000,000,000 bytes, but a node's .* only [\d,]+; lower"),
        ray_session([pool], "plan 'x'", row_bytes=10**12),
    ):
        pass
    with (
        pytest.raises(RunError, match=r"needs at least 1 GPUs for its pools, but Ray has 0; lower num_gpus"),
        ray_session([PlanPool(num_gpus=1)], "plan 'x'"),
    ):
        pass


@pytest.mark.usefixtures("ray_session")
def test_an_actor_that_no_node_has_room_for(monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "object_store_memory": 1e9}} for _ in range(2)]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])
    with cluster.ray_session([PlanPool(num_cpus=8, actors=Actors(min=2, max=2))], "plan 'x'"):
        pass
    with (
        pytest.raises(RunError, match=r"needs 16 CPUs for one actor, but no node has more than 8; lower num_cpus"),
        cluster.ray_session([PlanPool(num_cpus=16)], "plan 'x'"),
    ):
        pass


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("pool", "words"),
    [
        ({"resources": {"decode": 1}}, ""),
        ({"resources": {"decode": 16}}, ""),
        (
            {"resources": {"decode": 9}, "actors": {"min": 2, "max": 2}},
            "at least 18 'decode' for its pools, but Ray has 16",
        ),
        ({"resources": {"decode": 17}}, "at least 17 'decode' for its pools, but Ray has 16; lower resources or"),
        ({"resources": {"encode": 1}}, "at least 1 'encode' for its pools, but Ray has 0; lower resources or"),
        (
            {"num_gpus": 0.3, "resources": {"decode": 1}},
            "CPU: 1, GPU: 0.3, decode: 1} for one actor, but no node has all",
        ),
        ({"num_gpus": 1, "num_cpus": 12}, "one node with {CPU: 12, GPU: 1} for one actor, but no node has all of it"),
    ],
)
def test_pools_for_a_kind_of_node_that_is_not_there(monkeypatch, pool, words):
    kinds = ({"CPU": 16.0, "decode": 16.0}, {"CPU": 8.0, "GPU": 1.0})
    nodes = [{"Alive": True, "Resources": kind | {"object_store_memory": 1e9}} for kind in kinds]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    wanted = PlanPool.model_validate(pool)
    if not words:
        with cluster.ray_session([wanted], "plan 'x'"):
            return
    with pytest.raises(RunError, match=re.escape(words)), cluster.ray_session([wanted], "plan 'x'"):
        pass


def test_a_cluster_that_grows_is_asked_for_every_pool_with_its_kind_of_node(monkeypatch):
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(cluster, "request_resources", lambda *, bundles: asked.append(bundles))
    monkeypatch.setattr(cluster, "_lacking", lambda pools: "")
    decode = PlanPool.model_validate({"resources": {"decode": 1}, "actors": {"min": 2, "max": 9}})
    stage = PlanPool.model_validate({"num_cpus": 0.5, "num_gpus": 0.3})
    cluster._check_resources([decode, stage], "plan 'x'", patience=600)
    assert asked == [[{"CPU": 1.0, "decode": 1.0}] * 2 + [{"CPU": 0.5, "GPU": 0.3}]]


@pytest.mark.usefixtures("ray_session")
def test_a_scan_asks_what_it_may_read_and_what_a_node_holds(listed, tmp_path):
    endpoint, _, _ = listed
    wanted = {"output": str(tmp_path / "out"), "plan": str(small_plan(tmp_path, QUICK)), "run_id": "r"}
    faults = Faults(share={"403": 1.0}, matches=lambda method, key: method == "GET" and bool(key))
    with fault_proxy(endpoint, faults) as url, pytest.raises(UsageError, match="listed but not read"):
        run_scan(ScanConfig(source="s3://readable/", endpoint_url=url, **wanted))
    (tmp_path / "list.csv").write_text("uri,size_bytes\ns3://readable/0.jpg,10000000000000\n")
    with pytest.raises(RunError, match=r"windows of up to 10,000,000,\d+,\d+ bytes, but a node's object store"):
        run_scan(ScanConfig(source=str(tmp_path / "list.csv"), endpoint_url=endpoint, **wanted))


@pytest.mark.parametrize(
    ("source", "output", "inside"),
    [
        ("s3://b/in", "s3://b/in/out", True),
        ("s3://b/in/", "s3://b/in", True),
        ("s3://b/in", "s3://b/input", True),  # a prefix has no border
        ("s3://b/in/", "s3://b/out", False),
        ("s3://b/in/", "s3://c/in/out", False),
        ("/data/in", "/data/in/out", True),
        ("/data/in", "/data/input", False),
    ],
)
def test_an_output_inside_its_source(source, output, inside):
    if inside:
        with pytest.raises(UsageError, match="lies inside source"):
            check_apart(source, output)
    else:
        check_apart(source, output)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either --source, what to scan, or --retry-errors"),
        ({"source": "x", "retry_errors": "r"}, "either --source"),
        ({"retry_errors": "../x"}, "run id '../x' may hold letters"),
        ({"source": "x", "output_patience": 1000}, "output patience is 1000 s, not between 0 and 360"),
        ({"source": "x", "max_outage": 2}, "max outage is 2"),
        ({"source": "x", "endpoint_url": "http://u@h"}, "holds a user name or password"),
    ],
)
def test_values_that_make_no_scan(options, words):
    with pytest.raises(UsageError, match=words):
        ScanConfig(**options)


def test_a_list_that_names_the_output_is_refused(tmp_path):
    """An inventory report is of a whole bucket, and the output may lie in that."""
    output = Store("s3://bucket/out")
    beside = [{"uri": "s3://bucket/outer/a.jpg"}, {"uri": "s3://bucket/a.jpg"}]
    assert list(check_outside(beside, output)) == beside
    with pytest.raises(
        UsageError, match=r"lists s3://bucket/out/runs/r\.json, which lies in the output s3://bucket/out"
    ):
        list(check_outside([*beside, {"uri": "s3://bucket/out/runs/r.json"}], output))


@pytest.fixture
def boots(monkeypatch) -> dict[str, int]:
    """Counts starts and ends of a Ray that there is not."""
    counts = {"up": 0, "down": 0}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: counts["up"] > counts["down"])
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: counts.update(down=counts["down"] + 1))
    for check in ("_check_resources", "_check_object_store"):
        monkeypatch.setattr(cluster, check, lambda *_: None)
    return counts


def test_a_ray_that_is_starting_is_waited_for_and_ended_once(boots, monkeypatch):
    def start(_: int | None) -> None:
        time.sleep(0.3)
        boots["up"] += 1

    monkeypatch.setattr(cluster, "_start", start)
    with cluster.starting_ray():
        assert boots == {"up": 0, "down": 0}, "the caller goes on meanwhile"
        with cluster.ray_session([], "plan 'x'"):
            assert boots == {"up": 1, "down": 0}
        with cluster.starting_ray(), cluster.ray_session([], "plan 'x'"):
            assert boots == {"up": 1, "down": 0}, "there is one already"
    assert boots == {"up": 1, "down": 1}
    with pytest.raises(UsageError), cluster.starting_ray():
        raise UsageError("a wrong net")
    assert boots == {"up": 2, "down": 2}, "nothing is left behind"


def test_a_ray_that_cannot_start_is_told_to_who_needs_it(boots, monkeypatch):
    def start(_: int | None) -> None:
        raise RuntimeError("no room in /dev/shm")

    monkeypatch.setattr(cluster, "_start", start)
    with cluster.starting_ray(), pytest.raises(RuntimeError, match="no room"), cluster.ray_session([], "plan 'x'"):
        pass
    assert boots == {"up": 0, "down": 0}
