"""The core that a finished cycle hands to the next."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch

from dmsae_ray.core.core import Core

if TYPE_CHECKING:
    from dmsae_ray.sae.sae import MatryoshkaSAE


def next_core(
    previous: Core | None,
    sae: MatryoshkaSAE,
    ids_C: torch.Tensor,
    scores_N: torch.Tensor,
    density_F: torch.Tensor,
    *,
    cycle: int,
    seed: int,
    k: int,
    scale: float,
    hook: str,
    model: str,
    by: str = "attribution",
) -> Core:
    """The core that this cycle hands on.

    previous: the core inside `sae` (its member i is latent i there; with core_transfer `random` rows that no cycle has
    selected yet), None if there is none. ids_C: the selected latent
    ids, ascending; scores_N: fp64 attribution of all candidates; by: what the ids were selected by. Raises ValueError
    if the previous core belongs to another model, hook or scale.
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
    members = () if previous is None or sae.core_transfer == "random" else previous.selected
    selected = tuple((*members[latent], cycle) if latent < len(members) else (cycle,) for latent in ids_C.tolist())
    return Core(
        W_enc_CD=W_enc_FD[ids_C],
        W_dec_CD=sae.W_dec.detach().cpu()[ids_C],
        b_enc_C=sae.b_enc.detach().cpu()[ids_C],
        b_dec_D=sae.b_dec,
        scores_C=scores_N[ids_C],
        density_C=torch.as_tensor(density_F).cpu()[ids_C],
        latent_ids_C=ids_C,
        theta=float(sae.theta),
        scale=float(scale),
        hook=hook,
        model=model,
        cycle=cycle,
        seed=seed,
        k=k,
        entered_C=torch.tensor([cycles[0] for cycles in selected], dtype=torch.int64),
        selected=selected,
        selected_by=by,
    )


def _check_same_source(previous: Core, scale: float, hook: str, model: str) -> None:
    same_scale = math.isclose(previous.scale, scale, rel_tol=1e-12)
    if not same_scale or previous.hook != hook or previous.model != model:
        there = json.dumps({"model": previous.model, "hook": previous.hook, "scale": previous.scale})
        here = json.dumps({"model": model, "hook": hook, "scale": scale})
        raise ValueError(
            f"the previous core was made from {there}, this cycle from {here}: frozen encoder rows mean nothing there; "
            "give the chain one dataset"
        )
