"""What a sweep ends with in words: which features recur, and what was expected of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dmsae_ray.show.terminal.empty_table import table_of


def _cosine(groups: Sequence[dict[str, Any]]) -> float:
    """Mean, over features of two latents or more, of their members' mean decoder cosine."""
    known = [group["cosine"] for group in groups if group["cosine"] is not None]
    return sum(known) / len(known)


def consensus_text(consensus: dict[str, Any]) -> Text:
    """How many features recur, and how many are found where no core ever was."""
    groups, seeds = consensus["groups"], len(consensus["seeds"])
    repeated, everywhere = sum(g["in_seeds"] >= 2 for g in groups), sum(g["in_seeds"] == seeds for g in groups)
    lines = [
        f"Features: {len(groups)} different ones in {len(consensus['chains'])} cores of {seeds} seeds; {repeated} in "
        f"two seeds or more, {everywhere} in all; consensus core of {consensus['core_size']}."
    ]
    smallest = [g["smallest_cosine"] for g in groups if g["smallest_cosine"] is not None]
    if smallest:
        lines.append(
            f"Latents of one feature: smallest cosine {min(smallest):.2f}, by encoder or decoder, over all features of "
            f"two latents or more; mean decoder cosine {_cosine(groups):.2f}."
        )
    for arm, found in (consensus.get("rediscovery_summary") or {}).items():
        shares = [
            f"{found[whose]['found']['mean']:.0%} of {what}"
            for whose, what in (
                ("consensus", "the consensus core"),
                ("matched_consensus", "free latents as dense as its members"),
                ("cores", "all cores' latents"),
                ("matched", "free latents as dense as these"),
            )
            if found[whose]["found"] is not None
        ]
        if shares and "/" not in arm:
            lines.append(
                f"Found again in {found['saes']} SAEs of arm {arm}, of other seeds and without a core: "
                f"{', '.join(shares)}."
            )
    return Text("\n".join(lines))


def expectations_table(entries: Sequence[dict[str, Any]]) -> Table:
    """What was expected before the run, and what came."""
    table = table_of("Expected before the run", ["outcome", "claim"], ["value", "expected", "95 % interval"])
    for entry in entries:
        bound = "" if entry["bound"] is None else f"{entry['relation']} {entry['bound']:.3g}"
        style = {"hit": "green", "miss": "red", "open": "yellow"}.get(entry["outcome"])
        interval = ""
        if entry["interval"] is not None:
            low, high = entry["interval"]
            what = "" if entry["over"] is None else "difference "
            interval = f"{what}{low:.3g} to {high:.3g}"
        cells = [
            entry["outcome"] + (" by means" if entry["by"] == "means" else ""),
            entry["claim"],
            "n/a" if entry["value"] is None else f"{entry['value']:.3g}",
            bound or entry["why"],
            interval,
        ]
        table.add_row(*map(Text, cells), style=style)
    return table


EXPECTATIONS_NOTE = (
    "A claim is a hit where its interval lies beyond the bound, a miss where it lies on the other side, else open. "
    "Where the bound is measured too, both are taken over the seeds and k that they have in common, and the interval "
    "is that of their difference; expectations.json says which. By means: with fewer than four seeds, or a number "
    "of all seeds together, hit or miss says no more than which is larger."
)
