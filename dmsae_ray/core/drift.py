"""Decoder drift: whether a core's decoder rows, which every cycle learns afresh, come back to where they were.

Shape letters: C core size, D model dimension.
"""

from __future__ import annotations

import torch

NEAR = 0.9
"""Cosine from which a row counts as having come back."""


def decoder_drift(before_CD: torch.Tensor, after_CD: torch.Tensor) -> dict[str, float] | None:
    """Cosine of each member's decoder row in the SAE that selected it to the one learned since; None without a member.

    mean, min, median, lowest tenth (`q10`) and the share of rows at NEAR or above (`share_near`).
    """
    assert before_CD.shape == after_CD.shape, "rows of different cores"
    if not len(before_CD):
        return None
    cosine_C = torch.nn.functional.cosine_similarity(before_CD.double().cpu(), after_CD.detach().double().cpu(), dim=1)
    return {
        "mean": float(cosine_C.mean()),
        "min": float(cosine_C.min()),
        "median": float(cosine_C.quantile(0.5)),
        "q10": float(cosine_C.quantile(0.1)),
        "share_near": float((cosine_C >= NEAR).double().mean()),
    }
