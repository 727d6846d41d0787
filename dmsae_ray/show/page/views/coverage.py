"""The view of how concentrated the attribution is: cumulative share by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from dmsae_ray.show.page.arm_style import Style
from dmsae_ray.show.page.artifacts import Artifacts, unique
from dmsae_ray.show.page.chart import Chart, Choice, figure, plain
from dmsae_ray.show.page.table import Column, Table
from dmsae_ray.show.page.view import Note, Part, View

LEAD = (
    "How few latents carry the effect on the loss? Candidates stand by falling attribution; the curve adds up their "
    "shares. The ring is the core that was chosen: on the curve if it was chosen by attribution, below it otherwise."
)
SHARES = (0.5, 0.8, 0.9)
"""For these shares the table says how many latents it takes."""


def view(artifacts: Artifacts) -> View:
    """The view; in place of what is missing stands why."""
    rows = [row for row in artifacts.last if row.get("coverage_curve")]
    parts: list[Part] = []
    if not rows:
        parts.append(
            Note(
                "There is no curve to show: "
                f"{artifacts.reasons.get('evaluation.json') or 'evaluation.json holds none'}."
            )
        )
    else:
        parts += [_chart(rows), _table(rows)]
    return View("coverage", "Coverage", LEAD, parts)


def _chart(rows: Sequence[dict[str, Any]]) -> Chart:
    arms = unique(row["arm"] for row in rows)
    return Chart(
        "chart-coverage",
        "Share of the attribution carried by the top latents, last cycle",
        "Steep and early: few latents matter. One line per chain, its colour and dash by k; ranks on a logarithmic "
        "axis.",
        {(arm,): _curves([row for row in rows if row["arm"] == arm]) for arm in arms},
        [Choice("Arm", arms)],
    )


def _curves(rows: Sequence[dict[str, Any]]) -> go.Figure:
    ks = sorted({row["k"] for row in rows})
    traces, named = [], set()
    for row in rows:
        style = Style.number(ks.index(row["k"]))
        name = plain(row["chain"])
        traces.append(
            go.Scatter(
                x=[rank for rank, _ in row["coverage_curve"]],
                y=[share for _, share in row["coverage_curve"]],
                mode="lines",
                name=f"k = {row['k']}",
                legendgroup=str(row["k"]),
                showlegend=row["k"] not in named,
                line=style.line(1.8),
                meta=row["chain"],
                hovertemplate=f"{name}: the first %{{x}} latents carry %{{y:.3f}}<extra></extra>",
            )
        )
        named.add(row["k"])
        if row.get("core_out") and row.get("coverage") is not None:
            traces.append(
                go.Scatter(
                    x=[row["core_out"]],
                    y=[row["coverage"]],
                    mode="markers",
                    legendgroup=str(row["k"]),
                    showlegend=False,
                    meta=row["chain"],
                    marker={"color": style.colour, "symbol": "circle-open", "size": 11, "line": {"width": 2}},
                    hovertemplate=f"{name}: core of %{{x}} latents carries %{{y:.3f}}<extra></extra>",
                )
            )
    made = figure(traces, height=440)
    made.layout.xaxis.update(title_text="latents, by falling attribution", type="log", dtick="D2", tickformat=",d")
    made.layout.yaxis.update(title_text="cumulative share of the attribution", range=[0, 1.03])
    return made


def rank_at(curve: Sequence[Sequence[float]], share: float) -> int | None:
    """How many latents it takes to reach a share; None if the curve ends below it."""
    return next((int(rank) for rank, reached in curve if reached >= share), None)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    def takes(share: float) -> Column:
        def value(row: dict[str, Any]) -> int | None:
            return rank_at(row["coverage_curve"], share)

        return Column(
            f"For {share:.0%}".replace("%", " %"),
            value,
            "count",
            "latents",
            why=lambda row: "the curve ends below this share",
        )

    columns = [
        Column("Chain", lambda row: row["chain"]),
        Column("Arm", lambda row: row["arm"]),
        Column("k", lambda row: row["k"], "count", "latents per token"),
        Column("Ranked", lambda row: row["coverage_curve"][-1][0], "count", "latents"),
        *map(takes, SHARES),
        Column("Core", lambda row: row.get("core_out"), "count", "latents"),
        Column("Core carries", lambda row: row.get("coverage"), "share", "of the attribution"),
    ]
    return Table("table-coverage", "How many latents it takes to carry a share of the attribution.", columns, rows)
