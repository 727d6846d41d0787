"""Re-discovery: are a core's features found in plain SAEs of other seeds, which never had a core?

If a core's features are there in the data, another run finds them without being told; free latents as dense as they are
say how many it finds of any such latents. The consensus core's features have recurred across seeds, and are means of
their members: what they are held against has recurred as well, and is averaged as they are (`Recurring`).
Shape letters: N features, C core size, D model dimension, F width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dmsae_ray.compare.consensus import Consensus, NamedCore, find_consensus
from dmsae_ray.compare.density import Densities, too_far
from dmsae_ray.compare.interval import COSINE, SHARE, spread
from dmsae_ray.compare.measured_latents import MeasuredLatents
from dmsae_ray.draws import REDISCOVERY_NULL

DRAWS = 10
"""Draws of frequency-matched latents: the mean over a core's latents and ten draws is exact to a few percent of itself.
"""
CHUNK = 4096
"""Latents of a plain SAE taken at a time."""
SETS = ("consensus", "free_consensus", "cycle0_consensus", "members", "matched_consensus", "cores", "matched")
"""Which features. Means over chains: the consensus core, what recurs among free latents as dense as the cores, what
recurs among cycle 0's top latents, as many as the cores have. Single latents: the members of the consensus, free
latents as dense as these (which need not recur), all cores' latents, free latents as dense as these.
"""
COMPARED = (("consensus", "free_consensus"), ("consensus", "cycle0_consensus"), ("cores", "matched"))
"""Each set with the one that it is held against: alike in how it was chosen, but for what is asked, and averaged."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Features that are looked for, by their rows."""

    W_enc_ND: torch.Tensor
    W_dec_ND: torch.Tensor

    @staticmethod
    def joined(parts: Sequence[Directions]) -> Directions:
        return Directions(torch.cat([part.W_enc_ND for part in parts]), torch.cat([part.W_dec_ND for part in parts]))


@dataclass(frozen=True, eq=False)
class Sought:
    """What is looked for of one chain."""

    named: NamedCore
    core: Directions
    """the core's rows [C]"""
    free: MeasuredLatents
    """all free latents that occur in a draw"""
    draws: tuple[np.ndarray, ...]
    """rows of `free`, int64 [C], that stand for the core's members in each draw; empty if none could be made"""
    density_gap: float | None
    """typical ratio of a drawn latent's density to its core latent's"""
    reason: str | None
    """why the drawn latents are no comparison, if they are none"""
    start: MeasuredLatents
    """cycle 0's top latents by attribution, as many as the core has members, or all if there are fewer"""
    no_start: str | None
    """why cycle 0 says nothing about distillation, if it does not"""

    def drawn(self, draw: int) -> NamedCore:
        """A draw's free latents, in the core's place."""
        return self._in_its_place(self.free.take(self.draws[draw]))

    def started(self) -> NamedCore:
        """Cycle 0's top latents, in the core's place."""
        return self._in_its_place(self.start)

    def _in_its_place(self, latents: MeasuredLatents) -> NamedCore:
        core, size = self.named.core, latents.size
        taken = replace(
            core,
            W_enc_CD=latents.W_enc_ND,
            W_dec_CD=latents.W_dec_ND,
            b_enc_C=latents.b_enc_N,
            scores_C=torch.zeros(size),
            density_C=latents.density_N,
            latent_ids_C=torch.arange(size),
            entered_C=torch.full((size,), core.cycle),
            selected=((core.cycle,),) * size,
        )
        return NamedCore(self.named.label, self.named.seed, taken)


@dataclass(frozen=True, eq=False)
class Recurring:
    """What recurs across seeds among latents that are in no core, found and averaged as the consensus core is."""

    rows: Directions
    """means of the members of each such feature, of all draws"""
    draws: int
    reason: str | None
    """why there is nothing to hold a consensus against, if there is not"""

    def about(self) -> dict[str, Any]:
        return {"available": self.reason is None, "reason": self.reason, "draws": self.draws}


def recurring(chains: Sequence[Sought], cosine: float, share: float) -> dict[str, Recurring]:
    """`free_consensus` and `cycle0_consensus` of at least one chain. cosine, share: as the consensus of the cores was
    found with.
    """
    draws, core = min(len(one.draws) for one in chains), chains[0].core
    nothing = Directions(core.W_enc_ND[:0], core.W_dec_ND[:0])
    return {
        "free_consensus": _recurring(
            [[one.drawn(draw) for one in chains] for draw in range(draws)],
            [one.reason for one in chains],
            "free latents as dense as the cores' members",
            nothing,
            cosine,
            share,
        ),
        "cycle0_consensus": _recurring(
            [[one.started() for one in chains]],
            [one.no_start for one in chains],
            "cycle 0's top latents",
            nothing,
            cosine,
            share,
        ),
    }


def _recurring(
    draws: Sequence[Sequence[NamedCore]],
    reasons: Sequence[str | None],
    what: str,
    nothing: Directions,
    cosine: float,
    share: float,
) -> Recurring:
    cores = [find_consensus(draw, cosine, share).core for draw in draws]
    parts = [Directions(core.W_enc_CD, core.W_dec_CD) for core in cores if core is not None]
    why = sorted({reason for reason in reasons if reason})
    if not why and draws and not parts:
        size = sum(named.core.size for named in draws[0])
        seeds = len({named.seed for named in draws[0]})
        times = f"{len(draws)} draws of {size}" if len(draws) > 1 else f"{size}"
        why = [f"of {times} {what}, of {seeds} seeds, none recurs as a feature of the consensus core has to"]
    return Recurring(Directions.joined([nothing, *parts]), len(draws), "; ".join(why) or None)


@dataclass(frozen=True, eq=False)
class PlainSAE:
    """An SAE that never had a core."""

    label: str
    arm: str
    seed: int
    k: int
    latents: MeasuredLatents


@dataclass(frozen=True, eq=False)
class Found:
    """How an SAE answers to some features."""

    found_N: torch.Tensor
    """whether one of its latents has both the decoder and the encoder cosine, bool"""
    nearest_N: torch.Tensor
    """largest decoder cosine to any of its latents, fp32"""

    def of(self, index_C: np.ndarray | slice) -> dict[str, float | None]:
        """Share found, mean of the largest cosines (MMCS) and number of some of the features; None for none of them."""
        found_C, nearest_C = self.found_N[index_C], self.nearest_N[index_C]
        if not len(found_C):
            return {"found": None, "mmcs": None, "size": 0}
        return {"found": float(found_C.double().mean()), "mmcs": float(nearest_C.double().mean()), "size": len(found_C)}


def look_for(features: Directions, whole: MeasuredLatents, cosine: float) -> Found:
    """Look for features in all latents of an SAE; the same latent must have both cosines.

    In fp32, CHUNK latents at a time: a mean of thousands of cosines does not need more, and a wide SAE's matrix never
    exists as a whole.
    """
    enc_ND, dec_ND = (
        torch.nn.functional.normalize(rows_ND.float(), dim=1) for rows_ND in (features.W_enc_ND, features.W_dec_ND)
    )
    found_N, nearest_N = torch.zeros(len(dec_ND), dtype=torch.bool), torch.full((len(dec_ND),), -1.0)
    for own_enc_FD, own_dec_FD in zip(whole.W_enc_ND.split(CHUNK), whole.W_dec_ND.split(CHUNK), strict=True):
        decoder_NF = dec_ND @ torch.nn.functional.normalize(own_dec_FD.float(), dim=1).T
        nearest_N = torch.maximum(nearest_N, decoder_NF.amax(dim=1))
        encoder_NF = enc_ND @ torch.nn.functional.normalize(own_enc_FD.float(), dim=1).T
        found_N |= torch.minimum(decoder_NF, encoder_NF).amax(dim=1) >= cosine
    return Found(found_N, nearest_N.clamp(max=1.0))


def sought(
    named: NamedCore,
    sae: MeasuredLatents,
    start: MeasuredLatents,
    no_start: str | None,
    seed: int,
    draws: int = DRAWS,
) -> Sought:
    """The core's latents and, from all latents `sae` of the SAE in which it was selected, free ones as dense.

    start: cycle 0's latents by attribution, falling, and no_start why they say nothing about distillation, if so. seed:
    of the draws.
    """
    start = start.take(slice(named.core.size))
    core = Directions(named.core.W_enc_CD, named.core.W_dec_CD)
    densities = Densities.split(sae.density_N, named.core.latent_ids_C)
    if lack := densities.lack():
        return Sought(
            named, core, sae.take(slice(0)), (), None, f"the last SAE of {named.label} {lack}", start, no_start
        )
    ids, gap = densities.draw_all(draws, np.random.default_rng([seed, REDISCOVERY_NULL]))
    taken, places = np.unique(np.stack(ids), return_inverse=True)
    reason = too_far(gap)
    return Sought(
        named,
        core,
        sae.take(taken),
        tuple(places.reshape(draws, -1)),
        gap,
        None if reason is None else f"{named.label}: {reason}",
        start,
        no_start,
    )


def rediscover(
    plain: PlainSAE,
    consensus: Consensus,
    chains: Sequence[Sought],
    controls: Mapping[str, Recurring],
    cosine: float,
) -> dict[str, Any]:
    """How many features of each of SETS this SAE has: plain JSON types.

    chains: of the consensus, in its order. controls: what `recurring` gives for them. Matched latents are those of
    chains in which enough free latents are alive; they are `available` only where their densities are near the cores'
    in each. Raises ValueError if the SAE's seed is one of the chains': it began as their cycle 0 did, and would find
    its own latents again.
    """
    assert [one.named.label for one in chains] == [chain.label for chain in consensus.chains], (
        "chains of another consensus"
    )
    if own := [chain.label for chain in consensus.chains if chain.seed == plain.seed]:
        raise ValueError(
            f"{plain.label} has the seed of {own[0]}: it began with the same latents, and to find them again is no "
            "re-discovery; give plain SAEs other seeds"
        )
    parts = [one.core for one in chains] + [Directions(one.free.W_enc_ND, one.free.W_dec_ND) for one in chains]
    parts += [control.rows for control in controls.values()]
    if consensus.core is not None:
        parts.append(Directions(consensus.core.W_enc_CD, consensus.core.W_dec_CD))
    found = look_for(Directions.joined(parts), plain.latents, cosine)
    ends = np.cumsum([0, *(len(part.W_dec_ND) for part in parts)])
    many = len(chains)
    in_core = [_rows_in_core(consensus, place) for place in range(many)]
    pooled = [ends[many + place] + draw for place, one in enumerate(chains) for draw in one.draws]
    in_consensus = [ends[many + place] + draw[in_core[place]] for place, one in enumerate(chains) for draw in one.draws]
    reasons = sorted({one.reason for one in chains if one.reason})
    gaps = [one.density_gap for one in chains if one.density_gap is not None]
    about = {
        "available": not reasons,
        "reason": "; ".join(reasons) or None,
        "density_gap": max(gaps, default=None),
        "draws": DRAWS,
    }
    return {
        "chain": plain.label,
        "arm": plain.arm,
        "k": plain.k,
        "seed": plain.seed,
        "consensus": found.of(slice(ends[2 * many + len(controls)], None)),
        **{
            name: found.of(slice(ends[place], ends[place + 1])) | control.about()
            for place, (name, control) in enumerate(controls.items(), 2 * many)
        },
        "members": found.of(_together([ends[place] + rows for place, rows in enumerate(in_core)])),
        "matched_consensus": found.of(_together(in_consensus)) | about,
        "cores": found.of(slice(ends[many])),
        "matched": found.of(_together(pooled)) | about,
    }


def _rows_in_core(consensus: Consensus, place: int) -> np.ndarray:
    """Rows of a chain's core that are members of the consensus core's features."""
    rows = [
        member.index
        for feature in consensus.features
        if feature.in_core
        for member in feature.members
        if member.chain == place
    ]
    return np.array(sorted(rows), dtype=np.int64)


def _together(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def summarise_rediscovery(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per arm, and per arm and k: each set's `found` and `mmcs` over plain SAEs and its `features` a draw, and by how
    much a set exceeds the one it is held against (`excess`, see COMPARED), with intervals over the plain SAEs' seeds
    (below four the values themselves). Controls count where available.

    Keys: `plain`, `plain/k16`, ...
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name in (row["arm"], f"{row['arm']}/k{row['k']}"):
            groups.setdefault(name, []).append(row)
    return {name: _group(members) for name, members in groups.items()}


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    seeds = [row["seed"] for row in rows]

    def over(values: list[float | None], within: tuple[float, float] | None = None) -> dict | None:
        found = spread(values, seeds, seeds, within)
        return None if found is None else found.to_dict()

    def value(row: dict[str, Any], name: str, number: str) -> float | None:
        return row[name][number] if row[name].get("available", True) else None

    def excess(row: dict[str, Any], name: str, null: str, number: str) -> float | None:
        own, other = value(row, name, number), value(row, null, number)
        return None if own is None or other is None else own - other

    numbers = {"found": SHARE, "mmcs": COSINE}
    above: dict[str, dict[str, Any]] = {}
    for name, null in COMPARED:
        above.setdefault(name, {})[null] = {
            number: over([excess(row, name, null, number) for row in rows]) for number in numbers
        }
    return {
        "saes": len(rows),
        "seeds": len(set(seeds)),
        **{
            name: {number: over([value(row, name, number) for row in rows], numbers[number]) for number in numbers}
            | {"features": rows[0][name]["size"] / (rows[0][name].get("draws") or 1)}
            for name in SETS
        },
        "excess": above,
    }
