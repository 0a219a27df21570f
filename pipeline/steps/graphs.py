"""What a stage launches again and again on a CUDA device, recorded once for each shape and then replayed whole."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Runs functions of tensors; on CUDA as graphs, whose kernels are those of the function itself.

    A small net has some dozens of kernels that each take less time than their launch from Python. A graph is recorded
    when its key and shapes are seen for the second time: what comes once is not worth it, and the first call has the
    libraries choose their algorithms. Graphs of one instance share their memory, so results are copied out.
    Elsewhere functions are just called. For actors with one call at a time: who records must be alone on the device in
    this process, for a recording ends when another thread waits for all of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: set[Hashable] = set()
        self.recorded: dict[Hashable, _Recorded] = {}
        self.pool: Any = None
        """Torch's handle of the memory that they share."""

    def __call__(self, key: Hashable, run: Run, *inputs: Tensor) -> tuple[Tensor, ...]:
        """``run(*inputs)``; ``key`` names everything else that it depends on.

        Raises what it raises, torch.OutOfMemoryError among it.
        """
        if self.device.type != "cuda":
            return run(*inputs)
        key = (key, *((tuple(given.shape), given.dtype) for given in inputs))
        if key not in self.seen:
            self.seen.add(key)
            return run(*inputs)
        if key not in self.recorded:
            self.recorded[key] = self._record(run, inputs)
        ready = self.recorded[key]
        for fixed, given in zip(ready.inputs, inputs, strict=True):
            fixed.copy_(given)
        ready.graph.replay()
        return tuple(output.clone() for output in ready.outputs)

    def forget(self) -> None:
        """Gives the memory of all graphs back, for a device that is short of it."""
        self.recorded.clear()
        self.seen.clear()
        self.pool = None

    def _record(self, run: Run, inputs: tuple[Tensor, ...]) -> _Recorded:
        fixed = tuple(torch.empty_like(given) for given in inputs)
        graph = torch.cuda.CUDAGraph()
        # Threads of libraries may allocate meanwhile, and that is no part of the graph.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = run(*fixed)
        self.pool = self.pool or graph.pool()
        return _Recorded(graph, fixed, outputs)
