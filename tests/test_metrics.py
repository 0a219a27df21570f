"""Metrics: what Prometheus scrapes adds up to the ledger, during a scan and after it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.output import commit
from pipeline.output.commit import Ledger
from pipeline.output.tally import Tally
from pipeline.reporting.exporter import Exporter
from pipeline.reporting.metrics import METRICS, STEP_COUNTERS, Sample, counted, exposition, of_heartbeat, of_run
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.steps.bank import IGNORED
from pipeline.steps.fetch import Fetcher
from pipeline.store import Store
from tests.conftest import QUICK, small_plan
from tests.test_commit import Run

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Recorder(Exporter):
    """What an exporter would tell Ray."""

    def __init__(self, plan: str) -> None:
        super().__init__(plan)
        self.total: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()

    def _tell(self, samples) -> None:
        for sample in samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            self.total[key] = sample.value + (self.total[key] if METRICS[sample.name].kind == "counter" else 0)

    def by(self, name: str, label: str) -> dict[str, float]:
        return {dict(labels)[label]: value for (found, labels), value in self.total.items() if found == name}


def parsed(text: str) -> Series:
    """Samples by name without Ray's prefix and our own labels."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("ray_")
            metric = METRICS.get(name)
            if metric is not None:
                key = (name, tuple((label, sample.labels[label]) for label in sorted(metric.labels)))
                found[key] = found.get(key, 0) + sample.value
    return found


def test_every_metric_has_the_name_of_its_kind():
    for name, metric in METRICS.items():
        assert name.startswith("dorfman_") and name.endswith("_total") == (metric.kind == "counter"), name
        assert metric.kind in ("counter", "gauge", "histogram") and metric.meaning.endswith(".")
        assert ("run_id" in metric.labels) == (metric.kind == "gauge"), "a series for each night would be kept for ever"
    assert set(STEP_COUNTERS) < set(METRICS)


def test_counters_of_all_drivers_of_a_run_add_up_to_its_ledger(tmp_path):
    """One driver commits a shard and dies; the next one adopts it and counts the others only."""
    run = Run(tmp_path)
    receipts = run.receipts(run.windows())
    drivers = [Recorder("p"), Recorder("p")]
    for driver, mine in zip(drivers, (receipts[:1], receipts), strict=True):
        ledger = Ledger(run.store, "r", "2026-01-01", list(run.manifest.shards))
        for receipt in mine:
            if ledger.add(receipt):
                driver.committed(ledger.newest, ledger.newest_seconds)
    assert [driver.by("dorfman_shards_total", "plan") for driver in drivers] == [{"p": 1}, {"p": 2}]
    rows = run.table("ledger").to_pylist()
    together = Counter(drivers[0].by("dorfman_images_total", "outcome"))
    together.update(drivers[1].by("dorfman_images_total", "outcome"))
    assert together == Counter(row["outcome"] for row in rows)
    codes = Counter(drivers[0].by("dorfman_errors_total", "code"))
    codes.update(drivers[1].by("dorfman_errors_total", "code"))
    assert codes == Counter(row["error_code"] for row in rows if row["error_code"]) and codes
    flagged = sum(sum(driver.by("dorfman_flagged_total", "category").values()) for driver in drivers)
    assert flagged == run.table("flagged").num_rows > 0


def test_what_is_told_before_ray_is_there_waits(monkeypatch):
    told = []

    class Told:
        def __init__(self, name, *_):
            self.name = name

        def inc(self, value, labels):
            told.append((self.name, value, labels))

        set = observe = inc

    monkeypatch.setattr("pipeline.reporting.exporter.KINDS", {"counter": Told, "gauge": Told})
    monkeypatch.setattr("pipeline.reporting.exporter.Histogram", Told)
    tally = Tally()
    tally.add_outcomes({"cleared": 3})
    exporter = Exporter("p")
    exporter.committed(tally, 2.5)
    exporter.ended("complete")
    assert told == []
    exporter.join()
    assert told == [
        ("dorfman_shards_total", 1, {"plan": "p"}),
        ("dorfman_images_total", 3, {"plan": "p", "outcome": "cleared"}),
        ("dorfman_commit_seconds", 2.5, {"plan": "p"}),
        ("dorfman_runs_total", 1, {"plan": "p", "status": "complete"}),
    ]


RECORD = {
    "run_id": 'odd "run"\\', "plan": {"name": "p"}, "listed": 12, "status": "complete", "relative_cost": 0.25,
    "counts": {"listed": 10, "cleared": 7, "flagged": 2, "error": 1, "skipped": 0}, "errors": {"truncated": 1},
    "stages": [{"name": "s", "rounds": [{"tests": 8, "positive_tests": 2}, {"tests": 0, "positive_tests": 0}]}],
    "seconds": 4.0, "images_per_s": 2.5, "started_at": "1970-01-01T00:00:10+00:00",
    "updated_at": "1970-01-01T00:00:20+00:00", "suspect": [{"gate": "errors"}],
}  # fmt: skip


def test_a_run_is_told_as_its_record_says():
    beat = {"updated_at": RECORD["updated_at"], "moved_at": RECORD["started_at"], "decided": 11}
    series = parsed(exposition([*of_run(RECORD), *of_heartbeat(beat, RECORD)]))
    value = {(name, labels[1][1] if len(labels) > 2 else ""): found for (name, labels), found in series.items()}
    run = RECORD["run_id"]
    assert all(dict(labels)["run_id"] == run and dict(labels)["plan"] == "p" for _, labels in series)
    images = {dict(labels)["outcome"]: n for (name, labels), n in series.items() if name == "dorfman_run_images"}
    assert images == {"cleared": 7, "flagged": 2, "error": 1, "skipped": 0}
    assert value["dorfman_run_listed", ""] == 12 and value["dorfman_run_decided", ""] == 11
    (rate,) = (n for (name, _), n in series.items() if name == "dorfman_run_group_positive_rate")
    assert rate == 0.25
    assert value["dorfman_run_suspect_gates", ""] == 1
    assert value["dorfman_run_completed_timestamp_seconds", ""] == 20
    assert value["dorfman_run_moved_timestamp_seconds", ""] == 10
    accepted = [sample.value for sample in of_run(RECORD, accepted=True) if sample.name == "dorfman_run_suspect_gates"]
    assert accepted == [0]
    going = {sample.name for sample in of_run(RECORD | {"status": "running"})}
    assert not going & {"dorfman_run_completed_timestamp_seconds", "dorfman_run_suspect_gates"}


def test_what_a_label_says_is_what_a_scrape_reads_and_counters_are_told_as_such():
    name = 'a "b"\\c\nd {e="f"} é'
    samples = [
        Sample("dorfman_run_listed", {"run_id": name, "plan": "p"}, 3),
        Sample("dorfman_shards_total", {"plan": name}, 2),
        Sample("dorfman_run_listed", {"run_id": "other", "plan": "p"}, 1e9 + 0.5),
    ]
    text = exposition(samples)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {name: family.type for name, family in families.items()} == {
        "dorfman_shards": "counter", "dorfman_run_listed": "gauge",
    }  # fmt: skip
    assert families["dorfman_run_listed"].documentation == METRICS["dorfman_run_listed"].meaning
    read = [(s.name, s.labels, s.value) for family in families.values() for s in family.samples]
    assert sorted(read, key=str) == sorted(((s.name, dict(s.labels), s.value) for s in samples), key=str)
    assert text.count("# TYPE") == 2 and exposition([]) == ""


def test_a_sample_has_the_labels_of_its_metric():
    with pytest.raises(AssertionError):
        Sample("dorfman_images_total", {"plan": "p"}, 1)
    assert list(counted(Tally(), "p")) == [Sample("dorfman_shards_total", {"plan": "p"}, 1)], "nothing grows by nothing"


def test_entries_of_banks_that_are_not_obeyed_are_no_series():
    tally = Tally()
    tally.add_work([{"operator": f"{IGNORED}:known:{'a' * 64}", "round": None, "images_in": 3, "images_out": 3}])
    assert [sample.name for sample in counted(tally, "p")] == ["dorfman_shards_total"]


class Scraper:
    """A Prometheus that scrapes the endpoint of the session's only node every quarter of a second."""

    def __init__(self) -> None:
        import ray

        (node,) = (node for node in ray.nodes() if node["Alive"])
        self.url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        self.seen: list[Series] = []
        self.over = threading.Event()

    def scrape(self) -> Series:
        with urllib.request.urlopen(self.url, timeout=10) as answer:
            return parsed(answer.read().decode())

    def _run(self) -> None:
        while not self.over.wait(0.25):
            self.seen.append(self.scrape())

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        yield
        self.over.set()
        thread.join()

    def until(self, wanted: Series, before: Series) -> Series:
        """What was counted since ``before``, as soon as all that is wanted is there, or after half a minute."""
        deadline = datetime.now(UTC) + timedelta(seconds=30)
        while True:
            now = self.seen[-1]
            grown = {key: now.get(key, 0) - before.get(key, 0) for key in wanted}
            if grown == pytest.approx(wanted) or datetime.now(UTC) > deadline:
                return grown
            self.over.wait(0.25)


def ledger_series(output: Path, record: dict, plan: str) -> Series:
    """Counters as the tables and the record demand them."""
    rows, flagged = (
        [
            row
            for path in output.glob(f"{name}/*/*.parquet")
            for row in pq.read_table(path, partitioning=None).to_pylist()
        ]
        for name in ("ledger", "flagged")
    )
    counts = {
        ("dorfman_images_total", "outcome"): Counter(row["outcome"] for row in rows),
        ("dorfman_errors_total", "code"): Counter(row["error_code"] for row in rows if row["error_code"]),
        ("dorfman_flagged_total", "category"): Counter(row["category"] for row in flagged),
        ("dorfman_runs_total", "status"): {"complete": 1},
    }
    wanted: Series = {
        (name, tuple(sorted({"plan": plan, label: key}.items()))): n
        for (name, label), by in counts.items()
        for key, n in by.items()
    }
    wanted["dorfman_shards_total", (("plan", plan),)] = 4
    for row in record["operators"]:
        number = "" if row["round"] is None else str(row["round"])
        labels = tuple(sorted({"plan": plan, "stage": row["operator"], "round": number}.items()))
        wanted |= {(name, labels): row[field] for name, field in STEP_COUNTERS.items() if row[field] > 0}
    return wanted


@pytest.mark.usefixtures("ray_session")
def test_what_prometheus_scrapes_during_a_scan_and_after_it_adds_up_to_the_ledger(corpus, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number, path in enumerate(sorted(corpus.rglob("*.jpg"))[:61]):
        body = path.read_bytes()
        (source / f"{number:03d}.jpg").write_bytes(body[: len(body) // 2] if number % 20 == 0 else body)

    class Patient(Fetcher):
        """A shard takes longer than a metric needs to be seen."""

        def __call__(self, refs):
            time.sleep(1.5)
            return super().__call__(refs)

    # A name of its own: other scans of this session count too.
    plan = small_plan(tmp_path, QUICK, name="scraped")
    scraper = Scraper()
    before = scraper.scrape()
    config = ScanConfig(
        source=str(source), output=str(tmp_path / "out"), plan=str(plan), run_id="r", salt="s", shard_size=16
    )
    with scraper.running():
        record = run_scan(config, Patient)
        wanted = ledger_series(tmp_path / "out", record, "scraped")
        after = scraper.until(wanted, before)
    assert record["counts"]["error"] == 4
    counts = {key: n for key, n in wanted.items() if key[0].split("_")[-2] not in ("gmac", "seconds")}
    assert {key: after[key] for key in counts} == counts, "to the image"
    assert after == pytest.approx(wanted), "work and seconds but for their last digits"

    images = [sum(n for key, n in seen.items() if key[0] == "dorfman_images_total" and ("plan", "scraped") in key[1])
              for seen in scraper.seen]  # fmt: skip
    assert images == sorted(images) and images[-1] == 61
    assert set(images) - {0, 61}, "shards are counted while others are scanned"
    shown = [seen for seen in scraper.seen if any(key[0] == "dorfman_run_listed" for key in seen)]
    assert shown, "gauges of the run are told while it goes on"
    run = (("plan", "scraped"), ("run_id", "r"))
    committed = {key: n for key, n in shown[-1].items() if key[0] == "dorfman_run_images" and set(run) < set(key[1])}
    assert shown[-1]["dorfman_run_listed", run] == 61 == sum(committed.values())
    ended = commit.read_json(Store(str(tmp_path / "out")), commit.record_key("r"))
    assert ended is not None and shown[-1]["dorfman_run_relative_cost", run] == pytest.approx(ended["relative_cost"])


@pytest.mark.slow
def test_a_scan_without_a_cluster_stays_to_be_scraped_where_it_was_told_to(corpus, tmp_path):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    plan = small_plan(tmp_path, QUICK, name="alone")
    command = [sys.executable, "-m", "jobs.scan", "--source", str(corpus), "--output", str(tmp_path / "out"), "--plan"]
    command += [str(plan), "--run-id", "r", "--metrics-port", str(port), "--log-format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as scan:
        assert scan.stdout is not None
        events = (json.loads(line) for line in scan.stdout)
        complete = next(event for event in events if event["event"] == "complete")
        began, found = time.monotonic(), {}
        while sum(found.values()) < 320 and time.monotonic() - began < 25:
            time.sleep(0.5)
            with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as answer:
                series = parsed(answer.read().decode())
            found = {dict(key[1])["outcome"]: n for key, n in series.items() if key[0] == "dorfman_images_total"}
        print(f"all counts were there {time.monotonic() - began:.1f} s after the end")
        assert found == {kind: n for kind, n in complete["counts"].items() if n and kind != "listed"}
        assert [event["event"] for event in events] == ["counted", "written"]
    assert scan.returncode == 0
