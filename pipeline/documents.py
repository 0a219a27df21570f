"""YAML files that people write: read as strict models, with errors in one line."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import UsageError
from pipeline.mistakes import in_words, must_hold_fields, yaml_in_words
from pipeline.storage import parse_uri, read_object, reason
from pipeline.store import digest

M = TypeVar("M", bound=BaseModel)
MERGE = "tag:yaml.org,2002:merge"


class Strict(BaseModel):
    """Frozen; a field that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Loader(yaml.SafeLoader):
    """YAML takes the last of two equal keys in silence: half of what somebody has written would not count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        nodes = [key for key, _ in node.value if key.tag != MERGE]  # what "<<" brings may be said anew
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = nodes[number].start_mark
                raise yaml.MarkedYAMLError(problem=f"{key!r} stands there twice; keep one", problem_mark=mark)
        return super().construct_mapping(node, deep)


def read_document(model: type[M], what: str, uri: str, endpoint_url: str | None) -> tuple[M, str]:
    """The file at ``uri``, a path or in S3, and the SHA-256 of its bytes. ``what``: for messages. Raises UsageError."""
    where = f"{what} {uri}"
    try:
        body = read_object(parse_uri(uri), endpoint_url)
    except FileNotFoundError as error:
        raise UsageError(f"{where}: no such file") from error
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror or reason(error)}") from error
    return parse_document(model, parse_yaml(body, where), where), digest(body)


def parse_yaml(text: str | bytes, where: str) -> dict[str, Any]:
    """The fields that a file holds. Raises UsageError."""
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} is not YAML: {yaml_in_words(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{where} {must_hold_fields(content)}")
    return content


def parse_document(model: type[M], content: dict[str, Any], where: str) -> M:
    """Raises UsageError with the first two things that are wrong."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = in_words(model, error)
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        raise UsageError(f"{where}: {'; '.join(lines[:2])}{more}") from error
