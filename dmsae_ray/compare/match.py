"""Matching: one-to-one pairs of latents by the cosine of their rows.

Sources: Paulo and Belrose, arXiv 2501.16615 (shared latents); Song et al., arXiv 2505.20254 (PW-MCC). The cosine is
signed: a ReLU latent and its negative are two different features.
Shape letters: N and M latents of the two sides, D model dimension, P matched pairs, min(N, M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

CHUNK = 4096
"""Rows of a whole dictionary taken at a time, so that its fp64 copy never exists as a whole."""

Rows: TypeAlias = torch.Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Matching:
    """The assignment with the largest sum of cosines; the larger side keeps latents without a partner."""

    left_P: np.ndarray
    """indices on the first side, int64 [P], ascending if it is the smaller one"""
    right_P: np.ndarray
    """their partners on the second side, int64 [P]"""
    cosine_P: np.ndarray
    """cosine of each pair, fp64 [P]"""
    sizes: tuple[int, int]
    """latents on both sides (N, M)"""


def unit(rows_ND: Rows) -> np.ndarray:
    """Rows scaled to norm 1, fp64; a row of zeros stays zero, so its cosine to anything is 0.

    Raises ValueError if a value is not finite.
    """
    if isinstance(rows_ND, torch.Tensor):
        rows_ND = rows_ND.detach().cpu().double().numpy()
    rows_ND = np.asarray(rows_ND, dtype=np.float64)
    if not np.isfinite(rows_ND).all():
        raise ValueError("rows to be matched hold a value that is not finite")
    norms_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return np.divide(rows_ND, norms_N1, out=np.zeros_like(rows_ND), where=norms_N1 > 0)


def cosines(A_ND: Rows, B_MD: Rows) -> np.ndarray:
    """Signed cosine of every row of A to every row of B, fp64 [N, M] within [-1, 1]."""
    return np.clip(unit(A_ND) @ unit(B_MD).T, -1.0, 1.0)


def assign(cosine_NM: np.ndarray) -> Matching:
    """Matching of a matrix of cosines; rectangular and empty ones included."""
    left_P, right_P = linear_sum_assignment(cosine_NM, maximize=True)
    return Matching(left_P, right_P, cosine_NM[left_P, right_P], cosine_NM.shape)


def hungarian(A_ND: Rows, B_MD: Rows) -> Matching:
    """Matching of the rows of A to the rows of B by signed cosine."""
    return assign(cosines(A_ND, B_MD))


def shared_pairs(encoder: Matching, decoder: Matching, cosine: float = 0.7) -> np.ndarray:
    """Pairs (left, right), int64 [S, 2], that both matchings name, with both cosines at least `cosine`."""
    assert encoder.sizes == decoder.sizes, "matchings of different latents"
    partner_N = np.full(encoder.sizes[0], -1)
    encoder_cosine_N = np.full(encoder.sizes[0], -np.inf)
    partner_N[encoder.left_P] = encoder.right_P
    encoder_cosine_N[encoder.left_P] = encoder.cosine_P
    left_P, right_P = decoder.left_P, decoder.right_P
    both_P = (partner_N[left_P] == right_P) & (encoder_cosine_N[left_P] >= cosine) & (decoder.cosine_P >= cosine)
    return np.stack([left_P[both_P], right_P[both_P]], axis=1)


def overlap(encoder: Matching, decoder: Matching, cosine: float = 0.7) -> float | None:
    """2 * shared / (N + M); None if a side is empty."""
    if min(encoder.sizes) == 0:
        return None
    return 2 * len(shared_pairs(encoder, decoder, cosine)) / sum(encoder.sizes)


def pw_mcc(decoder: Matching) -> float | None:
    """Mean cosine of the matched decoder rows, over the smaller side; None if a side is empty."""
    return float(decoder.cosine_P.mean()) if decoder.cosine_P.size else None


def largest_cosines(A_ND: Rows, B_MD: Rows) -> np.ndarray:
    """For each row of A its largest cosine to any row of B (M at least 1), fp64 [N]."""
    left_ND = unit(A_ND)
    best_N = np.full(left_ND.shape[0], -1.0)
    for start in range(0, B_MD.shape[0], CHUNK):
        np.maximum(best_N, (left_ND @ unit(B_MD[start : start + CHUNK]).T).max(axis=1), out=best_N)
    return np.minimum(best_N, 1.0)


def mmcs(A_ND: Rows, B_MD: Rows) -> float | None:
    """Mean over A of the largest cosine to any row of B; None if a side is empty."""
    if min(A_ND.shape[0], B_MD.shape[0]) == 0:
        return None
    return float(largest_cosines(A_ND, B_MD).mean())
