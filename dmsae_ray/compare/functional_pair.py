"""The functional agreement of one pair of cores, with its nulls.

Shape letters: C core size, P matched pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from dmsae_ray.compare import activation
from dmsae_ray.compare.activation import Standardised
from dmsae_ray.compare.activation import agreement as correlation
from dmsae_ray.compare.cycle0 import Ranked
from dmsae_ray.compare.density import FreeDraws, too_far
from dmsae_ray.compare.functional import (
    Functional,
    FunctionalNull,
    LossRows,
    correlations,
    drawn_numbers,
    effect,
    excesses,
    firing,
    loss_effects,
    pearson,
    ranks,
)
from dmsae_ray.compare.match import Matching, Rows, assign, cosines, hungarian, shared_pairs
from dmsae_ray.compare.measured_latents import MeasuredLatents
from dmsae_ray.compare.subspace import RandomSubspaces, agreement, span
from dmsae_ray.draws import PERMUTED_NULL

NEIGHBOURS = 5
"""Latents next to each other in density whose partners are exchanged in a draw of the permuted null."""


@dataclass(frozen=True, eq=False)
class Uses:
    """What one chain's latents are used for. Each part is made when the first pair asks."""

    core: MeasuredLatents
    core_firing: Standardised
    """activations of the core, in its own order"""
    scores_C: np.ndarray
    """attribution of its members"""
    start: Ranked
    """cycle 0's set of the core's size, or all of its candidates"""
    free: FreeDraws
    """free latents as dense as the members, in the core's order"""
    loss_rows: LossRows | None
    """None: not measured"""

    @cached_property
    def core_effects(self) -> Standardised | None:
        return self._effects(self.core)

    @cached_property
    def start_effects(self) -> Standardised | None:
        return self._effects(self.start.latents)

    @cached_property
    def free_effects(self) -> Standardised | None:
        """Of the free latents whose activations are compared."""
        return self._effects(self.free.latents.take(slice(len(self.free.activations.alive_N))))

    def _effects(self, latents: MeasuredLatents) -> Standardised | None:
        return None if self.loss_rows is None else loss_effects(latents, self.loss_rows)


class FunctionalComparer:
    """Compares what the latents of two cores are used for."""

    def __init__(self, random: RandomSubspaces, cosine: float, draws: int, seed: int):
        """random: subspaces of the data's covariance; cosine: at which a latent is shared; draws: of the permuted
        null.
        """
        self.random, self.cosine, self.draws, self.seed = random, cosine, draws, seed

    def pair(
        self, a: Uses, b: Uses, encoder: Matching, decoder: Matching, density_C: np.ndarray, no_start: str | None
    ) -> Functional:
        """encoder, decoder: matchings of the cores; density_C: of the second core's members; no_start: why cycle 0 is
        no null, if so.
        """
        overlap = firing(a.core_firing, b.core_firing, decoder)
        effects = None
        if a.core_effects is not None and b.core_effects is not None:
            effects = correlation(a.core_effects, b.core_effects, decoder)
        score_a_P, score_b_P = a.scores_C[decoder.left_P], b.scores_C[decoder.right_P]
        alone = unmatched(encoder, decoder, self.cosine)
        spans = span(a.core.W_dec_ND[alone[0]]), span(b.core.W_dec_ND[alone[1]])
        rank = max(spans[0].shape[1], spans[1].shape[1])
        alike = agreement(*spans)
        return Functional(
            matched=len(decoder.left_P),
            firing=overlap.mean,
            firing_chance=overlap.chance,
            firing_pairs=overlap.counted,
            firing_left_out=overlap.left_out,
            effect=None if effects is None else effects.mean,
            effect_pairs=0 if effects is None else effects.counted,
            effect_left_out=0 if effects is None else effects.left_out,
            effect_rows=0 if a.loss_rows is None else len(a.loss_rows.x_MD),
            importance=pearson(ranks(score_a_P), ranks(score_b_P)),
            importance_pearson=pearson(score_a_P, score_b_P),
            subspace=alike,
            unmatched_a=len(alone[0]),
            unmatched_b=len(alone[1]),
            subspace_isotropic=None if alike is None else rank / a.core.W_dec_ND.shape[1],
            nulls={
                "permuted": self._permuted(a, b, decoder, density_C[decoder.right_P], overlap.chance),
                "matched_density": self._matched_density(a, b, alone, overlap.chance),
                "covariance": self._covariance(alone),
                "cycle0": self._cycle0(a, b, no_start),
            },
        )

    def _permuted(
        self, a: Uses, b: Uses, decoder: Matching, density_P: np.ndarray, chance: float | None
    ) -> FunctionalNull:
        """The cores' own latents, each with the partner of another whose partner is about as dense: equal densities,
        equal scores, no common feature.

        chance: of the matched pairs' firing overlap. Densities of exchanged partners differ a little, and with them
        what they share by chance: a draw's overlap is put at the matched pairs' own chance.
        """
        if len(density_P) < 2:
            return FunctionalNull(False, "one matched pair: there is no other partner", 0)
        left_P, right_P = torch.from_numpy(decoder.left_P), torch.from_numpy(decoder.right_P)
        excess_PP = excesses(a.core_firing.fires_NR[left_P], b.core_firing.fires_NR[right_P])
        effect_PP = None
        if a.core_effects is not None and b.core_effects is not None:
            effect_PP = correlations(a.core_effects, b.core_effects, left_P, right_P)
        rank_a_P, rank_b_P = ranks(a.scores_C[decoder.left_P]), ranks(b.scores_C[decoder.right_P])
        rng = np.random.default_rng([self.seed, PERMUTED_NULL])
        own_P = np.arange(len(density_P))
        found: dict[str, list[float | None]] = {"firing": [], "effect": [], "importance": []}
        for _ in range(self.draws):
            other_P = exchanged(density_P, rng)
            found["firing"].append(_above(chance, _mean(excess_PP[own_P, other_P])))
            found["effect"].append(None if effect_PP is None else _mean(effect_PP[own_P, other_P]))
            found["importance"].append(pearson(rank_a_P, rank_b_P[other_P]))
        return FunctionalNull(True, None, self.draws, **drawn_numbers(**found))

    def _matched_density(
        self, a: Uses, b: Uses, alone: tuple[np.ndarray, np.ndarray], chance: float | None
    ) -> FunctionalNull:
        """Free latents as dense as the cores' members; chance: as for `_permuted`."""
        for side, uses in (("first", a), ("second", b)):
            if uses.free.lack:
                return FunctionalNull(False, f"the {side} SAE {uses.free.lack}", 0)
        reason = too_far(max(a.free.gap, b.free.gap))
        found: dict[str, list[float | None]] = {"firing": [], "effect": [], "subspace": []}
        for left_C, right_C in list(zip(a.free.places, b.free.places, strict=True))[: activation.DRAWS]:
            drawn = assign(cosines(a.free.latents.W_dec_ND[left_C], b.free.latents.W_dec_ND[right_C]))
            pairs = replace(drawn, left_P=left_C[drawn.left_P], right_P=right_C[drawn.right_P])
            fired = firing(a.free.activations, b.free.activations, pairs)
            found["firing"].append(_above(chance, fired.excess))
            found["effect"].append(effect(a.free_effects, b.free_effects, pairs))
            # Those drawn for the members that have no partner: as many, and as dense.
            spans = (
                span(uses.free.latents.W_dec_ND[places_C[mine]])
                for uses, places_C, mine in ((a, left_C, alone[0]), (b, right_C, alone[1]))
            )
            found["subspace"].append(agreement(*spans))
        draws = len(found["firing"])
        return FunctionalNull(reason is None, reason, draws, subspace_draws=draws, **drawn_numbers(**found))

    def _covariance(self, alone: tuple[np.ndarray, np.ndarray]) -> FunctionalNull:
        size = len(alone[0]), len(alone[1])
        if not min(size):
            return FunctionalNull(False, "every latent of a core is shared: there is no other subspace", 0)
        found = self.random.of(size)
        return FunctionalNull(True, None, 0, subspace_draws=len(found), **drawn_numbers(subspace=found))

    def _cycle0(self, a: Uses, b: Uses, no_start: str | None) -> FunctionalNull:
        """Sets of cycle 0 as large as the cores, by attribution."""
        size = a.start.latents.size, b.start.latents.size
        wanted = a.core.size, b.core.size
        if size != wanted:
            return FunctionalNull(
                False, f"cycle 0 has {size[0]} and {size[1]} candidates for cores of {wanted[0]} and {wanted[1]}", 0
            )
        encoder = hungarian(a.start.latents.W_enc_ND, b.start.latents.W_enc_ND)
        decoder = hungarian(a.start.latents.W_dec_ND, b.start.latents.W_dec_ND)
        alone = unmatched(encoder, decoder, self.cosine)
        numbers = drawn_numbers(
            firing=[firing(a.start.activations, b.start.activations, decoder).mean],
            effect=[effect(a.start_effects, b.start_effects, decoder)],
            subspace=[_subspace(a.start.latents.W_dec_ND, b.start.latents.W_dec_ND, alone)],
        )
        return FunctionalNull(no_start is None, no_start, 1, subspace_draws=1, **numbers)


def unmatched(encoder: Matching, decoder: Matching, cosine: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the latents on each side that are not shared, ascending."""
    pairs_S2 = shared_pairs(encoder, decoder, cosine)
    first, second = (np.setdiff1d(np.arange(size), pairs_S2[:, side]) for side, size in enumerate(decoder.sizes))
    return first, second


def exchanged(density_P: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each pair another pair's index, int64 [P], of like density: within blocks of about NEIGHBOURS in the order of
    density (none of one alone, so that first and last may be longer) all move on by one random step.
    """
    order_P = rng.permutation(len(density_P))  # ties are broken anew in every draw
    order_P = order_P[np.argsort(density_P[order_P], kind="stable")]
    other_P = np.empty_like(order_P)
    first = int(rng.integers(NEIGHBOURS))  # so that the blocks' borders differ between draws
    borders = [0, *range(first, len(order_P), NEIGHBOURS), len(order_P)]
    for block in _blocks(borders):
        members = order_P[block]
        rng.shuffle(members)
        other_P[members] = np.roll(members, int(rng.integers(1, len(members))))
    return other_P


def _blocks(borders: Sequence[int]) -> list[slice]:
    """Slices between these borders, none shorter than 2: a shorter one joins its neighbour."""
    inner = [border for border in dict.fromkeys(borders) if 2 <= border <= borders[-1] - 2]
    kept: list[int] = [0]
    for border in inner:
        if border - kept[-1] >= 2:
            kept.append(border)
    kept.append(borders[-1])
    return [slice(start, end) for start, end in zip(kept, kept[1:], strict=False)]


def _above(chance: float | None, excess: float | None) -> float | None:
    return None if chance is None or excess is None else chance + excess


def _mean(values_P: np.ndarray) -> float | None:
    """Over those that are known; None if none is."""
    known_P = values_P[~np.isnan(values_P)]
    return float(known_P.mean()) if known_P.size else None


def _subspace(left_ND: Rows, right_ND: Rows, alone: tuple[np.ndarray, np.ndarray]) -> float | None:
    return agreement(span(left_ND[alone[0]]), span(right_ND[alone[1]]))
