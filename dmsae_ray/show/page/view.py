"""A view of the page: a heading, a sentence, and charts, tables and notes below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dmsae_ray.show.page.chart import Chart
from dmsae_ray.show.page.table import Table


@dataclass(frozen=True)
class Note:
    """A plain sentence; also what stands in the place of a chart that has nothing to show."""

    text: str

    def html(self) -> str:
        return f'<p class="note">{escape(self.text)}</p>'


@dataclass(frozen=True)
class Raw:
    """HTML as it is, made by a view that escaped every text in it."""

    markup: str

    def html(self) -> str:
        return self.markup


@dataclass(frozen=True)
class Grid:
    """Small charts side by side."""

    charts: Sequence[Chart | Note]
    columns: int = 2
    """side by side at most"""

    def html(self) -> str:
        return (
            '<div class="grid" style="--columns: '
            f'{self.columns}">{"".join(chart.html() for chart in self.charts)}</div>'
        )


Part = Chart | Table | Note | Raw | Grid


@dataclass(frozen=True)
class View:
    """One view."""

    id: str
    """its address in the page, after the #"""
    title: str
    """its name in the navigation"""
    lead: str
    """what one looks at and how to read it"""
    parts: Sequence[Part]
    """what it shows, in order"""

    def html(self) -> str:
        parts = "\n".join(part.html() for part in self.parts)
        return (
            f'<section class="view" id="view-{self.id}" aria-labelledby="title-{self.id}">'
            f'<h2 id="title-{self.id}" tabindex="-1">{escape(self.title)}</h2><p '
            f'class="lead">{escape(self.lead)}</p>\n{parts}</section>'
        )

    def charts(self) -> list[Chart]:
        """All charts, also those within grids."""
        found: list[Part] = []
        for part in self.parts:
            found += part.charts if isinstance(part, Grid) else [part]
        return [part for part in found if isinstance(part, Chart)]
