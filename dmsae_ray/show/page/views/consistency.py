"""The view of agreement between chains: a matrix of every two cores, groups of pairs, and the pairs with
their nulls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dmsae_ray.show.page.artifacts import Artifacts, unique
from dmsae_ray.show.page.chart import Chart, Choice, figure, plain
from dmsae_ray.show.page.numerals import shown
from dmsae_ray.show.page.table import Column, Table
from dmsae_ray.show.page.view import Note, Part, View
from dmsae_ray.show.page.views.functional_parts import functional_parts
from dmsae_ray.show.page.views.pair_groups import groups_table

LEAD = (
    "How far do the cores of two chains agree, beside what chance would give? A number alone says nothing here: "
    "directions with the activations' covariance, and latents that merely fire as often, agree a little too. Each pair "
    "therefore stands beside its nulls."
)
CELLS_WITH_TEXT = 14
"""Up to so many chains the cells of the matrix state their value."""


@dataclass(frozen=True)
class Score:
    """One measure of agreement of a pair, and the fields in which a null holds the same."""

    name: str
    ab: str
    """field of the pair: first chain read from the second"""
    ba: str
    """field of the pair, the other way round; the same where the measure is symmetric"""
    high: str
    """field of a null: its 99th percentile, p95 where its draws carry no higher one"""
    mean: str
    """field of a null: its mean"""
    read: str
    """how to read it"""


SCORES = (
    Score("PW-MCC", "pw_mcc", "pw_mcc", "p99", "mean", "mean decoder cosine of matched latents"),
    Score(
        "overlap",
        "overlap",
        "overlap",
        "overlap_p99",
        "overlap_mean",
        "share of latents that both matchings pair at cosine 0.7",
    ),
    Score(
        "activation",
        "activation",
        "activation",
        "activation_p95",
        "activation_mean",
        "correlation of matched latents' activations",
    ),
    Score(
        "MMCS",
        "mmcs_ab",
        "mmcs_ba",
        "mmcs_p99",
        "mmcs_mean",
        "row: mean over this core of the best cosine in the column's whole SAE",
    ),
)
NULLS = {
    "covariance": "covariance null",
    "matched_density": "matched-density null",
    "cycle0": "cycle-0 sets",
    "matched_compute": "plain SAEs on as many tokens",
}
ALL = "all arms"
READ = (
    "“Minus a null” shows what is left above chance: blue above the null, red below. Point at a cell for all its nulls."
)


def view(artifacts: Artifacts) -> View:
    """The view; in place of what is missing stands why."""
    pairs = artifacts.comparison.get("pairs", [])
    parts: list[Part] = []
    if not pairs:
        parts.append(Note(f"There is nothing to compare: {artifacts.reasons['comparison.json']}."))
    else:
        parts.append(_matrix(artifacts.comparison, [row["chain"] for row in artifacts.last]))
        if artifacts.comparison.get("sample"):
            of = sum(group.get("of") or group["pairs"] for group in artifacts.comparison["summary"]["groups"].values())
            most = artifacts.comparison["sample"]
            parts.append(
                Note(
                    f"{len(pairs):,} of {of:,} pairs were compared: of each group at most {most}, drawn by a fixed "
                    "seed."
                )
            )
        parts.append(groups_table(artifacts.comparison, NULLS) or Note("No group of pairs has a score."))
        parts.append(_pairs(pairs))
        parts += functional_parts(artifacts.comparison)
    return View("consistency", "Consistency", LEAD, parts)


def null_field(pairs: Sequence[dict[str, Any]], score: Score, null: str) -> str | None:
    """What a null of this score is judged by: its high percentile if any pair has one, else its mean; None without
    either.
    """
    for field in (score.high, score.mean):
        if any(null_value(pair, null, field) is not None for pair in pairs):
            return field
    return None


def null_value(pair: dict[str, Any], null: str, field: str) -> float | None:
    """A field of a pair's null; None if the null is not available."""
    found = pair["nulls"].get(null) or {}
    return found.get(field) if found.get("available") else None


def _matrix(comparison: dict[str, Any], ordered: Sequence[str]) -> Chart:
    pairs, arms = comparison["pairs"], comparison["arms"]
    labels = unique([*(label for label in ordered if label in comparison["chains"]), *comparison["chains"]])
    groups = {arm: [label for label in labels if arms[label] == arm] for arm in unique(arms[label] for label in labels)}
    groups = {arm: members for arm, members in groups.items() if len(members) > 1}
    if len(unique(arms.values())) > 1:
        groups[ALL] = labels
    modes = ["value", *(f"minus {words}" for words in NULLS.values())]
    figures: dict[tuple[str, ...], go.Figure | str] = {}
    for arm, members in groups.items():
        inside = [pair for pair in pairs if pair["a"] in members and pair["b"] in members]
        for score in SCORES:
            figures[arm, score.name, "value"] = _heat(members, inside, score, None, None)
            for null, words in NULLS.items():
                field = null_field(inside, score, null)
                figures[arm, score.name, f"minus {words}"] = (
                    _heat(members, inside, score, null, field) if field else _no_null(inside, score, null)
                )
    return Chart(
        "chart-matrix",
        "Agreement of every two cores",
        READ,
        figures,
        [Choice("Arm", list(groups)), Choice("Measure", [score.name for score in SCORES]), Choice("Show", modes)],
    )


def _percentile(score: Score) -> str:
    return score.high[-3:]


def _no_null(pairs: Sequence[dict[str, Any]], score: Score, null: str) -> str:
    reasons = unique(
        pair["nulls"][null]["reason"] for pair in pairs if pair["nulls"].get(null) and pair["nulls"][null].get("reason")
    )
    return f"No pair has the {NULLS[null]} of {score.name}" + (f": {reasons[0]}." if reasons else ".")


def _heat(
    members: Sequence[str], pairs: Sequence[dict[str, Any]], score: Score, null: str | None, field: str | None
) -> go.Figure | str:
    """One matrix: a score, or what is left of it above `field` of a null."""
    place = {label: number for number, label in enumerate(members)}
    z: list[list[float | None]] = [[None] * len(members) for _ in members]
    hover = [
        ["a chain with itself" if i == j else "no such pair compared" for j in range(len(members))]
        for i in range(len(members))
    ]
    for pair in pairs:
        for a, b, name in ((pair["a"], pair["b"], score.ab), (pair["b"], pair["a"], score.ba)):
            value, chance = pair.get(name), null_value(pair, null, field) if null and field else 0.0
            z[place[a]][place[b]] = None if value is None or chance is None else value - chance
            hover[place[a]][place[b]] = _hover(pair, a, b, score, value)
    if all(value is None for row in z for value in row):
        return (
            f"No pair of these chains has {score.name}"
            + (": " + pairs[0]["reason"] if pairs and pairs[0]["reason"] else "")
            + "."
        )
    colours: dict[str, Any] = {
        "colorscale": "Cividis",
        "zmin": min(0.0, *(v for row in z for v in row if v is not None)),
        "zmax": 1.0,
    }
    title = score.name
    # Short: the words along a colour bar have no more room than the cells are high.
    if null:
        widest = max(abs(v) for row in z for v in row if v is not None) or 1.0
        colours = {"colorscale": "RdBu", "zmin": -widest, "zmax": widest}
        title = f"{score.name} − {_percentile(score) if field == score.high else 'mean'}"
    small = len(members) > CELLS_WITH_TEXT
    heat = go.Heatmap(
        x=[plain(label) for label in members],
        y=[plain(label) for label in members],
        z=z,
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        texttemplate="" if small else "%{z:+.2f}" if null else "%{z:.2f}",
        colorbar={"title": {"text": title, "side": "right"}},
        **colours,
    )
    side = min(900, 190 + len(members) * (18 if small else 42))
    made = figure([heat], height=side, meta={"read": f"Each cell is a pair of chains: {score.read}. {READ}"})
    made.layout.yaxis.update(autorange="reversed", showgrid=False, type="category")
    made.layout.xaxis.update(showgrid=False, type="category", tickangle=-45)
    return made


def _hover(pair: dict[str, Any], a: str, b: str, score: Score, value: float | None) -> str:
    lines = [f"<b>{plain(a)} and {plain(b)}</b>", f"{score.name} {shown(value, 'share')}"]
    if value is None:
        lines.append(plain(pair["reason"] or "not measured"))
    lines.append(f"cores of {pair['size_a']} and {pair['size_b']} latents")
    for null, words in NULLS.items():
        found = pair["nulls"].get(null) or {}
        if found.get("available"):
            mean, high = found.get(score.mean), found.get(score.high)
            lines.append(f"{words}: mean {shown(mean, 'share')}, {_percentile(score)} {shown(high, 'share')}")
        else:
            lines.append(f"{words}: n/a" + (f" ({plain(found['reason'])})" if found.get("reason") else ""))
    return "<br>".join(lines)


def _beats(pair: dict[str, Any], nulls: Sequence[str]) -> bool | None:
    """Whether the pair's PW-MCC exceeds the 99th percentile of each null that is available; None if none is."""
    bars = [bar for bar in (null_value(pair, null, "p99") for null in nulls) if bar is not None]
    return None if pair["pw_mcc"] is None or not bars else all(pair["pw_mcc"] > bar for bar in bars)


def beyond_chance(pair: dict[str, Any]) -> bool | None:
    """Above both nulls of chance, or above the one that is available; None if neither is."""
    return _beats(pair, ("covariance", "matched_density"))


def _exceeds_mean(pair: dict[str, Any], null: str) -> bool | None:
    """Whether the cores, cut to the null's sizes, agree more than its mean; None where it is not available."""
    found, mean = pair["nulls"].get(null) or {}, null_value(pair, null, "mean")
    own = found.get("core_pw_mcc_same_size")
    return None if mean is None or own is None else own > mean


def _dictionary(pair: dict[str, Any], null: str) -> float | None:
    """A null of whole dictionaries; None where it is not available."""
    found = pair["dictionary_nulls"].get(null) or {}
    return found.get("mean") if found.get("available") else None


def _pairs(pairs: Sequence[dict[str, Any]]) -> Table:
    def null(name: str, field: str = "p99") -> dict[str, Any]:
        return {
            "value": lambda pair: null_value(pair, name, field),
            "why": lambda pair: (pair["nulls"].get(name) or {}).get("reason"),
        }

    def unscored(pair: dict[str, Any]) -> str | None:
        return pair["reason"]

    columns = [
        Column("Chain a", lambda pair: pair["a"]),
        Column("Chain b", lambda pair: pair["b"]),
        Column("Differ in", lambda pair: pair["differs"]),
        Column("Size a", lambda pair: pair["size_a"], "count", "latents"),
        Column("Size b", lambda pair: pair["size_b"], "count", "latents"),
        Column("PW-MCC", lambda pair: pair["pw_mcc"], "share", why=unscored, help=SCORES[0].read),
        Column(
            "Covariance p99",
            kind="share",
            **null("covariance"),
            help="random directions with the activations' covariance",
        ),
        Column("Density p99", kind="share", **null("matched_density"), help="free latents that fire about as often"),
        Column(
            "Cycle-0 sets", kind="share", **null("cycle0", "mean"), help="top latents of the undistilled SAEs, as many"
        ),
        Column(
            "Beyond chance",
            beyond_chance,
            "yes_no",
            help="PW-MCC above the p99 of each of the two nulls that is available",
        ),
        Column(
            "Plain, as many tokens",
            kind="share",
            **null("matched_compute", "mean"),
            help="top latents of plain SAEs trained on a whole chain's tokens, as many; mean over pairs of them",
        ),
        Column("of pairs", kind="count", **null("matched_compute", "draws"), help="pairs of plain SAEs in that mean"),
        Column(
            "Above cycle 0",
            lambda pair: _beats(pair, ["cycle0"]),
            "yes_no",
            help="cores agree more than the sets that one cycle's tokens give",
        ),
        Column(
            "Above plain",
            lambda pair: _exceeds_mean(pair, "matched_compute"),
            "yes_no",
            help="distillation adds agreement to training a plain SAE on as many tokens, whose mean is exceeded",
        ),
        Column("Overlap", lambda pair: pair["overlap"], "share", why=unscored, help=SCORES[1].read),
        Column("Activation", lambda pair: pair.get("activation"), "share", why=unscored, help=SCORES[2].read),
        Column("MMCS a to b", lambda pair: pair["mmcs_ab"], "share", why=unscored, help="core a in the whole SAE of b"),
        Column("MMCS b to a", lambda pair: pair["mmcs_ba"], "share", why=unscored, help="core b in the whole SAE of a"),
        Column("PW-MCC, whole SAEs", lambda pair: pair["pw_mcc_dictionary"], "share"),
        Column(
            "Its covariance null", lambda pair: _dictionary(pair, "covariance"), "share", help="mean of draws as large"
        ),
        Column("Whole SAEs of cycle 0", lambda pair: _dictionary(pair, "cycle0"), "share"),
        Column("Whole plain SAEs, as many tokens", lambda pair: _dictionary(pair, "matched_compute"), "share"),
    ]
    caption = "Every pair with its nulls. A core agrees beyond chance where PW-MCC exceeds the p99 columns."
    return Table("table-pairs", caption, columns, pairs)
