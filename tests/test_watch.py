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

from pipeline import flow
from pipeline.errors import RunError
from pipeline.reporting import watch
from pipeline.reporting.progress import time_rows
from pipeline.reporting.watch import Book, Watch
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.steps import rows
from pipeline.steps.rows import Gate, Pace
from pipeline.steps.stages import GroupStage
from pipeline.window import Window, Work
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


def test_an_operator_notes_how_long_it_had_nothing_to_do(monkeypatch):
    clock = iter([10.0, 12.5, 20.0, 21.0, 22.0])
    monkeypatch.setattr(rows.time, "perf_counter", lambda: next(clock))
    pace, waits = Pace("single"), []
    for _ in range(3):
        pace.begin()
        windows = [Window(shard=0, window=number, first_ordinal=0, images=[]) for number in range(2)]
        for window in windows:
            window.work = [Work(operator="decode:single"), Work(operator="single", round=0), Work(operator="single")]
        pace.note(windows)
        waits.append([[work.waited_seconds for work in window.work] for window in windows])
        pace.end()
    none = [0.0, 0.0, 0.0]
    assert waits == [[none, none], [[0.0, 2.5, 0.0], none], [[0.0, 1.0, 0.0], none]]


def test_who_hardly_waits_is_named_at_the_end():
    fetch = {"operator": "fetch", "round": None, "images_in": 9, "seconds": 3.0, "waited_seconds": 97.0}
    decode = {"operator": "decode:s", "round": None, "images_in": 9, "seconds": 60.0, "waited_seconds": 20.0}
    first = {"operator": "s", "round": 0, "images_in": 9, "seconds": 30.0, "transfer_seconds": 5.0}
    again = {"operator": "s", "round": 1, "images_in": 2, "seconds": 7.0, "waited_seconds": 63.0}
    assert list(time_rows({"operators": [fetch, decode, first, again]})) == [
        ("fetch, time at work", "3.0 s, 3%; waited 97.0 s"),
        ("decode:s, time at work", "60.0 s, 60%; waited 20.0 s"),
        ("s, time at work", "37.0 s, 37%, 5.0 s of it transfer; waited 63.0 s"),
        ("more actors help first", "decode:s, at work for 75% of its time"),
    ]
    old = {"operator": "fetch", "round": None, "images_in": 9, "seconds": 3.0}
    assert list(time_rows({"operators": [old]})) == [("fetch, time at work", "3.0 s, 100%")]


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
