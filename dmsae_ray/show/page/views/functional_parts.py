"""Parts of the consistency view: what matched latents are used for, and agreement as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dmsae_ray.compare.functional import NULLS, Functional
from dmsae_ray.show.page.arm_style import Style
from dmsae_ray.show.page.chart import Chart, Choice, figure, plain, span
from dmsae_ray.show.page.numerals import shown
from dmsae_ray.show.page.spread import ends, ends_columns
from dmsae_ray.show.page.table import Column, Table
from dmsae_ray.show.page.view import Part


@dataclass(frozen=True)
class Measure:
    """One measure of functional agreement."""

    name: str
    field: str
    chance: str
    """the null by which its chance is shown first"""
    unmatched: bool = False
    """of latents without a partner"""


MEASURES = (
    Measure("firing overlap", "firing", "permuted"),
    Measure("loss effects", "effect", "permuted"),
    Measure("importance", "importance", "permuted"),
    Measure("unmatched subspace", "subspace", "covariance", unmatched=True),
)
READ = (
    "Firing overlap: Jaccard of the held-out tokens on which matched latents are active. Loss effects: correlation "
    "over tokens of what matched latents do to the loss (to first order). Importance: rank correlation of the chains' "
    "own attribution scores. Unmatched subspace: mean squared cosine of the principal angles between what the latents "
    "span that are not shared, 1 if both cores hold one subspace in different bases."
)
PERMUTED = "the same latents with each other's partners, among like densities; for subspaces random directions"
COURSE = (
    ("PW-MCC, one size", "pw_mcc_same_size", "pw_mcc_chance_same_size"),
    ("overlap, one size", "overlap_same_size", None),
    ("PW-MCC, whole cores", "pw_mcc", "pw_mcc_chance"),
    ("overlap, whole cores", "overlap", None),
    ("firing overlap, whole cores", "firing", "firing_chance"),
)
"""Name, number of the course, and the number that is its chance."""


def functional_parts(comparison: dict[str, Any]) -> list[Part]:
    """A chart over training tokens, a table by group and one by pair, as far as comparison.json has them."""
    groups = comparison.get("summary", {}).get("groups", {})
    made = [_course(groups), _groups(groups), _pairs(comparison.get("pairs", []))]
    return [part for part in made if part is not None]


def _course(groups: dict[str, Any]) -> Chart | None:
    within = {name: group for name, group in groups.items() if "~" not in name and len(group.get("course") or {}) > 1}
    if not within:
        return None
    return Chart(
        "chart-course",
        "Agreement as training goes on",
        "A point for each cycle of the chains, at the tokens trained on until then; dotted: chance. At one size, the "
        "best members of each core, chance is the same throughout. Bars: 95 % intervals, from four seeds on.",
        {(name,): _curves(within, number, chance) for name, number, chance in COURSE},
        [Choice("Measure", [name for name, _, _ in COURSE])],
    )


def _curves(groups: dict[str, Any], number: str, chance: str | None) -> go.Figure | str:
    traces, seen = [], []
    for place, (name, group) in enumerate(groups.items()):
        points = [point for point in group["course"].values() if point.get(number)]
        if not points:
            continue
        style, x = Style.number(place), [point["tokens"] for point in points]
        means = [point[number]["mean"] for point in points]
        intervals = [point[number]["interval"] or [mean, mean] for point, mean in zip(points, means, strict=True)]
        seen += [end for interval in intervals for end in interval] + means
        traces.append(
            go.Scatter(
                x=x,
                y=means,
                mode="lines+markers",
                name=plain(name),
                legendgroup=name,
                line=style.line(1.8),
                marker=style.marker(8),
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [high - mean for (_, high), mean in zip(intervals, means, strict=True)],
                    "arrayminus": [mean - low for (low, _), mean in zip(intervals, means, strict=True)],
                    "thickness": 1,
                },
                text=[
                    f"{plain(name)}, {point['tokens']:,} tokens: {shown(mean, 'share')} over {point['pairs']} pairs"
                    for point, mean in zip(points, means, strict=True)
                ],
                hovertemplate="%{text}<extra></extra>",
            )
        )
        if chance is not None and all(point.get(chance) for point in points):
            y = [point[chance]["mean"] for point in points]
            seen += y
            traces.append(
                go.Scatter(
                    x=x,
                    y=y,
                    mode="lines",
                    name=f"{plain(name)}, chance",
                    legendgroup=name,
                    showlegend=False,
                    line={"color": style.colour, "dash": "dot", "width": 1.2},
                    hovertemplate=f"{plain(name)}, chance: %{{y:.3f}}<extra></extra>",
                )
            )
    if not traces:
        return "No group of pairs has this number."
    made = figure(traces, height=380)
    made.layout.xaxis.update(title_text="tokens trained on", rangemode="tozero")
    made.layout.yaxis.update(title_text="mean over pairs", range=span(seen, 0.2, 1.0))
    return made


def _groups(groups: dict[str, Any]) -> Table | None:
    rows = []
    for name, group in groups.items():
        found = group.get("functional") or {}
        for measure in MEASURES:
            if not found.get(measure.field):
                continue
            nulls = found["nulls"]
            rows.append(
                {
                    "group": name,
                    "measure": measure.name,
                    **ends(found[measure.field], group["scored"]),
                    "chance": _mean(nulls[measure.chance].get(measure.field)),
                    "density": _mean(nulls["matched_density"].get(measure.field)),
                    "cycle0": _mean(nulls["cycle0"].get(measure.field)),
                    "beyond": found["beyond"][measure.field],
                    "pairs": found[measure.field]["n"],
                }
            )
    columns = [
        Column("Group", lambda row: row["group"], help="arm / what the two chains of a pair do not have in common"),
        Column("Measure", lambda row: row["measure"]),
        *ends_columns(),
        Column("Permuted or random", lambda row: row["chance"], "share", help=PERMUTED),
        Column("Free, as dense", lambda row: row["density"], "share", help="free latents that fire about as often"),
        Column("Cycle-0 sets", lambda row: row["cycle0"], "share", help="top latents of the undistilled SAEs, as many"),
        Column(
            "Beyond chance",
            lambda row: row["beyond"],
            "share",
            help="share of the pairs that exceed both kinds of chance",
        ),
        Column("Pairs", lambda row: row["pairs"], "count"),
    ]
    caption = f"Functional agreement by group, beside the means of its nulls. {READ}"
    return Table("table-functional-groups", caption, columns, rows) if rows else None


def _mean(spread: dict[str, Any] | None) -> float | None:
    return None if spread is None else spread["mean"]


def _pairs(pairs: Sequence[dict[str, Any]]) -> Table | None:
    rows = []
    for pair in pairs:
        if not pair.get("functional"):
            continue
        found = Functional.from_dict(pair["functional"])
        for measure in MEASURES:
            rows.append(
                {
                    "a": pair["a"],
                    "b": pair["b"],
                    "measure": measure,
                    "value": getattr(found, measure.field),
                    "beyond": found.beyond(measure.field),
                    "found": found,
                }
            )

    def null(chosen: str | None, number: str) -> dict[str, Any]:
        """A null's number; chosen: None: the one by which the measure's chance is shown first."""

        def of(row: dict[str, Any]) -> Any:
            return row["found"].nulls[chosen or row["measure"].chance]

        def value(row: dict[str, Any]) -> float | None:
            return getattr(of(row), number.format(row["measure"].field)) if of(row).available else None

        def why(row: dict[str, Any]) -> str | None:
            if row["measure"].field not in NULLS[chosen or row["measure"].chance]:
                return "free latents and cycle 0's sets have no scores of this chain's core"
            return of(row).reason

        return {"value": value, "why": why}

    columns = [
        Column("Chain a", lambda row: row["a"]),
        Column("Chain b", lambda row: row["b"]),
        Column("Measure", lambda row: row["measure"].name),
        Column("Agreement", lambda row: row["value"], "share", why=_absent),
        Column("Permuted or random", kind="share", **null(None, "{}_bar"), help=f"the bar: p99 of {PERMUTED}"),
        Column(
            "Free, as dense",
            kind="share",
            **null("matched_density", "{}_bar"),
            help="the bar: largest of the draws of free latents that fire about as often",
        ),
        Column("Cycle-0 sets", kind="share", **null("cycle0", "{}"), help="top latents of the undistilled SAEs"),
        Column("Without structure", _expected, "share", help="independent firing at these densities; isotropic spans"),
        Column("Beyond chance", lambda row: row["beyond"], "yes_no", help="above each bar that is available"),
        Column("Latents", _latents, help="matched pairs counted, or members without a partner in a and in b"),
    ]
    caption = "Functional agreement of every pair: beyond chance where it exceeds the bars beside it."
    return Table("table-functional", caption, columns, rows) if rows else None


def _absent(row: dict[str, Any]) -> str | None:
    found: Functional = row["found"]
    if row["measure"].field == "effect" and not found.effect_rows:
        return "gradients of the loss were not measured for this dataset: the sweep's or the report's command does"
    if row["measure"].unmatched:
        return "every latent of a core is shared"
    return "the matched latents are silent, or all alike"


def _expected(row: dict[str, Any]) -> float | None:
    """What the measure is of things that have nothing to do with each other, computed and not drawn."""
    found: Functional = row["found"]
    known = {"firing": found.firing_chance, "subspace": found.subspace_isotropic, "effect": 0.0, "importance": 0.0}
    return known[row["measure"].field] if row["value"] is not None else None


def _latents(row: dict[str, Any]) -> str:
    found: Functional = row["found"]
    counted = {"firing": found.firing_pairs, "effect": found.effect_pairs, "importance": found.matched}
    if row["measure"].unmatched:
        return f"{found.unmatched_a} and {found.unmatched_b}"
    return f"{counted[row['measure'].field]} pairs"
