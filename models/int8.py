"""Nets in int8 for CPUs: ONNX graphs of what lies between a net's merges, quantised once and run by ONNX Runtime.

Post-training quantisation as Jacob et al. have it (CVPR 2018): weights in int8 with a scale per output channel,
activations in uint8 with a scale per tensor, from the least and greatest values that some pictures cause. Weights have
seven bits, so that the sum of two products fits into 16: processors without VNNI add them so, and would saturate.

Shapes: N images, S pixels a side, U units, K categories; X is whatever shape one unit's features have.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
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

    @classmethod
    def of_graphs(cls, name: str, num_categories: int, graphs: Mapping[str, bytes]) -> PieceTrunk:
        """``graphs``: as ``quantise`` gives them."""
        return cls(name, num_categories, {end: OnnxPiece(graph) for end, graph in graphs.items()})

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
    """A graph in a session of its own, which is opened by the first call, with as many threads as torch has then.

    Raises torch.OutOfMemoryError where ONNX Runtime finds no memory for a batch.
    """

    def __init__(self, graph: bytes) -> None:
        self.graph = graph

    def __call__(self, units_UX: Tensor) -> Tensor:
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException  # noqa: PLC0415  as below

        try:
            (found,) = self._session.run(None, {"units": units_UX.contiguous().numpy()})
        except (Fail, RuntimeException) as error:
            if "allocate" not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from error
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
    """Graphs by piece, of a net in floats, in eval mode on the CPU.

    Ranges are those of ``pixels_NSS3`` (uint8), tested alone and in consecutive groups of every size. Raises
    ImportError without the packages of the extra ``int8``.
    """
    net = fold_norms(copy.deepcopy(net))
    ends = [*dict.fromkeys(point.cut for point in net.merge_points), None]
    modules = {end or LAST: _Between(net.trunk, start, end).eval() for start, end in pairwise([None, *ends])}
    return {end: _quantised(modules[end], partial(_units_before, end, net, modules, pixels_NSS3)) for end in modules}


def _units_before(
    end: str, net: GroupNet, modules: Mapping[str, nn.Module], pixels_NSS3: np.ndarray
) -> Iterator[np.ndarray]:
    """What the piece that ends at ``end`` is given, a batch at a time: all of it may be more than memory holds."""
    given: list[np.ndarray] = []

    def watched(units_UX: Tensor) -> Tensor:
        given.append(units_UX.numpy())
        found: Tensor = modules[end](units_UX)
        return found

    trunk = PieceTrunk(net.trunk.name, net.num_categories, {**modules, end: watched})
    observed = GroupNet(trunk, net.merge_points, net.merge_name).eval()
    for size in net.group_sizes:
        whole = len(pixels_NSS3) // size * size
        batch = max(1, PICTURES_PER_BATCH // size) * size
        for start in range(0, whole, batch):
            pixels = torch.from_numpy(pixels_NSS3[start : min(start + batch, whole)].copy())
            with torch.inference_mode():
                observed(pixels, torch.ones(len(pixels), dtype=torch.bool), size)
            yield from given
            given.clear()


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


def _quantised(module: nn.Module, units: Callable[[], Iterator[np.ndarray]]) -> bytes:
    from onnxruntime.quantization import QuantType, quantize_static  # noqa: PLC0415  with onnx, only to make a net
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    units_UX = torch.from_numpy(next(units())[:2])
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
            floats, integers, _Reader(units()), per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return _bare(integers.read_bytes())


def _bare(graph: bytes) -> bytes:
    """Without what torch notes down of the code that was exported: paths of this machine, on which digests would
    depend."""
    import onnx  # noqa: PLC0415  as above

    model = onnx.load_from_string(graph)
    inside = model.graph
    for part in (model, inside, *inside.node, *inside.initializer, *inside.input, *inside.output, *inside.value_info):
        part.doc_string = ""
        del part.metadata_props[:]
    bare: bytes = model.SerializeToString()
    return bare


class _Reader:
    """Batches as ONNX Runtime's quantisation asks for them."""

    def __init__(self, batches: Iterator[np.ndarray]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"units": batch}
