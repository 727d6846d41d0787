"""What recurs across seeds, and is found where no core ever was, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

FOUND = (
    ("consensus", "the consensus core"),
    ("cycle0_consensus", "what recurs among cycle 0's top latents"),
    ("free_consensus", "what recurs among free latents as dense as the cores'"),
    ("members", "its members one by one"),
    ("cores", "all cores' latents"),
    ("matched", "free latents as dense as these"),
)
"""Sets of features that are looked for, in the order in which they are told; `members` begins the single latents."""


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
        if "/" not in arm:
            lines += _found_again(arm, found, [row for row in consensus["rediscovery"] if row["arm"] == arm])
    return Text("\n".join(lines))


def _cosine(groups: Sequence[dict[str, Any]]) -> float:
    """Mean, over features of two latents or more, of their members' mean decoder cosine."""
    known = [group["cosine"] for group in groups if group["cosine"] is not None]
    return sum(known) / len(known)


def _found_again(arm: str, found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Means beside means, single latents beside single latents; and why a control is missing."""
    shares = {
        whose: f"{found[whose]['found']['mean']:.0%} of {what}"
        + (f" ({found[whose]['features']:.3g} features)" if whose.endswith("_consensus") else "")
        for whose, what in FOUND
        if (found.get(whose) or {}).get("found") is not None
    }
    if not shares:
        return []
    lines = [
        f"Found again in {found['saes']} SAEs of arm {arm}, of other seeds and without a core: "
        f"{', '.join(shares.values())}."
    ]
    for whose, what in FOUND:
        reason = (rows[0].get(whose) or {}).get("reason") if rows else None
        if whose not in shares and reason:
            lines.append(f"Not held against {what}: {reason}.")
    return lines
