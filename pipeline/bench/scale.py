"""Scans from ten thousand images to a million, manifests of ten million keys: an image's cost, the driver's memory.

Each scan is a process of its own, watched from outside: its memory as the kernel counts it, and the processor seconds
of the whole machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table

from pipeline.bench.measure import Report, Say, machine_seconds, result_of, write_result, writing
from pipeline.errors import RunError, UsageError
from pipeline.listing.source import list_file
from pipeline.output import commit
from pipeline.plan import load_plan
from pipeline.store import Store

PICTURES = 1000
"""Files that there are; every key is another name of one of them."""
SIDE = 48
"""Pixels."""
SAMPLE_SECONDS = 0.1
FIRST, AGAIN = "first", "unchanged"
"""Names of the runs: every image is tested, or none."""
STAGE: dict[str, Any] = {
    "name": "mini", "model": "cifar-mini", "rounds": [1], "thresholds": {"automobile": [0.9]}, "input_size": 32,
    "num_cpus": 0.3,
}  # fmt: skip
PLAN: dict[str, Any] = {
    "name": "scale",
    "categories": ["automobile"],
    "preparation": {name: {"num_cpus": 0.3} for name in ("fetch", "decode", "write")},
    "stages": [STAGE],
}


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Scans more and more images: processor seconds of an image, and memory of the driver. Nothing else may run.

    Exit codes: 0 done, 1 a scan failed, 2 wrong usage.
    """

    keys: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """How many images to scan: tiny local ones, under as many names."""
    idle: bool = False
    """Fetch and test nothing: every image is cleared as it is listed, so that the driver does what it does in a scan
    and the others nearly nothing. For manifests of many millions."""
    again: bool = False
    """Scan each size once more with --since last: nothing has changed."""
    plan: str | None = None
    """Shipped plan by name, or the path of a plan file. Default: one small net; fused, but with --idle in pools."""
    shard_size: int = 1_000_000
    """Images in one shard."""
    repeats: int = 3
    """Scans of each size; of the largest there is one, which is its own average."""
    json: Path | None = None
    """File to write the rows to."""
    plot: Path | None = None
    """Picture (SVG or PNG) of cost and memory over the number of keys."""

    def __post_init__(self) -> None:
        if not self.keys or min(self.keys) < 1:
            raise UsageError(f"keys are {list(self.keys)}: give numbers of images, at least 1 each")
        for name in ("repeats", "shard_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but it must be at least 1")


def bench_scale(config: ScaleConfig, say: Say) -> dict[str, Any]:
    """A row for each size, and for each second night. Raises UsageError and RunError as a scan does."""
    if config.plan:
        load_plan(config.plan)
    rows = []
    with tempfile.TemporaryDirectory(prefix="dorfman-bench-") as name:
        folder = Path(name)
        draw_pictures(folder / "pictures")
        for keys in sorted(config.keys):
            source = write_listing(folder, keys)
            nights: dict[str, list[dict[str, Any]]] = {}
            for turn in range(1 if keys == max(config.keys) else config.repeats):
                for night, row in _scan(config, folder, source, folder / f"out-{keys}-{turn}"):
                    nights.setdefault(night, []).append(row)
                    say(f"{keys:,} keys, {night}, turn {turn + 1}: {row['seconds']:.1f} s, {_costs(row)}")
            rows += [{"keys": keys, "night": night} | _middle(turns) for night, turns in nights.items()]
    result = result_of("scale", rows, "ray", "duckdb", "pyarrow", idle=config.idle, shard_size=config.shard_size)
    write_result(config.json, result)
    plot_scale(config.plot, result)
    return result


def draw_pictures(folder: Path) -> None:
    """Small JPEGs, none like another."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    for number in range(PICTURES):
        grain = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        grain.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=80)


def write_listing(folder: Path, keys: int) -> Path:
    """A table of ``keys`` uris with what a bucket's listing tells of each; every one can be read.

    Each folder that it names is a link to the one folder of pictures, so a thousand keys cost one link.
    """
    there = [list_file(str(path)) for path in sorted((folder / "pictures").iterdir())]
    names = [row["uri"].rsplit("/", 1)[1] for row in there]
    told = pa.Table.from_pylist(there).drop_columns("uri")
    links = folder / "links"
    links.mkdir(exist_ok=True)
    source = folder / f"keys-{keys}.parquet"
    schema = pa.schema([("uri", pa.string()), *told.schema])
    with pq.ParquetWriter(source, schema, compression="zstd") as writer:
        for number in range(-(-keys // PICTURES)):
            link = links / f"{number:06d}"
            if not link.is_symlink():
                link.symlink_to(folder / "pictures")
            rows = min(PICTURES, keys - number * PICTURES)
            uris = pa.array([f"{link.as_uri()}/{name}" for name in names[:rows]])
            writer.write_table(pa.table([uris, *told.slice(0, rows).columns], schema=schema))
    return source


def _scan(config: ScaleConfig, folder: Path, source: Path, output: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What one night took, or two: by name, with what was seen of it."""
    plan = config.plan
    if plan is None:
        plan = str(folder / "plan.yaml")
        Path(plan).write_text(yaml.safe_dump(_plan(idle=config.idle)))
    flags = {"source": str(source), "output": str(output), "plan": plan, "shard_size": config.shard_size}
    for night, since in ((FIRST, None), (AGAIN, "last"))[: 1 + config.again]:
        trace = watch(_command(flags | {"run_id": night} | ({"since": since} if since else {}), idle=config.idle))
        store = Store(str(output))
        record = commit.read_json(store, commit.record_key(night))
        assert record is not None, "a scan that ends well leaves its record"
        if record["counts"]["error"]:
            raise RunError(f"{record['counts']['error']:,} of {record['counts']['listed']:,} images were errors")
        state = sum(store.sizes(commit.state_prefix(night)).values())
        # What a shard's rows are made of, the shard's own file, and its copy in the table.
        written = state + 3 * sum(file["bytes"] for file in record["files"])
        yield night, row_of(record, trace) | {"row_bytes": written / record["counts"]["listed"]}
    shutil.rmtree(output)


def _plan(*, idle: bool) -> dict[str, Any]:
    """Of small windows, where images are tested: the first result is the clock's beginning, and comes from several."""
    if idle:
        return PLAN
    actors = os.cpu_count()
    return PLAN | {"window": {"images": 64}, "fused": {"actors": {"min": actors, "max": actors}, "num_cpus": 1}}


def _command(flags: dict[str, Any], *, idle: bool) -> list[str]:
    if idle:
        return [sys.executable, "-c", "from pipeline.bench.idle import scan_idle; scan_idle()", json.dumps(flags)]
    given = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "jobs.scan", *given]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What was seen of a process, a row for each look: when (Unix time), then seconds and bytes until then."""

    when: np.ndarray
    machine: np.ndarray
    """Processor seconds of everything on the machine."""
    driver: np.ndarray
    """Of the process alone, its threads included."""
    peak: np.ndarray
    """The most memory that the process has held."""

    def between(self, name: str, begin: float, end: float) -> float:
        """By how much one of the rows grew between two moments."""
        first, last = np.interp([begin, end], self.when, getattr(self, name))
        return float(last - first)

    def peak_until(self, end: float) -> float:
        return float(self.peak[: max(1, np.searchsorted(self.when, end, "right"))].max())


def watch(command: list[str]) -> Trace:
    """Runs a command to its end. Raises RunError with what it said last when it fails."""
    looks: list[tuple[float, float, float, float]] = []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                look = _look(process.pid)
                looks += [look] if look else []
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()
            process.wait()
        # The end counts: what the last look saw of the process, and the machine as it is now.
        looks.append((time.time(), machine_seconds(), *looks[-1][2:]))
        if process.returncode:
            said.seek(0)
            raise RunError(f"a scan ended with {process.returncode}: {''.join(said.readlines()[-1:]).strip()}")
    when, machine, driver, peak = np.array(looks).T
    return Trace(when=when, machine=machine, driver=driver, peak=peak)


def _look(pid: int) -> tuple[float, float, float, float] | None:
    """None when the process has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    if peak is None:
        return None
    driver = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.time(), machine_seconds(), driver, 1024.0 * int(peak[1])


def row_of(record: dict[str, Any], trace: Trace) -> dict[str, Any]:
    """What one scan took. Listing and what comes after the first result is its images' cost, the rest is start-up."""
    keys, end = record["counts"]["listed"], float(trace.when[-1])
    listed_at, frozen_at, ended_at = (
        datetime.fromisoformat(record[name]).timestamp() for name in ("listed_at", "started_at", "updated_at")
    )
    # Where nothing is to be tested there is no first result, and nothing is started.
    tested = keys > record["counts"]["skipped"]
    begin = ended_at - record["seconds"] + record["startup_seconds"] if tested else frozen_at
    listing, scanning = (trace.between("machine", *span) for span in ((listed_at, frozen_at), (begin, end)))
    driver = trace.between("driver", begin, end)
    windows = record["windows"]  # none where nothing is tested
    return {
        "seconds": end - float(trace.when[0]),
        "startup_seconds": (begin - float(trace.when[0])) - (frozen_at - listed_at),
        "listing_seconds": frozen_at - listed_at,
        "images_per_s": keys / (end - begin),
        "cpu_s_per_1k": 1000 * (listing + scanning) / keys,
        "listing_cpu_s_per_1k": 1000 * listing / keys,
        "windows_per_s": windows / (end - begin),
        "listing_us": 1e6 * (frozen_at - listed_at) / keys,
        "window_ms": 1e3 * max(0.0, driver - record["commit_seconds"]) / windows if windows else 0.0,
        "commit_us": 1e6 * record["commit_seconds"] / keys,
        "driver_cpu_seconds": driver,
        "windows": windows,
        "shards": len(commit.files_of("ledger", record["files"])),
        "commit_seconds": record["commit_seconds"],
        "listing_peak_bytes": trace.peak_until(frozen_at),
        "peak_bytes": trace.peak_until(end),
    }


def _middle(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number, and of a peak the highest."""
    return {
        name: (max if name.endswith("peak_bytes") else statistics.median)(row[name] for row in turns)
        for name in turns[0]
    } | {"cpu_s_per_1k_range": [pick(row["cpu_s_per_1k"] for row in turns) for pick in (min, max)]}


def _costs(row: dict[str, Any]) -> str:
    return f"{row['cpu_s_per_1k']:.3f} processor s per 1,000 images, driver {row['peak_bytes'] / 1e6:,.0f} MB"


def growth(rows: Sequence[dict[str, Any]]) -> float:
    """What an image costs at the most keys, over what it costs at the fewest."""
    first = [row for row in rows if row["night"] == FIRST]
    return first[-1]["cpu_s_per_1k"] / first[0]["cpu_s_per_1k"]


def driver_inputs(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What ``capacity`` wants to know of the driver, by its names there: of a window and a key the dearest seen."""
    first = [row for row in rows if row["night"] == FIRST]
    least, most = first[0], first[-1]
    more = (most["peak_bytes"] - least["peak_bytes"]) / max(1, most["keys"] - least["keys"])
    slope = max(0.0, more)
    highest = {name: max(row[name] for row in first) for name in ("listing_us", "window_ms", "commit_us", "row_bytes")}
    return highest | {"driver_bytes": slope, "driver_base_mb": (least["peak_bytes"] - slope * least["keys"]) / 1e6}


def scale_report(result: dict[str, Any]) -> Report:
    rows = result["rows"]
    least, most = (f"{end(row['keys'] for row in rows):,}" for end in (min, max))
    report: Report = [scale_table(result), f"an image of {most} costs {growth(rows):.3f} of one of {least}"]
    if result["idle"]:
        inputs = ", ".join(f"{name}: {value:.4g}" for name, value in driver_inputs(rows).items())
        report.append(f"for capacity: {inputs}")
    return report


def scale_table(result: dict[str, Any]) -> Table:
    title = "listing, manifest, streaming and commits alone" if result["idle"] else "scans of tiny local images"
    table = Table(title=f"{title}, shards of {result['shard_size']:,}", title_justify="left")
    for column in ("keys", "night", "seconds", "start-up", "listing", "images/s", "CPU s per 1,000", "of it listing",
                   "driver ms/window", "commit us/image", "driver MB", "while listing"):  # fmt: skip
        table.add_column(column, justify="left" if column == "night" else "right")
    for row in result["rows"]:
        table.add_row(
            f"{row['keys']:,}",
            row["night"],
            *(f"{row[name]:,.1f}" for name in ("seconds", "startup_seconds", "listing_seconds")),
            f"{row['images_per_s']:,.0f}",
            *(f"{row[name]:.3f}" for name in ("cpu_s_per_1k", "listing_cpu_s_per_1k")),
            *(f"{row[name]:,.2f}" for name in ("window_ms", "commit_us")),
            *(f"{row[name] / 1e6:,.0f}" for name in ("peak_bytes", "listing_peak_bytes")),
        )
    return table


def plot_scale(path: Path | None, result: dict[str, Any]) -> None:
    """Cost of an image and memory of the driver over the number of keys, as SVG or PNG. Raises UsageError."""
    if path is None:
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    shown = (("cpu_s_per_1k", 1, "processor seconds per 1,000 images"), ("peak_bytes", 1e-6, "driver's peak, MB"))
    for axes, (name, unit, label) in zip(panels, shown, strict=True):
        for night in dict.fromkeys(row["night"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["night"] == night]
            axes.plot([row["keys"] for row in rows], [unit * row[name] for row in rows], marker="o", label=night)
        axes.set_xscale("log")
        axes.set_ylim(0, 1.1 * max(unit * row[name] for row in result["rows"]))
        axes.set_xlabel("keys")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    with writing(path):
        figure.savefig(path)
