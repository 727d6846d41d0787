"""The view of what SAEs are worth: sparsity, variance explained and the model's loss, arm beside arm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from dmsae_ray.show.columns import standard_error_words
from dmsae_ray.show.page.arm_style import Style
from dmsae_ray.show.page.artifacts import Artifacts, unique
from dmsae_ray.show.page.chart import Chart, Choice, figure, plain, span
from dmsae_ray.show.page.measures import ARMS, FURTHER, MAIN, PREFIX, Measure
from dmsae_ray.show.page.numerals import shown
from dmsae_ray.show.page.spread import ONE_SEED, Spread, over_seeds
from dmsae_ray.show.page.table import Column, Table
from dmsae_ray.show.page.view import Grid, Note, Part, View

LEAD = (
    "What does distillation cost, and what does it give? All SAEs are evaluated on the same held-out tokens, each at "
    "the last cycle of its chain. Points are means over seeds; bars are 95 % intervals from four seeds on, below that "
    "the range of the seeds."
)


ARMS_AGAINST_K = 6
"""With more arms, those that have a single k are left to the chart of arms side by side: their points would hide the
lines.
"""


def view(artifacts: Artifacts) -> View:
    """The view; in place of what is missing stands why."""
    rows = artifacts.last
    parts: list[Part] = []
    if not rows:
        parts.append(
            Note(
                f"There is nothing to evaluate: {artifacts.reasons.get('evaluation.json') or 'no chain has finished'}."
            )
        )
    else:
        parts.append(Grid([_against_k(rows, measure) for measure in MAIN]))
        parts += [_arms(rows), _further(rows), _prefixes(rows)]
        parts += [_spreads(rows), _chains(rows)]
    return View("quality", "Quality", LEAD, parts)


def spreads(
    rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]
) -> dict[tuple[str, int], Spread]:
    """By arm and k: a value over seeds."""
    made = {}
    for arm, k in unique((row["arm"], row["k"]) for row in rows):
        spread = over_seeds((row["seed"], value(row)) for row in rows if (row["arm"], row["k"]) == (arm, k))
        if spread:
            made[arm, k] = spread
    return made


def _place(rows: Sequence[dict[str, Any]], arm: str) -> int:
    """An arm's place among all, by which it looks the same in every chart; those with a line over k come first, and
    differ most.
    """
    several = {
        name for name in unique(row["arm"] for row in rows) if len({row["k"] for row in rows if row["arm"] == name}) > 1
    }
    return sorted(unique(row["arm"] for row in rows), key=lambda name: name not in several).index(arm)


def _error_bars(spreads: Sequence[Spread]) -> dict[str, Any]:
    return {
        "symmetric": False,
        "array": [spread.high - spread.mean for spread in spreads],
        "arrayminus": [spread.mean - spread.low for spread in spreads],
        "thickness": 1.5,
        "width": 4,
    }


def _said(arm: str, where: str, spread: Spread, measure: Measure) -> str:
    low, high = shown(spread.low, measure.kind), shown(spread.high, measure.kind)
    ends = "" if spread.seeds == 1 else f" [{low}, {high}], {spread.words()}"
    return (
        f"<b>{plain(arm)}</b>, {where}<br>{measure.name} {shown(spread.mean, measure.kind)}{ends}<br>{spread.chains} "
        "chains"
    )


def _trace(
    arm: str, place: int, x: Sequence[str], points: Sequence[Spread], where: Sequence[str], measure: Measure
) -> go.Scatter:
    style = Style.number(place)
    return go.Scatter(
        x=list(x),
        y=[point.mean for point in points],
        error_y=_error_bars(points),
        name=plain(arm),
        meta=arm,
        mode="lines+markers",
        line=style.line(),
        marker=style.marker(),
        hovertemplate="%{text}<extra></extra>",
        text=[_said(arm, at, point, measure) for at, point in zip(where, points, strict=True)],
    )


def _k_figure(rows: Sequence[dict[str, Any]], measure: Measure, height: int) -> go.Figure | None:
    arms, found = unique(row["arm"] for row in rows), spreads(rows, measure.of)
    if len(arms) > ARMS_AGAINST_K:
        several = {arm for arm in arms if len({row["k"] for row in rows if row["arm"] == arm}) > 1}
        found = {key: spread for key, spread in found.items() if key[0] in several} or found
    if not found:
        return None
    traces = []
    for arm in arms:
        at = sorted(k for name, k in found if name == arm)
        if at:
            points = [found[arm, k] for k in at]
            traces.append(
                _trace(arm, _place(rows, arm), [str(k) for k in at], points, [f"k = {k}" for k in at], measure)
            )
    made = figure(traces, height=height, scattermode="group", scattergap=0.75, meta={"read": measure.read})
    made.layout.yaxis.update(range=_range(found.values(), measure))
    made.layout.xaxis.update(
        title_text="k, latents per token",
        type="category",
        categoryorder="array",
        categoryarray=[str(k) for k in _ks(rows)],
    )
    made.layout.yaxis.update(title_text=f"{measure.name} ({measure.unit})")
    return made


def _range(points: Iterable[Spread], measure: Measure, values: Iterable[float] = ()) -> list[float]:
    """What an axis shows: grouped traces would start it at 0, where differences of a loss recovered cannot be seen.

    A single point stands amid a tenth of its value: its seeds differ by less than would be worth a look from nearby.
    """
    points = list(points)
    ends = [*values, *(point.low for point in points), *(point.high for point in points)]
    largest = max(abs(end) for end in ends)
    least = (0.1 if len(points) == 1 else 0.02) * largest or 0.1
    return span(ends, least, 1.0 if measure.kind == "share" else None)


def _ks(rows: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({row["k"] for row in rows})


def _against_k(rows: Sequence[dict[str, Any]], measure: Measure) -> Chart | Note:
    made = _k_figure(rows, measure, 340)
    if made is None:
        return Note(f"{measure.name} was not measured in this sweep.")
    read = measure.read
    if len(made.data) < len(unique(row["arm"] for row in rows)):
        read += " Arms of a single k stand below, side by side."
    made.layout.meta = None
    return Chart(f"chart-{measure.field.replace('_', '-')}", f"{measure.name} against k", read, {(): made})


def _arms(rows: Sequence[dict[str, Any]]) -> Chart | Note:
    """A line per arm at one k: mean, its bar, and every chain."""
    figures: dict[tuple[str, ...], go.Figure | str] = {
        (str(k), measure.name): _arms_figure(rows, k, measure) for k in _ks(rows) for measure in ARMS
    }
    if not any(isinstance(made, go.Figure) for made in figures.values()):
        return Note("Arms cannot be set side by side: nothing was measured.")
    choices = [Choice("k", [str(k) for k in _ks(rows)]), Choice("Measure", [measure.name for measure in ARMS])]
    return Chart("chart-arms", "Arms side by side at one k", ARMS[0].read, figures, choices)


def _arms_figure(rows: Sequence[dict[str, Any]], k: int, measure: Measure) -> go.Figure | str:
    traces: list[go.Scatter] = []
    means: list[Spread] = []
    values: list[float] = []
    for arm in unique(row["arm"] for row in rows):
        members = [row for row in rows if (row["arm"], row["k"]) == (arm, k) and row.get(measure.field) is not None]
        spread = over_seeds((row["seed"], row[measure.field]) for row in members)
        if spread is None:
            continue
        means.append(spread)
        values += [row[measure.field] for row in members]
        style, y = Style.number(_place(rows, arm)), plain(arm)
        traces.append(
            go.Scatter(
                x=[row[measure.field] for row in members],
                y=[y] * len(members),
                mode="markers",
                meta={"arm": arm, "of": "chains"},
                marker={"color": style.colour, "symbol": "line-ns-open", "size": 13},
                opacity=0.6,
                hovertemplate="%{text}<extra></extra>",
                text=[
                    f"{plain(row['chain'])}<br>{measure.name} {shown(row[measure.field], measure.kind)}"
                    for row in members
                ],
            )
        )
        traces.append(
            go.Scatter(
                x=[spread.mean],
                y=[y],
                error_x=_error_bars([spread]),
                mode="markers",
                marker=style.marker(10),
                meta={"arm": arm, "of": "mean"},
                text=[_said(arm, f"k = {k}", spread, measure)],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    if not traces:
        return f"No arm has {measure.name} at k = {k}."
    read = f"{measure.read} Symbols are means with their bars, strokes are single chains."
    made = figure(traces, height=110 + 14 * len(traces), showlegend=False, meta={"read": read})
    made.layout.yaxis.update(type="category", autorange="reversed")
    made.layout.xaxis.update(title_text=f"{measure.name} ({measure.unit})", range=_range(means, measure, values))
    return made


def _further(rows: Sequence[dict[str, Any]]) -> Chart | Note:
    figures: dict[tuple[str, ...], go.Figure | str] = {
        (measure.name,): _k_figure(rows, measure, 380) or f"{measure.name} was not measured in this sweep."
        for measure in FURTHER
    }
    if not any(isinstance(made, go.Figure) for made in figures.values()):
        return Note("No further measure was made.")
    choice = Choice("Measure", [measure.name for measure in FURTHER])
    return Chart("chart-further", "Further measures against k", FURTHER[0].read, figures, [choice])


def prefix_of(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The row's entry of one prefix; {} if it has none."""
    return next((entry for entry in row.get("prefixes") or [] if entry["name"] == name), {})


def _prefixes(rows: Sequence[dict[str, Any]]) -> Chart | Note:
    rows = [row for row in rows if row.get("prefixes")]
    if not rows:
        return Note("Prefixes were not evaluated in this sweep.")
    names = unique(entry["name"] for row in rows for entry in row["prefixes"])
    names = [name for name in names if name == "core"] + sorted((name for name in names if name != "core"), key=int)
    figures: dict[tuple[str, ...], go.Figure | str] = {}
    for k in _ks(rows):
        at_k = [row for row in rows if row["k"] == k]
        for measure in PREFIX:
            figures[f"{k}", measure.name] = _prefix_figure(rows, at_k, names, measure)
    return Chart(
        "chart-prefixes",
        "By prefix: the core alone, then group after group",
        "How much of the whole SAE (right) the core alone (left) and the smallest prefixes give.",
        figures,
        [Choice("k", [str(k) for k in _ks(rows)]), Choice("Measure", [measure.name for measure in PREFIX])],
    )


def _prefix_figure(
    rows: Sequence[dict[str, Any]], at_k: Sequence[dict[str, Any]], names: Sequence[str], measure: Measure
) -> go.Figure | str:
    """One measure over the prefixes at one k; `rows`: of all k, for the arms' places."""
    traces: list[go.Scatter] = []
    points: list[Spread] = []
    for arm in unique(row["arm"] for row in rows):
        members = [row for row in at_k if row["arm"] == arm]
        found = {
            name: spread
            for name in names
            if (spread := over_seeds((row["seed"], measure.of(prefix_of(row, name))) for row in members))
        }
        if found:
            words, spreads_at = [_prefix_name(name) for name in found], list(found.values())
            traces.append(_trace(arm, _place(rows, arm), words, spreads_at, words, measure))
            points += spreads_at
    if not traces:
        return f"{measure.name} of the prefixes was not measured."
    made = figure(traces, height=400, scattermode="group", scattergap=0.75)
    made.layout.yaxis.update(range=_range(points, measure))
    made.layout.xaxis.update(
        type="category", categoryorder="array", categoryarray=[_prefix_name(name) for name in names]
    )
    made.layout.yaxis.update(title_text=f"{measure.name} ({measure.unit})")
    return made


def _prefix_name(name: str) -> str:
    return "core alone" if name == "core" else f"to group {name}"


def _spreads(rows: Sequence[dict[str, Any]]) -> Table | Note:
    found = [
        {"arm": arm, "k": k, "measure": measure, "spread": spread}
        for measure in (*MAIN, *FURTHER)
        for (arm, k), spread in spreads(rows, measure.of).items()
    ]
    columns = [
        Column("Arm", lambda row: row["arm"]),
        Column("k", lambda row: row["k"], "count", "latents per token"),
        Column("Measure", lambda row: row["measure"].name),
        Column("Unit", lambda row: row["measure"].unit),
        Column("Mean", lambda row: row["spread"].mean, "nats"),
        Column("Low", lambda row: row["spread"].ends[0], "nats", why=lambda row: ONE_SEED),
        Column("High", lambda row: row["spread"].ends[1], "nats", why=lambda row: ONE_SEED),
        Column("Low and high are", lambda row: row["spread"].words()),
        Column("Chains", lambda row: row["spread"].chains, "count"),
    ]
    if not found:
        return Note("No chain has one of these measures.")
    return Table("table-spreads", "The numbers of the charts above: mean over seeds by arm and k.", columns, found)


def _chains(rows: Sequence[dict[str, Any]]) -> Table:
    columns = [
        Column("Chain", lambda row: row["chain"]),
        Column("Arm", lambda row: row["arm"]),
        Column("Core from", lambda row: row.get("from"), why=lambda row: "starts without another chain's core"),
        Column("Seed", lambda row: row["seed"], "count"),
        Column("k", lambda row: row["k"], "count", "latents per token"),
        Column("Cycle", lambda row: row["cycle"], "count"),
        *(Column(measure.name, measure.of, measure.kind, measure.unit, measure.read) for measure in (*MAIN, *FURTHER)),
    ]
    sure = standard_error_words(row.get("standard_errors") for row in rows)
    caption = "Every chain at its last finished cycle, on held-out tokens."
    return Table("table-quality", f"{caption} {sure}" if sure else caption, columns, rows)
