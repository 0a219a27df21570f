"""What every run record has, of whatever version it is: by this it is told from what somebody has put in its place."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError


def _moment(text: str) -> str:
    datetime.fromisoformat(text)
    return text


class _File(BaseModel):
    path: str
    sha256: str


class _Record(BaseModel):
    """Of a complete run's record, and of the status of one that is not complete."""

    model_config = ConfigDict(strict=True)
    run_id: str
    parent_run_id: str | None = None  # the first version knew no retries
    source: str
    started_at: Annotated[str, AfterValidator(_moment)]
    plan_version: str
    weights_sha256: dict[str, str] = {}
    files: list[_File] = []  # a status has none, and who reads many leaves them out


def fault(content: Any) -> str | None:
    """Why this is no run record, in words; None for one that is."""
    try:
        _Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'the whole'}: {first['msg']}"
    return None
