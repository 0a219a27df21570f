"""Scans a bucket or folder: ``python -m jobs.scan --source s3://bucket/prefix --output s3://bucket/out``.

``--demo`` draws a corpus, serves it from an embedded S3-compatible server and scans that.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

from jobs.cli import run_job
from pipeline.errors import UsageError
from pipeline.labels.demo import SOURCE, demo_corpus
from pipeline.plan import load_plan
from pipeline.reporting.events import Events, configure
from pipeline.reporting.progress import closing_table
from pipeline.run.preflight import check_output
from pipeline.run.scan import ScanConfig, check_accepted, check_owners_files, run_scan
from pipeline.steps.nets import check_models
from pipeline.store import Store


@dataclass(frozen=True, kw_only=True)
class JobConfig(ScanConfig):
    """Scans the images of a bucket or folder for violating ones and writes tables, a run record and a report.

    Exit codes: 0 complete, 1 the run failed, 2 wrong usage, configuration or no input, 3 complete but unlike the runs
    before it, 4 stopped at a limit.
    """

    demo: bool = False
    """Scan a corpus drawn for the purpose, from an embedded S3-compatible server, instead of a source."""
    demo_images: int = 8000
    """Pictures in the demo corpus."""
    demo_prevalence: float = 0.015
    """Share of them with an emblem that the plan looks for."""
    demo_seed: int = 7
    """Seed of the demo corpus; training never saw this one."""

    def __post_init__(self) -> None:
        if [bool(self.source), bool(self.retry_errors), self.demo].count(True) != 1:
            raise UsageError("give either --source, what to scan, or --retry-errors, or --demo")
        if self.demo:
            # The demo's source is still to be drawn; all else is checked before that.
            replace(self, demo=False, source=SOURCE)
            if self.labels or self.endpoint_url or self.output.startswith("s3://"):
                raise UsageError("--demo brings labels and endpoint of its own and writes to a local folder")
        else:
            super().__post_init__()


def run(config: JobConfig) -> None:
    configure(config.log_format)
    events = Events(config.run_id)
    with ExitStack() as stack:
        if config.demo:
            plan = load_plan(config.plan)
            check_models(plan)
            check_owners_files(config, plan)
            check_output(Store(config.output))
            events.tell("drawing", f"drawing {config.demo_images:,} demo pictures into an embedded S3 server")
            corpus = demo_corpus(config.demo_images, config.demo_prevalence, config.demo_seed, plan.categories)
            demo = stack.enter_context(corpus)
            labels = Store(config.output).write("labels.parquet", demo.labels)
            config = replace(
                config, demo=False, source=demo.source, endpoint_url=demo.endpoint_url, labels=labels,
                report_thumbnails=True,
            )  # fmt: skip
        record = run_scan(config)
    events = Events(record["run_id"])
    events.tell("counted", closing_table(record), counts=record["counts"])
    report = f"runs/{record['run_id']}/report.html"
    events.tell("written", f"tables, run record and report: {config.output}, {report}", report=report)
    check_accepted(config, record)


if __name__ == "__main__":
    run_job("jobs.scan", JobConfig, run)
