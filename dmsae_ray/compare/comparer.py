"""Comparing pairs of chains on one set of held-out rows; what pairs have in common is made once.

Shape letters: C core size, D model dimension, F width, R rows of activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from dmsae_ray.compare.activation import ROWS, Standardised, agreement, standardised
from dmsae_ray.compare.chain_result import ChainResult
from dmsae_ray.compare.course import ROWS as COURSE_ROWS
from dmsae_ray.compare.course import Course
from dmsae_ray.compare.covariance import CovarianceNull, Gaussian
from dmsae_ray.compare.cycle0 import Ranked, cycle0_null
from dmsae_ray.compare.density import FreeDraws, matched_density_null
from dmsae_ray.compare.functional import LossRows
from dmsae_ray.compare.functional_pair import FunctionalComparer, Uses
from dmsae_ray.compare.match import hungarian, mmcs, overlap, pw_mcc, shared_pairs
from dmsae_ray.compare.nulls import DictionaryNull, NullResult, unavailable
from dmsae_ray.compare.pair import OWN_NULLS, SMALLEST_CORE, CompareSettings, PairResult, about
from dmsae_ray.compare.pairing import paired
from dmsae_ray.compare.subspace import RandomSubspaces


@dataclass(frozen=True, eq=False)
class Side:
    """One chain with what all of its pairs need, made when the first of them asks."""

    result: ChainResult
    rows_RD: torch.Tensor
    """held-out rows, raw units"""
    covariance: CovarianceNull
    loss_rows: LossRows | None

    @cached_property
    def uses(self) -> Uses:
        """What its latents are used for."""
        result = self.result
        return Uses(
            result.core_latents(),
            self.core_activations,
            result.core.scores_C.numpy(),
            self.start,
            self.free,
            self.loss_rows,
        )

    @cached_property
    def course_fires(self) -> tuple[torch.Tensor, ...]:
        """On which rows the members of each cycle's core are active, bool [C, R] each."""
        return tuple(cycle.fires(self.rows_RD[:COURSE_ROWS]) for cycle in self.result.course)

    @cached_property
    def core_activations(self) -> Standardised:
        """The core's, in its own order."""
        return standardised(self.result.core_latents(), self.rows_RD)

    @cached_property
    def core(self) -> Ranked:
        """The core by score."""
        order_C = self.result.by_score_C()
        return Ranked(self.result.core_latents().take(order_C), self.core_activations.take(order_C))

    @cached_property
    def start(self) -> Ranked:
        """As many of cycle 0's candidates as the core has members, or all if there are fewer."""
        latents = self.result.start.take(self.result.start_ids_N[: self.result.core.size])
        return Ranked(latents, standardised(latents, self.rows_RD))

    @cached_property
    def free(self) -> FreeDraws:
        """Draws of free latents as dense as the core's members."""
        return FreeDraws.of(
            self.result.sae, self.result.core_ids_C, self.covariance.draws, self.covariance.seed, self.rows_RD
        )

    @cached_property
    def covariance_mmcs(self) -> float:
        """Mean largest cosine of directions of the covariance to the whole SAE."""
        return self.covariance.to_whole(self.result.sae.W_dec_ND)


class Comparer:
    """Compares pairs of chains. rows_RD: held-out activations, raw units, of which at most `activation.ROWS` are
    used.
    """

    def __init__(
        self,
        rows_RD: torch.Tensor,
        settings: CompareSettings,
        gaussian: Gaussian | None = None,
        loss_rows: LossRows | None = None,
    ):
        """gaussian: directions of the rows' covariance; None: taken from these rows. loss_rows: None: effects on the
        loss are not compared.
        """
        self.rows_RD, self.settings = rows_RD[:ROWS], settings
        self.covariance = CovarianceNull(
            gaussian or Gaussian.of_rows(rows_RD), settings.draws, settings.cosine, settings.seed
        )
        self.loss_rows, directions = loss_rows, self.covariance.gaussian
        self.functional = FunctionalComparer(
            RandomSubspaces(directions, settings.draws, settings.seed), settings.cosine, settings.draws, settings.seed
        )
        self.course = Course(directions, settings.cosine, settings.seed)

    def side(self, result: ChainResult) -> Side:
        """A chain, ready for its pairs; whoever holds it decides how long what was prepared stays in memory."""
        return Side(result, self.rows_RD, self.covariance, self.loss_rows)

    def pair(self, side_a: Side, side_b: Side) -> PairResult:
        """Compare two chains. Cores with fewer than SMALLEST_CORE members give a result without core scores.

        Raises ValueError if the two differ in nothing, are of different models or hooks, or the rows are of another
        dataset.
        """
        a, b = side_a.result, side_b.result
        self._check(a, b)
        pairing, size, cosine = paired(a.chain, b.chain), (a.core.size, b.core.size), self.settings.cosine
        common = (
            about(pairing)
            | {"size_a": size[0], "size_b": size[1], "activation_rows": len(self.rows_RD)}
            | self._dictionaries(a, b)
            | {"course": self.course.of(a.course, b.course, side_a.course_fires, side_b.course_fires)}
        )
        if min(size) < SMALLEST_CORE:
            reason = (
                f"cores of {size[0]} and {size[1]} latents: a comparison needs at least {SMALLEST_CORE} on each side"
            )
            return PairResult(
                **common,
                overlap=None,
                shared=None,
                pw_mcc=None,
                mmcs_ab=None,
                mmcs_ba=None,
                activation=None,
                activation_pairs=None,
                activation_left_out=None,
                reason=reason,
                nulls={name: unavailable(reason, size) for name in OWN_NULLS},
                functional=None,
            )
        encoder, decoder = hungarian(a.core.W_enc_CD, b.core.W_enc_CD), hungarian(a.core.W_dec_CD, b.core.W_dec_CD)
        active = agreement(side_a.core_activations, side_b.core_activations, decoder)
        return PairResult(
            **common,
            overlap=overlap(encoder, decoder, cosine),
            shared=len(shared_pairs(encoder, decoder, cosine)),
            pw_mcc=pw_mcc(decoder),
            mmcs_ab=mmcs(a.core.W_dec_CD, b.sae.W_dec_ND),
            mmcs_ba=mmcs(b.core.W_dec_CD, a.sae.W_dec_ND),
            activation=active.mean,
            activation_pairs=active.counted,
            activation_left_out=active.left_out,
            reason=None,
            nulls=self._nulls(side_a, side_b),
            functional=self.functional.pair(
                side_a.uses,
                side_b.uses,
                encoder,
                decoder,
                b.core.density_C.numpy(),
                a.no_start() or b.no_start(),
            ),
        )

    def _check(self, a: ChainResult, b: ChainResult) -> None:
        for chain in (a, b):
            if chain.sae.W_dec_ND.shape[1] != self.covariance.gaussian.d:
                raise ValueError(
                    f"the activations have {self.covariance.gaussian.d} dimensions, chain {chain.label} has "
                    f"{chain.sae.W_dec_ND.shape[1]}: another dataset?"
                )
        for name in ("model", "hook"):
            if getattr(a.core, name) != getattr(b.core, name):
                raise ValueError(
                    f"chains {a.label} and {b.label} are of different {name}s, {getattr(a.core, name)} and "
                    f"{getattr(b.core, name)}: their directions have nothing to do with each other"
                )

    def _dictionaries(self, a: ChainResult, b: ChainResult) -> dict:
        """PW-MCC of the whole SAEs and its nulls, as fields of a PairResult."""
        width = min(self.settings.max_latents, max(a.sae.size, b.sae.size))
        size = (min(width, a.sae.size), min(width, b.sae.size))
        start_size = (min(width, a.start.size), min(width, b.start.size))
        reason = a.no_start() or b.no_start()
        start = pw_mcc(hungarian(a.start.W_dec_ND[:width], b.start.W_dec_ND[:width]))
        return {
            "pw_mcc_dictionary": pw_mcc(hungarian(a.sae.W_dec_ND[:width], b.sae.W_dec_ND[:width])),
            "dictionary_size": width,
            "dictionary_nulls": {
                "covariance": self.covariance.dictionary(size),
                "matched_density": DictionaryNull(
                    False, "a whole dictionary leaves no free latents to draw from", None, 0, size
                ),
                "cycle0": DictionaryNull(reason is None, reason, start, 1, start_size),
            },
        }

    def _nulls(self, side_a: Side, side_b: Side) -> dict[str, NullResult]:
        a, b, cosine = side_a.result, side_b.result, self.settings.cosine
        start_ab = mmcs(side_a.start.latents.W_dec_ND, b.start.W_dec_ND)
        start_ba = mmcs(side_b.start.latents.W_dec_ND, a.start.W_dec_ND)
        return {
            "covariance": self.covariance.of(
                (a.core.size, b.core.size), side_a.covariance_mmcs, side_b.covariance_mmcs
            ),
            "matched_density": matched_density_null(side_a.free, side_b.free, a.sae.W_dec_ND, b.sae.W_dec_ND, cosine),
            "cycle0": cycle0_null(
                side_a.start,
                side_b.start,
                side_a.core,
                side_b.core,
                cosine,
                mmcs_mean=None if start_ab is None or start_ba is None else (start_ab + start_ba) / 2,
                reason=a.no_start() or b.no_start(),
            ),
        }
