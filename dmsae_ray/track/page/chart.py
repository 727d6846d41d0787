"""A chart of the page: one plotly figure, or several to choose from, that follow the page's light or dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


@dataclass(frozen=True)
class Choice:
    """One thing that the reader of a chart chooses."""

    name: str
    """what is chosen, as the field's label"""
    options: Sequence[str]
    """what there is to choose, the first one shown at start; escaped where it is written"""


@dataclass(frozen=True)
class Chart:
    """One chart. Its figures are drawn by plotly in the browser when they first come into sight."""

    id: str
    """the element's id"""
    title: str
    """what one looks at"""
    read: str
    """how to read it, a sentence; a figure with a `read` of its own in its layout's meta replaces it"""
    figures: dict[tuple[str, ...], go.Figure | str]
    """for each combination of options a figure, or in plain words why there is none"""
    choices: Sequence[Choice] = field(default=())
    """what there is to choose, in the order of the figures' keys"""

    def html(self) -> str:
        """Heading, fields and the empty element that plotly fills."""
        fields = "".join(_field(self.id, choice) for choice in self.choices)
        controls = f'<div class="choices">{fields}</div>' if fields else ""
        return (
            f'<figure class="chart"><figcaption><h3>{escape(self.title)}</h3><p>{escape(self.read)}</p></figcaption>{controls}'
            f'<div class="plot" id="{self.id}" role="img" aria-label="{escape(self.title)}. {escape(self.read)}"></div></figure>'
        )

    def data(self) -> dict[str, Any]:
        """What the browser draws: figures by their options, joined by line breaks."""
        return {"\n".join(key): made if isinstance(made, str) else json.loads(made.to_json()) for key, made in self.figures.items()}


def _field(chart: str, choice: Choice) -> str:
    options = "".join(f"<option>{escape(option)}</option>" for option in choice.options)
    return f'<label>{escape(choice.name)} <select data-chart="{chart}" data-choice="{escape(choice.name)}">{options}</select></label>'


def figure(traces: Sequence[Any], height: int = 380, **layout: Any) -> go.Figure:
    """A figure without colours of its own: those come with the page's template."""
    made = go.Figure(list(traces))
    made.update_layout(template="none", height=height, **layout)
    made.layout.template = None
    return made


def totals(x: Sequence[str], y: Sequence[float], words: Sequence[str]) -> go.Scatter:
    """The heights of stacked bars, written above them."""
    return go.Scatter(
        x=list(x), y=list(y), mode="text", text=list(words), textposition="top center", showlegend=False, hoverinfo="skip", cliponaxis=False
    )


def plain(text: str) -> str:
    """A text for plotly, which reads some tags: as it stands."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def templates() -> dict[str, Any]:
    """Plotly's templates for the light and for the dark page; colours as in page.css."""
    return {
        "light": _template(ink="#1c2024", soft="#5b6470", line="#e3e6ea", paper="#ffffff"),
        "dark": _template(ink="#e7eaee", soft="#a2abb6", line="#2f353d", paper="#1a1e23"),
    }


def _template(ink: str, soft: str, line: str, paper: str) -> dict[str, Any]:
    axis = {
        "gridcolor": line, "linecolor": line, "zerolinecolor": line, "tickcolor": line, "zeroline": False,
        "automargin": True, "title": {"font": {"color": soft, "size": 13}, "standoff": 10}, "tickfont": {"color": soft},
    }  # fmt: skip
    template = go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "font": {"color": soft}},
            "hoverlabel": {"bgcolor": paper, "bordercolor": soft, "font": {"color": ink, "family": FONT}, "align": "left"},
            "colorway": [],
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": soft, "activecolor": ink},
        },
        data={
            "bar": [go.Bar(marker={"line": {"color": paper, "width": 1}})],
            "heatmap": [go.Heatmap(colorbar={"outlinewidth": 0, "thickness": 12, "tickfont": {"color": soft}})],
        },
    )
    return template.to_plotly_json()
