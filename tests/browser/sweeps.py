"""Folders of sweeps for the page's tests: a realistic one of many chains and features, and small ones in which
something is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dmsae_ray.compare.interval import of_share

CYCLES = 4
GROUPS = 5
WORDS = [
    " the",
    " of",
    "ing",
    " river",
    " said",
    ",",
    ".",
    "\n",
    "\n\n",
    " “quoted”",
    ' "',
    "'s",
    " <script>",
    "</script>",
    "<b>",
    " &amp;",
    " naïve",
    " 東京",
    " 🙂",
    " Straße",
    "\t",
    " if",
    "(",
    ")",
    " x<y",
    " $title",
    " `code`",
    "\\n",
    " 1984",
    " zebra",
    "<!--",
    "-->",
]


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


def pair(rng: np.random.Generator, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """A pair of two chains' last rows, scored unless a core is too small."""
    small = min(a["core_out"], b["core_out"]) < 2
    reason = (
        f"cores of {a['core_out']} and {b['core_out']} latents: a comparison needs at least 2 on each side"
        if small
        else None
    )
    pw_mcc = 0.45 + (0.1 if a["seed"] == b["seed"] else 0.0) + float(rng.normal(0, 0.04))
    null = {"mean": 0.25, "p99": 0.29, "overlap_mean": 0.0, "overlap_p99": 0.04, "mmcs_mean": 0.34, "draws": 200}

    def shifted(by: float) -> dict[str, Any]:
        return {
            **{
                name: value + by + float(rng.uniform(0, 0.01)) if name != "draws" else value
                for name, value in null.items()
            },
            "available": not small,
            "reason": reason,
            "size": [a["core_out"], b["core_out"]],
            "density_gap": None,
        }

    nulls = {"covariance": shifted(0.0), "matched_density": shifted(0.06), "cycle0": shifted(0.2)}
    nulls["matched_compute"] = shifted(0.3) | {"draws": 6, "core_pw_mcc_same_size": None if small else pw_mcc}
    if not small and (a["seed"] + b["seed"]) % 3 == 0:
        nulls["matched_density"] |= {"available": False, "reason": "the nearest free latents differ by a factor of 3.1"}
    seed, k = a["seed"] != b["seed"], a["k"] != b["k"]
    differs = "both" if seed and k else "seed" if seed else "k" if k else "arm"
    scores = {
        "overlap": 0.2 + float(rng.uniform(0, 0.2)),
        "shared": 7,
        "pw_mcc": pw_mcc,
        "mmcs_ab": pw_mcc + 0.10,
        "mmcs_ba": pw_mcc + 0.12,
        "activation": 0.4 + float(rng.uniform(0, 0.2)),
    }
    return {
        "a": a["chain"],
        "b": b["chain"],
        "arm_a": a["arm"],
        "arm_b": b["arm"],
        "size_a": a["core_out"],
        "size_b": b["core_out"],
        "differs": differs,
        "seed_a": a["seed"],
        "seed_b": b["seed"],
        "k_a": a["k"],
        "k_b": b["k"],
        **(dict.fromkeys(scores) if small else scores),
        "pw_mcc_dictionary": 0.35,
        "dictionary_size": 2048,
        "reason": reason,
        "nulls": nulls,
        "dictionary_nulls": {
            "covariance": {"available": True, "reason": None, "mean": 0.41, "draws": 1, "size": [2048, 2048]},
            "matched_density": {
                "available": False,
                "reason": "no free latents remain",
                "mean": None,
                "draws": 0,
                "size": [2048, 2048],
            },
            "cycle0": {"available": True, "reason": None, "mean": 0.36, "draws": 1, "size": [2048, 2048]},
        },
    }


def comparison(rng: np.random.Generator, rows: list[dict[str, Any]], failed: list[dict[str, str]]) -> dict[str, Any]:
    """Every pair within an arm, and across arms those of equal seed and k."""
    last = [row for row in rows if row["last"] and row["stage"] == "distill"]
    pairs = [
        pair(rng, a, b)
        for place, a in enumerate(last)
        for b in last[place + 1 :]
        if a["arm"] == b["arm"] or (a["seed"], a["k"]) == (b["seed"], b["k"])
    ]
    groups: dict[str, Any] = {}
    for name in dict.fromkeys((p["arm_a"], p["arm_b"], p["differs"]) for p in pairs):
        members = [p for p in pairs if (p["arm_a"], p["arm_b"], p["differs"]) == name]
        key = f"{name[0]}/{name[2]}" if name[0] == name[1] else f"{name[0]}~{name[1]}/{name[2]}"
        seeds = {p["seed_a"] for p in members} | {p["seed_b"] for p in members}
        scored = sum(p["pw_mcc"] is not None for p in members)
        groups[key] = {"pairs": len(members), "of": len(members), "scored": scored, "seeds": len(seeds)}
        for score in ("pw_mcc", "overlap", "activation"):
            values = [p[score] for p in members if p[score] is not None]
            mean = float(np.mean(values)) if values else 0.0
            interval = [mean - 0.02, mean + 0.03] if len(seeds) >= 4 else None
            groups[key][score] = (
                {"mean": mean, "min": min(values), "max": max(values), "interval": interval} if values else None
            )
        above = [p["pw_mcc"] - p["nulls"]["matched_compute"]["mean"] for p in members if p["pw_mcc"] is not None]
        if above:
            ends = {"min": min(above), "max": max(above), "n": len(above), "interval": None}
            groups[key]["nulls"] = {"matched_compute": {"excess": {"pw_mcc": {"mean": float(np.mean(above))} | ends}}}
    return {
        "format_version": 2,
        "key": "0123456789ab",
        "chains": [row["chain"] for row in last],
        "arms": {row["chain"]: row["arm"] for row in last},
        "failed": failed,
        "pairs": pairs,
        "summary": {"available": bool(pairs), "reason": None, "groups": groups},
        "seconds_per_pair": 0.4,
    }


def context(rng: np.random.Generator, tokens: int, peak: float) -> dict[str, Any]:
    middle = tokens // 2
    activations = np.where(rng.random(tokens) < 0.2, rng.uniform(0, peak * 0.8, tokens), 0.0)
    activations[middle] = peak
    return {
        "tokens": [WORDS[number] for number in rng.integers(0, len(WORDS), tokens)],
        "activations": activations.tolist(),
        "peak": middle,
        "document_token": int(rng.integers(1, 100)),
    }


def effect(rng: np.random.Generator) -> dict[str, Any]:
    token = WORDS[int(rng.integers(0, len(WORDS)))]
    return {"before": " once <i>upon", "token": token, "after": " a time\n", "delta": float(rng.normal(0, 0.4))}


def features(
    rng: np.random.Generator, chains: list[str], seeds: int, number: int, contexts: int = 8, tokens: int = 41
) -> dict[str, Any]:
    """`number` described features; the third is never active, and needle-7 in the eighth one's first context is there
    to be found.
    """
    described = []
    for place in range(number):
        among = sorted(rng.choice(len(chains), size=int(rng.integers(1, len(chains) + 1)), replace=False).tolist())
        members, in_seeds = [chains[i] for i in among], min(seeds, len(among))
        peak = float(rng.uniform(1, 9))
        silent = place == 2
        described.append(
            {
                "id": f"f{place:03d}",
                "kind": "consensus" if len(members) > 1 else "core",
                "chains": members,
                "in_chains": len(members),
                "in_seeds": in_seeds,
                "n_chains": len(chains),
                "n_seeds": seeds,
                "elsewhere": (in_seeds - 1) / (seeds - 1) if seeds > 1 else None,
                "interval": list(of_share(in_seeds - 1, seeds - 1)) if seeds > 1 else None,
                "score": float(rng.exponential(0.03)),
                "density": float(10 ** rng.uniform(-4, -0.5)),
                "cosine": float(rng.uniform(0.8, 1)) if len(members) > 1 else None,
                "smallest_cosine": float(rng.uniform(0.7, 0.8)) if len(members) > 1 else None,
                "partners": [
                    {
                        "chain": chain,
                        "latent": int(rng.integers(0, 90)),
                        "index": int(rng.integers(0, 26)),
                        "cosine": float(rng.uniform(0.7, 1)),
                        "score": float(rng.exponential(0.03)),
                        "density": float(10 ** rng.uniform(-4, -0.5)),
                    }
                    for chain in members[1:]
                ],
                "representative": {"chain": members[0], "latent": int(rng.integers(0, 90))},
                "max_activation": 0.0 if silent else peak,
                "mean_loss_change": None if silent else float(rng.normal(0, 0.1)),
                "contexts": []
                if silent
                else [context(rng, tokens, peak * (1 - 0.05 * rank)) for rank in range(contexts)],
                "effects": [] if silent else [effect(rng) for _ in range(8)],
            }
        )
    if number > 7:
        described[7]["contexts"][0]["tokens"][3:5] = [" needle", "-7"]
        described[5]["density"] = 0.93
    return {"format_version": 1, "tokens": 24693, "features": described}


def consensus(
    rng: np.random.Generator, chains: list[str], seeds: list[int], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    groups = []
    for place in range(60):
        members = [chain for chain in chains if rng.random() < 0.9 - place / 70] or [chains[0]]
        in_seeds = min(len(seeds), len(members))
        groups.append(
            {
                "id": f"f{place:03d}",
                "members": [
                    {"chain": chain, "index": 3, "latent": 12, "score": 0.02, "density": 0.05} for chain in members
                ],
                "in_chains": len(members),
                "in_seeds": in_seeds,
                "elsewhere": (in_seeds - 1) / (len(seeds) - 1) if len(seeds) > 1 else None,
                "interval": list(of_share(in_seeds - 1, len(seeds) - 1)) if len(seeds) > 1 else None,
                "cosine": float(rng.uniform(0.8, 0.95)) if len(members) > 1 else None,
                "smallest_cosine": float(rng.uniform(0.7, 0.8)) if len(members) > 1 else None,
                "score": float(rng.exponential(0.03)),
                "density": float(10 ** rng.uniform(-3, -0.5)),
                "in_core": in_seeds > 1 and in_seeds >= len(seeds) / 2,
            }
        )
    searched = [row for row in rows if row["stage"] == "plain" and row["last"]]
    size = sum(group["in_core"] for group in groups)
    return {
        "format_version": 1,
        "arm": "base",
        "chains": chains,
        "seeds": seeds,
        "groups": groups,
        "core_size": size,
        "rediscovery": [
            {
                "chain": row["chain"],
                "arm": row["arm"],
                "k": row["k"],
                "seed": row["seed"],
                "consensus": {"found": 0.8 + float(rng.uniform(0, 0.1)), "mmcs": 0.78, "size": size},
                "cycle0_consensus": {
                    "found": 0.6 + float(rng.uniform(0, 0.1)),
                    "mmcs": 0.75,
                    "size": 5,
                    "available": True,
                    "reason": None,
                    "draws": 1,
                },
                "free_consensus": {
                    "found": 0.3 + float(rng.uniform(0, 0.1)),
                    "mmcs": 0.6,
                    "size": 12,
                    "available": True,
                    "reason": None,
                    "draws": 10,
                },
                "matched_consensus": {
                    "found": 0.4 + float(rng.uniform(0, 0.1)),
                    "mmcs": 0.7,
                    "size": size,
                    "density_gap": 1.2,
                },
                "cores": {"found": 0.5 + float(rng.uniform(0, 0.1)), "mmcs": 0.66, "size": 210},
                "matched": {"found": 0.3 + float(rng.uniform(0, 0.1)), "mmcs": 0.6, "size": size, "density_gap": 1.3},
            }
            for row in searched
        ],
        "rediscovery_summary": {},
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
