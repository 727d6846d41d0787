"""Selection: from the candidates' attribution, or another value of theirs, to the next core.

Candidates are latents 0..N-1 of an SAE (its core and first free group), so a candidate's index is its latent id.
Shape letters: N candidates, F width, C core size, D model dimension.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from dmsae_ray.core.core import Core
from dmsae_ray.files import replacing

if TYPE_CHECKING:
    from dmsae_ray.sae.sae import MatryoshkaSAE

SCORES_VERSION = 1

ROUNDING = 1e-12
"""Relative slack in `share >= tau`: nine of ten equal scores are a share of 0.9 whatever their last bit says."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Candidates by score descending, ties by id ascending."""

    ids_N: torch.Tensor
    """latent ids, int64 [N]"""
    scores_N: torch.Tensor
    """their scores, fp64 [N]"""
    share_N: torch.Tensor
    """share of the total, fp64 [N], carried by the first 1, 2, ... of them; the last entry is 1"""


def rank(scores_N: torch.Tensor) -> Ranking:
    """Sort candidates by score. scores_N: fp64 [N] by latent id.

    Raises ValueError if a score is negative or not finite, or if all are zero.
    """
    values_N = torch.as_tensor(scores_N).detach().cpu().double().numpy()
    if values_N.ndim != 1 or values_N.size == 0:
        raise ValueError(f"scores have shape {values_N.shape}, need one score for each of at least one candidate")
    if not np.isfinite(values_N).all() or values_N.min() < 0:
        raise ValueError("scores must be finite and not negative; the attribution of this cycle is broken")
    order_N = _falling(values_N)
    sorted_N = values_N[order_N]
    running_N = np.cumsum(sorted_N)
    if running_N[-1] == 0:
        raise ValueError(
            f"all {values_N.size} candidates have attribution 0, so there is no share to select by: none of them was "
            "active on the attribution tokens, or none moved the loss; train longer, or raise k"
        )
    return Ranking(
        torch.from_numpy(order_N), torch.from_numpy(sorted_N), torch.from_numpy(running_N / running_N[-1])
    )


def select(scores_N: torch.Tensor, tau: float) -> torch.Tensor:
    """Ids, int64 ascending, of the smallest set of candidates whose share of the total score reaches `tau`.

    scores_N: fp64 [N] by latent id. Raises ValueError as `rank` does, or if tau is outside (0, 1].
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau is {tau}, needs a share above 0, at most 1")
    ranking = rank(scores_N)
    count = int(torch.argmax((ranking.share_N >= tau * (1 - ROUNDING)).int())) + 1
    return ranking.ids_N[:count].sort().values


def top(values_N: torch.Tensor, count: int) -> torch.Tensor:
    """Ids, int64 ascending, of the `count` candidates with the largest values, ties by id.

    values_N: [N] by latent id, of either sign. Raises ValueError if a value is not finite or there are fewer candidates.
    """
    values_N = torch.as_tensor(values_N).detach().cpu().double().numpy()
    if not np.isfinite(values_N).all():
        raise ValueError("a candidate is ranked by a value that is not finite")
    if not 0 <= count <= values_N.size:
        raise ValueError(f"a core of {count} latents cannot be selected from {values_N.size} candidates")
    return torch.from_numpy(_falling(values_N)[:count]).sort().values


def _falling(values_N: np.ndarray) -> np.ndarray:
    """Ids by value descending, ties by id ascending, int64 [N]."""
    return np.lexsort((np.arange(values_N.size), -values_N))


def count_of(share: float, candidates: int) -> int:
    """The fewest candidates that are at least this share of all."""
    return math.ceil(share * candidates * (1 - ROUNDING))


def carried(scores_N: torch.Tensor, ids_C: torch.Tensor) -> float:
    """Share of the candidates' total score that these carry, added in the order of `rank`. Raises ValueError as `rank` does."""
    ranking = rank(scores_N)
    chosen_N = torch.isin(ranking.ids_N, torch.as_tensor(ids_C, dtype=torch.int64))
    # numpy adds a running sum one by one, as in `rank`: the top candidates carry exactly their point of the curve.
    running_N = np.cumsum(torch.where(chosen_N, ranking.scores_N, 0.0).numpy())
    return float(running_N[-1] / np.cumsum(ranking.scores_N.numpy())[-1])


def save_scores(
    path: str | os.PathLike[str], scores_N: torch.Tensor, by: str = "attribution", values_N: torch.Tensor | None = None
) -> None:
    """Write `ids` and `scores` (attribution) of the candidates by id, and `curve`, the cumulative share by rank, in one step.

    values_N: what they were selected by, if by is not attribution; stored as `values`. Raises ValueError as `rank` does.
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


def next_core(
    previous: Core | None, sae: MatryoshkaSAE, ids_C: torch.Tensor, scores_N: torch.Tensor, density_F: torch.Tensor, *,
    cycle: int, seed: int, k: int, scale: float, hook: str, model: str, by: str = "attribution",
) -> Core:  # fmt: skip
    """The core that this cycle hands on.

    previous: the core inside `sae` (its member i is latent i there), None if there is none. ids_C: the selected latent
    ids, ascending; scores_N: fp64 attribution of all candidates; by: what the ids were selected by. Raises ValueError if
    the previous core belongs to another model, hook or scale.
    """
    old_size = 0 if previous is None else previous.size
    W_enc_FD = sae.encoder_rows().cpu()
    if previous is not None:
        _check_same_source(previous, scale=scale, hook=hook, model=model)
        assert previous.cycle < cycle, "a core cannot come from a later cycle"
        frozen = slice(sae.n_frozen)
        assert torch.equal(W_enc_FD[frozen].float(), previous.W_enc_CD[frozen]), "frozen encoder rows moved"
    assert sae.core_size == old_size, "the SAE holds another core than the one given"
    ids_C = torch.as_tensor(ids_C, dtype=torch.int64).cpu()
    scores_N = torch.as_tensor(scores_N).cpu()
    assert ids_C.numel() == 0 or int(ids_C.max()) < scores_N.shape[0] <= W_enc_FD.shape[0], "selected without a score"
    selected = tuple(
        (*previous.selected[latent], cycle) if previous is not None and latent < old_size else (cycle,)
        for latent in ids_C.tolist()
    )
    return Core(
        W_enc_CD=W_enc_FD[ids_C],
        W_dec_CD=sae.W_dec.detach().cpu()[ids_C],
        b_enc_C=sae.b_enc.detach().cpu()[ids_C],
        b_dec_D=sae.b_dec,
        scores_C=scores_N[ids_C],
        density_C=torch.as_tensor(density_F).cpu()[ids_C],
        latent_ids_C=ids_C,
        theta=float(sae.theta),
        scale=float(scale), hook=hook, model=model, cycle=cycle, seed=seed, k=k,
        entered_C=torch.tensor([cycles[0] for cycles in selected], dtype=torch.int64),
        selected=selected,
        selected_by=by,
    )  # fmt: skip


def _check_same_source(previous: Core, scale: float, hook: str, model: str) -> None:
    same_scale = math.isclose(previous.scale, scale, rel_tol=1e-12)
    if not same_scale or previous.hook != hook or previous.model != model:
        there = json.dumps({"model": previous.model, "hook": previous.hook, "scale": previous.scale})
        here = json.dumps({"model": model, "hook": hook, "scale": scale})
        raise ValueError(
            f"the previous core was made from {there}, this cycle from {here}: frozen encoder rows mean nothing there; "
            "give the chain one dataset"
        )


def jaccard(kept: int, old_size: int, new_size: int) -> float | None:
    """Overlap of two consecutive cores: members of both / members of either; None if both are empty."""
    assert 0 <= kept <= min(old_size, new_size), "more members kept than there were"
    union = old_size + new_size - kept
    return kept / union if union else None
