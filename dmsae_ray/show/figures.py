"""Figures of a sweep for MLflow, drawn with matplotlib's Agg; those of the page are in page/.

Colours are readable without red-green vision (cividis, Okabe-Ito).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dmsae_ray.files import replacing
from dmsae_ray.show.columns import ChainRow, null_value

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito, Color Universal Design (2008)"""
LARGEST_INCH = 24.0


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own: no pyplot state, so that any thread may draw."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; a reader never sees half of it."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def matrices(
    comparison: dict[str, Any], arm: str | None = None
) -> tuple[list[str], list[list[float | None]], list[list[float | None]]]:
    """Labels, PW-MCC and 99th percentile of the covariance null of comparison.json, as symmetric matrices with None
    where there is
    no pair (the diagonal among them). arm: of these chains only; None: of all."""
    labels = [label for label in comparison["chains"] if arm is None or comparison["arms"][label] == arm]
    at = {label: position for position, label in enumerate(labels)}
    values: list[list[float | None]] = [[None] * len(labels) for _ in labels]
    nulls: list[list[float | None]] = [[None] * len(labels) for _ in labels]
    for pair in comparison["pairs"]:
        if pair["a"] not in at or pair["b"] not in at:
            continue
        for i, j in ((at[pair["a"]], at[pair["b"]]), (at[pair["b"]], at[pair["a"]])):
            values[i][j] = pair["pw_mcc"]
            nulls[i][j] = null_value(pair, "covariance")
    return labels, values, nulls


def consistency_matrix(
    labels: Sequence[str],
    matrix: Sequence[Sequence[float | None]],
    nulls: Sequence[Sequence[float | None]],
    failed: Sequence[str] = (),
) -> Figure:
    """Heat map of PW-MCC, core against core. Each cell states, below its value, what it has to exceed: the 99th
    percentile of the covariance null."""
    n = len(labels)
    roomy = n <= 12
    side = min(LARGEST_INCH, 2.6 + (0.95 if roomy else 0.5) * n)
    figure = new_figure(side + 1.0, side)
    axes = figure.subplots()
    values = np.array([[math.nan if value is None else value for value in row] for row in matrix], dtype=float).reshape(
        n, n
    )
    colours = matplotlib.colormaps["cividis"].with_extremes(bad="#e8e8e8")
    lowest = min([0.0, *(value for row in matrix for value in row if value is not None)])
    image = axes.imshow(values if n else np.full((1, 1), np.nan), vmin=lowest, vmax=1.0, cmap=colours)
    for i in range(n):
        for j in range(n):
            value, null = matrix[i][j], nulls[i][j]
            if value is None:
                continue
            ink = "black" if value > 0.55 else "white"
            axes.text(
                j,
                i - (0.12 if roomy else 0),
                f"{value:.2f}",
                ha="center",
                va="center",
                color=ink,
                fontsize=11 if roomy else 6,
            )
            if roomy:
                below = "null n/a" if null is None else f"p99 {null:.2f}"
                axes.text(j, i + 0.22, below, ha="center", va="center", color=ink, fontsize=7)
    axes.set_xticks(range(n), labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=9 if roomy else 6)
    axes.set_yticks(range(n), labels, fontsize=9 if roomy else 6)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="PW-MCC", shrink=0.8)
    known = [null for row in nulls for null in row if null is not None]
    bar = (
        f"p99: 99th percentile of the covariance null, at most {max(known):.2f}"
        if known
        else "covariance null not available"
    )
    title = f"Agreement of the cores of {n} chains\n{bar}"
    if n < 2:
        title = "Agreement of cores: not available (needs two finished chains)"
    if failed:
        title += f"\nwithout failed: {', '.join(failed)}"
    axes.set_title(title, fontsize=10)
    return figure


def core_sizes(rows: Sequence[ChainRow]) -> Figure:
    """Core size after each cycle, one panel per chain; the stacked parts say in which cycle a latent first entered."""
    rows = [row for row in rows if row.sizes]
    across = max(1, min(4, len(rows)))
    down = max(1, math.ceil(len(rows) / across))
    figure = new_figure(max(4.5, 2.9 * across), min(LARGEST_INCH, 1.0 + 2.4 * down))
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    cycles = max((len(row.sizes) for row in rows), default=1)
    colours = matplotlib.colormaps["cividis"](np.linspace(0.0, 1.0, cycles))
    for axes, row in zip(panels, rows, strict=False):
        bottom = np.zeros(len(row.sizes))
        for origin in range(cycles):
            part = np.array([counts.get(origin, 0) for counts in row.origins], dtype=float)
            bars = {"color": colours[origin], "edgecolor": "white", "linewidth": 0.4}
            axes.bar(range(len(part)), part, bottom=bottom, label=f"cycle {origin}", **bars)
            bottom += part
        for cycle, size in enumerate(row.sizes):
            axes.text(cycle, size, str(size), ha="center", va="bottom", fontsize=7)
        axes.set_title(row.label, fontsize=9)
        axes.set_xticks(range(cycles))
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    figure.supxlabel("cycle", fontsize=9)
    figure.supylabel("latents in the core", fontsize=9)
    if rows:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, title="first entered in", fontsize=7, title_fontsize=8, loc="outside right upper")
    return figure
