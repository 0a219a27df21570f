"""Whole scans of one folder, start-up included: ours, what a team would write without it, and the decode limit."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from models.card import locate, read_card
from models.intervals import interval
from pipeline.bench.measure import (
    Clock,
    Report,
    Rival,
    Sample,
    Say,
    named,
    plot_rates,
    rate_table,
    result_of,
    take_turns,
    write_result,
)
from pipeline.errors import RunError, UsageError
from pipeline.labels.examples import read_labels
from pipeline.listing.source import DEFAULT_EXCLUDE, list_source
from pipeline.output import commit
from pipeline.plan import Plan, Preparation, load_plan
from pipeline.steps.decode import Decoder
from pipeline.steps.device import accelerator
from pipeline.window import Image, Window

LIMIT = "decode-limit"
TEMPLATE = "ray-template"
BATCH = 64
SHARE = 256
"""Files that a process of the decode limit takes at a time."""
TUNED_ON = 3_000
"""Pictures of the folder that are enough to see which number of workers is the fastest."""


@dataclass(frozen=True, kw_only=True)
class ScanBenchConfig:
    """Scans one labelled folder with every rival in turn. Nothing else should run on the machine.

    The others test every picture alone with the plan's last net, at its last threshold; template and loader, which
    compute with torch, with the net in floats that one in int8 was made of. Each has the number of workers that was the
    fastest on some thousand of the pictures, spread over the folder, in a turn before.

    Exit codes: 0 done, 1 a scan failed, 2 wrong usage, plan or labels.
    """

    source: Path
    """Folder with the pictures."""
    labels: Path
    """Labels file (Parquet: uri, category, label) of them."""
    plan: str = "emblem"
    """Our plan: a shipped one by name, or the path of a plan file."""
    net: str = ""
    """What template and loader test with instead: a net of the zoo or a card's path."""
    repeats: int = 3
    """Turns of every rival that count."""
    rivals: tuple[str, ...] = ()
    """Names of the rows to measure; without it all of them."""
    json: Path | None = None
    """File to write the rows to."""
    plot: Path | None = None
    """File for a plot, .svg or .png."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UsageError(f"repeats is {self.repeats}, but each rival must be measured at least once")
        unknown = sorted(set(self.rivals) - set(NAMES))
        if unknown:
            raise UsageError(f"rivals {', '.join(unknown)} are unknown; known are {', '.join(NAMES)}")
        if not self.source.is_dir():
            raise UsageError(f"source {self.source} is no folder: the rivals read files from a local one")


def bench_scan(config: ScanBenchConfig, say: Say) -> dict[str, Any]:
    """A row per rival. Raises UsageError and RunError."""
    plan = load_plan(config.plan)
    last = plan.stages[-1]
    if last.rounds[-1] != 1:
        raise UsageError(f"plan {plan.name!r} ends with groups of {last.rounds[-1]}, not with single images")
    truth = _truth(config.labels)
    paths = [row["uri"].removeprefix("file://") for row in list_source(str(config.source), DEFAULT_EXCLUDE, None)]
    with tempfile.TemporaryDirectory(prefix="dorfman-bench-") as folder:
        bench = _Bench(config, plan, truth, paths, Path(folder), say)
        made: dict[str, Callable[[], Rival]] = dict(zip(NAMES, bench.makers(), strict=True))
        rivals = [made[name]() for name in config.rivals or NAMES]
        # All that a turn could leave behind for the next is in the page cache: every turn is of new processes.
        for path in paths:
            Path(path).read_bytes()
        rows = named(take_turns(rivals, config.repeats, say, warm_up=False), "images_per_s")
    positives = sum(truth.values())
    result = result_of(
        "scan", rows, "ray", "torch", "onnxruntime", "torchvision", "pillow",
        images=len(paths), positives=positives, negatives=len(truth) - positives, plan=plan.model_dump(mode="json"),
    )  # fmt: skip
    write_result(config.json, result)
    plot_rates(config.plot, f"{len(paths):,} pictures, start-up included", rows, "images_per_s")
    return result


def in_floats(model: str) -> str:
    """The net that one in int8 was made of, or what is none. Raises UsageError when it is not at hand."""
    card = read_card(model)
    if card.made_of is None:
        return model
    source = card.made_of.rpartition("@")[0]
    beside = locate(model).with_name(f"{source}.json")
    if not beside.is_file() or read_card(str(beside)).version != card.made_of:
        raise UsageError(
            f"model {model!r} is one in int8, made of {card.made_of}, which {beside} is not: say with --net what "
            "template and loader test with"
        )
    return str(beside) if Path(model).suffix else source


def _truth(labels: Path) -> dict[str, bool]:
    """By uri, whether any category is there."""
    table = read_labels(str(labels)).group_by("uri").aggregate([("label", "max")])
    return dict(zip(table["uri"].to_pylist(), map(bool, table["label_max"].to_pylist()), strict=True))


class _Bench:
    def __init__(
        self, config: ScanBenchConfig, plan: Plan, truth: dict[str, bool], paths: list[str], folder: Path, say: Say
    ) -> None:
        self.config, self.plan, self.truth, self.paths, self.folder, self.say = config, plan, truth, paths, folder, say
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.runs = 0

    @property
    def net(self) -> str:
        """What template and loader test with."""
        return self.config.net or in_floats(self.plan.stages[-1].model)

    def makers(self) -> tuple[Callable[[], Rival], ...]:
        """In the order of ``NAMES``."""
        return self.ray_template, self.dataloader, self.individual, self.planned, self.decode_limit

    def ray_template(self) -> Rival:
        def told(actors: int) -> list[str]:
            return ["ray_template", "--actors", str(actors)]

        # With an actor on every core nothing is left to read with, and Ray waits for ever.
        actors = self._best(TEMPLATE, sorted({1, max(1, self.cores - 1)}), told)
        note = f"{self.net}, {actors} actors predict"
        return Rival(name=TEMPLATE, note=note, run=lambda: self._rival(told(actors)))

    def dataloader(self) -> Rival:
        def told(workers: int) -> list[str]:
            threads = max(1, self.cores - workers) if workers else self.cores
            return ["dataloader", "--workers", str(workers), "--threads", str(threads)]

        workers = self._best("dataloader", sorted({0, 1, self.cores - 1, self.cores}), told)
        return Rival(name="dataloader", note=f"{self.net}, {workers} workers", run=lambda: self._rival(told(workers)))

    def individual(self) -> Rival:
        alone = self.plan.stages[-1]
        first_round = {category: values[-1:] for category, values in alone.thresholds.items()}
        stage = alone.model_copy(update={"rounds": (1,), "thresholds": first_round, "burst": None})
        path = self.folder / "individual.yaml"
        path.write_text(yaml.safe_dump(self.plan.model_copy(update={"stages": (stage,)}).model_dump(mode="json")))
        return Rival(name="ours-individual", note=f"{alone.model} alone", run=partial(self._scan, str(path)))

    def planned(self) -> Rival:
        stages = " > ".join(f"{stage.model}@{stage.input_size}" for stage in self.plan.stages)
        return Rival(name="ours-planned", note=stages, run=partial(self._scan, self.config.plan))

    def decode_limit(self) -> Rival:
        side = self.plan.stages[0].input_size
        return Rival(name=LIMIT, note=f"to {side} px, {self.cores} processes", run=partial(self._decode, side))

    def _best(self, name: str, choices: list[int], told: Callable[[int], list[str]]) -> int:
        """The choice with the highest rate in one turn each."""
        if len(choices) == 1:
            return choices[0]
        folder, pictures = self._some_pictures()
        rates = {choice: pictures / self._run_rival(told(choice), folder, pictures)[0].seconds for choice in choices}
        self.say(f"{name}: " + ", ".join(f"{choice}: {rate:,.1f}/s" for choice, rate in rates.items()))
        return max(rates, key=lambda choice: rates[choice])

    def _some_pictures(self) -> tuple[Path, int]:
        """A folder of links to pictures from all over the source, and their number."""
        folder = self._output()
        folder.mkdir()
        paths = self.paths[:: math.ceil(len(self.paths) / TUNED_ON)]
        for number, path in enumerate(paths):
            (folder / f"{number:06d}{Path(path).suffix}").symlink_to(path)
        return folder, len(paths)

    def _run_rival(self, script: list[str], source: Path, pictures: int) -> tuple[Clock, pa.Table]:
        stage = self.plan.stages[-1]
        output = self._output()
        command = [
            "-m", f"pipeline.rivals.{script[0]}", "--source", str(source), "--output", str(output),
            "--model", self.net, "--side", str(stage.input_size), "--batch", str(BATCH), *script[1:],
            "--categories", *self.plan.categories, "--device", accelerator() if self.plan.asks_for_gpus else "cpu",
        ]  # fmt: skip
        clock = self._run(command)
        table = pq.read_table(output)
        if len(table) != pictures:
            raise RunError(f"{script[0]} wrote {len(table):,} rows for {pictures:,} pictures")
        return clock, table

    def _rival(self, script: list[str]) -> Sample:
        clock, table = self._run_rival(script, self.config.source, len(self.paths))
        stage = self.plan.stages[-1]
        limits_K = np.array([stage.thresholds[category][-1] for category in self.plan.categories])
        hits_N = np.any(np.array(table["scores"].to_pylist()) >= limits_K, axis=1)
        uris = [Path(path.removeprefix("file://")).resolve().as_uri() for path in table["path"].to_pylist()]
        return clock.sample(
            len(table), **self._quality({uri for uri, hit in zip(uris, hits_N.tolist(), strict=True) if hit})
        )

    def _scan(self, plan: str) -> Sample:
        output = self._output()
        command = ["-m", "jobs.scan", "--source", str(self.config.source), "--output", str(output), "--plan", plan]
        clock = self._run([*command, "--run-id", "bench", "--salt", "benchmark"])
        record = json.loads((output / "runs/bench.json").read_text())
        if record["counts"]["error"]:
            raise RunError(f"{record['counts']['error']:,} of {len(self.paths):,} pictures ended as errors")
        flagged = pa.concat_tables(
            [pq.read_table(output / file["path"]) for file in commit.files_of("flagged", record["files"])]
        )
        return clock.sample(
            record["counts"]["listed"],
            startup_s=record["startup_seconds"],
            relative_cost=record["relative_cost"],
            operator_seconds={work["operator"]: work["seconds"] for work in record["operators"]},
            **self._quality(set(flagged["source_uri"].to_pylist())),
        )

    def _run(self, command: list[str]) -> Clock:
        with Clock(machine=True) as clock:
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"{command[1]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        return clock

    def _output(self) -> Path:
        self.runs += 1
        return self.folder / str(self.runs)

    def _quality(self, flagged: set[str]) -> dict[str, Any]:
        positives = [uri for uri, violating in self.truth.items() if violating]
        negatives = len(self.truth) - len(positives)
        hits = sum(uri in flagged for uri in positives)
        wrong = sum(not self.truth[uri] for uri in flagged)
        return {
            "recall": hits / len(positives) if positives else None,
            "recall_interval": interval(hits, len(positives)),
            "false_positive_rate": wrong / negatives if negatives else None,
            "false_positive_rate_interval": interval(wrong, negatives),
        }

    def _decode(self, side: int) -> Sample:
        """As many decoders as there are cores, which do nothing else; their start is not counted."""
        shares = [self.paths[start : start + SHARE] for start in range(0, len(self.paths), SHARE)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.cores, mp_context=context, initializer=_begin, initargs=(side,)) as pool:
            list(pool.map(_decode_share, [shares[0][:1]] * self.cores))
            with Clock(machine=True) as clock:
                decoded = sum(pool.map(_decode_share, shares))
        return clock.sample(decoded)


NAMES = (TEMPLATE, "dataloader", "ours-individual", "ours-planned", LIMIT)

_decoders: list[Decoder] = []


def _begin(side: int) -> None:
    _decoders.append(Decoder("decode", side, Preparation()))
    _decoders[0].start()


def _decode_share(paths: list[str]) -> int:
    images = [Image(image_id=path, uri=path, payload=Path(path).read_bytes()) for path in paths]
    window = Window(shard=0, window=0, first_ordinal=0, images=images)
    _decoders[0]([window])
    return 0 if window.pixels is None else len(window.pixels)


def scan_report(result: dict[str, Any]) -> Report:
    table = rate_table(
        f"{result['images']:,} pictures, start-up included",
        result["rows"],
        "images_per_s",
        against=TEMPLATE if any(row["name"] == TEMPLATE for row in result["rows"]) else result["rows"][0]["name"],
        recall="recall",
        FPR="false_positive_rate",
        **{"start-up s": "startup_s", "relative cost": "relative_cost", "what": "note"},
    )
    return [table]
