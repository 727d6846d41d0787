"""What a sweep's finished chains come to: every artifact of its folder, from evaluation to page. Reads what the chains left, trains
nothing; each part is kept while what it was made from is the same.

    chains.json  data.json  evaluation.json  comparison.json  consensus.json  consensus.safetensors  features.json
    numbers.json  expectations.json  consistency.png  report.txt  report.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.outliers import write_data
from dmsae_ray.config import Config
from dmsae_ray.distill.plan import BASE, ChainPlan
from dmsae_ray.files import write_json
from dmsae_ray.ownership import ours_in
from dmsae_ray.study.comparison import compare_chains
from dmsae_ray.study.consensus import write_consensus
from dmsae_ray.study.describe import describe
from dmsae_ray.study.evaluation import write_evaluation
from dmsae_ray.study.expectations import judge
from dmsae_ray.study.numbers import numbers_of
from dmsae_ray.track.figures import consistency_matrix, matrices, save
from dmsae_ray.track.page import write_page
from dmsae_ray.track.tables import (
    chain_columns,
    chain_row,
    evaluation_columns,
    expectation_columns,
    feature_columns,
    group_columns,
    pair_columns,
    rediscovery_columns,
)
from dmsae_ray.track.terminal import report, write_report

PAGE = "report.html"
FILES = (
    "config.yaml", "chains.json", "data.json", "evaluation.json", "comparison.json", "consensus.json", "consensus.safetensors",
    "features.json", "numbers.json", "expectations.json", "consistency.png", "report.txt", PAGE,
)  # fmt: skip
"""All that may lie in a sweep's folder."""


@dataclass(frozen=True)
class Results:
    """What was written, as far as it is shown elsewhere too."""

    comparison: dict[str, Any]
    consensus: dict[str, Any] | None
    evaluation: list[dict[str, Any]]
    numbers: dict[str, float]
    expectations: list[dict[str, Any]]
    tables: Group
    """for a terminal"""
    columns: dict[str, dict[str, list[Any]]]
    """tables by name, each as columns of plain values"""

    def means(self) -> dict[str, float]:
        """The numbers without the ends of their intervals."""
        return {name: value for name, value in self.numbers.items() if not name.endswith((".min", ".max", ".low", ".high"))}
    files: list[Path]
    """everything in the folder"""


def write_results(
    config: Config, dataset: ActivationDataset, plans: list[ChainPlan], folder: Path, say: Callable[[str], None],
    connect: Callable[[], object], fresh: bool = False,
) -> Results:  # fmt: skip
    """Write all of it to the sweep's folder.

    connect: joins or starts Ray, called only where features have to be described anew. fresh: keep nothing that was computed before.
    """
    if fresh:
        for name in ("comparison.json", "consensus.json", "features.json"):
            (folder / name).unlink(missing_ok=True)
        for pair in ours_in(config.home, "pairs"):
            pair.unlink()
    write_data(dataset, folder / "data.json")
    base = [plan for plan in plans if plan.arm == BASE and plan.finished()]
    evaluation = write_evaluation(plans, folder / "evaluation.json")
    comparison = compare_chains(config, dataset, [plan for plan in plans if has_core(plan)], folder, say)
    consensus = None
    if len(base) > 1:
        consensus = write_consensus(config, base, [plan for plan in plans if plan.stage == "plain" and plan.arm != BASE], folder, say)
    else:
        for name in ("consensus.json", "consensus.safetensors"):
            (folder / name).unlink(missing_ok=True)
    describe(config, dataset, base, consensus, folder / "features.json", connect, say)
    numbers = numbers_of(evaluation, comparison, consensus)
    write_json(folder / "numbers.json", numbers)
    judged = judge(config.study.expect, numbers)
    write_json(folder / "expectations.json", judged)
    save(consistency_matrix(*matrices(comparison), [entry["label"] for entry in comparison["failed"]]), folder / "consistency.png")
    rows = [chain_row(plan.label, plan.folder.path, plan.cycles) for plan in plans]
    tables = report(rows, comparison, consensus, judged["expectations"])
    write_report(folder / "report.txt", tables)
    write_page(folder, folder / PAGE)
    files = [folder / name for name in FILES if (folder / name).exists()]
    columns = {
        "chains": chain_columns(rows), "evaluation": evaluation_columns(evaluation), "pairs": pair_columns(comparison["pairs"]),
        "groups": group_columns(comparison), "expectations": expectation_columns(judged["expectations"]),
        "features": feature_columns(consensus), "rediscovery": rediscovery_columns(consensus),
    }  # fmt: skip
    return Results(comparison, consensus, evaluation, numbers, judged["expectations"], tables, columns, files)


def has_core(plan: ChainPlan) -> bool:
    """Whether a chain's last core is one to compare: the grid's, and that of every arm that distils."""
    return plan.arm == BASE or plan.stage == "distill"
