"""What ended a run, in one line that can be shown."""

from __future__ import annotations

from botocore.exceptions import BotoCoreError, ClientError
from obstore.exceptions import BaseError
from ray.exceptions import RayTaskError

from pipeline.errors import Ended, RunError, StoreError, UsageError
from pipeline.storage import reason, redact

ADVICE = "To change retry attempts"
"""How Ray ends what a task has raised."""


def one_line(error: BaseException) -> str:
    if isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, (RunError, UsageError, Ended)):
        return str(error).splitlines()[0]  # Ray adds advice of its own
    if isinstance(error, (StoreError, BaseError, ClientError, BotoCoreError)):
        return f"storage: {reason(error)}"
    lines = [line for line in redact(str(error)).splitlines() if not line.startswith(ADVICE)]
    line = telling_line("\n".join(lines))
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def telling_line(text: str) -> str:
    """One that holds a traceback ends with what matters; others begin with it, and go on with advice. "" of nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1 if "Traceback" in text else 0][:300] if lines else ""
