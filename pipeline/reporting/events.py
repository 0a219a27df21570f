"""What happens in a job, told once: a line for people, or a JSON object for machines that collect logs.

Every event has a name and fields; the sentence for people is one of them. Whether lines or objects come out is decided
by whoever starts the process (``configure``), never by whoever tells.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from pipeline.errors import UsageError

FORMATS = ("text", "json")
VARIABLE = "DORFMAN_LOG_FORMAT"

_logger = logging.getLogger("dorfman")


class TextHandler(logging.Handler):
    """The sentence of each event, as it is; events without one are for machines only."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.__dict__["text"]
        if isinstance(text, str):
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
        elif text is not None:
            self.console.print(text)


class JsonFormatter(logging.Formatter):
    """One object a line: ts, level, event, then the event's fields, then the sentence as ``message``."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **record.__dict__["fields"],
        }
        text = record.__dict__["text"]
        return json.dumps(content | ({"message": text} if isinstance(text, str) else {}), default=str)


class Events:
    """Tells what happens in one run. ``console``: where people read it, instead of standard output."""

    def __init__(self, run_id: str | None = None, console: Console | None = None) -> None:
        self.fields = {"run_id": run_id} if run_id else {}
        self.console = console

    def tell(self, event: str, text: Any = None, level: int = logging.INFO, **fields: Any) -> None:
        """``text``: a sentence, or what rich can show; without one, people do not see the event."""
        extra = {"fields": self.fields | fields, "text": text}
        record = _logger.makeRecord(_logger.name, level, "", 0, event, (), None, extra=extra)
        # Not through the logger: Ray and others set up its parents, and a line must not come twice.
        (_handler() if self.console is None else TextHandler(self.console)).handle(record)


class JsonHandler(logging.Handler):
    """Objects on standard output, errors on standard error: where lines for people go too."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        print(self.format(record), file=stream, flush=True)


_chosen: list[str] = []
"""The format that this process was asked for, if it was."""


def configure(format: str | None) -> None:
    """Decides in which of FORMATS this process tells events; None: as DORFMAN_LOG_FORMAT says, or else as text.

    Raises UsageError.
    """
    wanted = os.environ.get(VARIABLE) or "text"
    if wanted not in FORMATS:
        raise UsageError(f"{VARIABLE} is {wanted!r}: give one of {', '.join(FORMATS)}")
    _chosen[:] = [format] if format else []


def told_as_json() -> bool:
    return (_chosen or [os.environ.get(VARIABLE, "")])[0] == "json"


def _handler() -> logging.Handler:
    # Made for each event: whoever calls ``run_scan`` may have turned standard output elsewhere by now.
    return JsonHandler() if told_as_json() else TextHandler(Console())
