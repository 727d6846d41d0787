"""Every evaluation of a sweep in one table: a row per finished cycle of each chain, from the chains' own records.

Letters: F width, C core size, P candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from dmsae_ray.core.score_file import coverage, coverage_ranks
from dmsae_ray.distill.folder import CycleFolder
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.files import present, write_json
from dmsae_ray.results.parts import UNREADABLE, damaged

FORMAT_VERSION = 1
DECADES = 5
"""A histogram of densities reaches down to 10^-DECADES; rarer latents count in its first bin, silent ones apart."""
BINS_PER_DECADE = 5
COVERAGE_POINTS = 60
IDENTITY = ("format_version", "chain", "label", "generation", "seed", "k", "cycle")
"""Fields of record.json that the row has under its own names, or that say nothing of the result."""


def write_evaluation(plans: Sequence[ChainPlan], path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Write evaluation.json; returns its rows, and in words which files of chains could not be read: a row goes without
    their curves.
    """
    rows: list[dict[str, Any]] = []
    unread: list[str] = []
    for plan in plans:
        rows += chain_rows(plan, unread)
    write_json(path, {"format_version": FORMAT_VERSION, "rows": rows})
    return rows, unread


def chain_rows(plan: ChainPlan, unread: list[str]) -> list[dict[str, Any]]:
    """One row per finished cycle that belongs to the sweep; what was cleaned away since is left out of it, what cannot
    be read goes to `unread`."""
    rows = []
    source = plan.start.chain if plan.start else None
    for cycle, record in enumerate(plan.folder.records()[: plan.cycles]):
        folder, last = plan.folder.cycle(cycle), cycle == plan.cycles - 1
        row = {
            "chain": plan.label,
            "arm": plan.arm,
            "stage": plan.stage,
            "seed": plan.seed,
            "k": plan.k,
            "cycle": cycle,
            "last": last,
            "from": source.label if source else None,
            "folder": str(plan.folder.path.name),
        }
        row |= {name: value for name, value in record.to_json().items() if name not in IDENTITY}
        row["core_density"] = record.core_l0 / record.core_in if record.core_in else None
        curves = {
            "coverage_curve": folder.scores.exists()
            and (lambda folder=folder, size=record.core_out: coverage_curve(folder, size)),
            "density_histogram": last
            and present(folder.sae)
            and folder.core.exists()
            and (lambda folder=folder: density_histogram(folder)),
        }
        for name, read in curves.items():
            try:
                if read:
                    row[name] = read()
            except UNREADABLE as error:
                unread.append(f"{plan.label} cycle {cycle}, {name.replace('_', ' ')}: {damaged(folder.path, error)}")
        rows.append(row)
    return rows


def coverage_curve(folder: CycleFolder, core_size: int) -> list[tuple[int, float]]:
    """(rank, share of the attribution carried by so many candidates), at a few ranks, the core's size among them."""
    share_P = coverage(folder.scores)
    return [(rank, float(share_P[rank - 1])) for rank in coverage_ranks(len(share_P), core_size, COVERAGE_POINTS)]


def density_histogram(folder: CycleFolder) -> dict[str, Any]:
    """Counts of log10 density on the evaluation tokens: of the latents the cycle selected, and of all others.

    edges: of the bins, ascending; silent: latents that were active on no evaluation token.
    """
    with safe_open(folder.sae, framework="np") as file:
        density_F = file.get_tensor("density").astype(np.float64)
    with safe_open(folder.core, framework="np") as file:
        ids_C = file.get_tensor("latent_ids_C")
    edges = np.linspace(-DECADES, 0, DECADES * BINS_PER_DECADE + 1)
    is_core_F = np.zeros(len(density_F), dtype=bool)
    is_core_F[ids_C] = True
    counts: dict[str, Any] = {"edges": edges.tolist(), "silent": {}}
    for name, chosen_F in (("core", is_core_F), ("free", ~is_core_F)):
        active = density_F[chosen_F & (density_F > 0)]
        counts[name] = np.histogram(np.log10(active).clip(-DECADES, 0), edges)[0].tolist()
        counts["silent"][name] = int((chosen_F & (density_F == 0)).sum())
    return counts
