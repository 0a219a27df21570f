"""What ends a run that would never end: windows that kill their actors, operators that stand still."""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from ray import cloudpickle

from pipeline import flow, watch
from pipeline.errors import RunError
from pipeline.rows import Gate
from pipeline.scan import ScanConfig, run_scan
from pipeline.stages import GroupStage
from pipeline.watch import Book, Watch
from tests.conftest import QUICK, small_plan


def test_the_book_counts_what_was_begun_in_vain():
    book = Book()
    call = ("group", ((0, 3), (0, 4)))
    other = ("group", ((0, 5),))
    assert [book.begin(call) for _ in range(3)] == [0, 1, 2]
    assert book.begin(other) == 0
    assert [entry for entry, _ in book.open_calls()] == [call, other]
    book.end(call)
    assert book.begin(call) == 0, "what was finished once has a clean slate"
    book.end(call)
    book.end(call)  # an answer that came twice
    assert [entry for entry, _ in book.open_calls()] == [other]


@pytest.mark.usefixtures("ray_session")
def test_the_watch_ends_a_window_that_keeps_dying_and_says_which():
    guard = Watch()
    for _ in range(watch.MAX_DEATHS):
        guard.begin("single", [(2, 7)])
    with pytest.raises(RunError, match="4 actors of 'single' died on window 7 of shard 2: mend what crashes"):
        guard.begin("single", [(2, 7)])
    guard.begin("single", [(2, 8)])
    assert "'single' has held window 7 of shard 2 for" in guard.describe()


class Deadly(GroupStage):
    """A net that takes its process with it on one window."""

    def __call__(self, windows):
        if any(window.window == 1 for window in windows):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(windows)


class Stuck(GroupStage):
    """A net that never answers."""

    def __call__(self, windows):
        time.sleep(600)
        return windows


@pytest.fixture
def breaking(ray_session, monkeypatch):
    """Puts another stage into the flow. Workers cannot import this module, so it travels with its classes."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield lambda stage: monkeypatch.setattr(flow, "build_stage", stage)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def scan(corpus, folder, **changes) -> dict:
    plan = small_plan(folder, QUICK, window={"images": 64}, **changes)
    return run_scan(ScanConfig(source=str(corpus), output=str(folder / "out"), plan=str(plan), run_id="r", salt="s"))


@pytest.mark.parametrize("fused", [None, {"num_cpus": 1}])
def test_a_window_that_kills_its_actors_fails_the_run_by_name(corpus, tmp_path, breaking, fused):
    """And not the window that was beside it in an actor whose operators are fused."""
    breaking(Deadly)
    with pytest.raises(RunError, match=r"4 actors of 'tree' died on window 1 of shard 0.*--run-id r to go on"):
        scan(corpus, tmp_path, fused=fused)


def test_suspects_are_alone_and_others_together():
    gate, together, order = Gate(), Barrier(2), []

    def call(name: str, alone: bool, partner: bool) -> None:
        with gate.pass_through(alone=alone):
            if partner:
                together.wait(10)  # both are inside, or this would break
            order.append(f"{name} in")
            time.sleep(0.05)
            order.append(f"{name} out")

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(call, "a", False, True), pool.submit(call, "b", False, True)]:
            done.result()
        order.clear()
        calls = [("c", False, False), ("suspect", True, False), ("d", False, False)]
        for done in [pool.submit(call, *told) for told in calls]:
            done.result()
    place = order.index("suspect in")
    assert order[place + 1] == "suspect out" and len(order) == 6


def test_a_run_that_stands_still_ends_with_words(corpus, tmp_path, breaking, monkeypatch):
    breaking(Stuck)
    monkeypatch.setattr(flow, "NO_PROGRESS_SECONDS", 30)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"nothing has moved for 30 s: 'tree' has held window \d of shard 0 for \d+ s"):
        scan(corpus, tmp_path)
    assert time.monotonic() - began < 120
