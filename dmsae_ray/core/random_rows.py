"""Random encoder rows in a core's place: the control that says whether it matters that the frozen rows are the core's.

Shape letters: N rows of activations, D model dimension, C core size.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from dmsae_ray.core.core import Core

MIXED = 256
"""Pairs of activations that a direction is mixed from."""


def random_rows(core: Core, rows_ND: torch.Tensor, seed: int) -> Core:
    """The core with encoder rows of random directions and its own rows' norms; nothing else of it changes.

    A direction is a sum, weighted by normal draws, of differences between two random activations: its covariance is
    theirs. Isotropic directions would be the weaker control, since they see little of the activations' variance and may
    lose the slot for that alone. Biases need no match: a cycle starts all of them at 0.

    rows_ND: activations, raw units. Only sums of single numbers in a fixed order, and exact ones: every worker, on any
    machine, makes the same bits. Raises ValueError if the activations do not differ.
    """
    rng = np.random.default_rng(seed)
    left_MC, right_MC = rng.integers(len(rows_ND), size=(2, MIXED, core.size))
    weight_MC = rng.standard_normal((MIXED, core.size))
    mixed_CD = np.zeros(core.W_enc_CD.shape)
    for left_C, right_C, weight_C in zip(left_MC, right_MC, weight_MC, strict=True):
        difference_CD = rows_ND[left_C].double() - rows_ND[right_C].double()
        mixed_CD += weight_C[:, None] * difference_CD.cpu().numpy()
    if not mixed_CD.any(axis=1).all():
        raise ValueError("the calibration rows do not differ: no random direction has their covariance")
    factors_C = [_norm(row_D) / _norm(mixed_D) for row_D, mixed_D in zip(core.W_enc_CD.double(), mixed_CD, strict=True)]
    return replace(core, W_enc_CD=torch.from_numpy(mixed_CD * np.array(factors_C)[:, None]))


def _norm(row_D: torch.Tensor | np.ndarray) -> float:
    return math.sqrt(math.fsum(value * value for value in row_D.tolist()))
