"""Folders of sweeps for the page's tests: a realistic one of many chains and features, and small ones in which
something is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from made_features import consensus, features
from made_pairs import comparison
from made_rows import CYCLES, evaluation_rows


def write(folder: Path, **artifacts: Any) -> Path:
    """Write artifacts into a folder under their names; None leaves a file out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in artifacts.items():
        if content is not None and name == "config":
            (folder / "config.yaml").write_text(yaml.safe_dump(content))
        elif content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def config(name: str, seeds: list[int], ks: list[int]) -> dict[str, Any]:
    return {
        "name": name,
        "model": {"name": "tiny", "hook": "blocks.2.hook_resid_post"},
        "corpus": {"source": "embedded"},
        "sae": {"width": 2048, "core_gate": "batchtopk", "core_transfer": "frozen"},
        "train": {"tokens": 307200, "batch": 1024, "lr": 0.004},
        "attribution": {"tokens": 24576, "tau": 0.6},
        "selection": {"by": "attribution"},
        "sweep": {"seeds": seeds, "k": ks, "cycles": CYCLES, "data": "shared"},
        "compare": {"draws": 200},
    }


EXPECTATIONS = {
    "format_version": 1,
    "expectations": [
        {
            "claim": "Cores of different seeds agree beyond chance",
            "value_name": "PW-MCC base/seed",
            "value": 0.4947953225054107,
            "relation": "above",
            "bound_name": "largest covariance p99",
            "bound": 0.3036571,
            "outcome": "hit",
            "by": "interval",
            "interval": [0.1613, 0.2205],
            "over": "the same 6 pairs of seeds 0 to 3 at k 16",
            "why": None,
        },
        {
            "claim": "Distillation adds agreement to that of cycle 0 & <nothing else>",
            "value_name": "PW-MCC base/seed",
            "value": 0.4947953225054107,
            "relation": "above",
            "bound_name": "cycle-0 sets",
            "bound": 0.5315189,
            "outcome": "miss",
            "by": "means",
            "interval": None,
            "over": "the same 1 pair of seeds 0, 1 at k 16",
            "why": "means only: no interval below four seeds in common, or where all are equal",
        },
        {
            "claim": "Half of the loss comes back",
            "value_name": "loss recovered",
            "value": 0.51,
            "relation": "above",
            "bound_name": None,
            "bound": 0.5,
            "outcome": "open",
            "by": "interval",
            "interval": [0.48, 0.54],
            "over": None,
            "why": None,
        },
        {
            "claim": "Placebo cores agree less",
            "value_name": "PW-MCC random/seed",
            "value": None,
            "relation": "below",
            "bound_name": None,
            "bound": None,
            "outcome": "not available",
            "by": None,
            "interval": None,
            "over": None,
            "why": "the arm “random” did not run",
        },
    ],
}
DATA = {
    "hook": "blocks.2.hook_resid_post",
    "rows": 73728,
    "norm_quantiles": {"0.5": 140.2, "0.99": 171.9},
    "outlier_norm": None,
    "dropped": 0,
    "outliers": {
        "multiple": 10.0,
        "rows": 17,
        "of_rows": 73728,
        "share_of_variance": 0.613,
        "largest": 26800.0,
        "median": 140.2,
    },
    "warning": "17 of 73,728 rows hold 61 % of the variance & <decide> scale and FVU; set harvest.outlier_norm: 10",
}
FAILED = [{"label": "seed4-k16", "reason": "ValueError: loss is not finite at step 37 <of 300>; lower train.lr"}]


def realistic(folder: Path, number: int = 1000) -> Path:
    """Eight base chains (four seeds, two k), a placebo, an exempt core, transfers, plain SAEs, one failed chain, 1000
    features.
    """
    rng = np.random.default_rng(0)
    seeds, ks = [0, 1, 2, 3], [16, 32]
    rows = []
    for arm in ("base", "random", "relu"):
        for seed in seeds if arm == "base" else seeds[:2]:
            for k in ks:
                rows += evaluation_rows(rng, f"seed{seed}-k{k}" + ("" if arm == "base" else f"-{arm}"), arm, seed, k)
    for seed in seeds:
        rows += evaluation_rows(rng, f"seed{seed}-k16-to-k64", "transfer", seed, 64, 1, "transfer", f"seed{seed}-k16")
    for seed in (10, 11, 12, 13):
        for k in (16, 32, 64):
            rows += evaluation_rows(rng, f"plain-seed{seed}-k{k}", "plain", seed, k, 1, "plain")
    chains = [f"seed{seed}-k{k}" for seed in seeds for k in ks]
    return write(
        folder,
        evaluation={"format_version": 1, "rows": rows},
        comparison=comparison(rng, rows, FAILED),
        consensus=consensus(rng, chains, seeds, rows),
        features=features(rng, chains, len(seeds), number),
        expectations=EXPECTATIONS,
        config=config("eight chains", seeds, ks),
        data=DATA | {"warning": None},
    )


def twelve_arms(folder: Path) -> Path:
    """A study with as many arms as a chart can hold, with names as long as they come."""
    rng = np.random.default_rng(4)
    rows = []
    for place in range(12):
        arm = "base" if place == 0 else f"another-way-to-choose-{place}"
        for seed in (0, 1):
            for k in (16, 32) if place < 6 else (16,):
                rows += evaluation_rows(rng, f"seed{seed}-k{k}" + ("" if place == 0 else f"-{arm}"), arm, seed, k)
    chains = [row["chain"] for row in rows if row["last"] and row["arm"] == "base"]
    return write(
        folder,
        evaluation={"format_version": 1, "rows": rows},
        comparison=comparison(rng, rows, []),
        consensus=consensus(rng, chains, [0, 1], rows),
        features=features(rng, chains, 2, 5),
        data=DATA,
        config=config("twelve arms", [0, 1], [16, 32]),
    )


def single_arm(folder: Path, **more: Any) -> Path:
    """What `make sweep` gives without a config: two seeds, two k, the base arm alone; nothing stated in advance."""
    rng = np.random.default_rng(3)
    rows = [
        row for seed in (0, 1) for k in (16, 32) for row in evaluation_rows(rng, f"seed{seed}-k{k}", "base", seed, k)
    ]
    for row in rows:
        row["decoder_drift"] = row["decoder_drift"] and {"mean": 1.0, "min": 1.0}
    chains = [row["chain"] for row in rows if row["last"]]
    made = {
        "evaluation": {"format_version": 1, "rows": rows},
        "comparison": comparison(rng, rows, []),
        "consensus": consensus(rng, chains, [0, 1], rows),
        "features": features(rng, chains, 2, 20),
        "expectations": {"format_version": 1, "expectations": []},
        "config": config("quickstart", [0, 1], [16, 32]),
        "data": DATA,
    }
    return write(folder, **(made | more))


PARTS = [
    {"part": "features", "reason": "OutOfMemoryError: 84 GiB <asked for>"},
    {"part": "consensus", "reason": "disk full"},
]


def parts_failed(folder: Path) -> Path:
    """Two parts of the results that could not be made."""
    return single_arm(folder, features=None, consensus=None, failed_parts=PARTS)


def no_evaluation(folder: Path) -> Path:
    """Cores were compared, but nothing says how good the SAEs are."""
    return single_arm(folder, evaluation=None, expectations=None)


def one_chain(folder: Path) -> Path:
    """A single chain of one cycle: nothing to compare with, nothing settled, all features its own."""
    rng = np.random.default_rng(1)
    rows = evaluation_rows(rng, "seed0-k16", "base", 0, 16, 1)
    return write(
        folder,
        evaluation={"format_version": 1, "rows": rows},
        comparison=comparison(rng, rows, []),
        features=features(rng, ["seed0-k16"], 1, 3),
        expectations={"format_version": 1, "expectations": []},
        config=config("one", [0], [16]),
    )


def unscored(folder: Path) -> Path:
    """Two chains whose cores are too small to be compared, one more failed; no features, consensus or expectations."""
    rng = np.random.default_rng(2)
    rows = [row for seed in (0, 1) for row in evaluation_rows(rng, f"seed{seed}-k16", "base", seed, 16, 2)]
    for row in rows:
        row["core_out"] = 1
    return write(
        folder, evaluation={"format_version": 1, "rows": rows}, comparison=comparison(rng, rows, FAILED), features={}
    )


def bare(folder: Path) -> Path:
    """Only evaluation.json, with the fields that every row has and nothing measured."""
    row = {
        "chain": "seed0-k16",
        "arm": "base",
        "stage": "distill",
        "seed": 0,
        "k": 16,
        "cycle": 0,
        "last": True,
        "from": None,
    }
    return write(folder, evaluation={"format_version": 1, "rows": [row]})


def all_failed(folder: Path) -> Path:
    """No chain finished a cycle."""
    empty = {
        "format_version": 2,
        "key": "0",
        "chains": [],
        "arms": {},
        "failed": FAILED,
        "pairs": [],
        "summary": {"groups": {}},
    }
    return write(
        folder, evaluation={"format_version": 1, "rows": []}, comparison=empty, config=config("failed", [4], [16])
    )
