"""The geometric median, where b_dec starts."""

from __future__ import annotations

import torch
from torch import Tensor


def geometric_median(points_ND: Tensor, max_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Point [D] with the least summed distance to the rows, by Weiszfeld's iteration from their mean.

    Ends after `max_iterations`, or when a move is shorter than `tolerance` (the figures of dictionary-learning 0.1.0).
    A row that coincides with the guess would have an infinite weight; its distance is bounded from below instead.
    """
    guess_D = points_ND.mean(dim=0)
    smallest = torch.finfo(points_ND.dtype).tiny ** 0.5
    for _ in range(max_iterations):
        previous_D = guess_D
        weight_N = 1 / torch.linalg.vector_norm(points_ND - guess_D, dim=1).clamp_min(smallest)
        guess_D = (weight_N / weight_N.sum()) @ points_ND
        if torch.linalg.vector_norm(guess_D - previous_D) < tolerance:
            break
    return guess_D
