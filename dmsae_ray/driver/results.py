"""What a sweep's finished chains come to: every artifact of its folder, from evaluation to page. Reads what the chains
left, trains nothing; each part is kept while what it was made from is the same, and stands alone: one that cannot be
made takes no other with it.

    chains.json  data.json  evaluation.json  comparison.json  consensus.json  consensus.safetensors  features.json
    numbers.json  expectations.json  consistency.png  report.txt  report.html  failed_parts.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.outliers import write_data
from dmsae_ray.compare.samples import Sample
from dmsae_ray.config import Config
from dmsae_ray.distill.plan import BASE, ChainPlan
from dmsae_ray.files import discard, write_json
from dmsae_ray.ownership import ours_in
from dmsae_ray.results.behind_numbers import samples_by_name
from dmsae_ray.results.comparison import compare_chains
from dmsae_ray.results.consensus import write_consensus
from dmsae_ray.results.evaluation import write_evaluation
from dmsae_ray.results.expectations import judge
from dmsae_ray.results.features.task import describe
from dmsae_ray.results.numbers import numbers_of
from dmsae_ray.results.parts import FILE as FAILED_PARTS
from dmsae_ray.results.parts import Parts
from dmsae_ray.show.columns import (
    ChainRow,
    chain_columns,
    chain_row,
    evaluation_columns,
    expectation_columns,
    feature_columns,
    group_columns,
    pair_columns,
    rediscovery_columns,
)
from dmsae_ray.show.figures import consistency_matrix, matrices, save
from dmsae_ray.show.page import write_page
from dmsae_ray.show.terminal.tables import report, write_report

PAGE = "report.html"
FILES = (
    "config.yaml",
    "chains.json",
    "data.json",
    "evaluation.json",
    "comparison.json",
    "consensus.json",
    "consensus.safetensors",
    "features.json",
    "numbers.json",
    "expectations.json",
    "consistency.png",
    "report.txt",
    PAGE,
    FAILED_PARTS,
)
"""All that may lie in a sweep's folder."""


@dataclass(frozen=True)
class Results:
    """What was written, as far as it is shown elsewhere too. What could not be made is None or empty."""

    comparison: dict[str, Any] | None
    consensus: dict[str, Any] | None
    evaluation: list[dict[str, Any]]
    numbers: dict[str, float]
    expectations: list[dict[str, Any]]
    tables: Group
    """for a terminal"""
    columns: dict[str, dict[str, list[Any]]]
    """tables by name, each as columns of plain values"""
    files: list[Path]
    """everything in the folder"""
    failed: dict[str, str]
    """by name of each part that could not be made, or not all of it: why"""

    def means(self) -> dict[str, float]:
        """The numbers without the ends of their intervals, and without those after each cycle, which make a curve."""
        return {
            name: value
            for name, value in self.numbers.items()
            if not name.endswith((".min", ".max", ".low", ".high")) and ".course." not in name
        }


def write_results(
    config: Config,
    dataset: ActivationDataset,
    plans: list[ChainPlan],
    folder: Path,
    say: Callable[[str], None],
    connect: Callable[[], object],
    fresh: bool = False,
) -> Results:
    """Write all of it to the sweep's folder, part by part: one that fails takes only those with it that need it.

    connect: joins or starts Ray, called only where features have to be described anew. fresh: keep nothing that was
    computed before.
    """
    if fresh:
        for name in ("comparison.json", "consensus.json", "features.json"):
            discard(folder / name)
        for pair in ours_in(config.home, "pairs"):
            discard(pair)
    parts = Parts(folder, say)
    make = parts.make
    make("data", lambda: write_data(dataset, folder / "data.json"), files=["data.json"])
    base = [plan for plan in plans if plan.arm == BASE and plan.finished()]
    evaluation = make("evaluation", lambda: evaluated(parts, plans, folder), files=["evaluation.json"]) or []
    comparison = make(
        "comparison", lambda: compared(parts, config, dataset, plans, folder, say), files=["comparison.json"]
    )
    consensus = make(
        "consensus", lambda: agreed(config, base, plans, folder, say), files=["consensus.json", "consensus.safetensors"]
    )
    numbers = make("numbers", lambda: numbered(evaluation, comparison, consensus, folder), files=["numbers.json"]) or {}
    judged = (
        make(
            "expectations",
            lambda: judge_all(config, numbers, samples_by_name(evaluation, comparison, consensus), folder),
            files=["expectations.json"],
        )
        or []
    )
    make(
        "picture",
        lambda: picture(comparison, folder),
        needs=["comparison"] if comparison is None else [],
        files=["consistency.png"],
    )
    # Last of what is computed: it takes a language model, and a worker to hold it.
    make(
        "features",
        lambda: describe(config, dataset, base, consensus, folder / "features.json", connect, say),
        needs=["consensus"],
        files=["features.json"],
    )
    rows = [chain_row(plan.label, plan.folder.path, plan.cycles) for plan in plans]
    columns = make("tables", lambda: columns_of(rows, evaluation, comparison, consensus, judged)) or {}
    parts.write()  # the page says what it names
    make("page", lambda: write_page(folder, folder / PAGE), files=[PAGE])
    tables = report(rows, comparison, consensus, judged, parts.reasons)
    make("report", lambda: write_report(folder / "report.txt", tables), files=["report.txt"])
    parts.write()
    files = [folder / name for name in FILES if (folder / name).exists()]
    return Results(comparison, consensus, evaluation, numbers, judged, tables, columns, files, dict(parts.reasons))


def evaluated(parts: Parts, plans: list[ChainPlan], folder: Path) -> list[dict[str, Any]]:
    rows, unread = write_evaluation(plans, folder / "evaluation.json")
    if unread:
        parts.note("evaluation", "; ".join(unread), "INCOMPLETE")
    return rows


def compared(
    parts: Parts,
    config: Config,
    dataset: ActivationDataset,
    plans: list[ChainPlan],
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    comparison = compare_chains(config, dataset, plans, folder, say)
    finished = {plan.label for plan in plans if plan.finished()}
    unread = [
        f"without {entry['label']}: {entry['reason']}" for entry in comparison["failed"] if entry["label"] in finished
    ]
    if unread:
        parts.note("comparison", "; ".join(unread), "INCOMPLETE")
    return comparison


def agreed(
    config: Config, base: list[ChainPlan], plans: list[ChainPlan], folder: Path, say: Callable[[str], None]
) -> dict[str, Any] | None:
    if len(base) > 1:
        return write_consensus(
            config, base, [plan for plan in plans if plan.stage == "plain" and plan.arm != BASE], folder, say
        )
    for name in ("consensus.json", "consensus.safetensors"):
        discard(folder / name)
    return None


def numbered(
    evaluation: list[dict[str, Any]], comparison: dict[str, Any] | None, consensus: dict[str, Any] | None, folder: Path
) -> dict[str, float]:
    numbers = numbers_of(evaluation, comparison, consensus)
    write_json(folder / "numbers.json", numbers)
    return numbers


def judge_all(
    config: Config, numbers: dict[str, float], samples: dict[str, Sample], folder: Path
) -> list[dict[str, Any]]:
    judged = judge(config.study.expect, numbers, samples)
    write_json(folder / "expectations.json", judged)
    return judged["expectations"]


def picture(comparison: dict[str, Any] | None, folder: Path) -> None:
    assert comparison is not None, "the part needs it: without one it is not begun"
    save(
        consistency_matrix(*matrices(comparison), [entry["label"] for entry in comparison["failed"]]),
        folder / "consistency.png",
    )


def columns_of(
    rows: list[ChainRow],
    evaluation: list[dict[str, Any]],
    comparison: dict[str, Any] | None,
    consensus: dict[str, Any] | None,
    judged: list[dict[str, Any]],
) -> dict[str, dict[str, list[Any]]]:
    columns = {"chains": chain_columns(rows), "evaluation": evaluation_columns(evaluation)}
    if comparison is not None:
        columns |= {"pairs": pair_columns(comparison["pairs"]), "groups": group_columns(comparison)}
    return columns | {
        "expectations": expectation_columns(judged),
        "features": feature_columns(consensus),
        "rediscovery": rediscovery_columns(consensus),
    }
