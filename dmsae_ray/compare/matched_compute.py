"""Matched compute: same-size sets, by attribution, of plain SAEs trained on as many tokens as a whole chain.

Cycle 0's sets say what a Matryoshka SAE gives on the tokens of one cycle. A chain has read several times as many, and
more tokens alone make plain SAEs agree more: what distillation adds is what its cores agree by beyond these.

Shape letters: N candidates by score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from dmsae_ray.compare.activation import standardised
from dmsae_ray.compare.comparer import Side
from dmsae_ray.compare.cycle0 import Ranked, ranked_agreement
from dmsae_ray.compare.match import largest_cosines
from dmsae_ray.compare.nulls import NullResult, over_draws, unavailable
from dmsae_ray.compare.pair import PairResult

MOST_PAIRS = 50
"""Pairs of plain SAEs that stand for all: their mean is then surer than that of the cores' own pairs."""


class PlainSets:
    """Candidates of plain SAEs by score, prepared once for every pair of cores that is read against them."""

    def __init__(self, load: Callable[[str], Side], largest: int, cosine: float):
        """load: a chain by its label; largest: members of the largest core; cosine: at which a latent is shared."""
        self.load, self.largest, self.cosine = load, largest, cosine
        self._top, self._nearest = cache(self._read_top), cache(self._read_nearest)

    def _read_top(self, label: str) -> Ranked:
        side = self.load(label)
        latents = side.result.start.take(side.result.start_ids_N[: self.largest])
        return Ranked(latents, standardised(latents, side.rows_RD))

    def _read_nearest(self, label: str, other: str) -> np.ndarray:
        """Largest decoder cosine of each candidate to any latent of the other SAE, fp64 [N]."""
        return largest_cosines(self._top(label).latents.W_dec_ND, self.load(other).result.start.W_dec_ND)

    def null(self, pairs: Sequence[tuple[str, str]], own: PairResult) -> NullResult:
        """Agreement of these plain SAEs' top sets, as large as the two cores; a draw for each pair of them.

        pairs: labels of at least one pair, the one that stands for core a first. Where they have fewer candidates than
        a core has members, all are used, and the cores cut to those sizes stand beside them.
        """
        pairs = [pairs[place] for place in np.linspace(0, len(pairs) - 1, min(MOST_PAIRS, len(pairs))).astype(int)]
        tops = [(self._top(a), self._top(b)) for a, b in pairs]
        size = (
            min(own.size_a, *(a.latents.size for a, _ in tops)),
            min(own.size_b, *(b.latents.size for _, b in tops)),
        )
        if min(size) == 0:
            return unavailable("a plain SAE has no candidates", size)
        scores, overlaps, activations = zip(
            *(ranked_agreement(a.top(size[0]), b.top(size[1]), self.cosine) for a, b in tops), strict=True
        )
        cores = own.pw_mcc, own.overlap, own.activation
        if size != (own.size_a, own.size_b):
            a, b = self.load(own.a).core, self.load(own.b).core
            cores = ranked_agreement(a.top(size[0]), b.top(size[1]), self.cosine)
        nearest = [
            (self._nearest(a, b)[: size[0]].mean() + self._nearest(b, a)[: size[1]].mean()) / 2 for a, b in pairs
        ]
        return over_draws(
            scores,
            overlaps,
            activations,
            float(np.mean(nearest)),
            size,
            core_pw_mcc_same_size=cores[0],
            core_overlap_same_size=cores[1],
            core_activation_same_size=cores[2],
        )
