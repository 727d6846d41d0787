"""Which features are described: those that chains share, then what else is in a core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dmsae_ray.core.core import Core


@dataclass(frozen=True)
class Member:
    """A core latent of a chain."""

    chain: str
    index: int
    """row in the chain's core"""
    latent: int
    """id in the SAE in which that core was selected"""
    score: float
    """its attribution there"""
    density: float
    """share of evaluation tokens on which it is active"""


@dataclass(frozen=True)
class Feature:
    """What is described as one: a group of latents of several chains, or a latent that no other chain has."""

    id: str
    """a consensus group's own; for a latent in no group `<chain>.<latent>`"""
    kind: str
    """`consensus`: a group of two or more members; `core`: a latent alone"""
    members: tuple[Member, ...]
    """the representative first: the member with the highest score"""
    score: float
    """share of its chain's total core score, mean over members"""
    density: float
    """mean over members"""
    cosine: float | None
    """mean cosine between the members' decoder rows; None where there is one"""
    smallest_cosine: float | None
    """smallest cosine of two members, by encoder or by decoder; None where there is one"""
    n_chains: int
    """chains that it could have been found in"""
    n_seeds: int
    in_seeds: int
    elsewhere: float | None
    """its reproducibility: share of the other seeds in which it was found; None where there is no other, or chains were
    not compared
    """
    interval: tuple[float, float] | None
    """of that share; None where there is none"""

    @property
    def representative(self) -> Member:
        return self.members[0]


def roster_of(cores: Mapping[str, Core], consensus: dict | None) -> list[Feature]:
    """Every feature of these chains' cores once, in the order of importance.

    First the consensus groups with two or more members, as consensus.json lists them; then all other core latents by
    falling share of their chain's total score (equal ones: in the order of chains and latents). Raises ValueError if
    consensus.json names chains or latents that these cores do not have.
    """
    shared: list[Feature] = []
    alone: list[Feature] = []
    seen: set[tuple[str, int]] = set()
    if consensus:
        for group in consensus["groups"]:
            feature = _group(group, consensus, cores)
            (shared if feature.kind == "consensus" else alone).append(feature)
            seen |= {(member.chain, member.index) for member in feature.members}
    seeds = {core.seed for core in cores.values()}
    for label, core in cores.items():
        for index in range(core.size):
            if (label, index) not in seen:
                member = _member(label, core, index)
                alone.append(
                    Feature(
                        f"{label}.{member.latent}",
                        "core",
                        (member,),
                        _share(member, core),
                        member.density,
                        None,
                        None,
                        n_chains=len(cores),
                        n_seeds=len(seeds),
                        in_seeds=1,
                        elsewhere=None,
                        interval=None,
                    )
                )
    place = {label: i for i, label in enumerate(cores)}
    alone.sort(key=lambda feature: (-feature.score, place[feature.representative.chain], feature.representative.latent))
    return shared + alone


def cosines_to_representative(feature: Feature, cores: Mapping[str, Core]) -> list[float]:
    """Cosine of each further member's decoder row to the representative's."""
    first_D, *others = [cores[member.chain].W_dec_CD[member.index].double() for member in feature.members]
    return [float(torch.nn.functional.cosine_similarity(first_D, other_D, dim=0)) for other_D in others]


def _group(group: dict, consensus: dict, cores: Mapping[str, Core]) -> Feature:
    members = []
    for entry in group["members"]:
        core = cores.get(entry["chain"])
        if core is None or entry["index"] >= core.size or int(core.latent_ids_C[entry["index"]]) != entry["latent"]:
            raise ValueError(
                f"consensus.json: {group['id']} has latent {entry['latent']} of {entry['chain']} as row "
                f"{entry['index']} of its core, which it is not: delete consensus.json to have it computed again"
            )
        members.append(_member(entry["chain"], core, entry["index"]))
    members.sort(key=lambda member: -member.score)  # stable: of equal ones the first listed
    interval = group["interval"]
    return Feature(
        group["id"],
        "consensus" if len(members) > 1 else "core",
        tuple(members),
        group["score"],
        group["density"],
        group["cosine"],
        group["smallest_cosine"],
        n_chains=len(consensus["chains"]),
        n_seeds=len(consensus["seeds"]),
        in_seeds=group["in_seeds"],
        elsewhere=group["elsewhere"],
        interval=None if interval is None else tuple(interval),
    )


def _member(label: str, core: Core, index: int) -> Member:
    return Member(
        label, index, int(core.latent_ids_C[index]), float(core.scores_C[index]), float(core.density_C[index])
    )


def _share(member: Member, core: Core) -> float:
    total = float(core.scores_C.sum())
    return member.score / total if total else 0.0
