"""A stage: one net tests the undecided images of some windows, round after round. Knows nothing of Ray.

Groups are formed inside a window (``groups.py``). So a verdict depends on the window, the plan and the
weights alone, and not on which windows share a call.

Shapes: N images, G groups, K categories.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from models.cost import NetCost, segment_gmac
from models.folding import fold_norms
from models.group_net import Kept
from models.weights import load_net
from pipeline.errors import RunError
from pipeline.plan import StageSpec
from pipeline.steps.device import accelerator, open_device
from pipeline.steps.graphs import Graphs
from pipeline.steps.groups import Group, form_groups, slots
from pipeline.steps.layout import padded
from pipeline.steps.nets import StageCost, check_stage, stage_cost
from pipeline.steps.upload import Upload
from pipeline.window import GroupTest, Window, Work

# By id of a window: in which row of its pixels the image of a position is, decided or not.
PixelRows = dict[int, dict[int, int]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class GroupStage:
    """``windows -> windows``. Clears what it finds negative; the final stage flags what it finds positive."""

    def __init__(
        self,
        spec: StageSpec,
        categories: tuple[str, ...],
        *,
        final: bool,
        gpu_kind: str | None = None,
        cost: StageCost | None = None,
    ) -> None:
        """``gpu_kind``: the device of a stage with GPUs, as told by the driver; ``cost``: as it has been counted there.

        Raises RunError when there is no such device.
        """
        self.spec = spec
        self.final = final
        self.net, card = load_net(spec.model)
        check_stage(spec, categories, card)
        self.columns = [card.categories.index(category) for category in categories]
        self.thresholds = np.array([spec.thresholds[category] for category in categories]).T
        self.cost = cost or stage_cost(spec, NetCost(segment_gmac(self.net, spec.input_size), card.merge_points))
        fold_norms(self.net)
        # Halved whenever the device runs out of memory.
        self.batch_images = spec.batch_images
        self.device = torch.device("cpu")
        if spec.num_gpus:
            self.device = open_device(gpu_kind or accelerator(), f"stage {spec.name!r}")
        self.dtype = DTYPES[spec.dtype]
        # float32 means float32: TF32 would move scores by more than a change of batch does.
        torch.backends.cudnn.allow_tf32 = False
        self.net.to(self.device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.upload = Upload(self.device)
        self.graphs = Graphs(self.device)
        self.transfer_seconds = 0.0
        """Spent since the last account on bringing pixels to the device."""
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, round(spec.num_cpus)))

    def __call__(self, windows: list[Window]) -> list[Window]:
        """Raises RunError when not even one group, or one window, fits into the device's memory."""
        before = [_Undecided(window) for window in windows]
        try:
            return self._test_all(windows)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # Out of the handler: the error held on to the tensors of the call.
        for window in before:
            window.restore()
        if self.device.type == "cuda":
            self.graphs.forget()
            torch.cuda.empty_cache()
        if self.batch_images >= 2 * self.spec.rounds[0]:
            self.batch_images //= 2
            return self(windows)
        if len(windows) > 1:
            half = len(windows) // 2
            return self(windows[:half]) + self(windows[half:])
        raise RunError(
            f"stage {self.spec.name!r}: window {windows[0].window} does not fit into the memory of its device even "
            f"when one group of {self.spec.rounds[0]} is tested at a time; give the plan smaller windows or rounds, "
            "or the stage a device of its own"
        )

    @torch.inference_mode()
    def _test_all(self, windows: list[Window]) -> list[Window]:
        self.transfer_seconds = 0.0  # a call that ran out of memory has left some
        had_pixels = [window.undecided for window in windows]
        pixel_rows = {
            id(window): {position: row for row, position in enumerate(before)}
            for window, before in zip(windows, had_pixels, strict=True)
        }
        if self.spec.groupings == 2:
            self._test_twice(windows, pixel_rows)
        else:
            self._test_in_rounds(windows, pixel_rows)
        for window, before in zip(windows, had_pixels, strict=True):
            if self.final:
                for position in window.undecided:
                    window.images[position].decide("flagged")
            window.keep_pixels(before)
        return windows

    def _test_in_rounds(self, windows: list[Window], pixel_rows: PixelRows) -> None:
        """Ever smaller groups: what one round finds positive is split for the next.

        Groups of a window that falls back are tested for the first time in the round of their size.
        """
        done: list[_Tested] = []
        waiting: list[Group] = []
        for number, size in enumerate(self.spec.rounds):
            began = time.perf_counter()
            entered = [len(window.undecided) for window in windows]
            if number == 0:
                done, waiting = self._test_first_round(windows, pixel_rows)
            else:
                done = [self._test_again(number, done)]
                if self.spec.burst is not None and size == self.spec.burst.group_size:
                    done.append(self._test_fresh(number, waiting, pixel_rows))
            seconds = time.perf_counter() - began
            fell_back = {id(group.window) for group in waiting if number == 0}
            self._account(number, windows, entered, done, seconds, fell_back)

    def _test_first_round(self, windows: list[Window], pixel_rows: PixelRows) -> tuple[list[_Tested], list[Group]]:
        """The first round, and the smaller groups that wait for theirs because their window falls back.

        Whether it does depends on its own first groups alone, so its verdicts do not depend on the call.
        """
        formed = [form_groups(window, self.spec) for window in windows]
        rule = self.spec.burst
        if rule is None:
            return [self._test_fresh(0, list(chain(*formed)), pixel_rows)], []
        first = self._test_fresh(0, list(chain(*(groups[: rule.first_groups] for groups in formed))), pixel_rows)
        positives = Counter(id(group.window) for group in first.positives)
        planned, waiting = [], []
        for window, groups in zip(windows, formed, strict=True):
            others = groups[rule.first_groups :]
            if positives[id(window)] < rule.positive:
                planned += others
            else:
                waiting += [part for group in others for part in group.fall_back(rule.group_size)]
        return [first, self._test_fresh(0, planned, pixel_rows)], waiting

    def _test_fresh(self, number: int, groups: list[Group], pixel_rows: PixelRows) -> _Tested:
        """Tests groups from their pixels."""
        size = self.spec.rounds[number]
        logits_GK, batches = self._test(groups, size, pixel_rows, keep=not self._is_last(number))
        positive_G = self._judge(number, groups, self._to_scores(logits_GK))
        kept = Kept() if self._is_last(number) else self._keep_positive(batches, positive_G, size)
        return _Tested(groups, np.full(len(groups), self.cost.fresh[number]), positive_G, kept)

    def _test_again(self, number: int, before: list[_Tested]) -> _Tested:
        """Tests the parts of positive groups from the features that their tests have kept."""
        size = self.spec.rounds[number]
        groups = [part for tested in before for group in tested.positives for part in group.split(size)]
        kept = Kept.join([tested.kept for tested in before])
        logits_GK = self._retest(kept, size)
        # A part of a positive group may hold holes only: it has a score, but it is no test.
        present_G = np.array([group.size > 0 for group in groups], dtype=bool)
        positive_G = self._judge(number, groups, self._to_scores(logits_GK)) & present_G
        kept = Kept() if self._is_last(number) else _take(kept, positive_G, size)
        return _Tested(groups, np.where(present_G, self.cost.rounds[number], 0.0), positive_G, kept)

    def _is_last(self, number: int) -> bool:
        return number + 1 == len(self.spec.rounds)

    def _test_twice(self, windows: list[Window], pixel_rows: PixelRows) -> None:
        """Two groupings at once, non-adaptive: an image goes on when both of its groups are positive.

        The second grouping starts from the features the first one has kept, so the layers before the
        first merge are paid for once.
        """
        began = time.perf_counter()
        entered = [len(window.undecided) for window in windows]
        (size,) = self.spec.rounds
        first = [group for window in windows for group in form_groups(window, self.spec)]
        second = [group for window in windows for group in form_groups(window, self.spec, across=True)]
        logits_GK, batches = self._test(first, size, pixel_rows, keep=True)
        again_GK = self._regroup([features.units[1] for features in batches], first, second, size)
        # Both groupings saw every image that entered, whoever the first one clears.
        positive = np.concatenate(
            [self._judge(0, first, self._to_scores(logits_GK)), self._judge(0, second, self._to_scores(again_GK))]
        )
        gmac_G = np.repeat([self.cost.rounds[0], self.cost.regroup], [len(first), len(second)])
        seconds = time.perf_counter() - began
        self._account(0, windows, entered, [_Tested(first + second, gmac_G, positive, Kept())], seconds)

    def _regroup(self, batches: list[Tensor], first: list[Group], second: list[Group], size: int) -> Tensor:
        """Logits (G, K) of the second grouping, from the features (N, X) per batch that the first one has kept."""
        places = ((group, position) for group in first for position in group.members)
        row_of = {(id(group.window), position): row for row, (group, position) in enumerate(places)}
        logits = [self._no_logits()]
        width = self._groups_per_batch(size)
        for start in range(0, len(second), width):
            members = second[start : start + width]
            shape = padded(len(members), width) * size
            rows = np.zeros(shape, dtype=np.int64)
            present_N, filled = self._nobody_present(shape)
            for slot, group, position in slots(members, size):
                rows[slot] = row_of[id(group.window), position]
                filled[slot] = True
            units_NX = _gather(batches, rows)
            logits.append(self.net.regroup(units_NX, self.upload(present_N), size))
        return torch.cat(logits)[: len(second)]

    def _test(self, groups: list[Group], size: int, pixel_rows: PixelRows, *, keep: bool) -> tuple[Tensor, list[Kept]]:
        """Logits (G, K) of tests from pixels, and per device batch what it keeps for later rounds."""
        logits, batches = [self._no_logits()], []
        for pixels_NSS3, present_N in self._batches(groups, size, pixel_rows):
            logits_GK, features = self.test_batch(pixels_NSS3, present_N, size, keep=keep)
            logits.append(logits_GK)
            batches.append(features)
        return torch.cat(logits)[: len(groups)], batches

    def test_batch(self, pixels_NSS3: Tensor, present_N: Tensor, size: int, *, keep: bool) -> tuple[Tensor, Kept]:
        """Logits (N / size, K) of one device batch of consecutive groups, uint8, and what later rounds go on from."""
        parts = self.net.group_sizes[: self.net.depth_of(size)] if keep else ()

        def run(pixels_NSS3: Tensor, present_N: Tensor) -> tuple[Tensor, ...]:
            images_NCHW = self.net.trunk.normalise(pixels_NSS3, self.dtype)
            logits_GK, kept = self.net.test(images_NCHW, present_N, size)
            return logits_GK, *(kept.units[part] for part in parts), *(kept.present[part] for part in parts)

        logits_GK, *features = self.graphs(("test", size, keep), run, pixels_NSS3, present_N)
        units, present = features[: len(parts)], features[len(parts) :]
        return logits_GK, Kept(dict(zip(parts, units, strict=True)), dict(zip(parts, present, strict=True)))

    def _retest(self, kept: Kept, size: int) -> Tensor:
        """Logits (G, K) of a later round, from kept features."""
        logits = [self._no_logits()]
        if kept.units:
            width = self._groups_per_batch(size)
            for units_UCHW in kept.units[size].split(width):
                padded_UCHW = _pad(units_UCHW, padded(len(units_UCHW), width))
                (logits_UK,) = self.graphs(("retest", size), lambda units: (self.net.retest(units, size),), padded_UCHW)
                logits.append(logits_UK[: len(units_UCHW)])
        return torch.cat(logits)

    def _batches(self, groups: list[Group], size: int, pixel_rows: PixelRows) -> Iterator[tuple[Tensor, Tensor]]:
        """Device batches, of few shapes (``layout.py``): pixels (N, S, S, 3) and which are present (N,)."""
        side = self.spec.input_size
        per_batch = self._groups_per_batch(size)
        for start in range(0, len(groups), per_batch):
            members = groups[start : start + per_batch]
            shape = padded(len(members), per_batch) * size
            began = time.perf_counter()
            pixels_NSS3 = self.upload.empty((shape, side, side, 3), torch.uint8)
            present_N, filled = self._nobody_present(shape)
            _fill(pixels_NSS3.numpy(), filled, slots(members, size), pixel_rows)
            there = self.upload(pixels_NSS3), self.upload(present_N)
            self.transfer_seconds += time.perf_counter() - began
            yield there

    def _nobody_present(self, shape: int) -> tuple[Tensor, np.ndarray]:
        """(N,) of False to upload, and the same memory to write to."""
        present_N = self.upload.empty((shape,), torch.bool).zero_()
        return present_N, present_N.numpy()

    def _groups_per_batch(self, size: int) -> int:
        return max(1, self.batch_images // size)

    def _keep_positive(self, batches: list[Kept], positive: np.ndarray, size: int) -> Kept:
        """The features of the positive groups, gathered from the batches of their test."""
        width = self._groups_per_batch(size)
        return Kept.join(
            [
                _take(features, positive[index * width : (index + 1) * width], size)
                for index, features in enumerate(batches)
            ]
        )

    def _no_logits(self) -> Tensor:
        return torch.empty(0, self.net.num_categories, device=self.device, dtype=self.dtype)

    def _to_scores(self, logits_GK: Tensor) -> np.ndarray:
        # Not before: while this waits for the device, no batch of a round would be on its way.
        return torch.sigmoid(logits_GK.float().cpu()[:, self.columns]).numpy()

    def _judge(self, number: int, groups: list[Group], scores_GK: np.ndarray) -> np.ndarray:
        """Records the test with its members, clears those of negative groups; which are positive (G,)."""
        finite = np.isfinite(scores_GK).all(axis=1)
        positive = (scores_GK >= self.thresholds[number]).any(axis=1) & finite
        for group, scores, hit, sound in zip(groups, scores_GK.tolist(), positive, finite, strict=True):
            images = group.images
            test = GroupTest(
                stage=self.spec.name,
                round=number,
                group_id=group.number,
                group_size=group.size,
                scores=scores,
                burst=group.burst,
            )
            for image in images:
                image.tests.append(test)
                if not sound:
                    image.fail("score_not_finite", f"stage {self.spec.name!r} scored {scores}")
                elif not hit:
                    image.decide("cleared")
        return positive

    def _account(
        self,
        number: int,
        windows: list[Window],
        entered: list[int],
        done: list[_Tested],
        seconds: float,
        fell_back: Set[int] = frozenset(),
    ) -> None:
        """One Work entry per window; a group that cost nothing was no test. The call's seconds are shared by images.

        ``fell_back``: ids of the windows that did so in this round.
        """
        groups = [group for tested in done for group in tested.groups]
        gmac_G = np.concatenate([tested.gmac_G for tested in done])
        positive_G = np.concatenate([tested.positive_G for tested in done])
        transfer_seconds, self.transfer_seconds = self.transfer_seconds, 0.0
        for window, images_in in zip(windows, entered, strict=True):
            share = images_in / max(1, sum(entered))
            mine = np.array([group.window is window for group in groups], dtype=bool)
            window.work.append(
                Work(
                    operator=self.spec.name,
                    round=number,
                    images_in=images_in,
                    tests=int((mine & (gmac_G > 0)).sum()),
                    positive_tests=int((mine & positive_G).sum()),
                    images_out=len(window.undecided),
                    gmac=float(gmac_G[mine].sum()),
                    seconds=seconds * share,
                    transfer_seconds=transfer_seconds * share,
                    bursts=int(id(window) in fell_back),
                )
            )


@dataclass(frozen=True, slots=True)
class _Tested:
    """Groups after a test of each: what it cost, whether it was positive, and what the positive ones have kept."""

    groups: list[Group]
    gmac_G: np.ndarray
    positive_G: np.ndarray
    kept: Kept

    @property
    def positives(self) -> list[Group]:
        return [group for group, hit in zip(self.groups, self.positive_G, strict=True) if hit]


class _Undecided:
    """A window as a stage found it, to begin again from."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.pixels = window.pixels
        self.steps = len(window.work)
        images = (window.images[position] for position in window.undecided)
        self.images = [(image, image.payload, len(image.tests)) for image in images]

    def restore(self) -> None:
        self.window.pixels = self.pixels
        del self.window.work[self.steps :]
        for image, payload, tests in self.images:
            image.outcome = image.error_code = image.error_detail = None
            image.payload = payload
            del image.tests[tests:]


def _fill(
    pixels_NSS3: np.ndarray, present_N: np.ndarray, places: Iterable[tuple[int, Group, int]], pixel_rows: PixelRows
) -> None:
    """Copies each member's pixels to its slot; slots of nobody are black. Neighbours of one window go together."""
    runs: list[tuple[int, Group, list[int]]] = []
    for slot, group, position in places:
        row = pixel_rows[id(group.window)][position]
        if runs and runs[-1][1].window is group.window and slot == runs[-1][0] + len(runs[-1][2]):
            runs[-1][2].append(row)
        else:
            runs.append((slot, group, [row]))
    for first, group, rows in runs:
        assert group.window.pixels is not None
        there = slice(first, first + len(rows))
        # Any mode but "raise", which would fill a buffer first.
        np.take(group.window.pixels, rows, axis=0, out=pixels_NSS3[there], mode="clip")
        present_N[there] = True
    pixels_NSS3[~present_N] = 0


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has an error of its own for it, the CPU's allocator has not."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _take(kept: Kept, positive: np.ndarray, size: int) -> Kept:
    rows = torch.from_numpy(np.flatnonzero(positive))
    features = next(iter(kept.units.values()), None)
    return kept if features is None else kept.take(rows.to(features.device), size)


def _gather(batches: list[Tensor], rows: np.ndarray) -> Tensor:
    """Rows of the batches as if these were one tensor, which would double the memory; all batches are of one length."""
    length = len(batches[0])
    return torch.stack([batches[row // length][row % length] for row in rows.tolist()])


def _pad(units: Tensor, length: int) -> Tensor:
    if len(units) == length:
        return units
    return torch.cat([units, units.new_zeros(length - len(units), *units.shape[1:])])
