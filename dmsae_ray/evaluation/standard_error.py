"""How far an evaluation would move on other text of the same kind: standard errors over its sequences.

Letters: N sequences, K kinds of reference loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

OF_A_SEQUENCE = ("tokens", "error", "variance", "loss", "kl")
"""What is summed up sequence by sequence for the whole SAE: targets; squared error and squared distance to the
dataset's mean row, over rows that count; loss spliced, and KL, over targets.
"""


def standard_errors(
    table: torch.Tensor | None, references: Sequence[Sequence[float]] | None
) -> dict[str, float] | None:
    """Of fvu, kl, loss_recovered_zero and loss_recovered_mean. table: rows of OF_A_SEQUENCE, [5, N]; references: clean,
    zero and mean losses, [K, N].

    Each of them is a ratio of sums over sequences (of 1 - loss recovered the numerator is loss spliced - clean, the
    denominator loss ablated - clean), so that its standard error is that of survey sampling's ratio estimator,

        r = sum a_n / sum b_n,    se(r) = sqrt(N / (N - 1) sum (a_n - r b_n)^2) / |sum b_n|

    (Cochran, Sampling Techniques, chapter 6; an infinite population). Sequences count as drawn independently; where a
    document fills several of them in a row, errors are larger than that. FVU's variance is around the dataset's mean
    row here, which a sequence does not move. None with less than two sequences that have targets, or without one of the
    tables.
    """
    if table is None or references is None:
        return None
    has_targets_N = table[0] > 0
    if int(has_targets_N.sum()) < 2:
        return None
    tokens_N, error_N, variance_N, loss_N, kl_N = table[:, has_targets_N]
    clean_N, zero_N, mean_N = torch.tensor(references, dtype=torch.float64)[:, : len(has_targets_N)][:, has_targets_N]
    return {
        "fvu": of_ratio(error_N, variance_N),
        "kl": of_ratio(kl_N, tokens_N),
        "loss_recovered_zero": of_ratio(loss_N - clean_N, zero_N - clean_N),
        "loss_recovered_mean": of_ratio(loss_N - clean_N, mean_N - clean_N),
    }


def of_ratio(a_N: torch.Tensor, b_N: torch.Tensor) -> float:
    """Standard error of sum a / sum b over N independent draws of (a, b)."""
    n, total = len(a_N), b_N.sum()
    residual_N = a_N - a_N.sum() / total * b_N
    return float((n / (n - 1) * residual_N.square().sum()).sqrt() / total.abs())
