"""Gradient x activation of latents, on held-out text (method: "Attribute").

What stands at the hook, x, is replaced at every row (a token other than BOS) by the reconstruction from core and first
group; for each of those latents j and each row n

    a_j(n) = z_j(n) * s * < dLoss / d x(n), d_j >

with d_j the unit decoder row, s the dataset's scale and Loss the summed next-token cross-entropy of the sequence. With
`candidates: all` it is the whole reconstruction, and every latent.
Letters: N sequences, T context, R rows, D model dimension, P candidates, F width, M active pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmsae_ray.activations.outliers import counted
from dmsae_ray.attribution.histogram import Histogram
from dmsae_ray.attribution.partial import Partial
from dmsae_ray.sae.sae import MatryoshkaSAE

ROWS_AT_ONCE = 1024
"""Rows whose attribution exists at a time: with every latent of a wide SAE a candidate, all would be gigabytes. Fixed,
since it orders the sums.
"""


@dataclass(frozen=True)
class AttributionSettings:
    """What decides the attribution of a row, apart from the SAE and the sequences."""

    splice: str = "replace"
    """the reconstruction alone (`replace`), or with the SAE's error (`keep_error`)"""
    candidates: str = "first_group"
    """latents that are scored, and that the reconstruction is made of: core and `first_group`, or `all`"""
    max_norm: float | None = None
    """raw norm beyond which a position keeps what stands there and does not count; None: all count"""


def candidates_of(sae: MatryoshkaSAE, settings: AttributionSettings) -> int:
    """How many latents, the first ones, are scored."""
    return sae.width if settings.candidates == "all" else sae.group_ends[0]


def attribute(
    sae: MatryoshkaSAE, lm, ids_NT: torch.Tensor, lengths_N: torch.Tensor, scale: float, settings: AttributionSettings
) -> Partial:
    """What these sequences add to the candidates' attribution. ids_NT is on the SAE's device."""
    z_RP, grad_RD = gradients(sae, lm, ids_NT, lengths_N, scale, settings)
    candidates = z_RP.shape[1]
    signed_P = torch.zeros(candidates, dtype=torch.float64, device=z_RP.device)
    absolute_P, latents, magnitudes = torch.zeros_like(signed_P), [], []
    with torch.no_grad():
        for z_rP, grad_rD in zip(z_RP.split(ROWS_AT_ONCE), grad_RD.split(ROWS_AT_ONCE), strict=True):
            a_rP = z_rP * (grad_rD @ sae.W_dec[:candidates].T) * scale
            size_rP = a_rP.abs()
            signed_P += a_rP.sum(dim=0, dtype=torch.float64)
            absolute_P += size_rP.sum(dim=0, dtype=torch.float64)
            row_M, latent_M = (z_rP > 0).nonzero(as_tuple=True)
            latents.append(latent_M)
            magnitudes.append(size_rP[row_M, latent_M].float())
        if not bool(torch.isfinite(absolute_P).all()):
            raise FloatingPointError("attribution is not finite: the spliced language model overflowed")
        histogram = Histogram.of(torch.cat(latents), torch.cat(magnitudes))
    return Partial(len(z_RP), signed_P.cpu(), absolute_P.cpu(), histogram)


def gradients(
    sae: MatryoshkaSAE, lm, ids_NT: torch.Tensor, lengths_N: torch.Tensor, scale: float, settings: AttributionSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates' activations z [R, P] and the loss's gradient at the hook [R, D], spliced, at every row that
    counts.

    Rows are `LanguageModel.rows` (neither BOS nor padding) whose norm is at most `max_norm`. Every row that the model
    has is a target of the loss, outlier or not.
    """
    candidates = candidates_of(sae, settings)
    cut = lm.cut(ids_NT)  # the lower blocks once, without gradient
    with torch.no_grad():
        rows_NT = counted(lm.rows(ids_NT, lengths_N), cut.value_BTD, settings.max_norm)
        x_RD = cut.value_BTD[rows_NT] / scale
        keep_error = settings.splice == "keep_error"
        z_RF = sae.encode(x_RD, upto=sae.width if keep_error else candidates)
        z_RP = z_RF[:, :candidates]
        spliced_RD = sae.decode(z_RP) * scale
        if keep_error:
            # The error of the whole SAE stays in place: only what the candidates say is under test.
            spliced_RD = spliced_RD + (x_RD - sae.decode(z_RF)) * scale
        spliced_NTD = cut.value_BTD.clone()
        spliced_NTD[rows_NT] = spliced_RD
    spliced_NTD.requires_grad_(True)
    loss = lm.loss(cut, spliced_NTD, ids_NT, lengths_N)
    (grad_NTD,) = torch.autograd.grad(loss, spliced_NTD)
    return z_RP, grad_NTD[rows_NT]
