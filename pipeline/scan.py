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

from models.cost import gmac_per_test
from models.weights import load_net
from pipeline import commit
from pipeline.cluster import ray_session
from pipeline.commit import Ledger
from pipeline.errors import RunError, UsageError
from pipeline.examples import read_labels
from pipeline.flow import Destination, pools, stream, window_refs
from pipeline.plan import Plan, load_plan
from pipeline.progress import Progress
from pipeline.quality import judge_run
from pipeline.report import write_report
from pipeline.source import DEFAULT_EXCLUDE, Manifest, Shard, build_manifest, list_source
from pipeline.stages import check_stage
from pipeline.storage import Store, check_writable, parse_uri, reason
from pipeline.tally import relative_cost, stage_rows

RECORD_FIELDS = (
    "run_id", "source", "exclude", "salt", "scan_date", "started_at", "plan", "plan_version",
    "weights_sha256", "listed", "duplicates",
)  # fmt: skip
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Scans the images of a bucket or folder for violating ones and writes tables, a run record and a report."""

    source: str
    """What to scan: an s3:// prefix, a folder, or a Parquet or CSV file with a column 'uri'."""
    output: str = "out"
    """Where tables and records go: an s3:// prefix or a folder."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server for source and output; without it AWS is meant."""
    plan: str = "emblem"
    """A shipped plan by name, or the path of a plan file."""
    labels: str | None = None
    """Labels file (Parquet: uri, category, label) to report recall and false-positive rate against."""
    run_id: str | None = None
    """Name of the run; give the name of an unfinished run to go on with it. Default: date and time."""
    shard_size: int = 1_000_000
    """Images in one shard, the unit of commit and of resume; rounded up to whole windows."""
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    """Objects whose base name matches one of these patterns are not listed."""
    salt: str | None = None
    """Fixes the order in which images are grouped, so that a scan can be repeated. Default: random."""
    max_outage: float = 0.5
    """Share of a shard's images that may fail for reasons of the store or the workers before the run fails."""
    report_thumbnails: bool = False
    """Show flagged pictures in the report. Reports travel, and real ones would carry what must not."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UsageError(f"shard size is {self.shard_size}, but a shard needs at least 1 image")
        if not 0 <= self.max_outage <= 1:
            raise UsageError(f"max outage is {self.max_outage}, but it is a share between 0 and 1")
        if self.run_id is not None and not RUN_ID.fullmatch(self.run_id):
            raise UsageError(f"run id {self.run_id!r} may hold letters, digits, '.', '_' and '-' only, up to 100")


@dataclass(frozen=True, kw_only=True)
class Models:
    """What the run must know of the plan's nets: by stage (version, sha256), and the last one's cost alone."""

    versions: dict[str, tuple[str, str]]
    individual_gmac: float

    @property
    def weights_sha256(self) -> dict[str, str]:
        return {stage: digest for stage, (_, digest) in self.versions.items()}


def check_models(plan: Plan) -> Models:
    """Loads every net once, here, so that a missing or unfit one is a clear line and not a dead actor."""
    versions = {}
    try:
        for stage in plan.stages:
            net, card = load_net(stage.model)
            check_stage(stage, plan.categories, net, card.categories)
            versions[stage.name] = (card.version, card.sha256)
    except (ValueError, RuntimeError, KeyError) as error:
        # RuntimeError and KeyError: weights that do not fit the card's trunk.
        raise UsageError(f"plan {plan.name!r}: {' '.join(str(error).split())[:300]}") from error
    return Models(versions=versions, individual_gmac=gmac_per_test(net, plan.stages[-1].input_size, 1))


def run_scan(config: ScanConfig) -> dict[str, Any]:
    """Runs or resumes a scan and returns its run record.

    Raises UsageError before anything has begun and RunError afterwards.
    """
    began = time.perf_counter()
    with storage_errors_as_usage():
        _check_apart(config)
        plan, models, store = preflight(config)
        run_id = config.run_id or datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ-") + secrets.token_hex(2)
        labels = read_labels(config.labels, config.endpoint_url) if config.labels else None
        frozen = commit.read_frozen(store, run_id)
        if frozen is None:
            frozen = _start(config, store, run_id, plan, models)
        _check_same_run(frozen, config, run_id, plan, models)
        record = commit.read_json(store, commit.record_key(run_id))
        if record and record["status"] == "complete":
            return record
        driver = Driver(config, store, run_id, frozen, plan, models)
    return driver.run(labels, began)


def preflight(config: ScanConfig) -> tuple[Plan, Models, Store]:
    """Whatever can be known to be wrong without the source. Raises UsageError."""
    plan = load_plan(config.plan)
    models = check_models(plan)
    return plan, models, check_writable(config.output, config.endpoint_url)


@contextmanager
def storage_errors_as_usage() -> Iterator[None]:
    """Before a run has begun, a store that does not answer is a matter of configuration."""
    try:
        yield
    except UsageError:
        raise
    except (BaseError, BotoCoreError, ClientError, OSError, ValueError) as error:
        raise UsageError(f"storage: {reason(error)}") from error


def _check_apart(config: ScanConfig) -> None:
    """The output must not be listed. An S3 source is a prefix, with or without a slash at its end."""
    source, output = parse_uri(config.source), parse_uri(config.output)
    inside = source.key if source.bucket else source.key.rstrip("/") + "/"
    if source.bucket == output.bucket and (output.key.rstrip("/") + "/").startswith(inside):
        raise UsageError(f"output {config.output} lies inside source {config.source}: it would be scanned")


def _start(config: ScanConfig, store: Store, run_id: str, plan: Plan, models: Models) -> dict[str, Any]:
    """Lists the source and freezes the run: what it scans, in which order, and with what."""
    salt = config.salt or secrets.token_hex(16)
    # A folder of its own: two drivers that start one run at once must not write over each other.
    prefix = f"{commit.state_prefix(run_id)}/manifest-{uuid.uuid4().hex[:8]}"
    manifest = build_manifest(
        list_source(config.source, config.exclude, config.endpoint_url),
        store,
        prefix,
        salt=salt,
        window=plan.window,
        shard_size=config.shard_size,
    )
    if not manifest.images:
        raise UsageError(f"source {config.source} holds no images (patterns left out: {', '.join(config.exclude)})")
    frozen = {
        "run_id": run_id,
        "source": config.source,
        "exclude": list(config.exclude),
        "salt": salt,
        "scan_date": datetime.now(UTC).date().isoformat(),
        "started_at": datetime.now(UTC).isoformat(),
        "plan": plan.model_dump(mode="json"),
        "plan_version": plan.version,
        "weights_sha256": models.weights_sha256,
        **_manifest_json(manifest),
    }
    commit.freeze(store, run_id, frozen)
    return frozen


def _manifest_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "listed": manifest.images,
        "duplicates": manifest.duplicates,
        "shards": [asdict(shard) for shard in manifest.shards],
    }


def _check_same_run(frozen: dict[str, Any], config: ScanConfig, run_id: str, plan: Plan, models: Models) -> None:
    """A resumed run goes on with the source, plan and weights it was started with, or not at all."""
    for what, then, now in (
        ("source", frozen["source"], config.source),
        ("plan version", frozen["plan_version"], plan.version),
        ("weights", frozen["weights_sha256"], models.weights_sha256),
    ):
        if then != now:
            raise UsageError(f"run {run_id!r} was started with {what} {then}, not {now}; give another --run-id")


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
            self._write_record("running", began)
            startup = self._stream(began)
            record = self._record("complete", began, startup, self._judge(labels))
            write_report(
                self.store, record, self.plan, self.config.endpoint_url, thumbnails=self.config.report_thumbnails
            )
            self.ledger.check_epoch()
            commit.write_json(self.store, commit.record_key(self.run_id), record)
        # The run is complete: attempts that cannot be removed now are only litter.
        with suppress(BaseError, OSError):
            self.ledger.sweep_attempts()
        return record

    def _stream(self, began: float) -> float | None:
        """Scans the pending shards; seconds until the first windows had been decided."""
        startup = None
        with Progress(self.run_id, self.plan, self.frozen["listed"], self.committed_before) as progress:
            if not self.ledger.pending:
                return None
            destination = Destination(
                output=self.store.uri,
                endpoint_url=self.config.endpoint_url,
                attempts=commit.attempts_prefix(self.run_id),
                run_id=self.run_id,
                models=self.models.versions,
            )
            with ray_session(pools(self.plan), f"plan {self.plan.name!r}"):
                for receipt in stream(self.plan, window_refs(self.store, self.ledger.pending), destination):
                    startup = startup or time.perf_counter() - began
                    progress.add(receipt)
                    shard = self.ledger.add(receipt)
                    if shard is not None:
                        progress.committed(shard.index, len(self.ledger.done), len(self.ledger.shards))
        if self.ledger.pending:
            raise RunError(f"{len(self.ledger.pending)} shards were not finished though the stream has ended")
        return startup

    def _judge(self, labels: pa.Table | None) -> dict[str, Any] | None:
        if labels is None:
            return None
        paths = [file["path"] for file in self.ledger.files if file["path"].startswith("ledger/")]
        return judge_run(self.store, paths, labels).to_json()

    def _write_record(self, status: str, began: float, **more: Any) -> None:
        commit.write_json(self.store, commit.record_key(self.run_id), self._record(status, began, None, None) | more)

    def _record(
        self, status: str, began: float, startup: float | None, quality: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The run record: what is committed at this moment."""
        tally = self.ledger.tally
        seconds = time.perf_counter() - began
        return {key: self.frozen[key] for key in RECORD_FIELDS} | {
            "status": status,
            "updated_at": datetime.now(UTC).isoformat(),
            "counts": {"listed": tally.listed, **tally.outcomes},
            "errors": tally.errors,
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
            self._write_record("failed", began, failure=line)
            self.store.write(f"runs/{self.run_id}/failure.txt", traceback.format_exc().encode())


def _one_line(error: BaseException) -> str:
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, (RunError, UsageError)):
        return str(error)
    if isinstance(error, (BaseError, ClientError, BotoCoreError)):
        return f"storage: {reason(error)}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines else type(error).__name__
