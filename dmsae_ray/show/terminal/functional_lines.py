"""Functional agreement in a line per group of pairs, for a terminal and report.txt."""

from __future__ import annotations

from typing import Any

from rich.text import Text

MEASURES = (
    ("firing overlap", "firing", "permuted"),
    ("loss effects", "effect", "permuted"),
    ("importance", "importance", "permuted"),
    ("unmatched subspace", "subspace", "covariance"),
)
"""Name, field, and the null that stands in brackets."""


def functional_lines(groups: dict[str, dict[str, Any]]) -> Text | None:
    """Means over the pairs of each group within an arm, each with its null in brackets; None if there is none."""
    lines = []
    for name, group in groups.items():
        found = group.get("functional") or {}
        cells = [
            f"{words} {found[field]['mean']:.2f} ({_number(found['nulls'][null].get(field))})"
            for words, field, null in MEASURES
            if found.get(field)
        ]
        if cells and "~" not in name:
            lines.append(f"Used alike, {name} (by chance): {', '.join(cells)}.")
    return Text("\n".join(lines)) if lines else None


def _number(spread: dict[str, Any] | None) -> str:
    return "n/a" if spread is None else f"{spread['mean']:.2f}"
