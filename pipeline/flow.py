"""The pipeline as Ray Data sees it: manifest, fetch, decode, stages, sink. The only file that imports it."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.exceptions import ExecutionTimeoutError

from pipeline.errors import RunError
from pipeline.labels.examples import PictureReader
from pipeline.listing.manifest import Shard
from pipeline.output.policy import REVIEW_ALL, Policy
from pipeline.output.sink import Sink
from pipeline.past.contents import Contents
from pipeline.plan import Plan, Pool
from pipeline.reporting.watch import Watch
from pipeline.steps.bank import Banks
from pipeline.steps.decode import Decoder
from pipeline.steps.device import accelerator
from pipeline.steps.fetch import Fetcher
from pipeline.steps.nets import Models
from pipeline.steps.rows import (
    GroupsToScores,
    Operator,
    RefsToReceipts,
    RefsToWindows,
    UrisToPictures,
    Watched,
    WindowsToReceipts,
    WindowsToWindows,
    build_device_decoder,
    build_scorer,
    build_stage,
)
from pipeline.store import Store

# Above what one window of hanging files may take its decoder: see decode.py.
NO_PROGRESS_SECONDS = 420
MAX_SOURCE_BLOCKS = 10_000
PICTURES_PER_ROW = 128
CALLS = 2
"""Of a fused actor at one time: while one waits for its decoder, the other fetches or is tested."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where the scan's own files are, and under which names attempts are written."""

    store: Store
    endpoint_url: str | None
    """Of the source."""
    attempts: str
    run_id: str
    salt: str
    models: Models
    contents: Contents | None = None
    """What earlier runs have judged."""
    banks: Banks | None = None
    """What is flagged by its hash, as soon as it is decoded."""
    fetcher: Callable[..., Fetcher] = Fetcher
    """What fetches; benchmarks have one that does not."""
    policy: Policy = REVIEW_ALL
    """What is recommended to do with what is flagged."""


def stream(plan: Plan, refs: pa.Table, destination: Destination) -> Iterator[dict[str, Any]]:
    """Receipts, as the sink writes them. Every operator sees a table of windows, one row each.

    Raises RunError when nothing moves any more, or when a window kills its actors again and again.
    """
    _configure()
    watch = Watch()
    steps = _steps(plan, destination)
    if plan.fused:
        whole: tuple = ([step.built for step in steps], watch)
        receipts = _apply(_source(refs), "scan", RefsToReceipts, plan.fused, whole, calls=CALLS)
    else:
        receipts = _source(refs)
        for step in steps:
            receipts = _apply(receipts, step.name, step.adapter, step.pool, (*step.built, watch))
    try:
        yield from receipts.iter_rows()
    except ExecutionTimeoutError as error:
        raise RunError(
            f"nothing has moved for {NO_PROGRESS_SECONDS} s: {watch.describe()}; look at these nodes and stores"
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One operator of the scan: how an actor builds it, and which pool and adapter it has when it stands alone."""

    name: str
    build: Callable
    args: tuple
    options: dict[str, Any]
    adapter: type[Watched]
    pool: Pool

    @property
    def built(self) -> tuple:
        return self.build, self.args, self.options, self.name


def _steps(plan: Plan, destination: Destination) -> list[_Step]:
    store, preparation, models = destination.store, plan.preparation, destination.models
    steps: list[_Step] = []

    def add(name: str, pool: Pool, adapter: type[Watched], build: Callable, *args: Any, **options: Any) -> None:
        steps.append(_Step(name=name, build=build, args=args, options=options, adapter=adapter, pool=pool))

    known = destination.contents
    fetcher = destination.fetcher
    add("fetch", preparation.fetch, RefsToWindows, fetcher, store, destination.endpoint_url, preparation, known)
    gpu_kind = accelerator() if plan.asks_for_gpus else None
    points = decode_points(plan)
    for stage in plan.stages:
        if stage.name in points:
            name = f"decode:{stage.name}"
            sized = (name, stage.input_size, preparation)
            if preparation.jpeg == "device":
                add(name, preparation.decode, WindowsToWindows, build_device_decoder, *sized, gpu_kind)
            else:
                banks = destination.banks if stage is plan.stages[0] else None
                add(name, preparation.decode, WindowsToWindows, Decoder, *sized, banks)
        told = {"final": stage is plan.stages[-1], "gpu_kind": gpu_kind, "cost": models.costs[stage.name]}
        add(stage.name, stage, WindowsToWindows, build_stage, stage, plan.categories, **told)
    named = (destination.attempts, destination.run_id, plan, models.versions, destination.salt, destination.policy)
    add("write", preparation.write, WindowsToReceipts, Sink, store, *named)
    return steps


def _apply(
    data: Dataset,
    name: str,
    adapter: type[Operator] | type[RefsToReceipts],
    pool: Pool,
    operator: tuple,
    calls: int = 1,
) -> Dataset:
    """One operator: an actor pool that calls ``adapter(*operator)`` with batches of rows, ``calls`` at a time."""
    return data.map_batches(
        # Ray calls actors and metrics after the class: several operators of one name could not be told apart.
        type(name, (adapter,), {}),
        fn_constructor_args=operator,
        batch_size=pool.windows_per_call,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        resources=pool.resources or None,
        compute=ActorPoolStrategy(
            min_size=pool.actors.min,
            max_size=pool.actors.max,
            enable_true_multi_threading=calls > 1,
            max_concurrent_calls_per_actor=calls,
        ),
    )


def decode_points(plan: Plan) -> list[str]:
    """Stages with a decode operator before them: those that want another size than the pixels have."""
    sizes = [None, *(stage.input_size for stage in plan.stages)]
    return [stage.name for stage, before in zip(plan.stages, sizes, strict=False) if stage.input_size != before]


def pools(plan: Plan) -> list[Pool]:
    """Every actor pool that ``stream`` makes for a plan."""
    if plan.fused:
        return [plan.fused]
    preparation = plan.preparation
    decoders = [preparation.decode for _ in decode_points(plan)]
    return [preparation.fetch, *decoders, *plan.stages, preparation.write]


def read_pictures(uris: list[str], side: int, endpoint_url: str | None, pool: Pool) -> Iterator[dict[str, Any]]:
    """Pictures by uri, as ``schema.PICTURES`` rows in no order: what training learns from."""
    _configure()
    starts = range(0, len(uris), PICTURES_PER_ROW)
    chunks = pa.table({"first": list(starts), "uris": [uris[start : start + PICTURES_PER_ROW] for start in starts]})
    reader: tuple = (PictureReader, (side, endpoint_url), {})
    yield from _apply(_source(chunks), "read", UrisToPictures, pool, reader).iter_rows()


def score_rows(rows: pa.Table, scorer: tuple, pool: Pool) -> Iterator[dict[str, Any]]:
    """Rows of ``schema.SCORING`` with their scores, in no order. ``scorer``: what a ``GroupScorer`` is made of."""
    _configure()
    yield from _apply(_source(rows), "score", GroupsToScores, pool, (build_scorer, scorer, {})).iter_rows()


def window_refs(store: Store, shards: list[Shard]) -> pa.Table:
    """Where each window of these shards stands in the manifest: a few bytes a window."""
    return pa.concat_tables([_refs_of(store, shard) for shard in shards])


def _refs_of(store: Store, shard: Shard) -> pa.Table:
    body = io.BytesIO(store.read(shard.key, shard.sha256))
    windows = pq.read_table(body, columns=["window"])["window"].to_numpy()
    values, first, counts = np.unique(windows, return_index=True, return_counts=True)
    there = {"shard": shard.index, "key": shard.key, "sha256": shard.sha256}
    same = {name: pa.repeat(value, len(values)) for name, value in there.items()}
    return pa.table(same | {"window": values, "first_row": first, "rows": counts})


def _source(refs: pa.Table) -> Dataset:
    # One table would be one block, and so one task for everything. Not from_arrow: that runs a task to look at each of
    # them, for which processes start that nothing else needs.
    rows = math.ceil(refs.num_rows / MAX_SOURCE_BLOCKS)
    return ray.data.from_blocks([refs.slice(start, rows) for start in range(0, refs.num_rows, rows)])


def _configure() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # A block that fails must fail the run: losing it silently would lose its images.
    context.max_errored_blocks = 0
    # Not "UDF failed to process a data block", but what it raised.
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
