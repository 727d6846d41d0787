"""The results of a sweep as named numbers: what an expectation refers to, and what two sweeps are compared by. Names:

    chains.<arm>                                        finished chains
    evaluation.<arm>.k<k>.<metric>                      last cycle, mean over the arm's chains of this k
    evaluation.<arm>.k<k>.prefix.<core|0|1|..>.<metric> the same for a prefix
    consistency.<arm>.<differs>.<metric>                mean over pairs
    consistency.<arm>.<differs>.<metric>.low, .high     its interval over seeds, where there is one
    consistency.<arm>.<differs>.nulls.<null>.<metric>   what that metric would be by chance
    consistency.<arm>.<differs>.k<k>.<metric>           mean over the pairs of that one k: like with like
    consistency.<arm>.<differs>.functional.<measure>    firing, effect, importance, subspace: what latents are used for;
                                                        beyond.<measure>: share of the pairs beyond chance
    consistency.<arm>.<differs>.course.<cycle>.<metric> cores after that cycle; `tokens` trained on till then
    consensus.<name>                                    features found in several chains
    rediscovery.<arm>.<whose>.<metric>                  features found in SAEs that never had a core

Arms of one k are compared with the grid by the numbers of that k.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from dmsae_ray.compare.functional import MEASURES

METRICS = (
    "l0",
    "core_l0",
    "free_l0",
    "core_density",
    "fvu",
    "kl",
    "loss_recovered_zero",
    "loss_recovered_mean",
    "dead_share",
    "core_in",
    "core_out",
    "jaccard",
    "coverage",
    "core_share",
    "core_explained",
    "tokens",
)


def numbers_of(
    evaluation: list[dict[str, Any]], comparison: dict[str, Any] | None, consensus: dict[str, Any] | None
) -> dict[str, float]:
    """All of them, by name. What could not be measured is left out, never 0."""
    found = dict(evaluation_numbers(evaluation))
    if comparison is not None:
        found |= consistency_numbers(comparison)
    if consensus is not None:
        found |= consensus_numbers(consensus)
    return {name: float(value) for name, value in sorted(found.items()) if math.isfinite(value)}


def evaluation_numbers(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Means over chains of an arm and k, of their last cycle."""
    chains: dict[str, int] = defaultdict(int)
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if not row["last"]:
            continue
        chains[row["arm"]] += 1
        place = f"evaluation.{row['arm']}.k{row['k']}"
        for metric in METRICS:
            _take(values, f"{place}.{metric}", row.get(metric))
        for name, value in (row.get("decoder_drift") or {}).items():
            _take(values, f"{place}.decoder_drift.{name}", value)
        for name in ("split_half_spearman", "split_half_jaccard"):
            _take(values, f"{place}.{name}", row.get("attribution", {}).get(name))
        for prefix in row.get("prefixes") or ():
            for metric, value in prefix.items():
                _take(values, f"{place}.prefix.{prefix['name']}.{metric}", value)
    yield from ((f"chains.{arm}", float(count)) for arm, count in chains.items())
    yield from ((name, sum(some) / len(some)) for name, some in values.items())


def consistency_numbers(comparison: dict[str, Any]) -> dict[str, float]:
    """The summary's groups."""
    found: dict[str, float] = {}
    for name, group in comparison["summary"]["groups"].items():
        found |= dict(_spreads(f"consistency.{name.replace('/', '.')}", group))
    of_one_k: dict[str, list[float]] = defaultdict(list)
    for pair in comparison.get("pairs", ()):
        if pair["k_a"] == pair["k_b"]:
            for score in ("pw_mcc", "overlap", "activation"):
                _take(of_one_k, f"consistency.{pair['group'].replace('/', '.')}.k{pair['k_a']}.{score}", pair[score])
            for measure in MEASURES:
                value = (pair.get("functional") or {}).get(measure)
                _take(
                    of_one_k,
                    f"consistency.{pair['group'].replace('/', '.')}.k{pair['k_a']}.functional.{measure}",
                    value,
                )
    return found | {name: sum(some) / len(some) for name, some in of_one_k.items()}


def consensus_numbers(consensus: dict[str, Any]) -> dict[str, float]:
    """How many features recur, in how many seeds, and how often they are found where no core ever was."""
    seeds, groups = len(consensus["seeds"]), consensus["groups"]
    found = {"consensus.groups": len(groups), "consensus.core_size": consensus["core_size"]}
    if groups and seeds > 1:
        repeated = sum(group["in_seeds"] >= 2 for group in groups)
        found |= {
            "consensus.in_two_seeds": repeated,
            "consensus.share_in_two_seeds": repeated / len(groups),
            "consensus.in_all_seeds": sum(group["in_seeds"] == seeds for group in groups),
        }
    return found | dict(_spreads("rediscovery", consensus.get("rediscovery_summary") or {}))


def _spreads(place: str, tree: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Leaves of nested dicts; a spread, a dict with a mean, counts as its mean, with the interval's ends beside it."""
    for name, value in tree.items():
        where = f"{place}.{name.replace('/', '.')}"
        if isinstance(value, dict) and "mean" in value and not isinstance(value["mean"], dict):
            if value["mean"] is not None:
                yield where, value["mean"]
                yield from (
                    zip((f"{where}.min", f"{where}.max"), (value["min"], value["max"]), strict=True)
                    if "min" in value
                    else ()
                )
            if value.get("interval"):
                yield from zip((f"{where}.low", f"{where}.high"), value["interval"], strict=True)
        elif isinstance(value, dict):
            yield from _spreads(where, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield where, value


def _take(values: dict[str, list[float]], name: str, value: Any) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        values[name].append(value)
