"""What comparing two chains costs, by core size, width and draws, and what is saved where pairs have a chain or the
sizes in common.

    python jobs/bench/bench_compare.py --output jobs/bench/bench_compare.md

Chains are made at random: what is timed does not depend on what latents mean. Each case is one comparer and three
chains. `first` is a pair of which nothing is known; `one known` a pair with one known chain, of sizes that are new;
`both known` a pair of known chains and sizes, the usual one in a sweep of many chains. Columns after it say what
`first` is made of. Rediscovery is the search for the two cores' latents and their matched ones in one plain SAE.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dmsae_ray.compare.chain_result import ChainIdentity, ChainResult
from dmsae_ray.compare.comparer import Comparer
from dmsae_ray.compare.consensus import NamedCore, find_consensus
from dmsae_ray.compare.density import FreeDraws
from dmsae_ray.compare.match import hungarian
from dmsae_ray.compare.measured_latents import MeasuredLatents
from dmsae_ray.compare.pair import CompareSettings
from dmsae_ray.compare.rediscovery import PlainSAE, recurring, rediscover, sought
from dmsae_ray.core.core import Core


@dataclass(frozen=True)
class Case:
    """Sizes of a comparison."""

    d: int = 256
    width: int = 8192
    core: int = 100
    draws: int = 200
    rows: int = 16_384
    matched: int = 2048
    """latents of the whole dictionaries that are matched"""


BASE = Case()
CASES = [
    Case(d=128, width=2048, core=30),
    BASE,
    replace(BASE, core=25),
    replace(BASE, core=400),
    replace(BASE, width=32_768),
    replace(BASE, draws=50),
    replace(BASE, rows=65_536),
    replace(BASE, matched=4096),
]


def made(seed: int, case: Case) -> ChainResult:
    """A chain of random rows; cores differ in size by one, so that sizes are new where chains are."""
    generator = torch.Generator().manual_seed(seed)

    def latents() -> MeasuredLatents:
        W_FD = torch.nn.functional.normalize(torch.randn(case.width, case.d, generator=generator), dim=1)
        density_F = torch.rand(case.width, generator=generator) * 0.1 + 0.001
        biases_F, theta_F = torch.zeros(case.width), torch.full((case.width,), 0.05)
        return MeasuredLatents(W_FD, biases_F, W_FD, torch.zeros(case.d), theta_F, density_F, 1.0)

    sae, size = latents(), case.core + seed
    ids_C = torch.arange(size)
    core = Core(
        W_enc_CD=sae.W_enc_ND[ids_C],
        W_dec_CD=sae.W_dec_ND[ids_C],
        b_enc_C=torch.zeros(size),
        b_dec_D=torch.zeros(case.d),
        scores_C=torch.rand(size, generator=generator),
        density_C=sae.density_N[ids_C],
        latent_ids_C=ids_C,
        theta=0.05,
        scale=1.0,
        hook="h",
        model="m",
        cycle=2,
        seed=seed,
        k=16,
        entered_C=torch.full((size,), 2),
        selected=((2,),) * size,
    )
    chain = ChainIdentity(f"seed{seed}", "base", seed, seed, None, 16, "")
    return ChainResult(chain, core, sae, ids_C, latents(), torch.arange(2 * size))


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()  # of the processor: a shared machine's clock says more of its other users
    work()
    return time.process_time() - start


def measure(case: Case, repeats: int) -> list[str]:
    """One row of the table: medians over repeats."""
    rows_RD = torch.randn(case.rows, case.d, generator=torch.Generator().manual_seed(0)) / case.d**0.5
    chains = [made(seed, case) for seed in range(3)]
    settings = CompareSettings(draws=case.draws, max_latents=case.matched)
    seconds: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        seconds.setdefault(name, []).append(timed(work))

    for _ in range(repeats):
        comparer = Comparer(rows_RD, settings)
        a, b, c = chains
        sides = [comparer.side(chain) for chain in chains]
        note("first", lambda: comparer.pair(sides[0], sides[1]))
        note("one known", lambda: comparer.pair(sides[0], sides[2]))
        comparer.pair(sides[1], sides[2])
        note("both known", lambda: comparer.pair(sides[1], sides[2]))
        fresh = Comparer(rows_RD, settings)
        note("covariance", lambda: fresh.covariance.of((a.core.size, b.core.size), 0.0, 0.0))
        note(
            "matched density", lambda: [FreeDraws.of(one.sae, one.core_ids_C, case.draws, 0, rows_RD) for one in (a, b)]
        )
        note("dictionary", lambda: hungarian(a.sae.W_dec_ND[: case.matched], b.sae.W_dec_ND[: case.matched]))
        named = [NamedCore(one.label, one.chain.seed, one.core) for one in (a, b)]
        found = [
            sought(one, chain.sae, chain.start.take(chain.start_ids_N), None, 0)
            for one, chain in zip(named, (a, b), strict=True)
        ]
        consensus, plain = find_consensus(named), PlainSAE("p", "plain", 9, 16, c.sae)
        note("rediscovery", lambda: rediscover(plain, consensus, found, recurring(found, 0.7, 0.5), 0.7))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    row = [f"{case.d}/{case.width}/{case.core}/{case.draws}/{case.rows}/{case.matched}"]
    row += [f"{median[name]:.2f}" for name in ("first", "one known", "both known")]
    row += [f"{median['both known'] / median['first']:.2f}"]
    row += [f"{median[name]:.2f}" for name in ("covariance", "matched density", "dictionary", "rediscovery")]
    print(" | ".join(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, help="write the table there; what stands below the marker in that file is kept"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = [measure(case, args.repeats) for case in CASES]
    if args.output is not None:
        columns = ["d/width/core/draws/rows/matched", "first", "one known", "both known", "both known : first"]
        columns += [
            "covariance, once per sizes",
            "density draws, two chains",
            "dictionaries, of three",
            "re-discovery, one SAE",
        ]
        lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in table]
        write(args.output, lines, args)


MARKER = "<!-- below: kept by hand -->"


def write(path: Path, lines: list[str], args: argparse.Namespace) -> None:
    kept = path.read_text().partition(MARKER)[2] if path.exists() else "\n"
    versions = f"torch {torch.__version__}, numpy {np.__version__}"
    said = f"{args.threads} thread(s), {versions}, CPU. Seconds of the processor, medians of {args.repeats}."
    options = f"--output {path} --repeats {args.repeats} --threads {args.threads}"
    command = f"Made by `OMP_NUM_THREADS={args.threads} python jobs/bench/bench_compare.py {options}`."
    path.write_text("\n".join(["# Cost of comparing two chains", "", command, "", said, "", *lines, "", MARKER]) + kept)


if __name__ == "__main__":
    main()
