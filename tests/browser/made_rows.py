"""Rows of evaluation.json as a chain would have them, at random."""

from __future__ import annotations

from typing import Any

import numpy as np

CYCLES = 4
GROUPS = 5


def evaluation_rows(
    rng: np.random.Generator,
    label: str,
    arm: str,
    seed: int,
    k: int,
    cycles: int = CYCLES,
    stage: str = "distill",
    source: str | None = None,
) -> list[dict[str, Any]]:
    """One row per cycle of a chain, as record.json would have it."""
    rows: list[dict[str, Any]] = []
    origins: dict[str, int] = {}
    for cycle in range(cycles):
        before = sum(origins.values()) or (26 if stage == "transfer" else 0)
        entered, left = (26 if cycle == 0 else int(rng.integers(0, 4))), (int(rng.integers(0, 3)) if cycle else 0)
        origins = {**origins, str(cycle): entered}
        origins["0"] -= left
        after = sum(origins.values())
        fvu, core_l0 = 0.24 - 0.0025 * k + rng.normal(0, 0.004), 0.3 * k if before else 0.0
        recovered = 1 - fvu / 3.2
        row: dict[str, Any] = {
            "chain": label,
            "arm": arm,
            "stage": stage,
            "seed": seed,
            "k": k,
            "cycle": cycle,
            "last": cycle == cycles - 1,
            "from": source,
            "core_in": before,
            "core_out": after,
            "kept": before - left if cycle else 0,
            "entered": entered,
            "left": left,
            "jaccard": 1 - (left + entered) / (before + entered) if cycle else None,
            "origins": dict(origins),
            "core_share": 0.6 if before else 0.0,
            "l0": k - rng.uniform(0, 0.3),
            "core_l0": core_l0,
            "fvu_all_rows": fvu + 0.4,
            "rows_left_out": 17,
            "standard_errors": {"fvu": 0.01, "kl": 0.02, "loss_recovered_zero": 0.003, "loss_recovered_mean": 0.004},
            "core_density": core_l0 / before if before else None,
            "free_l0": k - core_l0,
            "fvu": fvu,
            "dead_share": float(rng.uniform(0.01, 0.04)),
            "loss_clean": 3.1832072953525543,
            "loss_zero": 9.50877520087297,
            "loss_mean": 9.776217972325153,
            "loss_spliced": 9.50877520087297 - recovered * (9.50877520087297 - 3.1832072953525543),
            "loss_recovered_zero": recovered,
            "loss_recovered_mean": recovered + 0.002,
            "evaluation_tokens": 24693,
            "kl": 0.9 * fvu + rng.uniform(0, 0.01),
            "core_explained": 0.55 + rng.normal(0, 0.01) if before else None,
            "decoder_drift": {
                "mean": 0.93 + 0.01 * cycle + float(rng.normal(0, 0.006)),
                "min": 0.61,
                "before": 0.9,
                "gap_closed": 0.3 + 0.1 * cycle,
            }
            if cycle
            else None,
            "prefixes": _prefixes(rng, fvu, k, bool(before)),
        }
        ranks = np.unique(np.geomspace(1, 90, 40).astype(int))
        row["coverage_curve"] = [[int(rank), float(1 - np.exp(-rank / (20 + k / 4)))] for rank in ranks]
        row["coverage"] = float(1 - np.exp(-after / (20 + k / 4))) - (0.2 if arm == "random" else 0.0)
        edges = np.linspace(-5, 0, 26)
        core = np.histogram(np.clip(rng.normal(-1.2, 0.5, after), -5, 0), edges)[0]
        free = np.histogram(np.clip(rng.normal(-2.4, 0.7, 2048 - after), -5, 0), edges)[0]
        row["density_histogram"] = {
            "edges": edges.tolist(),
            "core": core.tolist(),
            "free": free.tolist(),
            "silent": {"core": 0, "free": int(rng.integers(0, 40))},
        }
        rows.append(row)
    return rows


def _prefixes(rng: np.random.Generator, fvu: float, k: int, core: bool) -> list[dict[str, Any]]:
    entries = []
    for place, name in enumerate((["core"] if core else []) + [str(group) for group in range(GROUPS)]):
        last = name == str(GROUPS - 1)
        here = fvu if last else fvu + 0.4 / (place + 1) + rng.uniform(0, 0.01)
        recovered = 1 - here / 3.2
        entries.append(
            {
                "name": name,
                "latents": 26 + 64 * 2**place,
                "l0": k if last else k * (place + 1) / (GROUPS + 1),
                "fvu": here,
                "fvu_all_rows": here + 0.4,
                "loss": 3.2 + here,
                "loss_recovered_zero": recovered,
                "loss_recovered_mean": recovered + 0.002,
                "kl": 0.9 * here,
            }
        )
    return entries
