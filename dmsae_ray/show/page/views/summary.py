"""The first view: what was run, what came out in plain words, what was expected, and what failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dmsae_ray.secret_url import masked
from dmsae_ray.show.page.arm_style import words
from dmsae_ray.show.page.artifacts import BASE, Artifacts, unique
from dmsae_ray.show.page.banner import banners
from dmsae_ray.show.page.facts import Fact, facts
from dmsae_ray.show.page.numerals import shown, whole
from dmsae_ray.show.page.row_facts import rows_facts
from dmsae_ray.show.page.spread import Spread, over_seeds
from dmsae_ray.show.page.table import Column, Table
from dmsae_ray.show.page.view import Note, Part, Raw, View
from dmsae_ray.show.page.views.consistency import beyond_chance, null_value

LEAD = (
    "Which features of the model are really there, and which are an accident of one training run? Chains distil "
    "Matryoshka SAEs into a core of latents; cores that independent chains agree on, beyond chance, are evidence."
)

BESIDE = {
    "cycle0": "as many top latents of cycle 0",
    "matched_compute": "as many of plain SAEs on a whole chain's tokens",
}
"""Nulls of a headline: what agreement there would be without distillation, on a cycle's and on a chain's tokens."""


@dataclass(frozen=True)
class Headline:
    """One number and the sentence that says what it is."""

    id: str
    label: str
    value: Any
    kind: str
    sentence: str

    def html(self) -> str:
        return (
            f'<li class="card" id="card-{self.id}"><span class="label">{escape(self.label)}</span>'
            f'<strong data-value="{escape(whole(self.value))}" '
            f'title="{escape(whole(self.value))}">{escape(shown(self.value, self.kind))}'
            f"</strong><span>{escape(self.sentence)}</span></li>"
        )


def view(artifacts: Artifacts) -> View:
    """The view; in place of what is missing stands why."""
    headlines = [line for line in (make(artifacts) for make in HEADLINES) if line is not None]
    parts: list[Part] = [*banners(artifacts)]
    parts.append(Raw(f'<ul class="cards">{"".join(line.html() for line in headlines)}</ul>'))
    parts.append(_expectations(artifacts))
    parts.append(_arms(artifacts))
    parts.append(_failed(artifacts))
    parts.append(_run(artifacts))
    parts.append(rows_facts(artifacts))
    return View("summary", "Summary", LEAD, parts)


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _ends(spread: Spread, kind: str) -> str:
    if spread.seeds == 1:
        return "one seed"
    low, high = shown(spread.low, kind), shown(spread.high, kind)
    # "0.389 to 0.389" would read like a mistake.
    return f"{low} in each of {spread.seeds} seeds" if low == high else f"{spread.words()}: {low} to {high}"


def _chains_headline(artifacts: Artifacts) -> Headline | None:
    finished, failed = len(unique(row["chain"] for row in artifacts.last)), len(artifacts.failed)
    if "evaluation.json" in artifacts.reasons and artifacts.comparison.get("chains"):
        compared = artifacts.comparison["chains"]
        sentence = f"They were compared; how good they are is not known: {artifacts.reasons['evaluation.json']}."
        return Headline("chains", "Chains finished", len(compared), "count", sentence)
    if "evaluation.json" in artifacts.reasons and not artifacts.comparison:
        return None
    base = [row for row in artifacts.last if row["arm"] == BASE]
    ks = sorted({row["k"] for row in base})
    grid = f"{_plural(len({row['seed'] for row in base}), 'seed')} at k = {', '.join(map(str, ks))}"
    sentence = f"The distilled grid has {grid}." if base else "None of the distilled grid has finished."
    sentence += f" {_plural(failed, 'chain')} failed." if failed else " None failed."
    return Headline("chains", "Chains finished", finished, "count", sentence)


def _core_headline(artifacts: Artifacts) -> Headline | None:
    spread = over_seeds((row["seed"], row.get("core_out")) for row in artifacts.last if row["arm"] == BASE)
    if spread is None:
        return None
    return Headline(
        "core",
        "Latents in a core",
        spread.mean,
        "tenths",
        f"Mean over base chains, last cycle; {_ends(spread, 'tenths')}.",
    )


def _agreement_headline(artifacts: Artifacts) -> Headline | None:
    group = artifacts.comparison.get("summary", {}).get("groups", {}).get(f"{BASE}/seed")
    if not group or not group.get("pw_mcc"):
        return None
    found = group["pw_mcc"]
    low, high = (shown(end, "share") for end in found["interval"] or (found["min"], found["max"]))
    if group.get("scored") == 1:
        ends = "a single pair"
    elif low == high:
        ends = f"{low} for each of {_plural(group['scored'], 'pair')}"
    else:
        ends = f"{'95 % interval' if found['interval'] else 'range of pairs'}: {low} to {high}"
    sentence = f"PW-MCC of cores that differ in their seed; {ends}."
    bars = [
        bar
        for pair in artifacts.comparison["pairs"]
        for null in ("covariance", "matched_density")
        if pair["differs"] == "seed"
        and pair["arm_a"] == pair["arm_b"] == BASE
        and (bar := null_value(pair, null, "p99")) is not None
    ]
    if bars:
        sentence += f" Chance alone reaches at most {shown(max(bars), 'share')}."
    for null, what in BESIDE.items():
        excess = group.get("nulls", {}).get(null, {}).get("excess", {}).get("pw_mcc")
        if excess:
            within = excess.get("interval")
            ends = f" ({shown(within[0], 'signed')} to {shown(within[1], 'signed')})" if within else ""
            sentence += f" Against {what}: {shown(excess['mean'], 'signed')}{ends}."
    return Headline("agreement", "Agreement across seeds", found["mean"], "share", sentence)


def _chance_headline(artifacts: Artifacts) -> Headline | None:
    pairs = [pair for pair in artifacts.comparison.get("pairs", []) if artifacts.comparison["arms"][pair["a"]] == BASE]
    pairs = [pair for pair in pairs if artifacts.comparison["arms"][pair["b"]] == BASE]
    judged = [verdict for verdict in map(beyond_chance, pairs) if verdict is not None]
    if not judged:
        return None
    sentence = (
        f"{sum(judged)} of {_plural(len(judged), 'pair')} of base cores exceed the p99 of every null of chance they "
        "have."
    )
    return Headline("chance", "Pairs beyond chance", sum(judged) / len(judged), "percent", sentence)


def _consensus_headline(artifacts: Artifacts) -> Headline | None:
    consensus = artifacts.consensus
    if not consensus.get("groups"):
        return None
    everywhere = sum(group["in_seeds"] == len(consensus["seeds"]) for group in consensus["groups"])
    seeds = _plural(len(consensus["seeds"]), "seed")
    sentence = (
        f"Features in the consensus core of {_plural(len(consensus['chains']), 'chain')}; {everywhere} stand in all "
        f"{seeds}."
    )
    return Headline("consensus", "Consensus features", consensus["core_size"], "count", sentence)


def _loss_headline(artifacts: Artifacts) -> Headline | None:
    """The more sober of two ways to say it, and the other one beside it."""
    found = {
        way: over_seeds((row["seed"], row.get(f"loss_recovered_{way}")) for row in artifacts.last if row["arm"] == BASE)
        for way in ("mean", "zero")
    }
    known = sorted(((spread.mean, way, spread) for way, spread in found.items() if spread), key=lambda one: one[0])
    if not known:
        return None
    mean, way, spread = known[0]
    against = {"mean": "setting the stream to its mean", "zero": "setting the stream to zero"}
    sentence = (
        f"With the stream replaced by the SAE (1: all of the model's loss), measured against {against[way]}; "
        f"{_ends(spread, 'share')}."
    )
    if len(known) > 1:
        sentence += f" Against {against[known[1][1]]}: {shown(known[1][0], 'share')}."
    return Headline("loss", "Loss recovered", mean, "share", sentence)


HEADLINES: Sequence[Callable[[Artifacts], Headline | None]] = (
    _chains_headline,
    _core_headline,
    _agreement_headline,
    _chance_headline,
    _consensus_headline,
    _loss_headline,
)

SIGNS = {"hit": "✓ hit", "miss": "✗ miss", "open": "○ open", "not available": "– not available"}


BY_MEANS = ", by means alone"
ENDS = "of the 95 % interval: of the value, or, where the bound is measured too, of value less bound"


def _end(row: dict[str, Any], place: int) -> float | None:
    return None if row["interval"] is None else row["interval"][place]


def _interval_of(row: dict[str, Any]) -> str:
    if row["interval"] is None:
        return "means only" if row["by"] == "means" else "–"
    return "95 % interval" if row["over"] is None else "95 % interval of the difference"


def _expectations(artifacts: Artifacts) -> Table | Note:
    if not artifacts.expectations:
        return Note(f"No expectations to check: {artifacts.reasons['expectations.json']}.")
    columns = [
        Column("Claim", lambda row: row["claim"], "prose"),
        Column("Outcome", lambda row: SIGNS[row["outcome"]] + (BY_MEANS if row["by"] == "means" else "")),
        Column("Quantity", lambda row: row["value_name"], "prose"),
        Column("Value", lambda row: row["value"], "nats", why=lambda row: row.get("why")),
        Column("Has to be", lambda row: row["relation"]),
        Column("Bound", lambda row: row["bound"], "nats", why=lambda row: row.get("why")),
        Column("which is", lambda row: row["bound_name"], "prose"),
        Column("Low", lambda row: _end(row, 0), "nats", help=ENDS, why=lambda row: row.get("why")),
        Column("High", lambda row: _end(row, 1), "nats", help=ENDS, why=lambda row: row.get("why")),
        Column("Low and high are", _interval_of),
        Column("Compared over", lambda row: row["over"], "prose"),
    ]
    if any(row.get("why") for row in artifacts.expectations):
        columns.append(Column("Remark", lambda row: row.get("why"), "prose"))
    counts = ", ".join(
        f"{sum(row['outcome'] == outcome for row in artifacts.expectations)} {outcome}" for outcome in SIGNS
    )
    by_means = sum(row["by"] == "means" for row in artifacts.expectations)
    counts += f"; {by_means} of them{BY_MEANS}" if by_means else ""
    caption = (
        f"What was expected, stated before the run, and what came out: {counts}. A hit is a 95 % interval beyond the "
        "bound, a miss one on the other side; open: it holds the bound. Where only means could be compared, hit or "
        "miss says no more than which is larger."
    )
    return Table(
        "table-expectations",
        caption,
        columns,
        artifacts.expectations,
        lambda row: f"outcome-{row['outcome'].replace(' ', '-')}",
    )


def _arms(artifacts: Artifacts) -> Table | Note:
    if not artifacts.rows:
        return Note(f"There are no results yet: {artifacts.reasons.get('evaluation.json')}.")
    rows = []
    for arm in artifacts.arms:
        members = [row for row in artifacts.rows if row["arm"] == arm]
        rows.append(
            {
                "arm": arm,
                "chains": len({row["chain"] for row in members}),
                "seeds": sorted({row["seed"] for row in members}),
                "k": sorted({row["k"] for row in members}),
                "cycles": max(row["cycle"] for row in members) + 1,
            }
        )
    columns = [
        Column("Arm", lambda row: row["arm"]),
        Column("What it is", lambda row: words(row["arm"], artifacts.config), "prose"),
        Column("Chains", lambda row: row["chains"], "count"),
        Column("Seeds", lambda row: row["seeds"]),
        Column("k", lambda row: row["k"], unit="latents per token"),
        Column("Cycles", lambda row: row["cycles"], "count"),
    ]
    return Table("table-arms", "The groups of chains that stand side by side.", columns, rows)


def _failed(artifacts: Artifacts) -> Table | Note:
    if not artifacts.failed:
        return Note(
            "No chain failed."
            if artifacts.comparison
            else f"Failures are not known: {artifacts.reasons['comparison.json']}."
        )
    columns = [Column("Chain", lambda row: row["label"]), Column("Why it failed", lambda row: row["reason"], "prose")]
    return Table(
        "table-failed",
        "Chains that did not finish; no number on this page holds anything of them.",
        columns,
        artifacts.failed,
    )


FACTS = (
    ("Language model", ("model", "name"), ""),
    ("Residual stream at", ("model", "hook"), ""),
    ("Text", ("corpus", "source"), ""),
    ("SAE width", ("sae", "width"), "latents"),
    ("Gate of the core", ("sae", "core_gate"), ""),
    ("Core passes on as", ("sae", "core_transfer"), ""),
    ("Training", ("train", "tokens"), "tokens a cycle"),
    ("Batch", ("train", "batch"), "tokens"),
    ("Learning rate", ("train", "lr"), ""),
    ("Attribution", ("attribution", "tokens"), "held-out tokens"),
    ("Share a core carries (tau)", ("attribution", "tau"), ""),
    ("Selected by", ("selection", "by"), ""),
    ("Seeds", ("sweep", "seeds"), ""),
    ("k", ("sweep", "k"), "latents per token"),
    ("Cycles", ("sweep", "cycles"), ""),
    ("Data of the seeds", ("sweep", "data"), ""),
    ("Null draws", ("compare", "draws"), ""),
)
"""What of the configuration a reader wants to know first: (name, field, unit)."""
MEASURED = (
    ("Evaluated on", "evaluation_tokens", "count", "held-out tokens"),
    ("Left out of the evaluation", "rows_left_out", "count", "rows beyond harvest.outlier_norm"),
    ("The model's own loss", "loss_clean", "nats", "nats per token"),
)
"""What every evaluation has in common: (name, field of a row, format, unit)."""


def _run(artifacts: Artifacts) -> Raw | Note:
    if not artifacts.config:
        return Note(f"What was run is not known: {artifacts.reasons['config.yaml']}.")
    entries = []
    for name, (section, field), unit in FACTS:
        value = (artifacts.config.get(section) or {}).get(field)
        value = (
            masked(value) if isinstance(value, str) else value
        )  # config.yaml of an earlier version may hold a secret
        if value is not None:
            seen = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shown(value, "text")
            entries.append(Fact(name, value, f"{seen} {unit}".strip()))
    for name, field, kind, unit in MEASURED:
        value = next((row[field] for row in artifacts.rows if row.get(field) is not None), None)
        if value is not None and (value or field != "rows_left_out"):
            entries.append(Fact(name, value, f"{shown(value, kind)} {unit}"))
    return facts("facts", "What was run", entries)
