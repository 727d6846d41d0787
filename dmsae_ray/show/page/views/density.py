"""The view of how often latents fire: core beside free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dmsae_ray.show.page.arm_style import Style
from dmsae_ray.show.page.artifacts import Artifacts, unique
from dmsae_ray.show.page.chart import Chart, Choice, figure
from dmsae_ray.show.page.numerals import percent
from dmsae_ray.show.page.table import Column, Table
from dmsae_ray.show.page.view import Note, Part, View

LEAD = (
    "How often do latents fire? Density is the share of held-out tokens on which a latent is active. Core latents "
    "usually fire more often than free ones; an exempt core can become dense, which is why density is always shown."
)


def view(artifacts: Artifacts) -> View:
    """The view; in place of what is missing stands why."""
    rows = [row for row in artifacts.last if row.get("density_histogram")]
    parts: list[Part] = []
    if not rows:
        parts.append(
            Note(
                "There is no histogram to show: "
                f"{artifacts.reasons.get('evaluation.json') or 'evaluation.json holds none'}."
            )
        )
    else:
        for row in rows:
            _check(row)
        parts += [_chart(rows), _table(rows)]
    return View("density", "Density", LEAD, parts)


def _check(row: dict[str, Any]) -> None:
    histogram = row["density_histogram"]
    edges = histogram["edges"]
    if len(edges) - 1 != len(histogram["core"]) or len(edges) - 1 != len(histogram["free"]):
        raise ValueError(
            f"evaluation.json: density_histogram of {row['chain']} has {len(edges)} edges for {len(histogram['core'])} "
            f"and {len(histogram['free'])} counts; it needs one edge more than counts"
        )
    if any(b <= a for a, b in zip(edges, edges[1:], strict=False)) or edges[-1] > 0:
        raise ValueError(
            f"evaluation.json: density_histogram of {row['chain']}: edges are log10 of shares, rising, at most 0"
        )


def pooled(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Counts of several chains added up. Raises ValueError if their edges are not the same."""
    first = rows[0]
    edges = first["density_histogram"]["edges"]
    for row in rows:
        if row["density_histogram"]["edges"] != edges:
            raise ValueError(
                f"evaluation.json: density_histogram of {row['chain']} has other edges than {first['chain']}"
            )
    sums = {
        part: np.sum([row["density_histogram"][part] for row in rows], axis=0).tolist() for part in ("core", "free")
    }
    return {"edges": edges, **sums}


def _chart(rows: Sequence[dict[str, Any]]) -> Chart:
    arms = unique(row["arm"] for row in rows)
    return Chart(
        "chart-density",
        "Density of core and free latents, last cycle",
        "Bars are shares of the core's and of the free latents, so that the few and the many can be compared; point "
        "at one for its count.",
        {(arm,): _bars(pooled([row for row in rows if row["arm"] == arm])) for arm in arms},
        [Choice("Arm", arms)],
    )


def _bars(histogram: dict[str, list[float]]) -> go.Figure:
    edges = np.array(histogram["edges"])
    traces = []
    for place, (part, pattern) in enumerate((("core", ""), ("free", "/"))):
        counts = np.array(histogram[part], dtype=float)
        if counts.sum() == 0:
            continue
        ranges = [f"{percent(10**low)} to {percent(10**high)}" for low, high in zip(edges, edges[1:], strict=False)]
        traces.append(
            go.Bar(
                x=((edges[:-1] + edges[1:]) / 2).tolist(),
                width=np.diff(edges).tolist(),
                y=(counts / counts.sum()).tolist(),
                name=part,
                marker={"color": Style.number(place).colour, "pattern": {"shape": pattern, "size": 5}},
                opacity=0.72,
                customdata=counts.tolist(),
                text=[f"density {words}" for words in ranges],
                textposition="none",
                hovertemplate=(
                    f"%{{customdata:,d}} {part} latents, %{{text}}<br>%{{y:.3f}} of the {part} latents<extra></extra>"
                ),
            )
        )
    made = figure(traces, height=420, barmode="overlay")
    ticks = list(range(int(np.floor(edges[0])), 1))
    words = [f"{100 * 10.0**tick:g} %" for tick in ticks]
    made.layout.xaxis.update(title_text="density (share of tokens, logarithmic)", tickvals=ticks, ticktext=words)
    made.layout.yaxis.update(title_text="share of the latents", rangemode="tozero")
    return made


def median(edges: Sequence[float], counts: Sequence[float]) -> float | None:
    """Density below which half of the counted latents are, read from the histogram (exact to the width of a bar)."""
    total = sum(counts)
    if total == 0:
        return None
    reached = 0.0
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count and reached + count >= total / 2:
            return float(10 ** (low + (high - low) * (total / 2 - reached) / count))
        reached += count
    raise AssertionError("counts add up to their own total")


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    def half(part: str) -> Any:
        return lambda row: median(row["density_histogram"]["edges"], row["density_histogram"][part])

    def silent(part: str) -> Any:
        return lambda row: row["density_histogram"].get("silent", {}).get(part)

    columns = [
        Column("Chain", lambda row: row["chain"]),
        Column("Arm", lambda row: row["arm"]),
        Column("k", lambda row: row["k"], "count", "latents per token"),
        Column("Core, counted", lambda row: sum(row["density_histogram"]["core"]), "count", "latents"),
        Column("Core, median", half("core"), "percent", "of tokens", why=lambda row: "no core latent was counted"),
        Column("Core, silent", silent("core"), "count", "latents"),
        Column("Free, counted", lambda row: sum(row["density_histogram"]["free"]), "count", "latents"),
        Column("Free, median", half("free"), "percent", "of tokens", why=lambda row: "no free latent was counted"),
        Column("Free, silent", silent("free"), "count", "latents"),
    ]
    caption = "Latents that fired, the density that half of them stay below, and those that never fired."
    return Table("table-density", caption, columns, rows)
