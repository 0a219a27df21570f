"""A loop over a torch DataLoader: workers decode and preprocess, the main process predicts, a Parquet file at the end.

OUTPUT gets ``path`` and ``scores``. ``--workers``: of the loader; ``--threads``: of torch in the main process.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.rivals.net import Classifier, preprocess

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class Pictures(Dataset):
    def __init__(self, folder: Path, model: str, side: int) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        self.transform = preprocess(model, side)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path = self.paths[index]
        with Image.open(path) as picture:
            return self.transform(picture.convert("RGB")), str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--categories", nargs="+", required=True)
    for name in ("side", "workers", "threads", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()

    pictures = Pictures(told.source, told.model, told.side)
    loader = DataLoader(pictures, batch_size=told.batch, num_workers=told.workers, pin_memory=told.device != "cpu")
    classifier = Classifier(told.model, told.categories, told.threads, told.device)
    paths: list[str] = []
    scores: list[list[float]] = []
    for images, names in loader:
        scores += classifier(images).tolist()
        paths += names
    told.output.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"path": paths, "scores": scores}), told.output / "scores.parquet")


if __name__ == "__main__":
    main()
