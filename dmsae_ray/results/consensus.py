"""The consensus of finished chains and its re-discovery: from their folders to `consensus.json` and
`consensus.safetensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dmsae_ray.compare.consensus import Consensus, NamedCore, find_consensus
from dmsae_ray.compare.measured_latents import MeasuredLatents
from dmsae_ray.compare.rediscovery import PlainSAE, Sought, recurring, rediscover, sought, summarise_rediscovery
from dmsae_ray.config import CompareConfig, Config
from dmsae_ray.core.core import Core
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.files import discard, write_json
from dmsae_ray.identity import fields_key
from dmsae_ray.results.comparison import chain_result, key_of
from dmsae_ray.results.parts import known_from
from dmsae_ray.sae.sae import MatryoshkaSAE

FORMAT_VERSION = 2
"""Raised when the same cores and SAEs would give other features, numbers or fields."""


def write_consensus(
    config: Config, base: Sequence[ChainPlan], plain: Sequence[ChainPlan], folder: Path, say: Callable[[str], None]
) -> dict:
    """Consensus of the finished chains of one arm, and how much of it the finished plain SAEs of other seeds find
    again.

    Written to `folder` as consensus.json, and the consensus core, unless it is empty, as consensus.safetensors; reused
    while cores and SAEs are the same. A plain SAE that says nothing (it had a core, or a chain's seed) is left out with
    the reason. Raises ValueError if the chains' cores are of different models, hooks or scales, or are not selected by
    the same.
    """
    base, plain = [[plan for plan in plans if plan.finished()] for plans in (base, plain)]
    compare = config.compare
    key = fields_key(
        {
            "format": FORMAT_VERSION,
            "settings": compare.model_dump(mode="json", include={"cosine", "consensus", "seed"}),
            "base": {plan.label: key_of(plan) for plan in base},
            "plain": {plan.label: [plan.arm, key_of(plan)] for plan in plain},
        }
    )
    path, core_path = folder / "consensus.json", folder / "consensus.safetensors"
    if (known := known_from(path, say)) and known.get("key") == key and core_path.exists() == bool(known["core_size"]):
        return known
    say(f"consensus: of {len(base)} cores, looked for in {len(plain)} plain SAEs")
    consensus = find_consensus([named_core(plan) for plan in base], compare.cosine, compare.consensus)
    rows, left_out = _rediscovered(consensus, base, plain, compare)
    if consensus.core is None:
        discard(core_path)
    else:
        consensus.core.save(core_path)
    found = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "arm": base[0].arm if base else None,
        **consensus.to_dict(),
        "rediscovery": rows,
        "rediscovery_left_out": left_out,
        "rediscovery_summary": summarise_rediscovery(rows),
    }
    write_json(path, found)
    return found


def _rediscovered(
    consensus: Consensus, base: Sequence[ChainPlan], plain: Sequence[ChainPlan], compare: CompareConfig
) -> tuple[list[dict], list[dict]]:
    """Rows of the plain SAEs, and those that say nothing. One SAE is in memory at a time, a chain's two while
    its own latents are taken from them."""
    if not base or not plain:
        return [], []
    chains = [_sought(named, plan, compare.seed) for named, plan in zip(consensus.chains, base, strict=True)]
    controls = recurring(chains, compare.cosine, compare.consensus)
    rows, left_out = [], []
    for plan in plain:
        if plan.seed in consensus.seeds:
            left_out.append(
                {
                    "chain": plan.label,
                    "reason": "has the seed of a chain of the consensus, and so began with the same latents",
                }
            )
        elif plan.folder.records()[plan.cycles - 1].core_in:
            left_out.append({"chain": plan.label, "reason": "was trained with a core"})
        else:
            sae = PlainSAE(plan.label, plan.arm, plan.seed, plan.k, whole(plan))
            rows.append(rediscover(sae, consensus, chains, controls, compare.cosine))
    return rows, left_out


def _sought(named: NamedCore, plan: ChainPlan, seed: int) -> Sought:
    result = chain_result(plan)
    start = result.start.take(result.start_ids_N)
    return sought(named, result.sae, start, result.no_start(), seed)


def named_core(plan: ChainPlan) -> NamedCore:
    """The core that a finished chain's last cycle selected."""
    return NamedCore(plan.label, plan.seed, Core.load(plan.folder.cycle(plan.cycles - 1).core))


def whole(plan: ChainPlan) -> MeasuredLatents:
    """All latents of the SAE of a finished chain's last cycle."""
    last = plan.folder.cycle(plan.cycles - 1)
    sae, stored = MatryoshkaSAE.load(last.sae)
    return MeasuredLatents.of(sae, stored["density"], Core.load(last.core).scale)
