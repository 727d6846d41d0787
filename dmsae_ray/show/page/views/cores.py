"""The view of how cores settle: size by origin, Jaccard and decoder drift, cycle by cycle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dmsae_ray.show.page.arm_style import Style
from dmsae_ray.show.page.artifacts import Artifacts, unique
from dmsae_ray.show.page.chart import Chart, Choice, above_bars, figure, plain, span, totals
from dmsae_ray.show.page.numerals import shown
from dmsae_ray.show.page.table import Column, Table
from dmsae_ray.show.page.view import Grid, Note, Part, View

LEAD = (
    "Does the core settle? After every cycle each member has to earn its place again. A core that has settled keeps "
    "its size, its members (Jaccard near 1) and, although decoders are learned afresh, its directions: training brings "
    "its decoder rows back from where they begin, near as that may be (gap closed near 1)."
)


def view(artifacts: Artifacts) -> View:
    """The view; in place of what is missing stands why."""
    rows = [row for row in artifacts.rows if row.get("core_out") is not None]
    parts: list[Part] = []
    if not rows:
        parts.append(Note(f"No finished cycle selected a core{_because(artifacts)}."))
    else:
        parts += [_origins(rows), Grid([_sizes(rows), _jaccard(rows), _drift(rows)], 3), _table(rows)]
    return View("cores", "Cores", LEAD, parts)


def _because(artifacts: Artifacts) -> str:
    reason = artifacts.reasons.get("evaluation.json")
    return f": {reason}" if reason else ""


def _origins(rows: Sequence[dict[str, Any]]) -> Chart | Note:
    """Bars by the cycle in which members first entered; for an arm the mean over its chains, or one chain."""
    rows = [row for row in rows if row.get("origins")]
    if not rows:
        return Note("The rows do not say in which cycle the cores' members entered.")
    arms = unique(row["arm"] for row in rows)
    sets = {f"{arm}, mean of {_chains(rows, arm)}": [row for row in rows if row["arm"] == arm] for arm in arms}
    sets |= {chain: [row for row in rows if row["chain"] == chain] for chain in unique(row["chain"] for row in rows)}
    return Chart(
        "chart-origins",
        "Core size by cycle, and where its members come from",
        "The height of a bar is the core's size; its parts say in which cycle their members first entered.",
        {(name,): _bars(members) for name, members in sets.items()},
        [Choice("Chains", list(sets))],
    )


def _chains(rows: Sequence[dict[str, Any]], arm: str) -> str:
    number = len(unique(row["chain"] for row in rows if row["arm"] == arm))
    return f"{number} chain{'s' * (number != 1)}"


PATTERNS = ("", "/", "x", "-", "|", "+", ".", "\\")
"""Of the parts of a bar, beside their colours."""


def _bars(rows: Sequence[dict[str, Any]]) -> go.Figure:
    cycles = sorted({row["cycle"] for row in rows})
    x = [str(cycle) for cycle in cycles]
    traces: list[Any] = []
    for origin in range(cycles[-1] + 1):
        means = [
            float(np.mean([row["origins"].get(str(origin), 0) for row in rows if row["cycle"] == cycle]))
            for cycle in cycles
        ]
        if any(means):
            traces.append(
                go.Bar(
                    x=x,
                    y=means,
                    name=f"entered in cycle {origin}",
                    marker={
                        "color": Style.number(origin).colour,
                        "pattern": {"shape": PATTERNS[origin % len(PATTERNS)], "size": 6},
                    },
                    hovertemplate="cycle %{x}: %{y:.4g} members entered in cycle " + str(origin) + "<extra></extra>",
                )
            )
    heights = [
        float(np.mean([sum(row["origins"].values()) for row in rows if row["cycle"] == cycle])) for cycle in cycles
    ]
    traces.append(totals(x, heights, [shown(height, "tenths").removesuffix(".0") for height in heights]))
    made = figure(traces, barmode="stack", bargap=0.3, legend={"traceorder": "normal"})
    made.layout.xaxis.update(title_text="cycle", type="category", showgrid=False)
    made.layout.yaxis.update(title_text="latents in the core", range=above_bars(heights))
    return made


def lines(
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float | None],
    title: str,
    kind: str,
    least: float,
    most: float | None = None,
) -> go.Figure | None:
    """A line per chain over cycles, colour, dash and symbol by k; None if no row has a value.

    `least` and `most`: what the vertical axis shows at least, and what it does not go beyond (see `span`).
    """
    rows = [row for row in rows if value(row) is not None]
    if not rows:
        return None
    ks = sorted({row["k"] for row in rows})
    traces, named = [], set()
    for chain in unique(row["chain"] for row in rows):
        members = [row for row in rows if row["chain"] == chain]
        k = members[0]["k"]
        style = Style.number(ks.index(k))
        numbers = [value(row) for row in members]
        traces.append(
            go.Scatter(
                x=[row["cycle"] for row in members],
                y=numbers,
                mode="lines+markers",
                name=f"k = {k}",
                legendgroup=str(k),
                showlegend=k not in named,
                line=style.line(1.5),
                marker=style.marker(7),
                meta=chain,
                text=[
                    f"{plain(chain)}, cycle {row['cycle']}: {shown(number, kind)}"
                    for row, number in zip(members, numbers, strict=True)
                ],
                hovertemplate="%{text}<extra></extra>",
            )
        )
        named.add(k)
    made = figure(traces, height=320)
    cycles = [row["cycle"] for row in rows]
    made.layout.xaxis.update(
        title_text="cycle",
        dtick=max(1, (max(cycles) - min(cycles)) // 8),
        range=[min(cycles) - 0.25, max(cycles) + 0.25],
    )
    made.layout.yaxis.update(
        title_text=title, range=span([number for row in rows if (number := value(row)) is not None], least, most)
    )
    return made


def _by_arm(id: str, title: str, read: str, absent: str, rows: Sequence[dict[str, Any]], *args: Any) -> Chart | Note:
    figures: dict[tuple[str, ...], go.Figure | str] = {}
    for arm in unique(row["arm"] for row in rows):
        made = lines([row for row in rows if row["arm"] == arm], *args)
        if made is not None:
            figures[arm,] = made
    if not figures:
        return Note(absent)
    return Chart(id, title, read, figures, [Choice("Arm", [arm for (arm,) in figures])])


def _sizes(rows: Sequence[dict[str, Any]]) -> Chart | Note:
    return _by_arm(
        "chart-sizes",
        "Core size",
        "Flat lines have settled. One line per chain.",
        "No row has a core size.",
        rows,
        lambda row: row["core_out"],
        "latents",
        "count",
        8,
    )


def _jaccard(rows: Sequence[dict[str, Any]]) -> Chart | Note:
    return _by_arm(
        "chart-jaccard",
        "Jaccard with the core before",
        "1: the same members; 0: none kept. One line per chain.",
        "No chain has a second core to compare with its first.",
        rows,
        lambda row: row.get("jaccard"),
        "Jaccard",
        "share",
        0.1,
        1.0,
    )


def drift(row: dict[str, Any], name: str = "mean") -> float | None:
    """A number of the row's decoder drift."""
    return (row.get("decoder_drift") or {}).get(name)


DRIFT = {"after training": "mean", "before training": "before", "gap closed": "gap_closed"}
"""What is shown of the drift, and its name in the row."""


def _drift(rows: Sequence[dict[str, Any]]) -> Chart | Note:
    arms = [arm for arm in unique(row["arm"] for row in rows) if any(drift(row) is not None for row in _of(rows, arm))]
    if not arms:
        return Note("Decoder drift was not measured, or no chain has a second cycle.")
    figures: dict[tuple[str, ...], go.Figure | str] = {}
    for arm in arms:
        for words, name in DRIFT.items():
            title = words if name == "gap_closed" else "mean cosine"
            made = lines(_of(rows, arm), partial(drift, name=name), title, "share", 0.1, 1.0)
            figures[arm, words] = made or "Not measured: these records are older than the measure."
    return Chart(
        "chart-drift",
        "Decoder drift",
        "Mean cosine of members' decoder rows to what they were, after learning them afresh and before; gap closed: "
        "(after − before) / (1 − before), 0 where they are no nearer than they began. One line per chain.",
        figures,
        [Choice("Arm", arms), Choice("Show", list(DRIFT))],
    )


def _of(rows: Sequence[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["arm"] == arm]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = [
        Column("Chain", lambda row: row["chain"]),
        Column("Arm", lambda row: row["arm"]),
        Column("Cycle", lambda row: row["cycle"], "count"),
        Column("Core before", lambda row: row.get("core_in"), "count", "latents"),
        Column("Core after", lambda row: row["core_out"], "count", "latents"),
        Column("Kept", lambda row: row.get("kept"), "count", "latents"),
        Column("Entered", lambda row: row.get("entered"), "count", "latents"),
        Column("Left", lambda row: row.get("left"), "count", "latents"),
        Column("Jaccard", lambda row: row.get("jaccard"), "share", why=lambda row: "no core before the first cycle"),
        Column(
            "Drift, mean", drift, "share", "cosine", why=lambda row: "no core before the first cycle, or not measured"
        ),
        Column(
            "Gap closed",
            lambda row: drift(row, "gap_closed"),
            "share",
            help="(drift − before training) / (1 − before training): 0 where training brought them no nearer; the "
            "chart has the cosine before training",
        ),
        Column(
            "Coverage",
            lambda row: row.get("coverage"),
            "share",
            help="share of the attribution that the selected core carries",
        ),
    ]
    return Table("table-cores", "Every finished cycle of every chain.", columns, rows)
