"""Drives one frozen run: streams what is pending, commits shard by shard, writes the record last."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from botocore.exceptions import BotoCoreError
from obstore.exceptions import BaseError

from pipeline.errors import RunError, RunStopped
from pipeline.flow import Destination, pools, stream, window_refs
from pipeline.listing.canaries import count_canaries
from pipeline.listing.manifest import Shard
from pipeline.output import commit
from pipeline.output.commit import Ledger
from pipeline.output.policy import frozen_policy
from pipeline.output.tally import relative_cost, stage_rows
from pipeline.past.baseline import drift
from pipeline.past.contents import Contents, Part
from pipeline.past.records import PastRuns
from pipeline.plan import Plan
from pipeline.reporting.events import Events
from pipeline.reporting.exporter import Exporter
from pipeline.reporting.heartbeat import Heartbeat, forget_listing, of_driver
from pipeline.reporting.prices import Meter, cost_of, resources
from pipeline.reporting.progress import Progress
from pipeline.reporting.quality import judge_run
from pipeline.reporting.takeover import standing
from pipeline.run.cluster import cluster_size, ray_session
from pipeline.run.failure import one_line
from pipeline.run.limits import Budget, Limits
from pipeline.steps.bank import Banks, Frozen, ignored_entries
from pipeline.steps.fetch import Fetcher
from pipeline.steps.nets import Models
from pipeline.storage import redact
from pipeline.store import Store

RECORD_FIELDS = (
    "run_id", "parent_run_id", "source", "exclude", "salt", "scan_date", "listed_at", "started_at", "plan",
    "plan_version", "weights_sha256", "canaries_sha256", "listed", "duplicates", "since", "increment", "since_notes",
    "banks_sha256", "schema_version", "policy",
)  # fmt: skip

LEVELS = {
    "complete": logging.INFO,
    "stopped": logging.WARNING,
    "suspect": logging.WARNING,
    "failed": logging.ERROR,
}


class Driver:
    """Of one frozen run."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        frozen: dict[str, Any],
        plan: Plan,
        models: Models,
        *,
        endpoint_url: str | None,
        max_outage: float,
        limits: Limits,
        alarms: float | None = None,
        fetcher: Callable[..., Fetcher] = Fetcher,
        prices: dict[str, Any] | None = None,
        past: PastRuns | None = None,
    ) -> None:
        self.store = store
        self.past = past or PastRuns(store)
        self.endpoint_url = endpoint_url
        self.run_id = run_id
        self.frozen = frozen
        self.plan = plan
        self.models = models
        self.fetcher = fetcher
        shards = [Shard(**shard) for shard in frozen["shards"]]
        self.ledger = Ledger(store, run_id, frozen["scan_date"], shards, max_outage)
        self.committed_before = self.ledger.tally.listed
        self.decided = self.committed_before
        self.judged_before = 0
        """Images that this driver has committed and nobody looked at: earlier runs had judged them."""
        self.limits = limits
        self.alarms = alarms
        self.events = Events(run_id)
        self.exporter = Exporter(plan.name)
        self.prices = prices
        self.meter = Meter(cluster_size)
        self.before = self._done()

    def run(self, labels: pa.Table | None, began: float) -> dict[str, Any]:
        """The run record. ``began``: reading of the clock when the scan was started."""
        # Ray stays until the last metric is told.
        with ExitStack() as session, self._failing_by_name(began), self._heartbeat():
            self._write_status("running", began)
            forget_listing(self.store, self.run_id)
            if warning := self.limits.warning(self.ledger.pending):
                self.events.tell("unbounded", f"run {self.run_id}: {warning}", level=logging.WARNING)
            startup = self._stream(began, session)
            record = self._record("complete", began, startup, self._judge(labels))
            record = self.ledger.complete(record | drift(self.past, record, self.alarms))
            self._ended("suspect" if record.get("suspect") else "complete", record)
            return record

    def _stream(self, began: float, session: ExitStack) -> float | None:
        """Scans the pending shards; seconds until the first windows had been decided. Ray joins ``session``."""
        startup = None
        with Progress(self.run_id, self.plan, self.frozen["listed"], self.committed_before) as progress:
            for judged in [shard for shard in self.ledger.pending if shard.judged]:
                self.ledger.add_judged(judged)
                self.judged_before += judged.images
                self._committed(judged, progress, began)
            if not self.ledger.pending:
                return None
            budget = Budget(self.limits, self.ledger.tally, self.ledger.pending)
            destination = Destination(
                store=self.store,
                endpoint_url=self.endpoint_url,
                attempts=commit.attempts_prefix(self.run_id),
                run_id=self.run_id,
                salt=self.frozen["salt"],
                models=self.models,
                contents=self._contents(),
                banks=self._banks(),
                fetcher=self.fetcher,
                policy=frozen_policy(self.frozen.get("policy")),
            )
            session.enter_context(ray_session(pools(self.plan), f"plan {self.plan.name!r}", self._window_bytes()))
            self.exporter.join()
            refs = window_refs(self.store, self.ledger.pending)
            pa.default_memory_pool().release_unused()  # what the listing took
            self.meter.look()
            for receipt in stream(self.plan, refs, destination):
                self.meter.took(receipt)
                startup = startup or time.perf_counter() - began
                progress.add(receipt)
                self.decided = progress.decided
                shard = self.ledger.add(receipt)
                if shard is not None:
                    self._committed(shard, progress, began)
                    budget.check(self.ledger.tally, self.ledger.pending)
            self.meter.look(at_once=True)  # the last at which the cluster is there
        if self.ledger.pending:
            raise RunError(f"{len(self.ledger.pending)} shards were not finished though the stream has ended")
        return startup

    def _committed(self, shard: Shard, progress: Progress, began: float) -> None:
        self.exporter.committed(self.ledger.newest, self.ledger.newest_seconds)
        progress.committed(shard, len(self.ledger.done), len(self.ledger.shards))
        self.decided = progress.decided
        self._write_status("running", began)

    def _contents(self) -> Contents | None:
        # Runs of a version without increments knew no content.
        parts = tuple(Part(**part) for part in self.frozen.get("contents", []))
        return Contents(self.store, parts) if parts else None

    def _banks(self) -> Banks | None:
        frozen = [Frozen(**bank) for bank in self.frozen.get("banks", [])]
        pairs = tuple(zip(self.plan.banks, frozen, strict=True))
        return Banks(self.store, pairs, self.plan.version) if pairs else None

    def _window_bytes(self) -> int:
        """The most that one window can be in Ray's object store: its files and its pixels."""
        side = max(stage.input_size for stage in self.plan.stages)
        return self.frozen["largest_window_bytes"] + 3 * side * side * self.plan.window.images

    def _judge(self, labels: pa.Table | None) -> dict[str, Any] | None:
        if labels is None:
            return None
        return judge_run(self.store, commit.files_of("ledger", self.ledger.files), labels).to_json()

    def _write_status(self, status: str, began: float) -> None:
        self._put_status(self._record(status, began, None, None))

    def _put_status(self, content: dict[str, Any]) -> None:
        self.exporter.stands(content)
        # Written after every shard: with the files of all shards before, it would grow with each.
        short = {name: value for name, value in content.items() if name != "files"}
        commit.write_json(self.store, commit.status_key(self.run_id), short)

    def _record(
        self, status: str, began: float, startup: float | None, quality: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The run record: what is committed at this moment."""
        tally = self.ledger.tally
        committed = [self.ledger.shards[index] for index in self.ledger.done]
        seconds = time.perf_counter() - began
        startup = seconds if startup is None else startup
        record = {key: self.frozen.get(key) for key in RECORD_FIELDS} | {
            "status": status,
            "updated_at": datetime.now(UTC).isoformat(),
            "counts": {"listed": tally.listed, **tally.outcomes},
            "windows": sum(shard.windows for shard in committed if not shard.judged),
            "errors": tally.errors,
            "canaries": count_canaries(tally.skips),
            "skips": tally.skips,
            "taken": tally.taken,
            "categories": tally.categories,
            "ignored_entries": ignored_entries(tally.work_rows()),
            "operators": tally.work_rows(),
            "stages": stage_rows(tally, self.plan),
            "individual_gmac": self.models.individual_gmac,
            "relative_cost": relative_cost(tally, self.plan, self.models.individual_gmac),
            # Of this driver: an earlier one's time, and what it committed, are not counted again.
            "seconds": seconds,
            "startup_seconds": startup,
            "commit_seconds": self.ledger.commit_seconds,
            "images_per_s": (tally.listed - self.committed_before - self.judged_before) / seconds,
            "committed_before": self.committed_before,
            "quality": quality,
            "files": sorted(self.ledger.files, key=lambda file: file["path"]),
        }
        record["resources"] = self._resources(seconds, startup)
        record["cost"] = cost_of(record, self.prices) if self.prices else None
        return record

    def _done(self) -> dict[str, float]:
        """What is committed, by whichever driver, as far as it is paid for."""
        return {
            "images": self.ledger.tally.listed,
            "fetched": self.ledger.tally.operators("fetch")["images_in"],
            "shards": len(self.ledger.done),
            "written": sum(file["bytes"] for file in self.ledger.files),
        }

    def _resources(self, seconds: float, startup_seconds: float) -> dict[str, Any]:
        """Of this driver, as its seconds are."""
        done: dict[str, Any] = {name: count - self.before[name] for name, count in self._done().items()}
        source, output = self.frozen["source"], self.store.uri
        return resources(
            self.meter,
            source=source,
            output=output,
            listed=self.frozen["listed"],
            seconds=seconds,
            startup_seconds=startup_seconds,
            **done,
        )

    def _heartbeat(self) -> Heartbeat:
        listed = self.frozen["listed"]
        return of_driver(
            self.store, self.run_id, self.ledger.epoch, listed, lambda: (self.decided, self.meter.images), self._beat
        )

    def _beat(self, beat: dict[str, Any]) -> None:
        self.exporter.beat(beat, self.frozen)

    def _ended(self, status: str, record: dict[str, Any], **why: str) -> None:
        """Tells metrics and logs; people read the closing table, or the line with which the job ends."""
        self.exporter.stands(record)
        self.exporter.ended(status)
        told = {name: record[name] for name in ("counts", "errors", "relative_cost", "seconds", "images_per_s")}
        told["standing"] = standing(record)
        suspect = [finding["words"] for finding in record.get("suspect", [])]
        self.events.tell(status, level=LEVELS[status], **told, **({"suspect": suspect} if suspect else {}), **why)

    @contextmanager
    def _failing_by_name(self, began: float) -> Iterator[None]:
        """Turns whatever ends the run into one line, and leaves the traceback beside the run record."""
        try:
            yield
        except RunStopped as stop:
            record = self._record("stopped", began, None, None) | {"reason": str(stop)}
            self._put_end(record)
            self._ended("stopped", record, reason=str(stop))
            raise RunStopped(f"run {self.run_id!r} stopped: {stop}; {self._again()}") from None
        except (KeyboardInterrupt, Exception) as error:
            line = one_line(error)
            record = self._record("failed", began, None, None) | {"failure": line}
            self._put_end(record, redact(traceback.format_exc()))
            self._ended("failed", record, reason=line)
            if isinstance(error, KeyboardInterrupt):
                raise type(error)(f"{error or 'interrupted'}; {self._again()}") from None
            raise RunError(f"run {self.run_id!r} failed: {line}; {self._again()}") from error

    def _again(self) -> str:
        return f"start it again with --run-id {self.run_id} to go on"

    def _put_end(self, record: dict[str, Any], trace: str | None = None) -> None:
        """Writes how this driver ended, unless the run is another one's by now."""
        # When the output itself does not take it, the line that the job ends with has to do.
        with suppress(BaseError, BotoCoreError, OSError):
            if self.ledger.is_current():
                self._put_status(record)
                if trace is not None:
                    self.store.write(commit.failure_key(self.run_id), trace.encode())
