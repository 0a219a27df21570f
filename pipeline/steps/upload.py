"""From host memory to a stage's device, beside what the device is doing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Upload:
    """Tensors of the host, made by ``empty``, on ``device``.

    On CUDA they lie in pinned memory and travel on a stream of their own, so that a batch is on its way while the one
    before it is tested. A batch's memory is free again when whatever was queued behind it has run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory to write a batch into. torch gives it to nobody else before it has been read."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.stream is not None)

    def __call__(self, here: Tensor) -> Tensor:
        if self.stream is None:
            return here.to(self.device)
        with torch.cuda.stream(self.stream):
            there = here.to(self.device, non_blocking=True)
        reader = torch.cuda.current_stream(self.device)
        reader.wait_stream(self.stream)
        there.record_stream(reader)
        return there
