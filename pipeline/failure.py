"""What ended a run, in one line that can be shown."""

from __future__ import annotations

from botocore.exceptions import BotoCoreError, ClientError
from obstore.exceptions import BaseError
from ray.exceptions import RayTaskError

from pipeline.errors import RunError, StoreError, UsageError
from pipeline.storage import reason, redact


def one_line(error: BaseException) -> str:
    if isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, (RunError, UsageError)):
        return str(error).splitlines()[0]  # Ray adds advice of its own
    if isinstance(error, (StoreError, BaseError, ClientError, BotoCoreError)):
        return f"storage: {reason(error)}"
    lines = [line for line in redact(str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines else type(error).__name__
