"""Sets of latents that are probed: a chain's core, and sets of its size to compare it with.

Shapes: F latents of an SAE, C core size, N free latents that are alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dmsae_ray.compare.density import Densities, draw_matched, too_far
from dmsae_ray.core.score_file import load_scores
from dmsae_ray.core.select import top
from dmsae_ray.sae.latents import Latents

if TYPE_CHECKING:
    from dmsae_ray.results.saved_sweep import SavedChain, SavedSweep
    from dmsae_ray.sae.sae import MatryoshkaSAE

KINDS = {
    "core": "the core",
    "density": "free latents of the same SAE that fire as often",
    "norm": "free latents of the same SAE whose encoder rows are as long",
    "random": "free latents of the same SAE that fire at all, drawn at random",
    "cycle0": "as many of the chain's own cycle 0, largest attribution first",
}
"""Of every chain; `plain` arms, by name, come on top."""


@dataclass(frozen=True, eq=False)
class Source:
    """Latents of one SAE that occur in a set."""

    latents: Latents
    scale: float
    """divisor of raw activations"""

    @staticmethod
    def of(sae: MatryoshkaSAE, known: dict[str, Any], ids: Sequence[int], device: str) -> Source:
        return Source(Latents.some_of(sae, ids, device), float(known["scale"]))


@dataclass(frozen=True, eq=False)
class Chain:
    """One chain's sets."""

    label: str
    seed: int
    size: int
    """latents in each set"""
    sources: list[Source]
    sets: dict[str, list[tuple[int, np.ndarray]]]
    """by kind its draws, each a place in `sources` and columns there"""
    lacks: dict[str, str]
    """why a kind is not there, or is no fair comparison"""


def chains_of(sweep: SavedSweep, arm: str, k: int, draws: int, seed: int, device: str) -> list[Chain]:
    """The finished chains of an arm with this k. Plain chains are given out one for each, in the order of seeds.

    Raises ValueError if there is none.
    """
    finished = [chain for chain in sweep.chains.values() if chain.finished and chain.k == k]
    mine = sorted((chain for chain in finished if chain.arm == arm), key=lambda chain: chain.seed)
    if not mine:
        there = ", ".join(sorted({f"{chain.arm} k {chain.k}" for chain in sweep.chains.values() if chain.finished}))
        raise ValueError(f"{sweep.folder}: no finished chain of arm {arm} with k {k}; there are {there or 'none'}")
    plain: dict[str, list[SavedChain]] = {}
    for chain in sorted(finished, key=lambda chain: chain.seed):
        if chain.plan.stage == "plain" and chain.arm != arm:
            plain.setdefault(chain.arm, []).append(chain)
    return [
        _sets(chain, {name: those[i] for name, those in plain.items() if i < len(those)}, draws, seed, device)
        for i, chain in enumerate(mine)
    ]


def _sets(chain: SavedChain, plain: dict[str, SavedChain], draws: int, seed: int, device: str) -> Chain:
    core, (sae, known) = chain.core(), chain.sae()
    core_ids = core.latent_ids_C.numpy()
    rng = np.random.default_rng([seed, chain.seed, chain.k])
    densities = Densities.split(known["density"].numpy(), core_ids)
    lacks: dict[str, str] = {}
    drawn: dict[str, list[np.ndarray]] = {"core": [core_ids]}
    if lack := densities.lack():
        lacks |= dict.fromkeys(("density", "norm", "random"), f"{chain.label} {lack}")
    else:
        drawn["density"], gap = densities.draw_all(draws, rng)
        if far := too_far(gap):
            lacks["density"] = f"{chain.label}: {far}"
        norm_F = torch.linalg.vector_norm(sae.encoder_rows().double(), dim=1).numpy()
        free_N = densities.free_ids_N
        longest = np.maximum(norm_F, np.finfo(float).tiny)  # a logarithm follows
        drawn["norm"] = [free_N[draw_matched(longest[core_ids], longest[free_N], rng)] for _ in range(draws)]
        drawn["random"] = [rng.choice(free_N, len(core_ids), replace=False) for _ in range(draws)]
    union = np.unique(np.concatenate([ids for some in drawn.values() for ids in some]))
    sources = [Source.of(sae, known, union.tolist(), device)]
    sets = {kind: [(0, np.searchsorted(union, ids)) for ids in some] for kind, some in drawn.items()}
    others = ({"cycle0": chain} if len(chain.records) > 1 else {}) | plain
    for kind, other in others.items():
        scores_N = load_scores(other.plan.folder.cycle(0).scores)
        if len(scores_N) < core.size:
            lacks[kind] = f"{other.label} has {len(scores_N)} candidates, fewer than the {core.size} of {chain.label}"
            continue
        sets[kind] = [(len(sources), np.arange(core.size))]
        sources.append(Source.of(*other.sae(0), top(scores_N, core.size).tolist(), device))
    return Chain(chain.label, chain.seed, core.size, sources, sets, lacks)
