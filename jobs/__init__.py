"""Command line entry points. A job parses, builds, runs and reports; the work is done elsewhere."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

_codes: list[int] = []


def end(code: int) -> NoReturn:
    """Of a job, by the code that its process ends with."""
    _codes.append(code)
    sys.exit(code)


@atexit.register
def _leave() -> None:
    """Ends a job's process without taking the interpreter down, when all that was to be done at its end is done: this
    was registered before anything else.

    Arrow's threads let go of what they have read after ``read_table`` has returned, and want the interpreter for that.
    One that is late finds it half gone, and the process aborts, or hangs, instead of ending with its code.
    """
    if _codes and sys.modules["__main__"].__package__ == __name__:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(_codes[-1])
