"""One scan from its configuration to its run record: preflight, manifest, stream, commit, report."""

from __future__ import annotations

import re
import secrets
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import ray
from botocore.exceptions import BotoCoreError, ClientError
from obstore.exceptions import BaseError

from pipeline import commit
from pipeline.canaries import Canaries, count_canaries, read_canaries, with_canaries
from pipeline.cluster import ray_session
from pipeline.commit import Ledger
from pipeline.errors import RunError, StoreError, UsageError
from pipeline.examples import read_labels
from pipeline.flow import Destination, pools, stream, window_refs
from pipeline.plan import Plan, load_plan
from pipeline.preflight import Models, check_apart, check_models, check_output, check_readable
from pipeline.progress import Progress
from pipeline.quality import judge_run
from pipeline.report import write_report
from pipeline.retry import list_failed, read_parent
from pipeline.source import DEFAULT_EXCLUDE, Manifest, Shard, build_manifest, list_source
from pipeline.storage import check_endpoint, reason, redact, storage_errors_as_usage
from pipeline.store import Store
from pipeline.tally import relative_cost, stage_rows

RECORD_FIELDS = (
    "run_id", "parent_run_id", "source", "exclude", "salt", "scan_date", "started_at", "plan", "plan_version",
    "weights_sha256", "canaries_sha256", "listed", "duplicates",
)  # fmt: skip
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Scans the images of a bucket or folder for violating ones and writes tables, a run record and a report."""

    source: str = ""
    """What to scan: an s3:// prefix, a folder, or a Parquet or CSV file with a column 'uri'."""
    output: str = "out"
    """Where tables and records go: an s3:// prefix or a folder."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server for source and output; without it AWS is meant."""
    plan: str = "emblem"
    """A shipped plan by name, or the path of a plan file."""
    labels: str | None = None
    """Labels file (Parquet: uri, category, label) to report recall and false-positive rate against."""
    canaries: str | None = None
    """File of known positives (Parquet: uri, category) to test among the rest; they are never counted as findings."""
    run_id: str | None = None
    """Name of the run; give the name of an unfinished run to go on with it. Default: date and time."""
    retry_errors: str | None = None
    """Instead of a source: scan again, in a new run, what failed in this complete run for reasons that may pass."""
    shard_size: int = 1_000_000
    """Images in one shard, the unit of commit and of resume; rounded up to whole windows."""
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    """Objects whose base name matches one of these patterns are not listed."""
    salt: str | None = None
    """Fixes the order in which images are grouped, so that a scan can be repeated. Default: random."""
    max_outage: float = 0.5
    """Share of a shard's images that may fail for reasons of the store or the workers before the run fails."""
    output_patience: float = 300.0
    """Seconds for which an output that refuses what the scan reads and writes there is waited for."""
    kms_key: str | None = None
    """Key in AWS KMS (id or ARN) that encrypts the output. Default: as its bucket is set up."""
    single_driver: bool = False
    """A promise that no run is ever driven twice at a time, for an output store without conditional PUT."""
    report_thumbnails: bool = False
    """Show flagged pictures in the report. Reports travel, and real ones would carry what must not."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UsageError(f"shard size is {self.shard_size}, but a shard needs at least 1 image")
        if bool(self.source) == bool(self.retry_errors):
            raise UsageError(
                "give either --source, what to scan, or --retry-errors, the run whose errors to scan again"
            )
        if self.retry_errors and self.canaries:
            raise UsageError("--canaries test a scan of a whole source; leave them out with --retry-errors")
        if not 0 <= self.output_patience <= 360:
            raise UsageError(
                f"output patience is {self.output_patience:g} s, not between 0 and 360: a run that stands "
                "still for longer is ended"
            )
        check_endpoint(self.endpoint_url)
        if not 0 <= self.max_outage <= 1:
            raise UsageError(f"max outage is {self.max_outage}, but it is a share between 0 and 1")
        for run_id in (self.run_id, self.retry_errors):
            if run_id is not None and not RUN_ID.fullmatch(run_id):
                raise UsageError(f"run id {run_id!r} may hold letters, digits, '.', '_' and '-' only, up to 100")


def new_run_id() -> str:
    """Date and time, which sort, and a few random digits for runs that are started in the same second."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ-") + secrets.token_hex(2)


def run_scan(config: ScanConfig) -> dict[str, Any]:
    """Runs or resumes a scan and returns its run record.

    Raises UsageError before anything has begun and RunError afterwards.
    """
    began = time.perf_counter()
    with storage_errors_as_usage():
        plan = load_plan(config.plan)
        models = check_models(plan)
        store = Store(
            config.output,
            config.endpoint_url,
            kms_key=config.kms_key,
            patience=config.output_patience,
            conditional=not config.single_driver,
        )
        if config.source:
            check_apart(config.source, config.output)
        check_output(store)
        run_id = config.run_id or new_run_id()
        labels = read_labels(config.labels, config.endpoint_url) if config.labels else None
        canaries = read_canaries(config.canaries, plan.categories, config.endpoint_url) if config.canaries else None
        # The record first: of a complete run the state may have been removed.
        record = commit.read_json(store, commit.record_key(run_id))
        frozen = record or commit.read_frozen(store, run_id) or _start(config, store, run_id, plan, models, canaries)
        _check_same_run(frozen, config, run_id, plan, models, canaries)
        if record is None:
            driver = Driver(config, store, run_id, frozen, plan, models)
    if record is None:
        record = driver.run(labels, began)
    finish(store, record, plan, config)
    return record


def _start(
    config: ScanConfig, store: Store, run_id: str, plan: Plan, models: Models, canaries: Canaries | None
) -> dict[str, Any]:
    """Lists the source and freezes the run: what it scans, in which order, and with what."""
    parent = read_parent(store, config.retry_errors) if config.retry_errors else None
    if parent:
        rows = list_failed(store, parent, config.endpoint_url)
    else:
        rows = list_source(config.source, config.exclude, config.endpoint_url)
    if canaries:
        rows = with_canaries(rows, canaries, config.endpoint_url)
    salt = config.salt or secrets.token_hex(16)
    # A folder of its own: two drivers that start one run at once must not write over each other.
    prefix = f"{commit.state_prefix(run_id)}/manifest-{uuid.uuid4().hex[:8]}"
    manifest = build_manifest(rows, store, prefix, salt=salt, window=plan.window, shard_size=config.shard_size)
    if manifest.images == manifest.canaries:
        if parent:
            raise UsageError(f"run {config.retry_errors} has no errors that may pass: there is nothing to scan again")
        raise UsageError(f"source {config.source} holds no images (patterns left out: {', '.join(config.exclude)})")
    check_readable(store, manifest.shards[0], plan.preparation, config.endpoint_url)
    frozen = {
        "run_id": run_id,
        "parent_run_id": config.retry_errors,
        "source": parent["source"] if parent else config.source,
        "exclude": parent["exclude"] if parent else list(config.exclude),
        "salt": salt,
        "scan_date": datetime.now(UTC).date().isoformat(),
        "started_at": datetime.now(UTC).isoformat(),
        "plan": plan.model_dump(mode="json"),
        "plan_version": plan.version,
        "weights_sha256": models.weights_sha256,
        "canaries_sha256": canaries.sha256 if canaries else None,
        **_manifest_json(manifest),
    }
    commit.freeze(store, run_id, frozen)
    return frozen


def _manifest_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "listed": manifest.images,
        "duplicates": manifest.duplicates,
        "largest_window_bytes": manifest.largest_window_bytes,
        "shards": [asdict(shard) for shard in manifest.shards],
    }


def _check_same_run(
    frozen: dict[str, Any], config: ScanConfig, run_id: str, plan: Plan, models: Models, canaries: Canaries | None
) -> None:
    """A resumed run goes on with the source, plan, weights and canaries it was started with, or not at all."""
    # Runs of a version without audits named neither their rates nor canaries.
    rates = plan.audit.model_dump()
    for what, then, now in (
        ("source", frozen["source"], config.source or frozen["source"]),
        ("--retry-errors", frozen["parent_run_id"], config.retry_errors),
        ("plan version", frozen["plan_version"], plan.version),
        ("weights", frozen["weights_sha256"], models.weights_sha256),
        ("audit rates", frozen["plan"].get("audit", rates), rates),
        ("canaries of SHA-256", frozen.get("canaries_sha256"), canaries.sha256 if canaries else None),
    ):
        if then != now:
            raise UsageError(f"run {run_id!r} was started with {what} {then}, not {now}; give another --run-id")


def finish(store: Store, record: dict[str, Any], plan: Plan, config: ScanConfig) -> None:
    """What follows from a complete run's record: its status, its report, and that nobody needs its attempts.

    A driver that died before this is made up for when the run is started again. Raises RunError.
    """
    run_id = record["run_id"]
    try:
        if (commit.read_json(store, commit.status_key(run_id)) or {}).get("status") != "complete":
            commit.write_json(store, commit.status_key(run_id), record)
        if not store.exists(commit.report_key(run_id)):
            write_report(store, record, plan, config.endpoint_url, thumbnails=config.report_thumbnails)
        commit.sweep_attempts(store, run_id)
    except Exception as error:
        again = f"start it again with --run-id {run_id} for what is missing"
        raise RunError(f"run {run_id!r} is complete, but could not be finished: {_one_line(error)}; {again}") from error


class Driver:
    """Drives one frozen run: streams what is pending, commits shard by shard, writes the record last."""

    def __init__(
        self, config: ScanConfig, store: Store, run_id: str, frozen: dict[str, Any], plan: Plan, models: Models
    ) -> None:
        self.config = config
        self.store = store
        self.run_id = run_id
        self.frozen = frozen
        self.plan = plan
        self.models = models
        shards = [Shard(**shard) for shard in frozen["shards"]]
        self.ledger = Ledger(store, run_id, frozen["scan_date"], shards, config.max_outage)
        self.committed_before = self.ledger.tally.listed

    def run(self, labels: pa.Table | None, began: float) -> dict[str, Any]:
        """The run record. ``began``: reading of the clock when the scan was started."""
        with self._failing_by_name(began):
            self._write_status("running", began)
            startup = self._stream(began)
            record = self._record("complete", began, startup, self._judge(labels))
            return self.ledger.complete(record)

    def _stream(self, began: float) -> float | None:
        """Scans the pending shards; seconds until the first windows had been decided."""
        startup = None
        with Progress(self.run_id, self.plan, self.frozen["listed"], self.committed_before) as progress:
            if not self.ledger.pending:
                return None
            destination = Destination(
                store=self.store,
                endpoint_url=self.config.endpoint_url,
                attempts=commit.attempts_prefix(self.run_id),
                run_id=self.run_id,
                salt=self.frozen["salt"],
                models=self.models.versions,
            )
            with ray_session(pools(self.plan), f"plan {self.plan.name!r}", self._window_bytes()):
                for receipt in stream(self.plan, window_refs(self.store, self.ledger.pending), destination):
                    startup = startup or time.perf_counter() - began
                    progress.add(receipt)
                    shard = self.ledger.add(receipt)
                    if shard is not None:
                        progress.committed(shard.index, len(self.ledger.done), len(self.ledger.shards))
                        self._write_status("running", began)
        if self.ledger.pending:
            raise RunError(f"{len(self.ledger.pending)} shards were not finished though the stream has ended")
        return startup

    def _window_bytes(self) -> int:
        """The most that one window can be in Ray's object store: its files and its pixels."""
        side = max(stage.input_size for stage in self.plan.stages)
        return self.frozen["largest_window_bytes"] + 3 * side * side * self.plan.window.images

    def _judge(self, labels: pa.Table | None) -> dict[str, Any] | None:
        if labels is None:
            return None
        return judge_run(self.store, commit.files_of("ledger", self.ledger.files), labels).to_json()

    def _write_status(self, status: str, began: float, **more: Any) -> None:
        content = self._record(status, began, None, None) | more
        # Written after every shard: with the files of all shards before, it would grow with each.
        del content["files"]
        commit.write_json(self.store, commit.status_key(self.run_id), content)

    def _record(
        self, status: str, began: float, startup: float | None, quality: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The run record: what is committed at this moment."""
        tally = self.ledger.tally
        seconds = time.perf_counter() - began
        return {key: self.frozen.get(key) for key in RECORD_FIELDS} | {
            "status": status,
            "updated_at": datetime.now(UTC).isoformat(),
            "counts": {"listed": tally.listed, **tally.outcomes},
            "windows": sum(self.ledger.shards[index].windows for index in self.ledger.done),
            "errors": tally.errors,
            "canaries": count_canaries(tally.skips),
            "operators": tally.work_rows(),
            "stages": stage_rows(tally, self.plan),
            "individual_gmac": self.models.individual_gmac,
            "relative_cost": relative_cost(tally, self.plan, self.models.individual_gmac),
            # Of this driver: an earlier one's time, and what it committed, are not counted again.
            "seconds": seconds,
            "startup_seconds": seconds if startup is None else startup,
            "images_per_s": (tally.listed - self.committed_before) / seconds,
            "committed_before": self.committed_before,
            "quality": quality,
            "files": sorted(self.ledger.files, key=lambda file: file["path"]),
        }

    @contextmanager
    def _failing_by_name(self, began: float) -> Iterator[None]:
        """Turns whatever ends the run into one line, and leaves the traceback beside the run record."""
        try:
            yield
        except (KeyboardInterrupt, Exception) as error:
            line = _one_line(error)
            # When the output itself is what failed, the line below has to do.
            with suppress(BaseError, OSError):
                self._record_failure(line, began)
            if isinstance(error, KeyboardInterrupt):
                raise
            again = f"start it again with --run-id {self.run_id} to go on"
            raise RunError(f"run {self.run_id!r} failed: {line}; {again}") from error

    def _record_failure(self, line: str, began: float) -> None:
        if self.ledger.is_current():
            self._write_status("failed", began, failure=line)
            self.store.write(commit.failure_key(self.run_id), redact(traceback.format_exc()).encode())


def _one_line(error: BaseException) -> str:
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, (RunError, UsageError)):
        return str(error).splitlines()[0]  # Ray adds advice of its own
    if isinstance(error, (StoreError, BaseError, ClientError, BotoCoreError)):
        return f"storage: {reason(error)}"
    lines = [line for line in redact(str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines else type(error).__name__
