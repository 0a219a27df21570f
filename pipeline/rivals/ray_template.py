"""Ray Data's documented pattern of batch classification: read_images, preprocess, an actor pool that predicts, Parquet.

After "Image Classification Batch Inference with PyTorch" in Ray's documentation. Prints nothing; OUTPUT gets ``path``
and ``scores``. ``--actors``: of the pool that predicts, each with one thread.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import numpy as np
import ray
import torch

from pipeline.rivals.net import Classifier, preprocess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("source", "output", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--categories", nargs="+", required=True)
    for name in ("side", "actors", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    transform = preprocess(told.model, told.side)

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        return {"path": row["path"], "image": transform(row["image"]).numpy()}

    class Predictor:
        def __init__(self) -> None:
            self.classifier = Classifier(told.model, told.categories, threads=1, device=told.device)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            scores_NK = self.classifier(torch.from_numpy(np.stack(list(batch["image"]))))
            return {"path": batch["path"], "scores": scores_NK.numpy()}

    (
        ray.data.read_images(told.source, include_paths=True, mode="RGB", ignore_missing_paths=False,
                             file_extensions=["jpg", "jpeg", "png", "webp"])
        .map(prepare)
        .map_batches(Predictor, batch_size=told.batch, num_gpus=0 if told.device == "cpu" else 1 / told.actors,
                     compute=ray.data.ActorPoolStrategy(size=told.actors))
        .write_parquet(told.output)
    )  # fmt: skip
    ray.shutdown()


if __name__ == "__main__":
    main()
