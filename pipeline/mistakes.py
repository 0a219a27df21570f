"""What is wrong in a file that a person has written: place, value, limit and remedy, in a line for each mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError
from pydantic_core import ErrorDetails

Place = tuple[int | str, ...]
LONGEST = 60
"""Characters of a value that are repeated."""
KINDS = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "yes or no", int: "a number"}
"""What YAML calls values, for those who do not write Python."""


def in_words(model: type[BaseModel], error: ValidationError) -> list[str]:
    """An unknown field first: it is mostly the missing one, misspelt."""
    found = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    return [_line(model, entry) for entry in found if not _follows(entry, found)]


def _follows(entry: ErrorDetails, found: list[ErrorDetails]) -> bool:
    """A list that is too short only without the entry that is wrong."""
    place = entry["loc"]
    return entry["type"] == "too_short" and any(
        len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in found
    )


def _line(model: type[BaseModel], entry: ErrorDetails) -> str:
    kind, value, place = entry["type"], entry["input"], ".".join(str(part) for part in entry["loc"])
    if kind == "extra_forbidden":
        return f"{place} is no field; known there: {_fields(model, entry['loc'][:-1])}"
    if kind == "missing":
        return f"{place} is missing; give it"
    if kind == "value_error":
        said = entry["msg"].removeprefix("Value error, ")
        return f"{place}: {said}" if place else said
    if kind == "too_short":
        limits = entry["ctx"]
        return f"{place} has {limits['actual_length']} entries, but at least {limits['min_length']} is wanted"
    wanted = _wanted(model, entry)
    return f"{place} is {_shown(value)}, but {wanted}" if wanted else f"{place} is {_shown(value)}: {entry['msg']}"


def _wanted(model: type[BaseModel], entry: ErrorDetails) -> str | None:
    """The limit, for kinds of mistakes that have words of their own."""
    limits = entry.get("ctx", {})
    match entry["type"]:
        case "greater_than_equal":
            return f"at least {limits['ge']:g} is wanted"
        case "greater_than":
            return f"more than {limits['gt']:g} is wanted"
        case "less_than_equal":
            return f"at most {limits['le']:g} is wanted"
        case "less_than":
            return f"less than {limits['lt']:g} is wanted"
        case "finite_number":
            return "a finite number is wanted"
        case "float_type" | "float_parsing":
            return "a number is wanted, written as 0.5"
        case "int_type" | "int_parsing" | "int_from_float":
            return "a whole number is wanted, written as 5"
        case "string_type":
            return "text is wanted; give it, or leave the line out if it need not be there"
        case "tuple_type" | "list_type":
            return "a list is wanted; begin each entry with '- '"
        case "dict_type" | "model_type":
            known = _fields(model, entry["loc"]) if entry["type"] == "model_type" else ""
            return "fields with values are wanted" + (f": {known}" if known else ", as 'name: value'")
    return None


def _shown(value: Any) -> str:
    if value is None or isinstance(value, (dict, list)):
        return KINDS[type(value)]
    shown = repr(value)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."


def _fields(model: type[BaseModel], place: Place) -> str:
    """Names of the fields that may stand at a place."""
    models = [model]
    for part in place:
        # A number or a key of somebody's own leads from a list or mapping to its values: to the same models.
        below = [field.annotation for known in models for name, field in _named(known) if name == part]
        models = [found for annotation in below for found in _models(annotation)] if below else models
    return ", ".join(name for known in models for name, _ in _named(known))


def _named(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """As they are written in the file."""
    return ((field.alias or name, field) for name, field in model.model_fields.items())


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models(part)]


def spelt(pattern: str, words: str) -> AfterValidator:
    """A text of this pattern, which ``words`` say to people."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{_shown(text)} is not {words}")
        return text

    return AfterValidator(check)


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{'yes' if value else 'no'} is a switch, but a number is wanted, written as 0.5")
    return value


NUMBER = BeforeValidator(_no_switch)
"""YAML takes yes, on and true for a switch, and a switch would count as 1."""


def yaml_in_words(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Where it is no YAML, and why."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).replace('in "<byte string>", ', "").split())
    mark, context = error.problem_mark, f" ({error.context})" if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}"


def must_hold_fields(content: Any) -> str:
    if content is None:
        return "is empty, but it must hold fields with values, as 'name: value'"
    held = KINDS.get(type(content), type(content).__name__)
    return f"must hold fields with values, as 'name: value', not {held}"
