"""From host memory to a stage's device, beside what the device is doing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Upload:
    """Arrays as tensors on ``device``.

    On CUDA they go through pinned memory and a stream of their own, so that a batch travels while the one before it is
    tested. A batch's memory there is free again when whatever was queued behind it has run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, array: np.ndarray) -> Tensor:
        here = torch.from_numpy(array)
        if self.stream is None:
            return here.to(self.device)
        with torch.cuda.stream(self.stream):
            # torch keeps the pinned copy until this stream has read it.
            there = here.pin_memory().to(self.device, non_blocking=True)
        reader = torch.cuda.current_stream(self.device)
        reader.wait_stream(self.stream)
        there.record_stream(reader)
        return there
