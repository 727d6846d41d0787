"""The results of a sweep as named numbers: what an expectation refers to, and what two sweeps are compared by. Names:

    chains.<arm>                                        finished chains
    evaluation.<arm>.k<k>.<metric>                      last cycle, mean over the arm's chains of this k
    evaluation.<arm>.k<k>.standard_errors.<metric>      over evaluation sequences: fvu, kl, loss_recovered_zero, _mean
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

An expectation that names two of them compares both over the seeds and k that they have in common.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeGuard

from dmsae_ray.compare.functional import MEASURES

OF_ONE_K = ("pw_mcc", "overlap", "activation")
"""Scores of a pair that also have a number for each k alone."""
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
        chains[row["arm"]] += row["last"]
    for _, name, value in evaluation_values(rows):
        values[name].append(value)
    yield from ((f"chains.{arm}", float(count)) for arm, count in chains.items() if count)
    yield from ((name, sum(some) / len(some)) for name, some in values.items())


def evaluation_values(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, float]]:
    """Every value of every chain's last cycle: (its row, the name of the number that is its mean, value)."""
    for row in rows:
        if not row["last"]:
            continue
        place, attribution = f"evaluation.{row['arm']}.k{row['k']}", row.get("attribution", {})
        named = [(metric, row.get(metric)) for metric in METRICS]
        named += [(f"decoder_drift.{name}", value) for name, value in (row.get("decoder_drift") or {}).items()]
        named += [(name, attribution.get(name)) for name in ("split_half_spearman", "split_half_jaccard")]
        named += [(f"standard_errors.{name}", value) for name, value in (row.get("standard_errors") or {}).items()]
        for prefix in row.get("prefixes") or ():
            named += [(f"prefix.{prefix['name']}.{metric}", value) for metric, value in prefix.items()]
        yield from ((row, f"{place}.{name}", value) for name, value in named if _is_number(value))


def consistency_numbers(comparison: dict[str, Any]) -> dict[str, float]:
    """The summary's groups."""
    found: dict[str, float] = {}
    for name, group in comparison["summary"]["groups"].items():
        found |= dict(_spreads(f"consistency.{name.replace('/', '.')}", group))
    of_one_k: dict[str, list[float]] = defaultdict(list)
    for pair in comparison.get("pairs", ()):
        if pair["k_a"] == pair["k_b"]:
            stem = f"consistency.{pair['group'].replace('/', '.')}.k{pair['k_a']}"
            functional = pair.get("functional") or {}
            values = {score: pair[score] for score in OF_ONE_K}
            values |= {f"functional.{measure}": functional.get(measure) for measure in MEASURES}
            for name, value in values.items():
                if _is_number(value):
                    of_one_k[f"{stem}.{name}"].append(value)
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
        elif _is_number(value):
            yield where, value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
