"""Consensus: which features several chains' cores have in common, and the core that is made of them.

Shape letters: N and M latents of two cores, C core size, D model dimension, G members of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

from dmsae_ray.compare.interval import of_share
from dmsae_ray.compare.match import cosines, hungarian, shared_pairs
from dmsae_ray.core.core import Core

SEEDS_IN_CONSENSUS = 2
"""A feature that one seed alone has is no agreement, however small the share asked for."""
ROUNDING = 1e-12
"""Slack in `in_seeds / seeds >= share`, and where a cosine is worked out twice."""


@dataclass(frozen=True, eq=False)
class NamedCore:
    """One chain's core."""

    label: str
    seed: int
    core: Core


@dataclass(frozen=True, order=True)
class Member:
    """One latent of a group."""

    chain: int
    """place of its chain in the sequence given"""
    index: int
    """its row in that chain's core"""


@dataclass(frozen=True)
class Feature:
    """Latents of different chains that are one feature: at most one of each chain. Also a single latent that nobody
    else has.
    """

    members: tuple[Member, ...]
    """in the order of the chains"""
    in_seeds: int
    """different seeds among them: chains of one seed are not independent"""
    elsewhere: float | None
    """its reproducibility: share of the *other* seeds that have it, since a feature is found in some seed to begin
    with. None where there is no other
    """
    interval: tuple[float, float] | None
    """95 % interval of that share, for a latent of any one seed's core (`interval.of_share`)"""
    cosine: float | None
    """mean decoder cosine over pairs of members; None for a single one"""
    smallest_cosine: float | None
    """smallest encoder or decoder cosine over pairs of members; None for a single one"""
    score: float
    """mean share of its chain's total core score"""
    density: float
    """mean over members"""
    in_core: bool
    """whether it is in the consensus core"""


@dataclass(frozen=True, eq=False)
class Consensus:
    """All features of some chains, by falling in_seeds, then by falling score."""

    chains: tuple[NamedCore, ...]
    features: tuple[Feature, ...]
    core: Core | None
    """the consensus core, whose member i is feature i; None if it is empty"""

    @property
    def seeds(self) -> list[int]:
        return sorted({chain.seed for chain in self.chains})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "chains": [chain.label for chain in self.chains],
            "seeds": self.seeds,
            "groups": [self._plain(place, feature) for place, feature in enumerate(self.features)],
            "core_size": 0 if self.core is None else self.core.size,
        }

    def _plain(self, place: int, feature: Feature) -> dict[str, Any]:
        return {
            "id": f"f{place:03d}",
            "members": [
                {
                    "chain": self.chains[member.chain].label,
                    "index": member.index,
                    "latent": int(core.latent_ids_C[member.index]),
                    "score": float(core.scores_C[member.index]),
                    "density": float(core.density_C[member.index]),
                }
                for member in feature.members
                for core in [self.chains[member.chain].core]
            ],
            "in_chains": len(feature.members),
            "in_seeds": feature.in_seeds,
            "elsewhere": feature.elsewhere,
            "interval": None if feature.interval is None else list(feature.interval),
            "cosine": feature.cosine,
            "smallest_cosine": feature.smallest_cosine,
            "score": feature.score,
            "density": feature.density,
            "in_core": feature.in_core,
        }


def find_consensus(chains: Sequence[NamedCore], cosine: float = 0.7, share: float = 0.5) -> Consensus:
    """Features of these chains, and the core of those that at least `share` of the seeds, and at least two, have.

    Two latents are linked if both matchings of their cores name them and both cosines reach `cosine`, as in `overlap`;
    a feature's members all reach `cosine` to each other, by encoder and by decoder. Raises ValueError if the cores are
    of different models, hooks or scales, or are not selected by the same.
    """
    _check(chains)
    seeds = len({chain.seed for chain in chains})
    shares = [
        chain.core.scores_C / chain.core.scores_C.sum() if bool(chain.core.scores_C.any()) else chain.core.scores_C
        for chain in chains
    ]
    features = [_feature(chains, members, shares, seeds, share) for members in group(chains, cosine)]
    features.sort(key=lambda feature: (-feature.in_seeds, -feature.score, feature.members))
    chosen = [feature for feature in features if feature.in_core]
    return Consensus(tuple(chains), tuple(features), _core(chains, chosen) if chosen else None)


def group(chains: Sequence[NamedCore], cosine: float) -> list[tuple[Member, ...]]:
    """All latents of the cores, grouped by complete linkage. Links are taken from the surest (by their smaller cosine)
    to the least sure, each joining two groups if every latent of the one reaches `cosine` to every latent of the other,
    by encoder and by decoder: else a chain of small steps would be one feature whose ends have nothing in common. Two
    that are no matched pair count as well: a matching names one partner among near-copies, but the direction is one.
    No chain is in a group twice: of two near-copies in a chain the nearer one joins, the other stays alone.
    """
    groups = {
        Member(place, index): [Member(place, index)]
        for place, chain in enumerate(chains)
        for index in range(chain.core.size)
    }
    for left, right in links(chains, cosine):
        first, second = groups[left], groups[right]
        if first is second or {member.chain for member in first} & {member.chain for member in second}:
            continue
        if _smallest_across(chains, first, second) < cosine - ROUNDING:
            continue
        first += second
        for member in second:
            groups[member] = first
    return [tuple(sorted(members)) for members in {id(members): members for members in groups.values()}.values()]


def links(chains: Sequence[NamedCore], cosine: float) -> list[tuple[Member, Member]]:
    """Latents shared by two cores, by falling smaller cosine; ties by the chains' labels and the rows, whatever the
    chains' order.
    """
    found = []
    for (i, a), (j, b) in combinations(enumerate(chains), 2):
        encoder, decoder = hungarian(a.core.W_enc_CD, b.core.W_enc_CD), hungarian(a.core.W_dec_CD, b.core.W_dec_CD)
        sure = [
            dict(zip(matching.left_P.tolist(), matching.cosine_P.tolist(), strict=True))
            for matching in (encoder, decoder)
        ]
        for left, right in shared_pairs(encoder, decoder, cosine).tolist():
            ends = sorted([(a.label, left), (b.label, right)])
            found.append((-min(one[left] for one in sure), ends, Member(i, left), Member(j, right)))
    return [(left, right) for _, _, left, right in sorted(found)]


def _rows(chains: Sequence[NamedCore], members: Sequence[Member], name: str) -> torch.Tensor:
    """The members' rows of W_enc_CD or W_dec_CD, [G, D]."""
    return torch.stack([getattr(chains[member.chain].core, name)[member.index] for member in members])


def _smallest_across(chains: Sequence[NamedCore], first: Sequence[Member], second: Sequence[Member]) -> float:
    """Smallest encoder or decoder cosine of a latent of the one to a latent of the other."""
    return min(
        float(cosines(_rows(chains, first, name), _rows(chains, second, name)).min())
        for name in ("W_enc_CD", "W_dec_CD")
    )


def _feature(
    chains: Sequence[NamedCore], members: tuple[Member, ...], shares: list[torch.Tensor], seeds: int, share: float
) -> Feature:
    in_seeds = len({chains[member.chain].seed for member in members})
    pairs = np.triu_indices(len(members), 1)
    encoder_P, decoder_P = (
        cosines(rows_GD, rows_GD)[pairs]
        for rows_GD in (_rows(chains, members, name) for name in ("W_enc_CD", "W_dec_CD"))
    )
    return Feature(
        members=members,
        in_seeds=in_seeds,
        elsewhere=(in_seeds - 1) / (seeds - 1) if seeds > 1 else None,
        interval=of_share(in_seeds - 1, seeds - 1) if seeds > 1 else None,
        cosine=float(decoder_P.mean()) if len(members) > 1 else None,
        smallest_cosine=float(min(encoder_P.min(), decoder_P.min())) if len(members) > 1 else None,
        score=float(np.mean([float(shares[member.chain][member.index]) for member in members])),
        density=float(np.mean([float(chains[member.chain].core.density_C[member.index]) for member in members])),
        in_core=in_seeds >= SEEDS_IN_CONSENSUS and in_seeds >= share * seeds * (1 - ROUNDING),
    )


def _core(chains: Sequence[NamedCore], features: Sequence[Feature]) -> Core:
    """Means of the members. No chain selected this core: it counts as selected in cycle 0, its latent ids are its rows,
    and seed and k are the smallest of the chains', for the record only (a chain that starts from it draws from its own
    seed)."""

    def mean(name: str) -> torch.Tensor:
        return torch.stack(
            [
                torch.stack(
                    [getattr(chains[member.chain].core, name)[member.index].double() for member in feature.members]
                ).mean(dim=0)
                for feature in features
            ]
        )

    norm_C = torch.tensor(
        [
            np.mean([float(chains[m.chain].core.W_enc_CD[m.index].double().norm()) for m in feature.members])
            for feature in features
        ],
        dtype=torch.float64,
    )
    W_enc_CD, W_dec_CD, size, first = mean("W_enc_CD"), mean("W_dec_CD"), len(features), chains[0].core
    return Core(
        # A mean of rows that point apart is shorter than they are, and would be active less often.
        W_enc_CD=W_enc_CD * (norm_C / W_enc_CD.norm(dim=1))[:, None],
        W_dec_CD=W_dec_CD / W_dec_CD.norm(dim=1, keepdim=True),
        b_enc_C=mean("b_enc_C"),
        b_dec_D=torch.stack([chain.core.b_dec_D.double() for chain in chains]).mean(dim=0),
        scores_C=mean("scores_C"),
        density_C=mean("density_C"),
        latent_ids_C=torch.arange(size),
        theta=float(np.mean([chain.core.theta for chain in chains])),
        scale=first.scale,
        hook=first.hook,
        model=first.model,
        cycle=0,
        seed=min(chain.seed for chain in chains),
        k=min(chain.core.k for chain in chains),
        entered_C=torch.zeros(size, dtype=torch.int64),
        selected=((0,),) * size,
        selected_by=first.selected_by,
    )


def _check(chains: Sequence[NamedCore]) -> None:
    for chain in chains:
        for name in ("model", "hook", "scale", "selected_by"):
            own, first = getattr(chain.core, name), getattr(chains[0].core, name)
            if own != first:
                raise ValueError(
                    f"consensus: {chain.label} has {name} {own!r}, {chains[0].label} has {first!r}; their encoder rows "
                    "have no mean: give chains of one arm"
                )
