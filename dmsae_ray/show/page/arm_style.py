"""Arms of a study: what each is, from the fields it differs in, and how it is told from the others in a chart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dmsae_ray.show.page.artifacts import BASE
from dmsae_ray.show.page.numerals import NOTHING

WORDS = {
    ("selection.by", "attribution"): "core chosen by attribution",
    ("selection.by", "random"): "core chosen at random",
    ("selection.by", "frequency"): "core chosen by how often latents fire",
    ("selection.by", "reconstruction"): "core chosen by what latents add to the reconstruction",
    ("selection.by", "norm"): "core chosen by the norm of encoder rows",
    ("selection.size", "match"): "as many latents as in the grid",
    ("sae.core_gate", "relu"): "core outside the gate",
    ("sae.core_budget", "exempt"): "the core's latents count towards no budget",
    ("sae.core_transfer", "init"): "the core only starts latents, nothing is frozen",
    ("sae.core_transfer", "random"): "frozen random encoder rows in the core's place",
    ("sae.prefixes", "sampled"): "prefixes of sizes drawn anew in every step",
    ("sae.decoder", "frozen_random"): "decoder rows stay as they are drawn",
    ("sae.core_decoder_init", "kept"): "core latents keep their decoder rows",
    ("sweep.data", "disjoint"): "every seed on data of its own",
}
"""Fields of an arm in plain words; all others are named as they are."""

COLOURS = ("#2f78b7", "#c2620a", "#14805a", "#b0529a", "#d0452f", "#7a65d0", "#857612", "#74797f", "#1f8a99", "#a0663f")
"""On white and on the dark page alike these reach a contrast of 3:1, so that a chart need not be drawn in other
colours.
"""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "triangle-down", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Ten colours, seven symbols, six dashes: where one comes again, the others do not."""


@dataclass(frozen=True)
class Style:
    """How one trace looks: never by colour alone."""

    colour: str
    symbol: str
    dash: str

    @staticmethod
    def number(place: int) -> Style:
        """The style of the place-th of several traces."""
        return Style(COLOURS[place % len(COLOURS)], SYMBOLS[place % len(SYMBOLS)], DASHES[place % len(DASHES)])

    def line(self, width: float = 2.0) -> dict[str, object]:
        return {"color": self.colour, "dash": self.dash, "width": width}

    def marker(self, size: float = 8) -> dict[str, object]:
        return {"color": self.colour, "symbol": self.symbol, "size": size}


def words(arm: str, config: dict[str, Any]) -> str:
    """What an arm is, by the fields in which config.yaml says that it differs from the grid; a dash if it does not
    say.
    """
    if arm == BASE:
        by = (config.get("selection") or {}).get("by")
        return "the grid" + (f": {WORDS.get(('selection.by', by), f'core chosen by {by}')}" if by else "")
    plan = ((config.get("study") or {}).get("arms") or {}).get(arm)
    if plan is None:
        return NOTHING
    found = [WORDS.get((field, value), f"{field} = {value}") for field, value in (plan.get("fields") or {}).items()]
    if plan.get("core") not in (None, "none"):
        found.append(f"new SAEs on cores: {plan['core']}")
    if plan.get("cycles") is not None:
        found.append(f"{plan['cycles']} cycle{'s' * (plan['cycles'] != 1)}")
    return "; ".join(found) or "as the grid"
