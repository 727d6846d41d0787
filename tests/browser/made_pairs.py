"""comparison.json of given rows, at random: pairs of chains, their nulls, and the groups of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np


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
