"""Arms of a study: how each is called in plain words, and how it is told from the others in a chart."""

from __future__ import annotations

from dataclasses import dataclass

from dmsae_ray.track.page.artifacts import BASE

WORDS = {
    BASE: "distilled, core chosen by attribution",
    "random": "placebo: core of the same size chosen at random",
    "frequency": "placebo: core of the same size chosen by firing frequency",
    "norm": "placebo: core of the same size chosen by encoder norm",
    "relu": "distilled, core exempt from the gate",
    "init": "core only starts the next cycle's latents, nothing is frozen",
    "disjoint": "distilled, every seed on data of its own",
    "order": "same initialisation, other order of data",
    "plain": "plain Matryoshka SAE, one cycle, no core",
    "plain-long": "plain Matryoshka SAE on as many tokens as a whole chain",
    "transfer": "new SAE trained on a distilled core, at another k",
}

COLOURS = ("#2f78b7", "#c2620a", "#14805a", "#b0529a", "#d0452f", "#7a65d0", "#857612", "#74797f", "#1f8a99", "#a0663f")
"""On white and on the dark page alike these reach a contrast of 3:1, so that a chart need not be drawn in other colours."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "triangle-down", "pentagon", "star", "hexagon", "cross")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


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


def words(arm: str) -> str:
    """What an arm is; unknown ones by their name."""
    return WORDS.get(arm, f"arm “{arm}”")
