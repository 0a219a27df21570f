"""Nets in int8 for CPUs: ONNX graphs of what lies between a net's merges, quantised once and run by ONNX Runtime.

Post-training quantisation as Jacob et al. have it (CVPR 2018): weights in int8 with a scale per output channel,
activations in uint8 with a scale per tensor, from the least and greatest values that some pictures cause. Weights have
seven bits, so that the sum of two products fits into 16: processors without VNNI add them so, and all of them score
alike.

Shapes: N images, S pixels a side, U units, K categories; X is whatever shape one unit's features have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.backbone import TRUNKS, Trunk
from models.folding import fold_norms
from models.group_net import GroupNet

LAST = "head"
"""Name of the piece that ends with the logits; the others are named by the cut at their end."""
PICTURES_PER_BATCH = 32
ONNX_OPSET = 21

Piece = Callable[[Tensor], Tensor]


class PieceTrunk(Trunk):
    """A trunk that only computes: of its classifier there are no modules, but functions between the merges.

    The first of them takes pixels, the last one gives logits.
    """

    def __init__(self, name: str, num_categories: int, pieces: Mapping[str, Piece]) -> None:
        """``pieces``: by the cut at its end, or ``LAST``."""
        nn.Module.__init__(self)  # what Trunk's own would build here is a classifier with weights of chance
        self.name, self.num_categories = name, num_categories
        self.spec = TRUNKS[name]
        self.segments = {"pixels": (), **self.spec.segments}
        ends = [cut for cut in self.cuts if cut in pieces]
        self.pieces = [(start, end, pieces[end or LAST]) for start, end in pairwise([None, *ends, None])]

    def normalise(self, pixels_NSS3: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The pixels: the first piece normalises them."""
        return pixels_NSS3

    def features(self, x: Tensor, *, after: str | None = None, upto: str | None = None) -> Tensor:
        """As of any trunk, where ``after`` and ``upto`` are merges of the net; without ``upto`` the logits."""
        starts = [start for start, *_ in self.pieces]
        for _, end, run in self.pieces[starts.index(after) :]:
            x = run(x)
            if end is not None and end == upto:
                break
        return x

    def head(self, features_NX: Tensor) -> Tensor:
        """What it is given: the last piece ends with the logits."""
        return features_NX


class OnnxPiece:
    """A graph in a session of its own, which is opened by the first call, with as many threads as torch has then."""

    def __init__(self, graph: bytes) -> None:
        self.graph = graph

    def __call__(self, units_UX: Tensor) -> Tensor:
        (found,) = self._session.run(None, {"units": units_UX.contiguous().numpy()})
        return torch.from_numpy(found)

    @cached_property
    def _session(self) -> Any:
        import onnxruntime  # noqa: PLC0415  nets in floats do without

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Threads that wait for work by spinning would take the cores that decode.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])


def quantise(net: GroupNet, pixels_NSS3: np.ndarray) -> dict[str, bytes]:
    """Graphs by piece, of a net in floats, in eval mode on the CPU, whose norms are folded on the way.

    Ranges are those of ``pixels_NSS3`` (uint8), tested alone and in consecutive groups of every size. Raises
    ImportError without the packages of the extra ``int8``.
    """
    fold_norms(net)
    ends = [*dict.fromkeys(point.cut for point in net.merge_points), None]
    modules = {end or LAST: _Between(net.trunk, start, end).eval() for start, end in pairwise([None, *ends])}
    recorded = {end: _Recorded(module) for end, module in modules.items()}
    observed = GroupNet(
        PieceTrunk(net.trunk.name, net.num_categories, recorded), net.merge_points, net.merge_name
    ).eval()
    with torch.inference_mode():
        for size in net.group_sizes:
            batch = max(1, PICTURES_PER_BATCH // size) * size
            for start in range(0, len(pixels_NSS3) // size * size, batch):
                pixels = torch.from_numpy(np.ascontiguousarray(pixels_NSS3[start : start + batch]))
                pixels = pixels[: len(pixels) // size * size]
                observed(pixels, torch.ones(len(pixels), dtype=torch.bool), size)
    return {end: _quantised(modules[end], recorded[end].seen) for end in modules}


class _Between(nn.Module):
    """What a trunk computes between two cuts, to be exported."""

    def __init__(self, trunk: Trunk, start: str | None, end: str | None) -> None:
        super().__init__()
        self.trunk, self.start, self.end = trunk, start, end

    def forward(self, units_UX: Tensor) -> Tensor:
        if self.start is None:
            units_UX = self._normalise(units_UX)
        units_UX = self.trunk.features(units_UX, after=self.start, upto=self.end)
        return units_UX if self.end else self.trunk.head(units_UX)

    def _normalise(self, pixels_NSS3: Tensor) -> Tensor:
        """As the trunk does, by whole rows of pixels: ONNX Runtime takes fifteen times as long for three values at a
        time."""
        side, spec = pixels_NSS3.shape[1], self.trunk.spec
        mean_R, std_R = (torch.tensor(channels).repeat(side) for channels in (spec.mean, spec.std))
        rows_NSR = (pixels_NSS3.flatten(2).float() - mean_R) / std_R
        return rows_NSR.unflatten(2, (side, 3)).permute(0, 3, 1, 2)


class _Recorded:
    """A piece in floats that keeps what it was given."""

    def __init__(self, run: nn.Module) -> None:
        self.run = run
        self.seen: list[np.ndarray] = []

    def __call__(self, units_UX: Tensor) -> Tensor:
        self.seen.append(units_UX.numpy())
        found: Tensor = self.run(units_UX)
        return found


def _quantised(module: nn.Module, seen: list[np.ndarray]) -> bytes:
    from onnxruntime.quantization import QuantType, quantize_static  # noqa: PLC0415  with onnx, only to make a net
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    units_UX = torch.from_numpy(seen[0][:2])
    program = torch.onnx.export(
        module, (units_UX,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("U")},), opset_version=ONNX_OPSET,
        input_names=["units"], output_names=["found"], verbose=False,
    )  # fmt: skip
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="dorfman-int8-") as folder:
        exported, floats, integers = (Path(folder, f"{name}.onnx") for name in ("exported", "floats", "integers"))
        program.save(exported, external_data=False)
        # Its symbolic shapes fail on a batch of any length; the shapes of ONNX's own inference are enough.
        quant_pre_process(exported, floats, skip_symbolic_shape=True)
        quantize_static(
            floats, integers, _Reader(seen), per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return integers.read_bytes()


class _Reader:
    """Batches as ONNX Runtime's quantisation asks for them."""

    def __init__(self, seen: list[np.ndarray]) -> None:
        self.batches = iter(seen)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"units": batch}
