"""Agreement as training goes on: the cores of two chains after each of their cycles.

A chain's cycles are points on the axis of training tokens. Cores grow or shrink from cycle to cycle, so each cycle is
compared at its own sizes and, by score, at one size that all cycles of both chains have: there chance is the same
throughout, and what changes is agreement.
Shape letters: C core size, R rows of activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from dmsae_ray.compare.activation import PART
from dmsae_ray.compare.covariance import Gaussian
from dmsae_ray.compare.functional import overlap_of
from dmsae_ray.compare.match import Matching, Rows, hungarian, overlap, pw_mcc
from dmsae_ray.compare.measured_latents import MeasuredLatents
from dmsae_ray.draws import COURSE_NULL

if TYPE_CHECKING:
    from dmsae_ray.core.core import Core

ROWS = 16_384
"""Held-out rows at most on which the cores of all cycles are compared."""
DRAWS = 20
"""Draws of the mean that random directions give; there is one for every two sizes."""
NUMBERS = (
    "pw_mcc",
    "pw_mcc_chance",
    "overlap",
    "firing",
    "firing_chance",
    "pw_mcc_same_size",
    "pw_mcc_chance_same_size",
    "overlap_same_size",
)
"""What is measured after each cycle."""


@dataclass(frozen=True, eq=False)
class CycleCore:
    """The core that one cycle of a chain selected."""

    core: Core
    latents: MeasuredLatents
    """its members in the SAE in which it was selected, in its own order"""
    tokens: int
    """tokens that the chain was trained on until then, all its cycles together"""

    @staticmethod
    def of(core: Core, tokens: int, exempt: int) -> CycleCore:
        """exempt: latents, the first ones, of that SAE whose threshold is 0 (a core gated by ReLU)."""
        theta_C = torch.where(core.latent_ids_C < exempt, 0.0, core.theta)
        latents = MeasuredLatents(
            core.W_enc_CD, core.b_enc_C, core.W_dec_CD, core.b_dec_D, theta_C, core.density_C, core.scale
        )
        return CycleCore(core, latents, tokens)

    @cached_property
    def by_score_C(self) -> torch.Tensor:
        return torch.argsort(self.core.scores_C, descending=True, stable=True)

    def fires(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """On which rows each member is active, bool [C, R]."""
        return torch.cat([(self.latents.activations(part_RD) > 0).T for part_RD in rows_RD.split(PART)], dim=1)


@dataclass(frozen=True)
class CoursePoint:
    """Two chains after the same cycle. A number is None where a core is empty."""

    cycle: int
    tokens: int
    """tokens that each chain was trained on until then"""
    size_a: int
    size_b: int
    same_size: int
    """members, by score, of the cores cut to one size"""
    pw_mcc: float | None
    pw_mcc_chance: float | None
    """mean PW-MCC of as many Gaussian directions with the activations' covariance"""
    overlap: float | None
    firing: float | None
    """mean Jaccard of the rows on which matched latents are active"""
    firing_chance: float | None
    """the same if they fired independently, as often as they do"""
    pw_mcc_same_size: float | None
    pw_mcc_chance_same_size: float | None
    overlap_same_size: float | None


class Course:
    """Compares chains cycle by cycle."""

    def __init__(self, gaussian: Gaussian, cosine: float, seed: int):
        self.gaussian, self.cosine, self.seed = gaussian, cosine, seed
        self._chance = lru_cache(maxsize=None)(self._draw)

    def of(
        self,
        a: tuple[CycleCore, ...],
        b: tuple[CycleCore, ...],
        fires_a: tuple[torch.Tensor, ...],
        fires_b: tuple[torch.Tensor, ...],
    ) -> tuple[CoursePoint, ...]:
        """A point for each cycle; none where the two were not trained on the same numbers of tokens.

        fires_a, fires_b: on which rows each cycle's members are active, bool [C, R] each.
        """
        if [cycle.tokens for cycle in a] != [cycle.tokens for cycle in b]:
            return ()
        same = min((cycle.core.size for cycle in (*a, *b)), default=0)
        points = []
        for number, (first, second) in enumerate(zip(a, b, strict=True)):
            encoder, decoder = self._matched(first.latents, second.latents)
            fired = overlap_of(
                fires_a[number][torch.from_numpy(decoder.left_P)], fires_b[number][torch.from_numpy(decoder.right_P)]
            )
            encoder_cut, decoder_cut = self._matched(
                first.latents.take(first.by_score_C[:same]), second.latents.take(second.by_score_C[:same])
            )
            points.append(
                CoursePoint(
                    cycle=number,
                    tokens=first.tokens,
                    size_a=first.core.size,
                    size_b=second.core.size,
                    same_size=same,
                    pw_mcc=pw_mcc(decoder),
                    pw_mcc_chance=self._chance(*sorted(decoder.sizes)),
                    overlap=overlap(encoder, decoder, self.cosine),
                    firing=fired.mean,
                    firing_chance=fired.chance,
                    pw_mcc_same_size=pw_mcc(decoder_cut),
                    pw_mcc_chance_same_size=self._chance(same, same),
                    overlap_same_size=overlap(encoder_cut, decoder_cut, self.cosine),
                )
            )
        return tuple(points)

    @staticmethod
    def _matched(a: MeasuredLatents, b: MeasuredLatents) -> tuple[Matching, Matching]:
        """By encoder rows and by decoder rows."""
        return hungarian(a.W_enc_ND, b.W_enc_ND), hungarian(a.W_dec_ND, b.W_dec_ND)

    def _draw(self, smaller: int, larger: int) -> float | None:
        if not smaller:
            return None
        rng = np.random.default_rng([self.seed, COURSE_NULL])
        drawn: list[Rows] = [self.gaussian.rotated(rng, size) for _ in range(DRAWS) for size in (smaller, larger)]
        return float(np.mean([pw_mcc(hungarian(a, b)) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]))
