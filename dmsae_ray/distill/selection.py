"""Which latents of a finished cycle are its core."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dmsae_ray.core.criterion import criterion
from dmsae_ray.core.select import select, top
from dmsae_ray.sae.sae import MatryoshkaSAE

if TYPE_CHECKING:
    from dmsae_ray.distill.plan import ChainPlan


def choose(
    plan: ChainPlan,
    cycle: int,
    sae: MatryoshkaSAE,
    scores_P: torch.Tensor,
    density_F: torch.Tensor,
    removal_P: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latent ids of a cycle's core, int64 ascending, and, if it was not their attribution, what the candidates were
    ranked by.

    scores_P: attribution of all candidates, fp64. Raises ValueError if the size is another chain's and not known, or
    does not fit.
    """
    selection = plan.config.selection
    if selection.size == "tau":
        return select(scores_P, plan.config.attribution.tau), None
    values_P = criterion(selection.by, sae, scores_P, density_F, removal_P, plan.selection_seed(cycle))
    ids_C = top(values_P, plan.core_size(cycle, len(scores_P)))
    return ids_C, None if selection.by == "attribution" else values_P
