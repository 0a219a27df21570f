"""The device behind num_gpus: named in one place, and missed in one line."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import RunError, UsageError
from pipeline.plan import StageSpec, load_plan
from pipeline.steps import device
from pipeline.steps.device import accelerator, open_device
from pipeline.steps.nets import check_models
from pipeline.steps.rows import WindowsToWindows
from pipeline.steps.scoring import GroupScorer
from pipeline.steps.stages import GroupStage
from pipeline.window import windows_to_table

SPEC = StageSpec(
    name="one", model="cifar-mini", rounds=(1,), thresholds={"automobile": (0.5,)}, input_size=32, num_gpus=0.3
)
MISSING = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so none can be missed")


def stage(**options) -> GroupStage:
    return GroupStage(SPEC, ("automobile",), final=True, **options)


def test_gpus_are_cuda_unless_the_variable_names_another_kind(monkeypatch):
    monkeypatch.delenv(device.VARIABLE, raising=False)
    assert accelerator() == "cuda"
    for kind in ("xpu", "mps", "cpu"):
        monkeypatch.setenv(device.VARIABLE, kind)
        assert accelerator() == kind


@pytest.mark.parametrize("kind", ["gpu", "cuda:1", "CPU"])
def test_what_torch_does_not_know_is_refused_before_a_run_begins(monkeypatch, kind):
    monkeypatch.setenv(device.VARIABLE, kind)
    plan = load_plan("emblem")
    check_models(plan)  # without GPUs nobody asks
    gpus = plan.model_copy(update={"stages": tuple(entry.model_copy(update={"num_gpus": 1}) for entry in plan.stages)})
    with pytest.raises(
        UsageError, match=rf"DORFMAN_DEVICE is '{kind}', but it names a kind of device .* cpu to rehearse"
    ):
        check_models(gpus)


@MISSING
def test_a_device_that_is_not_there_is_one_line_that_names_the_remedy():
    words = r"stage 'one' asks for GPUs, but torch finds no cuda device on \S+ \(.+\); mend .* set num_gpus: 0, or name"
    with pytest.raises(RunError, match=words) as failure:
        stage(gpu_kind="cuda")
    assert "\n" not in str(failure.value)
    with pytest.raises(RunError, match="--gpu asks for GPUs, but torch finds no cuda device"):
        GroupScorer({}, ("automobile",), "cuda")
    with pytest.raises(RunError, match="finds no xpu device"):
        open_device("xpu", "stage 'one'")


def test_a_rehearsal_computes_on_the_cpu_with_the_threads_of_its_cpus(monkeypatch):
    threads = torch.get_num_threads()
    try:
        told = GroupStage(SPEC.model_copy(update={"num_cpus": 2}), ("automobile",), final=True, gpu_kind="cpu")
        assert told.device.type == "cpu" and torch.get_num_threads() == 2
        # Outside a scan nobody tells it.
        monkeypatch.setenv(device.VARIABLE, "cpu")
        assert stage().device.type == "cpu" and GroupScorer({}, ("automobile",), None).device.type == "cpu"
    finally:
        torch.set_num_threads(threads)


class Book:
    def begin(self, operator, windows):
        pass

    end = begin


@MISSING
def test_an_actor_that_could_not_be_built_says_so_at_its_first_call():
    """Not as it starts: Ray would print its tracebacks and wrap the reason."""
    options = {"final": True, "gpu_kind": "cuda"}
    actor = WindowsToWindows(GroupStage, (SPEC, ("automobile",)), options, "one", Book())
    with pytest.raises(RunError, match="torch finds no cuda device"):
        actor(windows_to_table([]))
