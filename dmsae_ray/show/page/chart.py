"""A chart of the page: one plotly figure, or several to choose from, that follow the page's light or dark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import product
from typing import Any

import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


@dataclass(frozen=True)
class Choice:
    """One thing that the reader of a chart chooses."""

    name: str
    """what is chosen, as the field's label"""
    options: Sequence[str]
    """what there is to choose, the first one shown at start; where there is but one it is said, not offered"""


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

    def __post_init__(self) -> None:
        options = set(product(*(choice.options for choice in self.choices)))
        assert self.figures.keys() == options, (
            f"{self.id} can be asked for {options - self.figures.keys()}, has {list(self.figures)}"
        )

    def html(self) -> str:
        """Heading, fields and the empty element that plotly fills."""
        fields = "".join(_field(self.id, choice) for choice in self.choices)
        controls = f'<div class="choices">{fields}</div>' if fields else ""
        return (
            f'<figure class="chart"><button type="button" class="save" data-save="{self.id}" title="Save this chart '
            'as an image">PNG</button>'
            f"<figcaption><h3>{escape(self.title)}</h3><p>{escape(self.read)}</p></figcaption>{controls}"
            f'<div class="plot" id="{self.id}" role="img" aria-label="{escape(self.title)}. '
            f'{escape(self.read)}"></div></figure>'
        )

    def data(self) -> dict[str, Any]:
        """What the browser draws: figures by the options that can be chosen, joined by line breaks."""
        return {
            self._asked(key): made if isinstance(made, str) else json.loads(made.to_json())
            for key, made in self.figures.items()
        }

    def _asked(self, key: tuple[str, ...]) -> str:
        return "\n".join(option for option, choice in zip(key, self.choices, strict=True) if len(choice.options) > 1)


def _field(chart: str, choice: Choice) -> str:
    if len(choice.options) == 1:
        return f'<span class="label">{escape(choice.name)} <b>{escape(choice.options[0])}</b></span>'
    # The value is written out: a browser reads an option's text with its runs of spaces made one.
    options = "".join(f'<option value="{escape(option)}">{escape(option)}</option>' for option in choice.options)
    return (
        f'<label>{escape(choice.name)} <select data-chart="{chart}" '
        f'data-choice="{escape(choice.name)}">{options}</select></label>'
    )


def figure(traces: Sequence[Any], height: int = 380, **layout: Any) -> go.Figure:
    """A figure without colours of its own: those come with the page's template."""
    # An empty template, which then goes: plotly would copy its own one of a thousand fields into every figure.
    made = go.Figure(list(traces), layout={"template": {}})
    made.layout.template = None
    made.layout.update(height=height, **layout)
    return made


def span(values: Iterable[float], least: float, most: float | None = None) -> list[float]:
    """What an axis shows: all values with a margin, and never less than `least`, lest noise around one point fill the
    chart.

    It does not go below 0 where no value does (but by the size of a mark), nor beyond `most` where no value is.
    """
    values = list(values)
    low, high = min(values), max(values)
    room = max(high - low, least)
    edge, start, end = 0.08 * room, (low + high - room) / 2, (low + high + room) / 2
    if low >= 0 and start < edge:
        start, end = 0.0, max(high, room)
    elif most is not None and high <= most < end + edge:
        start, end = min(low, most - room), most
    return [start - edge, end + edge]


def above_bars(heights: Iterable[float]) -> list[float]:
    """The vertical axis of bars whose heights are written above them: with room for the numbers."""
    return [0.0, 1.12 * max(heights, default=0.0) or 1.0]


def totals(x: Sequence[str], y: Sequence[float], words: Sequence[str]) -> go.Scatter:
    """The heights of stacked bars, written above them."""
    return go.Scatter(
        x=list(x),
        y=list(y),
        mode="text",
        text=list(words),
        textposition="top center",
        showlegend=False,
        hoverinfo="skip",
        cliponaxis=False,
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
        "gridcolor": line,
        "linecolor": line,
        "zerolinecolor": line,
        "tickcolor": "rgba(0,0,0,0)",
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 6,
        "automargin": True,
        "title": {"font": {"color": soft, "size": 13}, "standoff": 10},
        "tickfont": {"color": soft},
    }
    template = go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "font": {"color": soft}},
            "hoverlabel": {
                "bgcolor": paper,
                "bordercolor": soft,
                "font": {"color": ink, "family": FONT},
                "align": "left",
            },
            "colorway": [],
        },
        data={
            "bar": [go.Bar(marker={"line": {"color": paper, "width": 1}})],
            "heatmap": [
                go.Heatmap(colorbar={"outlinewidth": 0, "thickness": 12, "tickfont": {"color": soft, "size": 11}})
            ],
        },
    )
    return template.to_plotly_json()
