"""Scans on nodes of different kinds: who runs where, what happens when memory is short, and when all GPUs are gone."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as Pillow

from tests.conftest import QUICK, small_plan

SMALL_STORE, STORE = 80_000_000, 250_000_000
"""Bytes of a node's object store: near the least that Ray starts with, and of the full form."""
GONE_SECONDS = 60
SCAN_SECONDS = 500


class Nodes:
    """A node that fetches and decodes, on which the driver is, and one with a GPU that only Ray believes in."""

    def __init__(self, store_bytes: int) -> None:
        from ray.cluster_utils import Cluster

        size = {"num_cpus": 2, "object_store_memory": store_bytes}
        self.gpu_size = size | {"num_gpus": 1}
        head = size | {"resources": {"decode": 2}, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.gpu = self.cluster.add_node(**self.gpu_size)

    def lose_gpu(self) -> None:
        self.cluster.remove_node(self.gpu, allow_graceful=False)

    def gain_gpu(self) -> None:
        self.gpu = self.cluster.add_node(**self.gpu_size)

    def operators(self) -> dict[str, set[str]]:
        """By operator the names of the nodes that any of its actors was on, as Ray's table of actors has it."""
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        state = GlobalState()
        state._initialize_global_state(GcsClientOptions.create(self.cluster.address, None, True, False))
        names = {self.cluster.head_node.node_id: "cpu", self.gpu.node_id: "gpu"}
        nodes = defaultdict(set)
        for actor in state.actor_table(None, None, None).values():
            operator = actor["ActorClassName"].removeprefix("MapWorker(MapBatches(").removesuffix("))")
            if operator != actor["ActorClassName"] and actor["Address"]["NodeID"] in names:
                nodes[operator].add(names[actor["Address"]["NodeID"]])
        return nodes

    def in_use(self) -> tuple[int, int]:
        """Bytes in the fuller object store now, and bytes that were spilled to disk so far."""
        from ray._private.internal_api import node_stats

        stores = [
            node_stats(node.node_ip_address, node.node_manager_port, include_memory_info=False).store_stats
            for node in (self.cluster.head_node, self.gpu)
        ]
        return (
            max(store.object_store_bytes_used for store in stores),
            sum(store.spilled_bytes_total for store in stores),
        )


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    nodes = Nodes(getattr(request, "param", SMALL_STORE))
    yield nodes
    nodes.cluster.shutdown()


def plan_for_two_kinds(folder: Path, last_size: int) -> Path:
    """Three stages that share one GPU, and let everything through: each moves every window with its files."""
    folder.mkdir(exist_ok=True)
    content = copy.deepcopy(QUICK) | {"window": {"images": 8}}
    for name in ("fetch", "decode"):
        content["preparation"][name] |= {"resources": {"decode": 0.25}, "num_cpus": 0.25}
    # More decoders than the nodes have room for: those that find none must not keep the others from working.
    content["preparation"]["decode"] |= {"actors": {"min": 1, "max": 20}}
    stage = {"model": "cifar-mini", "rounds": [1], "num_cpus": 0.2, "num_gpus": 0.3, "batch_images": 16}
    content["stages"] = [
        stage | {"name": name, "thresholds": {"automobile": [least]}, "input_size": size}
        for name, least, size in (("first", 0.0, 32), ("second", 0.0, 32), ("retest", 0.0, last_size))
    ]
    return small_plan(folder, content)


def start(
    nodes: Nodes, source: Path, output: Path, plan: Path, shard_size: int = 1000, device: str = "cpu"
) -> subprocess.Popen:
    """A driver in a process of its own, so that this one's Ray is left alone; the GPU is a CPU in truth."""
    command = [sys.executable, "-m", "jobs.scan", "--source", str(source), "--output", str(output)]
    command += ["--plan", str(plan), "--run-id", "r", "--salt", "s", "--shard-size", str(shard_size)]
    environment = os.environ | {"RAY_ADDRESS": nodes.cluster.address, "DORFMAN_DEVICE": device}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(driver: subprocess.Popen, output: Path) -> dict:
    _, errors = driver.communicate(timeout=SCAN_SECONDS)
    assert driver.returncode == 0, errors
    return json.loads((output / "runs/r.json").read_text())


def large_files(folder: Path, files: int) -> Path:
    """``files`` pictures of 1.6 MB that decode in no time: what weighs in a window is its files."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(files):
        path = folder / f"{number}.png"
        if number < 8:
            Pillow.fromarray(rng.integers(0, 256, (730, 750, 3), dtype=np.uint8)).save(path, compress_level=0)
        else:
            os.link(folder / f"{number % 8}.png", path)
    return folder


@pytest.mark.parametrize(
    ("nodes", "files", "last_size"),
    [(SMALL_STORE, 96, 32), pytest.param(STORE, 640, 224, marks=pytest.mark.slow)],
    indirect=["nodes"],
)
def test_pools_run_on_their_kind_of_node_share_its_gpu_and_wait_when_memory_is_short(nodes, tmp_path, files, last_size):
    source = large_files(tmp_path / "pictures", files)
    room = nodes.gpu_size["object_store_memory"]
    moved = sum(path.stat().st_size for path in source.iterdir())
    assert moved > 1.5 * room
    began = time.monotonic()
    driver = start(nodes, source, tmp_path / "out", plan_for_two_kinds(tmp_path / "plan", last_size))
    fullest, spilled = 0, 0
    while driver.poll() is None and time.monotonic() < began + SCAN_SECONDS:
        time.sleep(0.5)
        used, spilled = nodes.in_use()
        fullest = max(fullest, used)
    record = finish(driver, tmp_path / "out")
    print(
        f"{moved / 1e6:.0f} MB through stores of {room / 1e6:.0f} MB in {time.monotonic() - began:.0f} s: at most "
        f"{fullest / 1e6:.0f} MB in use, {spilled / 1e6:.0f} MB spilled"
    )
    assert record["counts"] == {"listed": files, "cleared": 0, "flagged": files, "error": 0, "skipped": 0}
    assert [stage["images_in"] for stage in record["stages"]] == [files] * 3
    where = nodes.operators()
    again = {"decode:retest": {"cpu"}} if last_size != 32 else {}
    assert {name: where[name] for name in where if name != "write"} == {
        "fetch": {"cpu"}, "decode:first": {"cpu"}, "first": {"gpu"}, "second": {"gpu"}, "retest": {"gpu"}, **again,
    }  # fmt: skip
    assert fullest <= room, "how much was spilled on the way is a figure of the docs, not a promise"


def verdicts(output: Path) -> pa.Table:
    ledger = pq.read_table(sorted(output.glob("ledger/scan_date=*/*.parquet")), partitioning=None)
    return ledger.drop_columns("run_id").sort_by("ordinal")


@pytest.mark.slow
def test_decoders_that_have_a_gpu_say_what_others_do(nodes, corpus, tmp_path):
    there = {"jpeg": "device", "decode": {"num_cpus": 0.2, "num_gpus": 0.2}}
    on_gpu = copy.deepcopy(QUICK) | {"preparation": QUICK["preparation"] | there}
    plans = {"child": QUICK, "device": on_gpu}
    found = {}
    for name, content in plans.items():
        output = tmp_path / name
        output.mkdir()
        record = finish(start(nodes, corpus, output, small_plan(output, content)), output)
        assert record["counts"]["listed"] == 320 and record["counts"]["error"] == 0
        found[name] = verdicts(output)["outcome"].to_pylist()
    assert "gpu" in nodes.operators()["decode:tree"]
    differing = sum(mine != theirs for mine, theirs in zip(found["child"], found["device"], strict=True))
    assert differing <= 6, "decoders are within half a grey level, and verdicts with them but for a few"


@pytest.mark.slow
@pytest.mark.timeout(1500)  # two scans and a minute of waiting
def test_a_scan_outlives_a_minute_without_any_gpu(nodes, corpus, tmp_path):
    source = tmp_path / "pictures"
    source.mkdir()
    files = [path for path in sorted(corpus.rglob("*.*")) if path.suffix != ".parquet"]
    for copy_of in range(6):
        for path in files:
            os.link(path, source / f"{copy_of}-{path.name}")
    content = copy.deepcopy(QUICK)
    content["preparation"]["decode"] |= {"resources": {"decode": 0.5}}
    content["stages"][0] |= {"num_gpus": 0.5}
    plan = small_plan(tmp_path, content)

    finish(start(nodes, source, tmp_path / "undisturbed", plan, shard_size=64), tmp_path / "undisturbed")
    driver = start(nodes, source, tmp_path / "out", plan, shard_size=64)
    markers = tmp_path / "out/_state/r/markers"
    deadline = time.monotonic() + SCAN_SECONDS
    while len(list(markers.glob("*.json"))) < 3:
        assert driver.poll() is None and time.monotonic() < deadline, "no shards were committed in time"
        time.sleep(0.02)
    nodes.lose_gpu()
    time.sleep(GONE_SECONDS)
    before = len(list(markers.glob("*.json")))
    assert before < len(files) * 6 / 64, "the node was lost too late to prove anything"
    assert driver.poll() is None, driver.stderr.read()
    nodes.gain_gpu()
    record = finish(driver, tmp_path / "out")
    assert record["counts"]["listed"] == 6 * len(files) and record["counts"]["error"] == 0
    assert record["committed_before"] == 0, "one driver saw it through"
    assert nodes.operators()["tree"] == {"gpu"}
    assert verdicts(tmp_path / "out").equals(verdicts(tmp_path / "undisturbed"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so none can be missed")
def test_a_gpu_that_torch_does_not_see_ends_the_run_in_one_line(nodes, corpus, tmp_path):
    driver = start(nodes, corpus, tmp_path / "out", plan_for_two_kinds(tmp_path / "plan", 32), device="cuda")
    _, errors = driver.communicate(timeout=SCAN_SECONDS)
    assert driver.returncode == 1
    (line,) = [line for line in errors.splitlines() if "run 'r' failed" in line]
    assert "stage 'first' asks for GPUs, but torch finds no cuda device on " in line and "DORFMAN_DEVICE" in line
