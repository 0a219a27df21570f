"""The Ray session a job runs in: the cluster that is there, or one of its own; and whether it is large enough."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import ray
from ray.autoscaler.sdk import request_resources

from pipeline.errors import RunError
from pipeline.plan import Pool
from pipeline.run.endings import catch_sigterm

# How long a cluster may take to grow from nothing to the pools' minimum.
SCALE_UP_SECONDS = 600


_starts: list[Future] = []
"""The start of this process's own Ray that is under way, if one is: Ray is one for the process too."""


METRICS_SECONDS = 30
"""How long a Ray of our own stays for the last scrape: twice what Prometheus is mostly told to wait between two."""


@contextmanager
def starting_ray(metrics_port: int | None = None) -> Iterator[None]:
    """Starts a Ray on this machine for the ``ray_session`` within, while the caller goes on importing.

    ``metrics_port``: where Prometheus scrapes it, which then gets the time to. Does nothing where there is one already,
    or where RAY_ADDRESS names one: joining takes no time.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        yield
        return
    with ThreadPoolExecutor(1) as thread:
        start = thread.submit(_start, metrics_port)
        _starts.append(start)
        try:
            yield
        finally:
            _starts.remove(start)
            if start.exception() is None:  # else whoever needed it was told
                if metrics_port:
                    time.sleep(METRICS_SECONDS)
                _shutdown()


def _start(metrics_port: int | None = None) -> None:
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # "local": or it would join, or trip over, whatever cluster happens to run on this machine.
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _metrics_export_port=metrics_port,
    )


@contextmanager
def ray_session(pools: Sequence[Pool], what: str, row_bytes: int = 0) -> Iterator[None]:
    """Joins the cluster that RAY_ADDRESS or the job names; else starts one here for as long as it is needed.

    Raises RunError when the minimum of ``pools``, those of ``what``, does not fit, or when a row of
    ``row_bytes`` and what an operator makes of it do not fit into a node's object store.
    """
    for start in _starts:
        start.result()
        catch_sigterm()
    if ray.is_initialized():
        _check_resources(pools, what)
        _check_object_store(row_bytes, what)
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        patience = SCALE_UP_SECONDS
    else:
        _start()
        patience = 0
    catch_sigterm()
    try:
        _check_resources(pools, what, patience)
        _check_object_store(row_bytes, what)
        yield
    finally:
        if patience:
            request_resources(bundles=[])  # or the nodes would stay for ever
        _shutdown()


def _shutdown() -> None:
    ray.shutdown()
    catch_sigterm()


def cluster_size() -> tuple[float, float] | None:
    """CPUs and GPUs of all nodes, as Ray reports them at this moment; None where no Ray has been joined."""
    if not ray.is_initialized():
        return None  # or Ray would start one to answer
    there = ray.cluster_resources()
    return there.get("CPU", 0.0), there.get("GPU", 0.0)


def _check_resources(pools: Sequence[Pool], what: str, patience: float = 0) -> None:
    """Pools whose minimum does not fit would make Ray wait for ever; a cluster is given time to grow."""
    if patience:
        request_resources(bundles=[pool.needs for pool in pools for _ in range(pool.actors.min)])
    deadline = time.monotonic() + patience
    while lacking := _lacking(pools):
        if time.monotonic() >= deadline:
            raise RunError(f"{what} needs {lacking}")
        time.sleep(2)


def _lacking(pools: Sequence[Pool]) -> str:
    """What the pools need and Ray has not, in words; empty when they fit."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind in sorted({kind for pool in pools for kind in pool.needs}):
        wanted = [pool.needs.get(kind, 0) for pool in pools]
        field, unit = (f"num_{kind.lower()}s", f"{kind}s") if kind in ("CPU", "GPU") else ("resources", repr(kind))
        need = sum(pool.actors.min * amount for pool, amount in zip(pools, wanted, strict=True))
        room = sum(node.get(kind, 0) for node in nodes)
        largest = max((node.get(kind, 0) for node in nodes), default=0)
        if need > room + 1e-9:
            return (
                f"at least {need:g} {unit} for its pools, but Ray has {room:g}; lower {field} or "
                "actors.min, or add nodes"
            )
        if max(wanted) > largest + 1e-9:
            return (
                f"{max(wanted):g} {unit} for one actor, but no node has more than {largest:g}; lower "
                f"{field}, or add larger nodes"
            )
    for needs in (pool.needs for pool in pools):
        if not any(all(node.get(kind, 0) + 1e-9 >= amount for kind, amount in needs.items()) for node in nodes):
            together = ", ".join(f"{kind}: {amount:g}" for kind, amount in needs.items())
            return f"one node with {{{together}}} for one actor, but no node has all of it; lower it, or add such nodes"
    return ""


def _check_object_store(row_bytes: int, what: str) -> None:
    """Ray spills what it cannot hold, but an operator's row and its answer must be there at one time."""
    room = min(
        (int(node["Resources"].get("object_store_memory", 0)) for node in ray.nodes() if node["Alive"]), default=0
    )
    if 2 * row_bytes > room:
        raise RunError(
            f"{what} moves windows of up to {row_bytes:,} bytes, but a node's object store has only {room:,}; "
            "lower window.images or window.megabytes, or give Ray more object_store_memory"
        )
