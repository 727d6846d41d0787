"""Coverage: the share of the attribution that the best candidates carry, by their number.

Letters: P candidates.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from safetensors.torch import save as safetensors_bytes

from dmsae_ray.core.select import rank
from dmsae_ray.files import replacing

SCORES_VERSION = 1


def coverage(path: Path) -> np.ndarray:
    """Cumulative share of the attribution over candidates by falling score, [P], from scores.safetensors. Raises
    ValueError.
    """
    try:
        scores_P = np.sort(load_file(path)["scores"].astype(np.float64))[::-1]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path}: not a file of scores ({error}); delete this cycle's folder to have it computed again"
        ) from error
    total = scores_P.sum()
    return np.cumsum(scores_P) / total if total > 0 else np.zeros_like(scores_P)


def coverage_ranks(candidates: int, core_size: int, points: int) -> list[int]:
    """At most `points` ranks out of 1..candidates, dense at the head, the core's own size among them."""
    if candidates == 0:
        return []
    ranks = {round(float(rank)) for rank in np.geomspace(1, candidates, points - 1)}
    return sorted(ranks | ({core_size} if 0 < core_size <= candidates else set()))


def save_scores(
    path: str | os.PathLike[str], scores_N: torch.Tensor, by: str = "attribution", values_N: torch.Tensor | None = None
) -> None:
    """Write `ids` and `scores` (attribution) of the candidates by id, and `curve`, the cumulative share by rank, in one
    step.

    values_N: what they were selected by, if by is not attribution; stored as `values`. Raises ValueError as `rank`
    does.
    """
    assert (values_N is None) == (by == "attribution"), "attribution is in the scores, anything else in the values"
    scores_N = torch.as_tensor(scores_N).detach().cpu().double().contiguous()
    tensors = {"ids": torch.arange(scores_N.shape[0]), "scores": scores_N, "curve": rank(scores_N).share_N}
    header = {"format_version": str(SCORES_VERSION)}
    if values_N is not None:
        tensors, header = tensors | {"values": values_N.double().contiguous()}, header | {"by": by}
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(safetensors_bytes(tensors, header))


def load_scores(path: str | os.PathLike[str]) -> torch.Tensor:
    """Scores of all candidates by id, fp64 [N], as `save_scores` wrote them.

    Raises ValueError that names the file if it is missing, unreadable or of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such scores file; run the cycle that makes it")
    try:
        with safe_open(path, framework="pt") as file:
            version = (file.metadata() or {}).get("format_version")
            if version != str(SCORES_VERSION):
                raise ValueError(f"{path}: scores format version {version}, this program reads {SCORES_VERSION}")
            return file.get_tensor("scores")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or altered ({error}); delete it and run its cycle again") from error
