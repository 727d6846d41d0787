"""Coverage: the share of the attribution that the best candidates carry, by their number.

Letters: P candidates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file


def coverage(path: Path) -> np.ndarray:
    """Cumulative share of the attribution over candidates by falling score, [P], from scores.safetensors. Raises ValueError."""
    try:
        scores_P = np.sort(load_file(path)["scores"].astype(np.float64))[::-1]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: not a file of scores ({error}); delete this cycle's folder to have it computed again") from error
    total = scores_P.sum()
    return np.cumsum(scores_P) / total if total > 0 else np.zeros_like(scores_P)


def coverage_ranks(candidates: int, core_size: int, points: int) -> list[int]:
    """At most `points` ranks out of 1..candidates, dense at the head, the core's own size among them."""
    if candidates == 0:
        return []
    ranks = {round(float(rank)) for rank in np.geomspace(1, candidates, points - 1)}
    return sorted(ranks | ({core_size} if 0 < core_size <= candidates else set()))
