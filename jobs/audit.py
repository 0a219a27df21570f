"""What reviews say of a scan's recall: ``python -m jobs.audit --output OUT --run-id ID``."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from jobs.cli import run_job
from pipeline.errors import RunError, UsageError
from pipeline.output import commit
from pipeline.output.opening import open_output
from pipeline.output.sink import table_bytes
from pipeline.review.audit import audit, audit_table, thresholds_table
from pipeline.review.decisions import read_standing
from pipeline.review.evidence import read_evidence, read_reviews
from pipeline.storage import READ_PATIENCE, check_endpoint, storage_errors_as_usage
from pipeline.store import Store


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Estimates recall, false omission rate and prevalence of complete runs from reviews of what they flagged and drew.

    Exit codes: 0 no alarm, or too few labels to tell, 1 recall, or the share of canaries found, is below its bound, 2
    wrong usage or reviews.
    """

    output: str
    """The output of the scans: an s3:// prefix or a folder."""
    run_id: tuple[str, ...]
    """Complete runs, taken together: a week of nights sees what one night cannot."""
    reviews: str | None = None
    """Parquet file with image_id, category, label (1 violating, 0 not): reviewed rows of flagged/ and audit/. Default:
    what stands of the decisions that jobs.review has kept in the output."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    recall_bound: float | None = None
    """Recall to raise the alarm below, for every category. Default: the plan's certificate."""
    confidence: float = 0.95
    """Of the intervals, and that an alarm is no chance."""
    labels_output: str | None = None
    """File to write what was reviewed to, as labels (uri, category, label) for calibration to search with."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        if not self.run_id or len(set(self.run_id)) < len(self.run_id):
            raise UsageError(f"run ids are {list(self.run_id)}: give each run to audit once")
        if self.recall_bound is not None and not 0 < self.recall_bound <= 1:
            raise UsageError(f"recall bound is {self.recall_bound:g}, but it is a share above 0 and up to 1")
        if self.labels_output and not self.labels_output.endswith(".parquet"):
            raise UsageError(f"labels output is {self.labels_output!r}, but it is a Parquet file: name it *.parquet")
        if not 0.5 < self.confidence < 1:
            raise UsageError(f"confidence is {self.confidence:g}, but it must lie between 0.5 and 1")


def run(config: JobConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)
    with storage_errors_as_usage():
        store = open_output(config.output, config.endpoint_url)
        labels = read_reviews(config.reviews, config.endpoint_url) if config.reviews else read_standing(store)
        evidence = read_evidence(store, config.run_id, labels)
        result = audit(evidence, config.recall_bound, config.confidence)
        commit.write_json(store, commit.audit_key(config.run_id[0]), result.to_json())
        if config.labels_output:
            target, name = Store.around(config.labels_output, config.endpoint_url, patience=READ_PATIENCE)
            target.write(name, table_bytes(evidence.source_labels()))
    console.print(audit_table(result))
    if result.thresholds:
        console.print(thresholds_table(result))
    for note in result.notes:
        console.print(note, markup=False)
    console.print(f"written to {store.uri_of(commit.audit_key(config.run_id[0]))}", markup=False)
    if result.alarm:
        raise RunError(f"alarm: {result.alarm}; look at the misses, and calibrate anew")


if __name__ == "__main__":
    run_job("jobs.audit", JobConfig, run)
