"""A table as HTML: sortable in the browser, every cell with its whole value beside the one shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dmsae_ray.show.page.numerals import MISSING, NOTHING, WRITTEN, shown, whole

ROWS_FOR_FILTER = 25
"""Longer tables scroll, and get a field that filters their rows."""


@dataclass(frozen=True)
class Column:
    """One column."""

    name: str
    """its heading"""
    value: Callable[[dict[str, Any]], Any]
    """the cell's value from a row"""
    kind: str = "text"
    """a format of numerals.py"""
    unit: str = ""
    """written under the heading"""
    help: str = ""
    """what the number is, as the heading's title"""
    why: Callable[[dict[str, Any]], str | None] = lambda row: None
    """why a cell is not available, as its title"""


@dataclass(frozen=True)
class Table:
    """Rows of one kind."""

    id: str
    """the element's id"""
    caption: str
    """what it shows and how to read it"""
    columns: Sequence[Column]
    """the first one heads the row"""
    rows: Sequence[dict[str, Any]]
    """one dict per row"""
    classes: Callable[[dict[str, Any]], str] = lambda row: ""
    """classes of a row"""

    def html(self) -> str:
        """The table within a frame that scrolls sideways where it must."""
        head = "".join(_heading(column) for column in self.columns)
        body = "\n".join(self._row(row) for row in self.rows)
        field = (
            f'<label class="rows-filter">Show rows with <input type="search" data-filter-rows="{self.id}" '
            'autocomplete="off"> '
            f'<output aria-live="polite">{len(self.rows)} rows</output></label>'
            if len(self.rows) > ROWS_FOR_FILTER
            else ""
        )
        # A region that scrolls has to be reachable by keyboard.
        return (
            f'<div class="table{" long" if field else ""}">{field}<button type="button" class="more" hidden></button>'
            f'<div class="frame"><div class="scroll" tabindex="0" role="region" aria-labelledby="{self.id}-caption">'
            f'<table id="{self.id}"><caption id="{self.id}-caption"><span>{escape(self.caption)}</span></caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div></div>"
        )

    def _row(self, row: dict[str, Any]) -> str:
        first, *others = (_cell(column, row) for column in self.columns)
        named = self.classes(row)
        cells = f'<th scope="row"{first}</th>' + "".join(f"<td{cell}</td>" for cell in others)
        return f'<tr class="{escape(named)}">{cells}</tr>' if named else f"<tr>{cells}</tr>"


def _heading(column: Column) -> str:
    title = f' title="{escape(column.help)}"' if column.help else ""
    unit = f'<span class="unit">{escape(column.unit)}</span>' if column.unit else ""
    number = "" if column.kind in WRITTEN else ' class="number"'
    return f'<th scope="col"{number}><button type="button"{title}>{escape(column.name)}</button>{unit}</th>'


def _cell(column: Column, row: dict[str, Any]) -> str:
    """A cell from its attributes on, without the tag."""
    value = column.value(row)
    seen = shown(value, column.kind)
    absent = seen in (MISSING, NOTHING)
    title = column.why(row) or "" if absent else whole(value) if whole(value) != seen else ""
    classes = [{"text": "", "prose": "prose"}.get(column.kind, "number"), "missing" if absent else ""]
    return (
        (f' class="{" ".join(filter(None, classes))}"' if any(classes) else "")
        + f' data-value="{escape(whole(value))}"'
        + (f' title="{escape(title)}"' if title else "")
        + f">{_breakable(seen)}"
    )


def _breakable(seen: str) -> str:
    """Escaped; dotted names, which have no spaces, may break after their dots."""
    return escape(seen) if " " in seen or seen[:1].isdigit() else escape(seen).replace(".", ".<wbr>")
