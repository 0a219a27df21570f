"""What ended a run, in one line that can be shown."""

from __future__ import annotations

from botocore.exceptions import BotoCoreError, ClientError
from obstore.exceptions import BaseError
from ray.exceptions import RayTaskError

from pipeline.errors import RunError, StoreError, UsageError
from pipeline.storage import reason, redact

ADVICE = "To change retry attempts"
"""How Ray ends what a task has raised."""


def one_line(error: BaseException) -> str:
    if isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, (RunError, UsageError)):
        return str(error).splitlines()[0]  # Ray adds advice of its own
    if isinstance(error, (StoreError, BaseError, ClientError, BotoCoreError)):
        return f"storage: {reason(error)}"
    text = redact(str(error))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(ADVICE)]
    if not lines:
        return type(error).__name__
    # One that holds a traceback ends with what matters; others, as CUDA's, begin with it and go on with advice.
    line = lines[-1 if "Traceback" in text else 0]
    return f"{type(error).__name__}: {line.strip()[:300]}"
