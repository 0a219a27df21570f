"""What ended a run, in one line."""

from __future__ import annotations

import pytest

from pipeline.errors import RunError
from pipeline.run.failure import ADVICE, one_line

TRACEBACK = "ray::scan()\nTraceback (most recent call last):\n  File x, line 1\nOSError: the disk is full"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("CUDA error: an illegal access\nCompile with DSA to enable asserts."),
            "CUDA error: an illegal access",
        ),
        (
            RuntimeError(f"{TRACEBACK}\n{ADVICE}, backoff, or which errors are retried, configure it"),
            "OSError: the disk is full",
        ),
        (RuntimeError("one"), "one"),
    ],
)
def test_it_says_what_happened_and_not_what_could_be_done_in_general(error, line):
    assert one_line(error) == f"RuntimeError: {line}"


def test_errors_of_ours_begin_with_what_matters():
    assert one_line(RunError("no GPU\nadvice")) == "no GPU"
    assert one_line(ValueError()) == "ValueError"
