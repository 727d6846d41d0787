"""Gradient x activation of latents, on held-out text (method: "Attribute").

What stands at the hook, x, is replaced at every row (a token other than BOS) by the reconstruction from core and first
group; for each of those latents j and each row n

    a_j(n) = z_j(n) * s * < dLoss / d x(n), d_j >

with d_j the unit decoder row, s the dataset's scale and Loss the summed next-token cross-entropy of the sequence.
Letters: N sequences, T context, R rows, D model dimension, P candidates (core + first group).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmsae_ray.sae.sae import MatryoshkaSAE


@dataclass(frozen=True)
class AttributionSettings:
    """What decides a score, apart from the SAE and the sequences."""

    splice: str = "replace"
    aggregator: str = "mean_abs"
    tau: float = 0.9


def attribute(
    sae: MatryoshkaSAE, lm, ids_NT: torch.Tensor, lengths_N: torch.Tensor, scale: float, settings: AttributionSettings
) -> tuple[torch.Tensor, int]:
    """Sum over rows of the candidates' attribution, [P] fp64 on CPU, and the number of rows (`LanguageModel.rows`).

    ids_NT is on the SAE's device. BOS and padding positions count neither as rows nor in the sum.
    """
    rows_NT = lm.rows(ids_NT, lengths_N)
    candidates = sae.group_ends[0]
    cut = lm.cut(ids_NT)  # the lower blocks once, without gradient
    with torch.no_grad():
        x_RD = cut.value_BTD[rows_NT] / scale
        z_RP = sae.encode(x_RD, upto=candidates)
        spliced_RD = sae.decode(z_RP) * scale
        if settings.splice == "keep_error":
            # The error of the whole SAE stays in place: only what core and first group say is under test.
            z_RF = sae.encode(x_RD)
            spliced_RD = spliced_RD + (x_RD - sae.decode(z_RF)) * scale
        spliced_NTD = cut.value_BTD.clone()
        spliced_NTD[rows_NT] = spliced_RD
    spliced_NTD.requires_grad_(True)
    loss = lm.loss(cut, spliced_NTD, ids_NT, lengths_N)
    (grad_NTD,) = torch.autograd.grad(loss, spliced_NTD)
    with torch.no_grad():
        a_RP = z_RP * (grad_NTD[rows_NT] @ sae.W_dec[:candidates].T) * scale
        if not bool(torch.isfinite(a_RP).all()):
            raise FloatingPointError("attribution is not finite: the spliced language model overflowed")
        if settings.aggregator == "mean_abs":
            a_RP = a_RP.abs()
        return a_RP.double().sum(dim=0).cpu(), int(rows_NT.sum())


def total(partials: list[tuple[torch.Tensor, int]], settings: AttributionSettings) -> torch.Tensor:
    """Scores [P] fp64 from the shards' partial sums, added in shard order: the same bits whoever made them."""
    sums_P, tokens = torch.zeros_like(partials[0][0]), 0
    for partial_P, count in partials:
        sums_P += partial_P
        tokens += count
    return (sums_P / tokens).abs() if settings.aggregator == "mean_signed" else sums_P / tokens
