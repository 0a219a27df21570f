"""Scans on a cluster of three nodes whose processes are killed at random: each ends as the undisturbed one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.run.scan import ScanConfig, run_scan
from tests.conftest import QUICK, small_plan

KINDS = ("actor", "worker", "decoder", "node", "driver")
SHORT = ("decoder", "actor", "node", "worker", "driver")
"""One of each, in an order in which there is always one to kill."""
RUN_SECONDS = 400
COPIES = (6, 18)
"""How often the corpus is scanned in a run of the short form and of the full one: enough work to be disturbed in."""


class Machines:
    """A head, which survives, and two nodes of the same size that may die."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        size = {"num_cpus": 1, "object_store_memory": 200_000_000}
        self.size = size
        self.cluster = Cluster(initialize_head=True, head_node_args=size | {"include_dashboard": False})
        for _ in range(2):
            self.cluster.add_node(**size)

    def workers(self) -> list[psutil.Process]:
        """Every process that Ray has started for a task or an actor; a node dies with its agents, so not those."""
        nodes = [self.cluster.head_node, *self.cluster.worker_nodes]
        raylets = [node.all_processes["raylet"][0].process for node in nodes if "raylet" in node.all_processes]
        return [child for raylet in raylets for child in _children(raylet.pid) if _is_worker(child)]

    def kill_node(self, chance: random.Random) -> None:
        node = chance.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id))
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(**self.size)

    def close(self) -> None:
        self.cluster.shutdown()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def _is_worker(process: psutil.Process) -> bool:
    title = _title(process)
    return title.startswith("ray::") and "Agent" not in title


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    machines = Machines()
    yield machines
    machines.close()


def plan_in(folder: Path) -> Path:
    return small_plan(folder, QUICK, window={"images": 32})


class Scan:
    """One run, driven by a process of its own and started again until it is complete."""

    def __init__(self, machines: Machines, source: Path, folder: Path) -> None:
        self.machines, self.output = machines, folder / "out"
        self.command = [sys.executable, "-m", "jobs.scan", "--source", str(source), "--output", str(self.output)]
        self.command += ["--plan", str(plan_in(folder)), "--run-id", "chaos", "--shard-size", "64", "--salt", "s"]
        self.environment = os.environ | {"RAY_ADDRESS": machines.cluster.address}
        self.killed: Counter[str] = Counter()
        self.drivers = 0
        self.named: dict[Path, str] = {}
        self.start()

    def start(self) -> None:
        self.drivers += 1
        self.driver = subprocess.Popen(
            self.command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def remember(self) -> None:
        """What markers name at this moment, and has been copied to its place, must stay as it is."""
        for path in self.output.glob("_state/chaos/markers/*.json"):
            for file in json.loads(path.read_text())["files"]:
                table = self.output / file["path"]
                if table.exists():
                    self.named.setdefault(table, hashlib.sha256(table.read_bytes()).hexdigest())

    def kill(self, kind: str, chance: random.Random) -> bool:
        """Whether there was one to kill."""
        self.remember()
        if kind == "driver":
            os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
            self.start()
        elif kind == "node":
            self.machines.kill_node(chance)
        else:
            victims = sorted(self.victims(kind), key=lambda process: process.pid)
            if not victims:
                return False
            chance.choice(victims).kill()
        self.killed[kind] += 1
        return True

    def victims(self, kind: str) -> list[psutil.Process]:
        workers = self.machines.workers()
        if kind == "decoder":
            return [child for worker in workers for child in _children(worker.pid) if "decode_child" in _title(child)]
        if kind == "actor":
            return [worker for worker in workers if "MapBatches" in _title(worker)]
        return workers

    def committed(self) -> int:
        return len(list(self.output.glob("_state/chaos/markers/*.json")))

    def finish(self, kinds: Iterator[str], chance: random.Random, pause: tuple[float, float]) -> None:
        """Kills until the kinds are used up, and drives the run to its end."""
        deadline = time.monotonic() + RUN_SECONDS
        due = 0.0
        kind = next(kinds, None)
        while time.monotonic() < deadline:
            code = self.driver.poll()
            if code == 0:
                return
            if code is not None:
                assert code == 1, self.driver.stderr.read()
                self.start()  # failed by name, as it may when its cluster falls apart: goes on where it was
            if kind is not None and time.monotonic() > due and self.ready(kind) and self.kill(kind, chance):
                kind = next(kinds, None)
                due = time.monotonic() + chance.uniform(*pause)
            time.sleep(0.05)
        pytest.fail(f"not complete after {RUN_SECONDS} s: killed {dict(self.killed)}, {self.committed()} shards")

    def ready(self, kind: str) -> bool:
        """Whether there is work to disturb; for a driver, also something that its successor must leave alone."""
        if kind == "decoder":
            return True  # small pictures are all decoded before the first table is written
        return self.committed() > 0 if kind == "driver" else (self.output / "_attempts/chaos").exists()

    def check(self, undisturbed: Path) -> None:
        for name, key in (("ledger", "ordinal"), ("flagged", "image_id"), ("errors", "ordinal"), ("audit", "ordinal")):
            mine, theirs = (table(output, name).sort_by(key) for output in (self.output, undisturbed))
            if "scanned_at" in mine.column_names:
                mine, theirs = mine.drop_columns(["scanned_at"]), theirs.drop_columns(["scanned_at"])
            assert mine.equals(theirs), f"{name} differs after {dict(self.killed)}"
        for path, digest in self.named.items():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, f"{path} changed after {dict(self.killed)}"


@pytest.fixture(scope="module")
def pictures(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus under as many names as the test asks for."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [path for path in sorted(corpus.rglob("*")) if path.is_file() and path.suffix != ".parquet"]
    for copy in range(request.param):
        (folder / str(copy)).mkdir()
        for path in files:
            os.link(path, folder / str(copy) / path.name)
    return folder


def table(output: Path, name: str) -> pa.Table:
    return pq.read_table(sorted(output.glob(f"{name}/scan_date=*/*.parquet")), partitioning=None).drop_columns("run_id")


@pytest.fixture(scope="module")
def undisturbed(ray_session, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the scan in a Ray session where nothing dies."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = {"source": str(pictures), "output": str(folder / "out"), "plan": str(plan_in(folder))}
    record = run_scan(ScanConfig(**config, shard_size=64, salt="s"))
    counts = record["counts"]
    assert counts["listed"] == len(list(pictures.rglob("*.*")))
    assert counts["flagged"] > 100 and counts["cleared"] > 500 and counts["error"] == 0
    return folder / "out"


@pytest.mark.parametrize("pictures", COPIES[:1], indirect=True)
def test_a_scan_whose_processes_are_killed_ends_as_an_undisturbed_one(undisturbed, machines, pictures, tmp_path):
    scan = Scan(machines, pictures, tmp_path)
    scan.finish(iter(SHORT), random.Random(0), (0.2, 1.0))
    assert set(scan.killed) == set(SHORT) and scan.named, scan.killed
    scan.check(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("pictures", COPIES[1:], indirect=True)
def test_twenty_scans_with_random_kills_end_as_an_undisturbed_one(undisturbed, machines, pictures, tmp_path, seed):
    chance = random.Random(seed)
    scan = Scan(machines, pictures, tmp_path)
    began = time.monotonic()
    scan.finish(iter([chance.choice(KINDS) for _ in range(chance.randint(3, 8))]), chance, (0.2, 2.0))
    print(f"seed {seed}: {dict(scan.killed)}, {scan.drivers} drivers, {time.monotonic() - began:.0f} s")
    assert sum(scan.killed.values()) >= 3
    scan.check(undisturbed)
