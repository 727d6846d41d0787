"""The view of features that several chains found, and of their re-discovery by SAEs that never had a core."""

from __future__ import annotations

from collections import Counter
from typing import Any

import plotly.graph_objects as go

from dmsae_ray.compare.interval import COSINE, SHARE
from dmsae_ray.show.page.arm_style import Style
from dmsae_ray.show.page.artifacts import Artifacts, unique
from dmsae_ray.show.page.chart import Chart, above_bars, figure, totals
from dmsae_ray.show.page.spread import ONE_SEED, over_seeds
from dmsae_ray.show.page.table import Column, Table
from dmsae_ray.show.page.view import Note, Part, View

LEAD = (
    "Which features do independent chains find again? Latents of different chains that name each other as best match, "
    "and all point the same way, by encoder and by decoder, form one feature. Each is found in some seed to begin "
    "with: its reproducibility is the share of the other seeds that have it in their core."
)


def view(artifacts: Artifacts) -> View:
    """The view; in place of what is missing stands why."""
    consensus = artifacts.consensus
    parts: list[Part] = []
    if not consensus.get("groups"):
        parts.append(Note(f"There is no consensus to show: {artifacts.reasons['consensus.json']}."))
    else:
        described = {feature["id"] for feature in artifacts.features.get("features", [])}
        parts.append(_by_seeds(consensus))
        parts.append(_groups(consensus, described))
        parts += _rediscovery(consensus)
    return View("consensus", "Consensus", LEAD, parts)


def _by_seeds(consensus: dict[str, Any]) -> Chart:
    seeds = list(range(1, len(consensus["seeds"]) + 1))
    traces: list[Any] = []
    for inside, name, pattern in ((True, "in the consensus core", ""), (False, "not in it", "/")):
        counts = Counter(group["in_seeds"] for group in consensus["groups"] if group["in_core"] == inside)
        numbers = [counts.get(number, 0) for number in seeds]
        traces.append(
            go.Bar(
                x=[str(number) for number in seeds],
                y=numbers,
                name=name,
                marker={"color": Style.number(0 if inside else 7).colour, "pattern": {"shape": pattern, "size": 5}},
                hovertemplate="%{y} features in %{x} of " + str(len(seeds)) + " seeds<extra>" + name + "</extra>",
            )
        )
    of_all = Counter(group["in_seeds"] for group in consensus["groups"])
    heights = [of_all.get(number, 0) for number in seeds]
    traces.append(totals([str(number) for number in seeds], heights, [f"{height:,}" for height in heights]))
    made = figure(traces, barmode="stack", bargap=0.25)
    made.layout.xaxis.update(
        title_text=f"seeds (of {len(seeds)}) whose core has the feature", type="category", showgrid=False
    )
    made.layout.yaxis.update(title_text="features", range=above_bars(heights))
    return Chart(
        "chart-consensus",
        "How many seeds have a feature",
        f"Right is reproducible, left is found by one seed only. The consensus core holds {consensus['core_size']} "
        "features.",
        {(): made},
    )


def _groups(consensus: dict[str, Any], described: set[str]) -> Table | Note:
    rows = [group for group in consensus["groups"] if len(group["members"]) > 1]
    alone = len(consensus["groups"]) - len(rows)
    if not rows:
        return Note(f"No feature was found by more than one chain; {alone} latents stand alone.")
    columns = [
        Column("Feature", lambda group: group["id"]),
        Column("Seeds", lambda group: group["in_seeds"], "count", f"of {len(consensus['seeds'])}"),
        Column(
            "Reproducibility",
            lambda group: group["elsewhere"],
            "share",
            help="share of the other seeds whose core has it",
            why=lambda group: ONE_SEED,
        ),
        Column(
            "Low",
            lambda group: _end(group, 0),
            "share",
            help="lower end of its 95 % interval, for a latent of any one core",
            why=lambda group: ONE_SEED,
        ),
        Column("High", lambda group: _end(group, 1), "share", help="upper end", why=lambda group: ONE_SEED),
        Column("Chains", lambda group: group["in_chains"], "count", f"of {len(consensus['chains'])}"),
        Column("Cosine", lambda group: group["cosine"], "share", help="mean decoder cosine of its members"),
        Column(
            "Smallest cosine",
            lambda group: group["smallest_cosine"],
            "share",
            help="of any two members, by encoder or by decoder",
        ),
        Column(
            "Attribution share",
            lambda group: group["score"],
            "share",
            help="mean share of its chain's core attribution",
        ),
        Column("Density", lambda group: group["density"], "percent", "of tokens"),
        Column("In consensus core", lambda group: group["in_core"], "yes_no"),
    ]
    caption = "Features found by more than one chain." + (
        f" {alone} latents found by one chain alone are left out here: an interval holds the truth for a latent that "
        "is taken from one core, not for those picked because they were found again."
        if alone
        else ""
    )
    if described:
        caption += " Their contexts stand in the feature browser."
    return Table("table-consensus", caption, columns, rows)


def _end(group: dict[str, Any], place: int) -> float | None:
    return None if group["interval"] is None else group["interval"][place]


SETS = {
    "consensus": "consensus core",
    "cycle0_consensus": "what recurs among cycle 0's top latents",
    "free_consensus": "what recurs among free latents, as frequent",
    "members": "members of the consensus core, one by one",
    "matched_consensus": "free latents, as frequent as its members, recurring or not",
    "cores": "single chains' cores",
    "matched": "free latents, as frequent as those",
}


def _rediscovery(consensus: dict[str, Any]) -> list[Table | Note]:
    found = [
        {"chain": row["chain"], "arm": row["arm"], "seed": row["seed"], "k": row["k"], "set": words, **row[name]}
        for row in consensus.get("rediscovery") or []
        for name, words in SETS.items()
        if row.get(name)
    ]
    if not found:
        return [
            Note("Re-discovery was not measured: there are no SAEs without a core in this sweep, or no consensus core.")
        ]
    columns = [
        Column("Chain", lambda row: row["chain"]),
        Column("Arm", lambda row: row["arm"]),
        Column("k", lambda row: row["k"], "count", "latents per token"),
        Column("Looked for", lambda row: row["set"]),
        Column(
            "Found",
            lambda row: row["found"],
            "share",
            why=lambda row: row.get("reason"),
            help="share with a latent at encoder and decoder cosine 0.7 or more",
        ),
        Column("MMCS", lambda row: row["mmcs"], "share", help="mean of the best decoder cosine"),
        Column("Latents looked for", lambda row: row.get("size"), "count"),
        Column(
            "Density gap",
            lambda row: row.get("density_gap"),
            "share",
            "factor",
            help="how far the matched latents' densities are off",
        ),
    ]
    caption = (
        "Are the features there in SAEs that never had a core? The consensus core's have recurred across seeds and are "
        "means of their members: read them against what recurs among latents that are in no core, averaged as they "
        "are; single latents against single latents."
    )
    notes = [
        Note(f"Not searched: {row['chain']}, which {row['reason']}.")
        for row in consensus.get("rediscovery_left_out") or []
    ]
    lacking = unique((row["set"], row["reason"]) for row in found if not row.get("available", True))
    notes += [Note(f"No comparison: {words}: {reason}.") for words, reason in lacking]
    return [_rediscovery_summary(found), Table("table-rediscovery", caption, columns, found), *notes]


def _rediscovery_summary(found: list[dict[str, Any]]) -> Table:
    rows = []
    for arm, name in unique((row["arm"], row["set"]) for row in found):
        members = [row for row in found if (row["arm"], row["set"]) == (arm, name) and row.get("available", True)]
        for measure, words, within in (("found", "found", SHARE), ("mmcs", "MMCS", COSINE)):
            spread = over_seeds(((row["seed"], row[measure]) for row in members), within)
            if spread:
                rows.append({"arm": arm, "set": name, "measure": words, "spread": spread})
    columns = [
        Column("Arm", lambda row: row["arm"]),
        Column("Looked for", lambda row: row["set"]),
        Column("Measure", lambda row: row["measure"]),
        Column("Mean", lambda row: row["spread"].mean, "share"),
        Column("Low", lambda row: row["spread"].ends[0], "share", why=lambda row: ONE_SEED),
        Column("High", lambda row: row["spread"].ends[1], "share", why=lambda row: ONE_SEED),
        Column("Low and high are", lambda row: row["spread"].words()),
    ]
    return Table(
        "table-rediscovery-summary",
        "Re-discovery by arm, over the seeds of the SAEs that were searched.",
        columns,
        rows,
    )
