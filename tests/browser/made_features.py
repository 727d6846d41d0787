"""features.json and consensus.json of given chains, at random, with texts that a page could trip over."""

from __future__ import annotations

from typing import Any

import numpy as np

from dmsae_ray.compare.interval import of_share

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
