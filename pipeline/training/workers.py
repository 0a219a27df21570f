"""Several processes that train one net together: Ray Train places them and joins their gradients.

The only file that imports ``ray.train``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device, prepare_model
from ray.util.queue import Empty, Queue

from models.group_net import GroupNet
from models.training import Progress
from pipeline.errors import RunError
from pipeline.plan import Actors, Pool
from pipeline.run.cluster import ray_session


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one worker trains: which of how many, on what, and what joins their gradients."""

    rank: int = 0
    workers: int = 1
    device: str = "cpu"
    parallel: Callable[[GroupNet], torch.nn.Module] = lambda net: net


def run_workers(
    task: Callable[..., None],
    *,
    workers: int,
    gpu: bool,
    threads: int,
    storage: Path,
    on_progress: Callable[[Progress], None],
) -> None:
    """Runs ``task(on_progress, place)`` in every worker. Raises RunError when one fails.

    Ray would try again, whatever the reason; started again by its user, a training goes on from its checkpoint.
    """
    pool = Pool(num_cpus=threads, num_gpus=int(gpu), actors=Actors(min=workers, max=workers))
    with ray_session([pool], f"training with {workers} workers"):
        news: Queue = Queue(actor_options={"num_cpus": 0})
        trainer = TorchTrainer(
            _work,
            train_loop_config={"task": task, "news": news, "workers": workers},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpu,
                resources_per_worker={"CPU": threads} | ({"GPU": 1} if gpu else {}),
            ),
            run_config=RunConfig(storage_path=str(storage)),
        )
        with ThreadPoolExecutor(1) as executor:
            future = executor.submit(trainer.fit)
            while not future.done() or not news.empty():
                try:
                    on_progress(news.get(timeout=0.5))
                except Empty:
                    continue
        try:
            future.result()
        except (RayError, TrainingFailedError) as error:
            raise RunError(f"training with {workers} workers failed: {_reason(error)}") from error


def _work(job: dict[str, Any]) -> None:
    rank = ray.train.get_context().get_world_rank()
    place = Place(rank=rank, workers=job["workers"], device=str(get_device()), parallel=prepare_model)
    job["task"](job["news"].put, place)


def _reason(error: Exception) -> str:
    """The last line that says something: Ray wraps a worker's error in its own and in their tracebacks."""
    failures = getattr(error, "worker_failures", {})
    cause = next(iter(failures.values()), error)
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
