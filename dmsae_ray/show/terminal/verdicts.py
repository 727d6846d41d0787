"""What a sweep ends with in words: what was expected of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dmsae_ray.show.terminal.empty_table import table_of


def expectations_table(entries: Sequence[dict[str, Any]]) -> Table:
    """What was expected before the run, and what came."""
    table = table_of("Expected before the run", ["outcome", "claim"], ["value", "expected", "95 % interval"])
    for entry in entries:
        bound = "" if entry["bound"] is None else f"{entry['relation']} {entry['bound']:.3g}"
        style = {"hit": "green", "miss": "red", "open": "yellow"}.get(entry["outcome"])
        interval = ""
        if entry["interval"] is not None:
            low, high = entry["interval"]
            what = "" if entry["over"] is None else "difference "
            interval = f"{what}{low:.3g} to {high:.3g}"
        cells = [
            entry["outcome"] + (" by means" if entry["by"] == "means" else ""),
            entry["claim"],
            "n/a" if entry["value"] is None else f"{entry['value']:.3g}",
            bound or entry["why"],
            interval,
        ]
        table.add_row(*map(Text, cells), style=style)
    return table


EXPECTATIONS_NOTE = (
    "A claim is a hit where its interval lies beyond the bound, a miss where it lies on the other side, else open. "
    "Where the bound is measured too, both are taken over the seeds and k that they have in common, and the interval "
    "is that of their difference; expectations.json says which. By means: with fewer than four seeds, or a number "
    "of all seeds together, hit or miss says no more than which is larger."
)
