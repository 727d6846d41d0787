"""Same-size sets of cycle 0, by attribution: what a Matryoshka SAE gives without distillation."""

from __future__ import annotations

from dataclasses import dataclass

from dmsae_ray.compare.activation import Standardised, agreement
from dmsae_ray.compare.match import hungarian, overlap, pw_mcc
from dmsae_ray.compare.measured_latents import MeasuredLatents
from dmsae_ray.compare.nulls import NullResult, over_draws, unavailable


@dataclass(frozen=True, eq=False)
class Ranked:
    """Latents by score descending, with their activations."""

    latents: MeasuredLatents
    """of one SAE"""
    activations: Standardised
    """on the held-out rows"""

    def top(self, count: int) -> Ranked:
        return Ranked(self.latents.take(slice(count)), self.activations.take(slice(count)))


def cycle0_null(
    start_a: Ranked,
    start_b: Ranked,
    core_a: Ranked,
    core_b: Ranked,
    cosine: float,
    mmcs_mean: float | None,
    reason: str | None = None,
) -> NullResult:
    """start_a, start_b: cycle 0's candidates, core_a, core_b: the cores' members.

    Where cycle 0 has fewer candidates than the core has members, all of them are used, and the cores cut to those sizes
    stand beside them. mmcs_mean: mean largest cosine of these sets to the other run's whole cycle-0 SAE; reason: why
    the pair may not be read against this null, if so.
    """
    size = (min(start_a.latents.size, core_a.latents.size), min(start_b.latents.size, core_b.latents.size))
    if min(size) == 0:
        return unavailable("cycle 0 has no candidates on one side", size)
    scores, overlaps, activations = zip(
        *(ranked_agreement(a.top(size[0]), b.top(size[1]), cosine) for a, b in ((start_a, start_b), (core_a, core_b))),
        strict=True,
    )
    return over_draws(
        scores[:1],
        overlaps[:1],
        activations[:1],
        mmcs_mean,
        size,
        reason=reason,
        core_pw_mcc_same_size=scores[1],
        core_overlap_same_size=overlaps[1],
        core_activation_same_size=activations[1],
    )


def ranked_agreement(a: Ranked, b: Ranked, cosine: float) -> tuple[float | None, float | None, float | None]:
    """PW-MCC, overlap and activation agreement of two sets of latents."""
    decoder = hungarian(a.latents.W_dec_ND, b.latents.W_dec_ND)
    encoder = hungarian(a.latents.W_enc_ND, b.latents.W_enc_ND)
    return pw_mcc(decoder), overlap(encoder, decoder, cosine), agreement(a.activations, b.activations, decoder).mean
