"""Decoder drift: whether a core's decoder rows, which every cycle learns afresh, come back to where they were.

Where they begin decides what that says: a row that begins as its latent's encoder row points much the same way before
anything is learned (cosine 0.94 in the study). So the cosine before training stands beside the one after it, and
`gap_closed` says how much of what lay between was made good.

Shape letters: C core size, D model dimension.
"""

from __future__ import annotations

import torch

NEAR = 0.9
"""Cosine from which a row counts as near where it was."""
SMALLEST_GAP = 1e-6
"""Below this, `1 - before` is rounding, and no share of it means anything."""


def decoder_drift(
    old_CD: torch.Tensor, began_CD: torch.Tensor, learned_CD: torch.Tensor
) -> dict[str, float | None] | None:
    """Cosines of each member's decoder row in the SAE that selected it to the one learned since; None without a member.

    began_CD: the rows that training began from. mean, min, median, lowest tenth (`q10`) and share at NEAR or above
    (`share_near`) of the cosines after training; `before`: their mean before it; `gap_closed`: (mean - before) /
    (1 - before), 1 where all rows came back, 0 where they are no nearer than they began, below 0 where they went away;
    None where they began as what they were.
    """
    assert old_CD.shape == began_CD.shape == learned_CD.shape, "rows of different cores"
    if not len(old_CD):
        return None
    began_C, cosine_C = _cosines(old_CD, began_CD), _cosines(old_CD, learned_CD)
    mean, before = float(cosine_C.mean()), float(began_C.mean())
    return {
        "mean": mean,
        "min": float(cosine_C.min()),
        "median": float(cosine_C.quantile(0.5)),
        "q10": float(cosine_C.quantile(0.1)),
        "share_near": float((cosine_C >= NEAR).double().mean()),
        "before": before,
        "gap_closed": (mean - before) / (1 - before) if 1 - before > SMALLEST_GAP else None,
    }


def _cosines(one_CD: torch.Tensor, other_CD: torch.Tensor) -> torch.Tensor:
    one_CD, other_CD = (rows_CD.detach().double().cpu() for rows_CD in (one_CD, other_CD))
    return torch.nn.functional.cosine_similarity(one_CD, other_CD, dim=1)
