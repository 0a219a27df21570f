"""One scan from its configuration to its run record: preflight, freeze, drive, report."""

from __future__ import annotations

import re
import secrets
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.errors import RunError, RunSuspect, UsageError
from pipeline.labels.examples import read_labels
from pipeline.listing.canaries import Canaries, read_canaries, with_canaries
from pipeline.listing.increment import Earlier
from pipeline.listing.manifest import Manifest, build_manifest
from pipeline.listing.source import DEFAULT_EXCLUDE, list_source
from pipeline.output import commit
from pipeline.output.policy import read_policy
from pipeline.past.baseline import describe, stands_suspect
from pipeline.past.comparable import Found, find_earlier, judged_otherwise, records_of, under_other_policy
from pipeline.past.contents import write_contents
from pipeline.past.earlier import write_earlier
from pipeline.past.gates import FALSE_ALARMS
from pipeline.past.records import PastRuns
from pipeline.past.retry import list_failed, read_parent
from pipeline.plan import Plan, load_plan
from pipeline.reporting.events import FORMATS, Events
from pipeline.reporting.heartbeat import Listing
from pipeline.reporting.prices import read_prices
from pipeline.reporting.report import write_report
from pipeline.reporting.takeover import tell_taken_over
from pipeline.run.cluster import starting_ray
from pipeline.run.failure import one_line
from pipeline.run.limits import Limits
from pipeline.run.preflight import check_apart, check_output, check_outside, check_readable
from pipeline.steps.bank import freeze_banks
from pipeline.steps.fetch import Fetcher
from pipeline.steps.nets import Models, check_models
from pipeline.storage import check_endpoint, storage_errors_as_usage
from pipeline.store import Store

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Scans the images of a bucket or folder for violating ones and writes tables, a run record and a report."""

    source: str = ""
    """What to scan: an s3:// prefix, a folder, a Parquet or CSV file with a column 'uri', or the manifest.json of an S3
    Inventory report."""
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
    policy: str | None = None
    """File that says what is recommended to do with what is flagged, by category and score. Default: review all."""
    prices: str | None = None
    """Price table that the run's cost is computed from, in its currency."""
    run_id: str | None = None
    """Name of the run; give the name of an unfinished run to go on with it. Default: date and time."""
    retry_errors: str | None = None
    """Instead of a source: scan again, in a new run, what failed in this complete run for reasons that may pass."""
    since: str | None = None
    """Test what is new or changed since a run: 'last', the newest complete one over this source with this plan, nets
    and banks (without one, everything is tested), or a run by name, whatever its plan was."""
    known_content: bool = True
    """With --since: bytes that have been judged under another name keep their verdict, by their SHA-256."""
    limit_cost: float | None = None
    """Stop at a shard border rather than commit shards of more than this many GMAC in this start of the run. What the
    nets have begun of later shards by then is done again."""
    deadline: str | None = None
    """Stop at a shard border rather than go on past this moment: HH:MM in UTC, the next one, or ISO 8601."""
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
    gates: bool = True
    """Compare the run's rates with those of the last 14 like it; one that is unlike them ends with 3, as suspect."""
    false_alarms: float = FALSE_ALARMS
    """Share of nights like those before that the gates may call suspect."""
    metrics_port: int | None = None
    """Port of the Prometheus endpoint of a Ray that the scan starts for itself; it then stays half a minute after the
    end, to be scraped. Default: any port, and no wait."""
    log_format: str | None = None
    """How the scan tells what happens: text for lines, json for an object a line. Default: what DORFMAN_LOG_FORMAT
    says, or else text."""
    report_thumbnails: bool = False
    """Show flagged pictures in the report. Reports travel, and real ones would carry what must not."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UsageError(f"shard size is {self.shard_size}, but a shard needs at least 1 image")
        if bool(self.source) == bool(self.retry_errors):
            raise UsageError(
                "give either --source, what to scan, or --retry-errors, the run whose errors to scan again"
            )
        for flag, given in (("--canaries", self.canaries), ("--since", self.since)):
            if self.retry_errors and given:
                raise UsageError(f"{flag} is for a scan of a whole source; leave it out with --retry-errors")
        Limits.of(self.limit_cost, self.deadline)
        if not 0 <= self.output_patience <= 360:
            raise UsageError(
                f"output patience is {self.output_patience:g} s, not between 0 and 360: a run that stands "
                "still for longer is ended"
            )
        check_endpoint(self.endpoint_url)
        if not 0 < self.false_alarms < 1:
            raise UsageError(f"false alarms is {self.false_alarms}, but it is a share between 0 and 1")
        if self.log_format not in (None, *FORMATS):
            raise UsageError(f"--log-format is {self.log_format!r}: give one of {', '.join(FORMATS)}")
        if self.metrics_port is not None and not 1024 <= self.metrics_port <= 65535:
            raise UsageError(f"metrics port is {self.metrics_port}, but it must be one from 1024 to 65535")
        if not 0 <= self.max_outage <= 1:
            raise UsageError(f"max outage is {self.max_outage}, but it is a share between 0 and 1")
        for run_id in (self.run_id, self.retry_errors, self.since):
            if run_id is not None and not RUN_ID.fullmatch(run_id):
                raise UsageError(f"run id {run_id!r} may hold letters, digits, '.', '_' and '-' only, up to 100")


def new_run_id() -> str:
    """Date and time, which sort, and a few random digits for runs that are started in the same second."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ-") + secrets.token_hex(2)


def run_scan(config: ScanConfig, fetcher: Callable[..., Fetcher] = Fetcher) -> dict[str, Any]:
    """Runs or resumes a scan and returns its run record. ``fetcher``: see ``flow.Destination``.

    Raises UsageError before anything has begun and RunError afterwards; RunStopped at a limit of the user's.
    """
    began = time.perf_counter()
    limits = Limits.of(config.limit_cost, config.deadline)  # before listing, which may take hours
    with storage_errors_as_usage():
        plan = load_plan(config.plan)
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
        labels = read_labels(config.labels, config.endpoint_url) if config.labels else None
        canaries = read_canaries(config.canaries, plan.categories, config.endpoint_url) if config.canaries else None
        policy, prices = check_owners_files(config, plan)
        run_id = config.run_id or new_run_id()
        # The record first: of a complete run the state may have been removed.
        record = commit.read_json(store, commit.record_key(run_id))
        models = check_models(plan)
        frozen = record or commit.read_frozen(store, run_id)
        frozen = frozen or _start(config, store, run_id, plan, models, canaries, policy)
        _check_same_run(frozen, config, run_id, plan, models, canaries, policy)
    past = PastRuns(store)  # gates and trends look at mostly the same runs
    if record is None:
        with starting_ray(config.metrics_port):
            from pipeline.run.driver import Driver  # noqa: PLC0415  Ray Data and pandas, while Ray's processes come up

            with storage_errors_as_usage():
                options: dict[str, Any] = {"endpoint_url": config.endpoint_url, "max_outage": config.max_outage}
                options |= {
                    "alarms": config.false_alarms if config.gates else None,
                    "fetcher": fetcher,
                    "prices": prices,
                    "past": past,
                }
                driver = Driver(store, run_id, frozen, plan, models, limits=limits, **options)
            record = driver.run(labels, began)
    finish(store, record, plan, config, labels, past)
    return record


def check_owners_files(config: ScanConfig, plan: Plan) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The policy and the price table that the configuration names, as records keep them. Raises UsageError."""
    policy = read_policy(config.policy, plan.categories, config.endpoint_url) if config.policy else None
    return policy, read_prices(config.prices, config.endpoint_url) if config.prices else None


def _start(
    config: ScanConfig,
    store: Store,
    run_id: str,
    plan: Plan,
    models: Models,
    canaries: Canaries | None,
    policy: dict[str, Any] | None,
) -> dict[str, Any]:
    """Lists the source and freezes the run: what it scans, in which order, and with what."""
    parent = read_parent(store, config.retry_errors) if config.retry_errors else None
    if parent:
        rows = list_failed(store, parent, config.endpoint_url)
    else:
        rows = list_source(config.source, config.exclude, config.endpoint_url)
    if canaries:
        rows = with_canaries(rows, canaries, config.endpoint_url)
    # A folder of its own: two drivers that start one run at once must not write over each other.
    prefix = f"{commit.state_prefix(run_id)}/manifest-{uuid.uuid4().hex[:8]}"
    banks = freeze_banks(plan.banks, store, prefix, config.endpoint_url)
    decides = {
        "plan_version": plan.version,
        "weights_sha256": models.weights_sha256,
        "banks_sha256": {bank.name: bank.source_sha256 for bank in banks},
    }
    salt = config.salt or secrets.token_hex(16)
    listed_at = datetime.now(UTC)
    with Listing(store, run_id, plan.name) as listing:
        rows = listing.count(check_outside(rows, store))
        manifest, known = _list(config, rows, store, prefix, salt, plan, decides, policy)
        if manifest.images == manifest.canaries:
            if parent:
                raise UsageError(
                    f"run {config.retry_errors} has no errors that may pass: there is nothing to scan again"
                )
            raise UsageError(f"source {config.source} holds no images (patterns left out: {', '.join(config.exclude)})")
        if not manifest.shards[0].judged:
            check_readable(store, manifest.shards[0], plan.preparation, config.endpoint_url)
    frozen = {
        "run_id": run_id,
        "parent_run_id": config.retry_errors,
        "source": parent["source"] if parent else config.source,
        "exclude": parent["exclude"] if parent else list(config.exclude),
        "salt": salt,
        "scan_date": datetime.now(UTC).date().isoformat(),
        "listed_at": listed_at.isoformat(),
        "started_at": datetime.now(UTC).isoformat(),
        "plan": plan.model_dump(mode="json"),
        **decides,
        "canaries_sha256": canaries.sha256 if canaries else None,
        "policy": policy,
        "since": config.since,
        "schema_version": schema.VERSION,
        "listed": manifest.images,
        "duplicates": manifest.duplicates,
        "largest_window_bytes": manifest.largest_window_bytes,
        "shards": [asdict(shard) for shard in manifest.shards],
        **known,
        "banks": [asdict(bank) for bank in banks],
    }
    commit.freeze(store, run_id, frozen)
    tell_taken_over(Events(run_id), frozen)
    shards, seconds = len(manifest.shards), (datetime.now(UTC) - listed_at).total_seconds()
    Events(run_id).tell("listed", source=frozen["source"], listed=manifest.images, shards=shards, seconds=seconds)
    return frozen


def _list(
    config: ScanConfig,
    rows: Iterator[dict[str, Any]],
    store: Store,
    prefix: str,
    salt: str,
    plan: Plan,
    decides: dict[str, Any],
    policy: dict[str, Any] | None,
) -> tuple[Manifest, dict[str, Any]]:
    """The manifest, and what the frozen run says of what earlier runs have judged."""
    found = find_earlier(store, config.since, config.source, decides) if config.since else Found(record=None)
    earlier, notes = found.record, list(found.notes)
    with tempfile.TemporaryDirectory(prefix="dorfman-earlier-") as folder:
        judged = None
        if earlier:
            # Records of a version without increments say only when listing had ended.
            moment = datetime.fromisoformat(earlier.get("listed_at") or earlier["started_at"])
            judged = Earlier(folder=Path(folder), listed_at=moment)
            if lost := write_earlier(store, earlier, judged.folder):
                notes.append(f"what {', '.join(lost)} had judged has no verdict any more: record or tables are gone")
        manifest = build_manifest(
            rows, store, prefix, salt=salt, window=plan.window, shard_size=config.shard_size, earlier=judged
        )
        contents = write_contents(judged.folder, store, prefix) if judged and config.known_content else ()
    increment = _increment_json(manifest, earlier, store, decides, policy)
    return manifest, {
        "increment": increment, "since_notes": notes, "contents": [asdict(part) for part in contents]
    }  # fmt: skip


def _increment_json(
    manifest: Manifest,
    earlier: dict[str, Any] | None,
    store: Store,
    decides: dict[str, Any],
    policy: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """Against which run, and what has become of its objects; None when every object was to be tested."""
    if manifest.increment is None or earlier is None:
        return None
    increment = manifest.increment
    records = records_of(store, increment.judged_by)
    return {
        "run_id": earlier["run_id"],
        "judged_otherwise": judged_otherwise(records, increment.judged_by, decides),
        "under_other_policy": under_other_policy(records, increment.flagged_by, policy),
        **asdict(increment),
    }


def _check_same_run(
    frozen: dict[str, Any],
    config: ScanConfig,
    run_id: str,
    plan: Plan,
    models: Models,
    canaries: Canaries | None,
    policy: dict[str, Any] | None,
) -> None:
    """A resumed run goes on with the source, plan, weights, canaries and policy it was started with, or not at all."""
    # Runs of a version without audits named neither their rates nor canaries.
    rates = plan.audit.model_dump()
    for what, then, now in (
        ("source", frozen["source"], config.source or frozen["source"]),
        ("--retry-errors", frozen["parent_run_id"], config.retry_errors),
        ("--since", frozen.get("since"), config.since),
        ("plan version", frozen["plan_version"], plan.version),
        ("weights", frozen["weights_sha256"], models.weights_sha256),
        ("audit rates", frozen["plan"].get("audit", rates), rates),
        ("canaries of SHA-256", frozen.get("canaries_sha256"), canaries.sha256 if canaries else None),
        ("policy", _named_policy(frozen.get("policy")), _named_policy(policy)),
    ):
        if then != now:
            told, instead = (
                f"no {what.partition(' of ')[0]}" if value is None else f"{what} {value}" for value in (then, now)
            )
            raise UsageError(
                f"run {run_id!r} was started with {told}, not with {instead}; go on with that, or give another --run-id"
            )


def _named_policy(policy: Mapping[str, Any] | None) -> str | None:
    return f"{policy['name']} {policy['version']} of SHA-256 {policy['sha256']}" if policy else None


def check_accepted(config: ScanConfig, record: dict[str, Any]) -> None:
    """Raises RunSuspect for a complete run in which the gates found what nobody has accepted."""
    if stands_suspect(Store(config.output, config.endpoint_url, patience=config.output_patience), record):
        raise RunSuspect(describe(record, config.output))


def finish(
    store: Store,
    record: dict[str, Any],
    plan: Plan,
    config: ScanConfig,
    labels: pa.Table | None = None,
    past: PastRuns | None = None,
) -> None:
    """What follows from a complete run's record: its status, its report, and that nobody needs its attempts.

    A driver that died before this is made up for when the run is started again. Raises RunError.
    """
    run_id = record["run_id"]
    try:
        if (commit.read_json(store, commit.status_key(run_id)) or {}).get("status") != "complete":
            commit.write_json(store, commit.status_key(run_id), record)
        if not store.exists(commit.report_key(run_id)):
            options: dict[str, Any] = {"thumbnails": config.report_thumbnails, "labels": labels, "past": past}
            write_report(store, record, plan, config.endpoint_url, **options)
        commit.sweep_attempts(store, run_id)
    except Exception as error:
        again = f"start it again with --run-id {run_id} for what is missing"
        raise RunError(f"run {run_id!r} is complete, but could not be finished: {one_line(error)}; {again}") from error
