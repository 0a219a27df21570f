"""How a job is ended from outside: by SIGTERM, or by whoever reads what it prints and leaves."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

from pipeline.errors import ReaderGone, Terminated

_waiting: list[bool] = []
"""Of each ``ended_by_name`` that this process is within, whether no SIGTERM has come yet: a library must not take the
signals of whoever calls it."""


@contextmanager
def ended_by_name() -> Iterator[None]:
    """Within it SIGTERM raises Terminated, and printing for a reader that has left ReaderGone: whatever is tidied up
    after Ctrl-C is tidied up then too. ReaderGone then ends the process without a word, as ``ls | head`` ends.

    For the main thread."""
    before = signal.getsignal(signal.SIGTERM)
    _waiting.append(True)
    catch_sigterm()
    try:
        with redirect_stdout(cast(TextIO, _Printed(sys.stdout))):
            yield
            sys.stdout.flush()
    except ReaderGone as gone:
        sys.exit(gone.exit_code)
    finally:
        _waiting.pop()
        signal.signal(signal.SIGTERM, before)


def catch_sigterm() -> None:
    """To be called again when Ray has started or ended: its native code takes the signal, and prints a stack for it.

    While Ray starts in another thread, a SIGTERM still comes to that.
    """
    if _waiting and _waiting[-1]:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    _waiting[-1] = False
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # who asks twice is not kept waiting
    raise Terminated("terminated by SIGTERM")


class _Printed:
    """Standard output. Exceptions of sockets are none of its business, as they would be of a handler of SIGPIPE."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._leave()

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> NoReturn:
        # Or the interpreter would try once more to get rid of what is left, and complain.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        raise ReaderGone("nobody reads standard output any more") from None
