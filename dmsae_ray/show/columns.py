"""The tables of a sweep as plain columns: what the terminal, the report and MLflow all show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dmsae_ray.compare.functional import MEASURES as FUNCTIONAL
from dmsae_ray.compare.functional import NULLS as FUNCTIONAL_NULLS
from dmsae_ray.compare.pair import NULLS
from dmsae_ray.compare.rediscovery import SETS as REDISCOVERED
from dmsae_ray.compare.summary import NULL_NUMBERS, SCORES
from dmsae_ray.distill.folder import ChainFolder


@dataclass(frozen=True)
class ChainRow:
    """One chain; the measurements are those of its last finished cycle, None where there is none."""

    label: str
    status: str
    sizes: tuple[int, ...] = ()
    """core size after each finished cycle"""
    origins: tuple[dict[int, int], ...] = ()
    """for each finished cycle: how many of its core's latents first entered in which cycle"""
    jaccard: tuple[float, ...] = ()
    """overlap of each cycle's core with the one before, from cycle 1 on"""
    l0: float | None = None
    core_l0: float | None = None
    fvu: float | None = None
    fvu_all_rows: float | None = None
    """FVU over rows beyond the data's bound on norms, too; None where there are none"""
    loss_recovered: float | None = None
    """against zero ablation"""
    loss_recovered_mean: float | None = None
    """against mean ablation: the more sober one, since a stream set to its mean already costs less than one set to zero
    """
    dead: float | None = None
    tokens_per_s: float | None = None
    standard_errors: dict[str, float] | None = None
    """of the evaluation, see evaluation/standard_error.py"""


def chain_row(label: str, folder: Path, cycles: int, status: str | None = None) -> ChainRow:
    """Read a chain's row from its folder (which may not exist yet).

    status: what to say of a chain that is neither done nor failed (running, interrupted, ...); None: "2 of 4 cycles".
    """
    chain = ChainFolder(Path(folder))
    records = chain.records()[:cycles]
    if len(records) == cycles:
        status = "done"
    elif chain.failure() is not None:
        status = "failed"
    elif status is None:
        status = f"{len(records)} of {cycles} cycles" if records else "not started"
    row = ChainRow(
        label=label,
        status=status,
        sizes=tuple(record.core_out for record in records),
        origins=tuple({int(cycle): count for cycle, count in record.origins.items()} for record in records),
        jaccard=tuple(record.jaccard for record in records if record.jaccard is not None),
    )
    if not records:
        return row
    last = records[-1]
    return replace(
        row,
        l0=last.l0,
        core_l0=last.core_l0,
        fvu=last.fvu,
        fvu_all_rows=last.fvu_all_rows if last.rows_left_out else None,
        loss_recovered=last.loss_recovered_zero,
        loss_recovered_mean=last.loss_recovered_mean,
        dead=last.dead_share,
        tokens_per_s=last.tokens_per_s,
        standard_errors=last.standard_errors,
    )


def standard_error_words(errors: Iterable[dict[str, float] | None]) -> str | None:
    """How far evaluations would move on other text of the kind, in a sentence; None if none knows."""
    known = [one for one in errors if one]
    if not known:
        return None
    most = {name: max(one[name] for one in known) for name in known[0]}
    return (
        f"Standard errors over the sequences evaluated, at most: FVU {most['fvu']:.2g}, loss recovered "
        f"{most['loss_recovered_zero']:.2g} (zero) and {most['loss_recovered_mean']:.2g} (mean), KL {most['kl']:.2g}; "
        "four times as many evaluate.tokens halve them. All chains read the same text: how they differ is surer than "
        "that."
    )


def chain_columns(rows: list[ChainRow]) -> dict[str, list[Any]]:
    """The chains as columns of plain values."""
    return {
        "chain": [row.label for row in rows],
        "core sizes": [">".join(map(str, row.sizes)) for row in rows],
        "core size": [row.sizes[-1] if row.sizes else None for row in rows],
        "jaccard": [row.jaccard[-1] if row.jaccard else None for row in rows],
        "L0": [row.l0 for row in rows],
        "core L0": [row.core_l0 for row in rows],
        "FVU": [row.fvu for row in rows],
        "FVU (all rows)": [row.fvu if row.fvu_all_rows is None else row.fvu_all_rows for row in rows],
        "loss recovered": [row.loss_recovered for row in rows],
        "loss recovered (mean)": [row.loss_recovered_mean for row in rows],
        "dead share": [row.dead for row in rows],
        "tokens/s": [row.tokens_per_s for row in rows],
        "status": [row.status for row in rows],
    }


def pair_columns(pairs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The pairs of comparison.json as columns of plain values, nulls included."""
    names = [
        "a",
        "b",
        "group",
        "differs",
        "size_a",
        "size_b",
        "shared",
        "overlap",
        "pw_mcc",
        "mmcs_ab",
        "mmcs_ba",
        "activation",
        "activation_pairs",
        "activation_left_out",
        "pw_mcc_dictionary",
    ]
    columns = {name: [pair.get(name) for pair in pairs] for name in names}
    numbers = [
        "mean",
        "p99",
        "overlap_mean",
        "overlap_p99",
        "mmcs_mean",
        "activation_mean",
        "activation_p95",
        "density_gap",
        "draws",
    ]
    for null in NULLS:
        for name in ("available", *numbers, "reason"):
            columns[f"{null} {name}"] = [null_of(pair, null).get(name) for pair in pairs]
        columns[f"{null} dictionary"] = [
            ((pair.get("dictionary_nulls") or {}).get(null) or {}).get("mean") for pair in pairs
        ]
    for name in FUNCTIONAL:
        columns[f"functional {name}"] = [(pair.get("functional") or {}).get(name) for pair in pairs]
    for null, measures in FUNCTIONAL_NULLS.items():
        for name in ("available", *(number for measure in measures for number in (measure, f"{measure}_bar"))):
            found = [(pair.get("functional") or {}).get("nulls", {}).get(null, {}) for pair in pairs]
            columns[f"functional {null} {name}"] = [one.get(name) for one in found]
    return columns


def evaluation_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """evaluation.json, a row per cycle: everything but curves and lists. Prefixes are columns of their own, `prefix 0
    fvu`.
    """
    flat = []
    for row in rows:
        one = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        for prefix in row.get("prefixes") or ():
            one |= {f"prefix {prefix['name']} {name}": value for name, value in prefix.items() if name != "name"}
        flat.append(one)
    names = list(dict.fromkeys(name for one in flat for name in one))
    return {name: [one.get(name) for one in flat] for name in names}


def expectation_columns(entries: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """expectations.json."""
    names = ("claim", "outcome", "by", "value_name", "value", "relation", "bound_name", "bound", "over", "why")
    columns = {name: [entry[name] for entry in entries] for name in names}
    for place, end in enumerate(("low", "high")):
        columns[f"interval {end}"] = [None if one["interval"] is None else one["interval"][place] for one in entries]
    return columns


def feature_columns(consensus: dict[str, Any] | None) -> dict[str, list[Any]]:
    """The groups of consensus.json."""
    groups = consensus["groups"] if consensus else []
    names = ("id", "in_seeds", "in_chains", "elsewhere", "cosine", "smallest_cosine", "score", "density", "in_core")
    columns: dict[str, list[Any]] = {name: [group[name] for group in groups] for name in names}
    for place, end in enumerate(("low", "high")):
        columns[f"elsewhere {end}"] = [
            None if group["interval"] is None else group["interval"][place] for group in groups
        ]
    columns["members"] = [
        " ".join(f"{member['chain']}.{member['latent']}" for member in group["members"]) for group in groups
    ]
    return columns


def rediscovery_columns(consensus: dict[str, Any] | None) -> dict[str, list[Any]]:
    """How much of the cores each plain SAE has, beside what it is held against."""
    rows = (consensus or {}).get("rediscovery") or []
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in ("chain", "arm", "seed", "k")}
    for whose in REDISCOVERED:
        for name in ("found", "mmcs", "size"):
            columns[f"{whose} {name}"] = [(row.get(whose) or {}).get(name) for row in rows]
    return columns


def group_columns(comparison: dict[str, Any]) -> dict[str, list[Any]]:
    """The groups of comparison.json's summary as columns of plain values: what is measured, each with mean and
    interval, and the means of its nulls."""
    groups = comparison["summary"]["groups"]
    columns: dict[str, list[Any]] = {"group": list(groups)}
    columns |= {name: [group[name] for group in groups.values()] for name in ("pairs", "of", "scored", "seeds")}
    for score in SCORES:
        spreads = [group[score] or {} for group in groups.values()]
        columns[score] = [spread.get("mean") for spread in spreads]
        intervals = [spread.get("interval") or [None, None] for spread in spreads]
        columns |= {f"{score} {end}": [interval[i] for interval in intervals] for i, end in enumerate(("low", "high"))}
    for null in NULLS:
        found = [group["nulls"][null] for group in groups.values()]
        columns |= {f"{null} {name}": [one[name] for one in found] for name in ("available", "above")}
        columns |= {f"{null} {name}": [(one[name] or {}).get("mean") for one in found] for name in NULL_NUMBERS}
    for name in FUNCTIONAL:
        used = [group.get("functional") or {} for group in groups.values()]
        columns[f"functional {name}"] = [(one.get(name) or {}).get("mean") for one in used]
        columns[f"functional {name} beyond chance"] = [one.get("beyond", {}).get(name) for one in used]
    return columns


def null_of(pair: dict[str, Any], name: str) -> dict[str, Any]:
    """One null of a pair; {"available": False} if it was not drawn."""
    return (pair.get("nulls") or {}).get(name) or {"available": False}


def null_value(pair: dict[str, Any], name: str) -> float | None:
    """What the pair's PW-MCC has to exceed: the 99th percentile of a null, None if it is not available."""
    null = null_of(pair, name)
    return null.get("p99") if null.get("available") else None


def at_null_size(pair: dict[str, Any], name: str) -> float:
    """The pair's PW-MCC, of cores cut to the null's sizes where that has fewer latents."""
    cut = null_of(pair, name).get("core_pw_mcc_same_size")
    return pair["pw_mcc"] if cut is None else cut


def summary(comparison: dict[str, Any]) -> dict[str, float]:
    """Numbers that stand for the whole sweep; a mean over nothing is left out, not reported as 0 or 1."""
    pairs = comparison["pairs"]
    numbers: dict[str, float] = {
        "chains": len(comparison["chains"]),
        "failed": len(comparison.get("failed", [])),
        "pairs": len(pairs),
    }
    for name in ("pw_mcc", "overlap", "mmcs_ab", "mmcs_ba", "activation", "pw_mcc_dictionary"):
        values = [pair[name] for pair in pairs if pair.get(name) is not None]
        if values:
            numbers |= {f"{name}_mean": sum(values) / len(values), f"{name}_min": min(values)}
    for name in NULLS:
        above = [
            at_null_size(pair, name) > bar
            for pair in pairs
            if pair.get("pw_mcc") is not None and (bar := null_value(pair, name)) is not None
        ]
        numbers[f"{name}_available"] = len(above)
        if above:
            numbers[f"share_above_{name}"] = sum(above) / len(above)
    return numbers
