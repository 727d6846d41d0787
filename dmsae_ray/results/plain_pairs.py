"""Which plain SAEs stand for a pair of chains: as many tokens, as many active latents, differing in the same things."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from dmsae_ray.compare.comparer import Side
from dmsae_ray.compare.matched_compute import PlainSets
from dmsae_ray.compare.nulls import DictionaryNull, NullResult, unavailable
from dmsae_ray.compare.pair import MATCHED_COMPUTE, PairResult
from dmsae_ray.distill.plan import ChainPlan

OF_THE_CORE = ("core_gate", "core_budget", "core_transfer", "core_decoder_init")
"""Fields of `sae` that mean nothing where there is no core."""


def with_matched_compute(
    results: Sequence[PairResult], chains: Mapping[str, ChainPlan], load: Callable[[str], Side], cosine: float
) -> list[PairResult]:
    """The same results with this null beside the others. chains, load: by label; load is called only where plain SAEs
    stand for a pair.
    """
    plain = {label: plan for label, plan in chains.items() if plan.stage == "plain"}
    sets = PlainSets(load, max((max(pair.size_a, pair.size_b) for pair in results), default=0), cosine)
    whole = {frozenset((pair.a, pair.b)): pair.pw_mcc_dictionary for pair in results}
    made = []
    for pair in results:
        pairs, reason = stand_ins(pair, chains, plain)
        size = (pair.size_a, pair.size_b)
        if reason is None and pair.pw_mcc is None:
            reason = pair.reason
        null = sets.null(pairs, pair) if reason is None else unavailable(reason, size)
        made.append(_beside(pair, null, _dictionaries(pair, pairs, reason, whole)))
    return made


def stand_ins(
    pair: PairResult, chains: Mapping[str, ChainPlan], plain: Mapping[str, ChainPlan]
) -> tuple[list[tuple[str, str]], str | None]:
    """Labels of the pairs of plain SAEs for a pair of chains, and why there is none, if so."""
    a, b = chains[pair.a], chains[pair.b]
    if a.stage == "plain" and b.stage == "plain":
        return [], "both are plain SAEs themselves"
    differ = [name for name in pair.differences if name != "rest"]
    if not differ:
        return [], "the two differ in neither seed, data nor k: plain SAEs that do not either would be one SAE twice"
    fit = [_fitting(plan, plain) for plan in (a, b)]
    for plan, found in zip((a, b), fit, strict=True):
        if not found:
            return [], _lack(plan)
    pairs: list[tuple[str, str]] = []
    for one, other in product(*fit):
        if (other, one) not in pairs and _differences(plain[one], plain[other]) == differ:
            pairs.append((one, other))
    if pairs:
        return pairs, None
    return [], (
        f"of the plain SAEs on as many tokens ({', '.join(dict.fromkeys(fit[0] + fit[1]))}) no two differ in "
        f"{', '.join(differ)} alone, as these chains do: add seeds, or an arm, that do"
    )


def trained_tokens(plan: ChainPlan) -> int | None:
    """Rows that a chain's last core has cost, those of the chain whose core it began with included; None where it began
    with a core file of unknown past.
    """
    before: int | None = 0
    if plan.start is not None:
        before = None if plan.start.chain is None else trained_tokens(plan.start.chain)
    return None if before is None else before + plan.cycles * plan.steps * plan.config.train.batch


def _fitting(plan: ChainPlan, plain: Mapping[str, ChainPlan]) -> list[str]:
    """Plain SAEs like the chain's, on as many tokens but for those that fill no batch."""
    tokens = trained_tokens(plan)
    if tokens is None:
        return []
    found = {
        one.key: label
        for label, one in plain.items()
        if one.k == plan.k
        and _alike(one) == _alike(plan)
        and abs((trained_tokens(one) or 0) - tokens) < plan.config.train.batch * (plan.number(plan.cycles - 1) + 1)
    }
    return list(found.values())


def _lack(plan: ChainPlan) -> str:
    tokens = trained_tokens(plan)
    if tokens is None:
        return f"{plan.label} began with a core file: how many tokens went into it is not known"
    return (
        f"no plain SAE of k {plan.k} was trained like {plan.label} on its {tokens:,} tokens: add an arm to study.arms, "
        f"such as plain-long: {{cycles: 1, seeds: [100, 101, 102, 103], k: [{plan.k}], fields: {{train.tokens: "
        f"{tokens}}}}}"
    )


def _alike(plan: ChainPlan) -> dict[str, Any]:
    """What two SAEs have in common that are trained and attributed alike, but for their tokens, k, seed and data."""
    fields = plan.fields
    return {
        "dataset": fields["dataset"],
        "sae": {name: value for name, value in fields["sae"].items() if name not in OF_THE_CORE},
        "train": {name: value for name, value in fields["train"].items() if name != "tokens"},
        "attribution": {name: value for name, value in fields["attribution"].items() if name != "tau"},
    }


def _differences(one: ChainPlan, other: ChainPlan) -> list[str]:
    return [name for name in ("seed", "data_seed", "part", "k") if one.fields[name] != other.fields[name]]


def _dictionaries(
    pair: PairResult,
    pairs: Sequence[tuple[str, str]],
    reason: str | None,
    whole: Mapping[frozenset[str], float | None],
) -> DictionaryNull:
    """Of the whole SAEs: those of the plain pairs that were themselves compared."""
    size = (pair.dictionary_size, pair.dictionary_size)
    known = [value for one in pairs if (value := whole.get(frozenset(one))) is not None]
    if not known:
        return DictionaryNull(False, reason or "no such pair of plain SAEs was compared", None, 0, size)
    return DictionaryNull(True, None, float(np.mean(known)), len(known), size)


def _beside(pair: PairResult, null: NullResult, dictionaries: DictionaryNull) -> PairResult:
    return dataclasses.replace(
        pair,
        nulls=pair.nulls | {MATCHED_COMPUTE: null},
        dictionary_nulls=pair.dictionary_nulls | {MATCHED_COMPUTE: dictionaries},
    )
