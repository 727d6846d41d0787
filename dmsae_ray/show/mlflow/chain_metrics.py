"""Which of a chain's results are metrics of its run in MLflow, and under which names: a new one is a line here.

What stands before the slash groups MLflow's charts, so a group holds what one wants to see side by side. Everything
else is in record.json, an artifact of the run, and on the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from dmsae_ray.distill.record import CycleRecord

OF_CYCLE = {
    "core/size": "core_out",
    "core/entered": "entered",
    "core/left": "left",
    "core/jaccard": "jaccard",
    "core/coverage": "coverage",
    "core/drift": "decoder_drift.mean",
    "core/split_half": "attribution.split_half_jaccard",
    "core/l0": "core_l0",
    "core/fvu": "prefixes.core.fvu",
    "core/recovered": "prefixes.core.loss_recovered_zero",
    "sae/l0": "l0",
    "sae/fvu": "fvu",
    "sae/recovered": "loss_recovered_zero",
    "sae/recovered_mean": "loss_recovered_mean",
    "sae/kl": "kl",
    "sae/dead": "dead_share",
    "cost/tokens_per_s": "tokens_per_s",
    "cost/seconds": "seconds.total",
}
"""By metric: the field of record.json, nested ones with dots, those of a prefix under its name. Step = cycle, so that
the latest value is the last cycle's."""
OF_PAIRS = {
    "agreement/pw_mcc": "pw_mcc",
    "agreement/overlap": "overlap",
    "agreement/activation": "activation",
    "agreement/null": "nulls.covariance.p99",
    "agreement/null_density": "nulls.matched_density.p99",
    "agreement/cycle0": "nulls.cycle0.mean",
}
"""By metric: the field of a pair in comparison.json. A chain's value is the mean over its pairs with the chains that
differ from it in their seed alone; a null that is not available counts for nothing."""
OF_CURVE = {"train/loss": "loss", "train/fvu": "fvu", "train/core_l0": "core_l0", "train/dead": "dead_share"}
"""By metric: the column of curve.jsonl. Step = optimiser step, counted on through the cycles."""


def of_cycle(record: CycleRecord) -> Iterator[tuple[str, float]]:
    """The metrics that a finished cycle has."""
    tree = record.to_json() | {"prefixes": {prefix["name"]: prefix for prefix in record.prefixes}}
    yield from _named(OF_CYCLE, tree)


def of_curve(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics that a line of curve.jsonl has."""
    yield from _named(OF_CURVE, row)


def of_pairs(label: str, pairs: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """How far a chain's core agrees with those of its seed partners."""
    partners = [pair for pair in pairs if pair.get("differs") == "seed" and label in (pair["a"], pair["b"])]
    values: dict[str, list[float]] = {}
    for pair in partners:
        for name, value in _named(OF_PAIRS, pair):
            values.setdefault(name, []).append(value)
    yield from ((name, sum(found) / len(found)) for name, found in values.items())
    if partners:
        yield "agreement/partners", float(len(partners))


def _named(table: dict[str, str], tree: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, path in table.items():
        value = _at(tree, path)
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield name, float(value)


def _at(tree: Any, path: str) -> Any:
    """What lies at a dotted path; None if nothing does, or if it is said on the way not to be available."""
    for name in path.split("."):
        if not isinstance(tree, dict) or not tree.get("available", True):
            return None
        tree = tree.get(name)
    return tree
