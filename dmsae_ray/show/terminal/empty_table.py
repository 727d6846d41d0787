"""An empty table of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

DENSITY = len("n/a (x3.1)")
"""Room for what stands in the column of the density null where that is not available."""


def table_of(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """left, right: column names by alignment. Labels and sizes are never broken; other columns give way first."""
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for name in left:
        table.add_column(name, overflow="fold", no_wrap=name in ("chain", "a", "b"))
    for name in right:
        table.add_column(
            name,
            justify="right",
            overflow="fold",
            no_wrap=name == "sizes",
            min_width=DENSITY if "density" in name else None,
        )
    return table
