"""Label selectors of Ray's nodes, as Ray reads them: `spot`, `!spot`, `in(spot, reserved)`, `!in(spot, reserved)`."""

from __future__ import annotations

import re
from collections.abc import Mapping

WORD = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
KEY = re.compile(rf"(?:(?=.{{1,253}}/){WORD}(?:\.{WORD})*/)?{WORD}")
VALUE = re.compile(rf"(!?)(?:in\(({WORD}(?:,{WORD})*)\)|({WORD}))")


def selector_problem(selector: Mapping[str, str]) -> str | None:
    """Why Ray would not take this selector; None if it would."""
    for key, value in selector.items():
        if not KEY.fullmatch(key):
            return f"{key!r} is not the name of a label (letters, digits, dashes, underscores, dots; prefix/name)"
        if not VALUE.fullmatch(value):
            return f"{key} {value!r}: is not a value, !value, in(value, value) or !in(value, value)"
    return None


def without_spaces(selector: dict[str, str]) -> dict[str, str]:
    """The same, in the form that needs no trimming of Ray."""
    return {key: re.sub(r", ", ",", value) for key, value in selector.items()}


def selected(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels is selected. A node without a label is one whose label has another value."""
    return all(_holds(value, labels.get(key)) for key, value in selector.items())


def _holds(value: str, label: str | None) -> bool:
    parts = VALUE.fullmatch(value)
    assert parts is not None, "a configuration has no other"
    negated, several, one = parts.groups()
    return (label in ([one] if one else several.split(","))) != bool(negated)


def written(selector: Mapping[str, str]) -> str:
    """For people."""
    return ", ".join(f"{key}={value}" for key, value in selector.items())
