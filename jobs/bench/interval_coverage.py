"""How often the intervals of compare/interval.py hold the truth, where what makes seeds differ is known.

    python jobs/bench/interval_coverage.py --output jobs/bench/interval_coverage.md

Means over pairs of seeds: values are drawn many times, by each scenario, and the share of times is counted in which the
interval has the true mean. Beside the package's interval stand two others: percentiles over resampled seeds, and the
dyadic-robust variance with Student's t (Fafchamps and Gubert 2007; Aronow, Samii and Assenova 2015).
Reproducibility: of every true share the exact chance that the interval has it, and the least over all shares.
Shape letters: P values, R resamples, S seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.special import comb, stdtrit

from dmsae_ray.compare.interval import COVERAGE, equal, of_share, over_seeds
from dmsae_ray.compare.samples import Origin, Sample, difference

Ends = tuple[float, float] | None


@dataclass(frozen=True)
class Scenario:
    """How values come about; the truth is the mean of what is drawn."""

    name: str
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, list[int], list[int]]]
    """values of one sweep of so many seeds, and the seeds of each"""
    truth: float
    promised: bool = True
    """whether the package's interval is to hold it 90 times of 100, at four seeds and at eight"""


def pairs(seeds: int) -> tuple[list[int], list[int]]:
    left, right = zip(*combinations(range(seeds), 2), strict=True)
    return list(left), list(right)


def over_pairs(seed_sd: float, pair_sd: float, ks: int = 1):
    """Normal effects of seeds and of pairs; at each of `ks` sparsities a further pair noise, as large."""

    def draw(rng: np.random.Generator, seeds: int):
        left, right = pairs(seeds)
        effect_S = rng.normal(0, 1, seeds) * seed_sd
        values = [effect_S[left] + effect_S[right] + rng.normal(0, 1, len(left)) * pair_sd for _ in range(ks)]
        return np.concatenate(values), left * ks, right * ks

    return draw


def products(rng: np.random.Generator, seeds: int):
    left, right = pairs(seeds)
    effect_S = rng.normal(0, 1, seeds)
    return effect_S[left] * effect_S[right], left, right


def shares(mean_logit: float, seed_sd: float, of: int):
    """Shares of so many latents that two cores have in common: seeds' effects on the log-odds, then a binomial."""

    def draw(rng: np.random.Generator, seeds: int):
        left, right = pairs(seeds)
        effect_S = rng.normal(0, seed_sd, seeds)
        return rng.binomial(of, logistic(mean_logit + effect_S[left] + effect_S[right])) / of, left, right

    return draw


def of_seeds(values: Callable[[np.random.Generator, int], np.ndarray]):
    """One number per seed."""

    def draw(rng: np.random.Generator, seeds: int):
        return values(rng, seeds), list(range(seeds)), list(range(seeds))

    return draw


def skewed_seeds(values: Callable[[np.random.Generator, int], np.ndarray]):
    """Pairs whose value is the sum of two seeds' effects."""

    def draw(rng: np.random.Generator, seeds: int):
        left, right = pairs(seeds)
        effect_S = values(rng, seeds)
        return effect_S[left] + effect_S[right], left, right

    return draw


def sampled(rng: np.random.Generator, seeds: int):
    """A sample of as many pairs as there are seeds: around a circle."""
    effect_S, left = rng.normal(0, 1, seeds), list(range(seeds))
    right = [(seed + 1) % seeds for seed in left]
    return effect_S[left] + effect_S[right] + rng.normal(0, 1, seeds), left, right


def logistic(x):
    return 1 / (1 + np.exp(-x))


def mean_share(mean_logit: float, seed_sd: float) -> float:
    """The expected share of `shares`, by Gauss and Hermite's rule."""
    x, weight = np.polynomial.hermite_e.hermegauss(60)
    return float(logistic(mean_logit + math.sqrt(2) * seed_sd * x) @ weight / weight.sum())


SCENARIOS = [
    Scenario("pairs: seeds differ", over_pairs(1, 0), 0.0),
    Scenario("pairs: only pairs differ", over_pairs(0, 1), 0.0),
    Scenario("pairs: both", over_pairs(1, 1.5), 0.0),
    Scenario("pairs at two k: both", over_pairs(1, 1.5, ks=2), 0.0),
    Scenario("pairs: products of seeds' effects", products, 0.0),
    Scenario("pairs, as many as seeds: both", sampled, 0.0),
    Scenario("pairs: shares of 30, mean 0.06", shares(-3, 0.5, 30), mean_share(-3, 0.5)),
    Scenario("pairs: shares of 100, mean 0.06", shares(-3, 0.5, 100), mean_share(-3, 0.5)),
    Scenario("pairs: shares of 30, mean 0.02", shares(-4, 0.5, 30), mean_share(-4, 0.5)),
    Scenario("seeds: normal", of_seeds(lambda rng, seeds: rng.normal(0, 1, seeds)), 0.0),
    Scenario(
        "seeds: log-normal, skewness 1.75", of_seeds(lambda rng, seeds: rng.lognormal(0, 0.5, seeds)), math.exp(0.125)
    ),
    Scenario(
        "pairs: seeds differ, exponential, skewness 2",
        skewed_seeds(lambda rng, seeds: rng.exponential(1, seeds)),
        2.0,
        promised=False,
    ),
    Scenario(
        "pairs: one seed in five is another kind",
        skewed_seeds(lambda rng, seeds: (rng.random(seeds) < 0.2) + rng.normal(0, 0.05, seeds)),
        0.4,
        promised=False,
    ),
]


def ours(values_P: np.ndarray, left: list[int], right: list[int], rng: np.random.Generator) -> Ends:
    return over_seeds(values_P, left, right)


def resampled(values_P: np.ndarray, left: list[int], right: list[int], rng: np.random.Generator) -> Ends:
    """Percentiles of the mean over 400 resamples of the seeds."""
    seeds = max(right) + 1
    times_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=400)
    weight_RP = times_RS[:, left] * np.where(np.equal(left, right), 1, times_RS[:, right])
    weight_RP = weight_RP[weight_RP.sum(axis=1) > 0]
    low, high = np.quantile(weight_RP @ values_P / weight_RP.sum(axis=1), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return low, high


def dyadic(values_P: np.ndarray, left: list[int], right: list[int], rng: np.random.Generator) -> Ends:
    """Products of residuals of all numbers that have a seed in common; Student's t, and S / (S - 1)."""
    seeds, rest_P = max(right) + 1, values_P - values_P.mean()
    has_SP = np.array([np.equal(left, seed) | np.equal(right, seed) for seed in range(seeds)]).astype(float)
    common_PP = (has_SP.T @ has_SP > 0).astype(float)
    variance = max(0.0, float(rest_P @ common_PP @ rest_P)) / values_P.size**2 * seeds / (seeds - 1)
    half = float(stdtrit(seeds - 1, (1 + COVERAGE) / 2)) * math.sqrt(variance)
    return values_P.mean() - half, values_P.mean() + half


METHODS = {"ours": ours, "resampled": resampled, "dyadic-robust": dyadic}


@dataclass(frozen=True)
class Held:
    """What came of many draws of one scenario."""

    coverage: float
    """share of the intervals that have the truth"""
    width: float
    """mean width, in widths of the interval of an endless number of sweeps, 2 x 1.96 deviations of the mean"""
    none: float
    """share of draws without an interval"""


def held(scenario: Scenario, method: str, seeds: int, times: int, seed: int = 0) -> Held:
    rng = np.random.default_rng([seed, seeds])
    inside, widths, means, none = 0, [], [], 0
    for _ in range(times):
        values_P, left, right = scenario.draw(rng, seeds)
        means.append(values_P.mean())
        # Equal values have no interval in the package; the others are not blamed for theirs.
        ends = None if equal(values_P) else METHODS[method](values_P, left, right, rng)
        if ends is None:
            none += 1
            continue
        inside += ends[0] <= scenario.truth <= ends[1]
        widths.append(ends[1] - ends[0])
    return Held(inside / (times - none), float(np.mean(widths) / (3.92 * np.std(means))), none / times)


def difference_held(seeds: int, times: int, both_ways: bool, seed: int = 0) -> float:
    """Coverage for the difference of two groups of pairs over the same seeds: another arm's pairs of these seeds, or,
    both_ways, pairs of one seed at two k against pairs of two seeds at one.
    """
    rng, inside = np.random.default_rng([seed, seeds]), 0
    left, right = pairs(seeds)
    across = tuple(Origin.of(a, b, 16, 16) for a, b in zip(left, right, strict=True))
    within = tuple(Origin.of(a, a, 16, 32) for a in range(seeds))
    for _ in range(times):
        effect_S, other_S = rng.normal(0, 1, seeds), rng.normal(0, 0.5, seeds)
        second = Sample(tuple(effect_S[left] + effect_S[right] + rng.normal(0, 0.5, len(left))), across)
        if both_ways:
            first = Sample(tuple(2 * effect_S + other_S + rng.normal(0, 0.5, seeds)), within)
        else:
            turned_S = effect_S + other_S
            first = Sample(tuple(turned_S[left] + turned_S[right] + rng.normal(0, 0.5, len(left))), across)
        ends = difference(first, second).interval
        assert ends is not None
        inside += ends[0] <= 0 <= ends[1]
    return inside / times


SHARES = np.linspace(0.002, 0.998, 499)
"""True shares of which the worst is looked for."""


def share_held(
    seeds: int, least: int, own: Callable[[int, int], tuple[float, float]] | None = None
) -> tuple[float, float]:
    """Least chance, over true shares, that a feature's interval has the true share, and that share.

    least 0: a latent of one seed's core, which is in so many of the others. least 1: a feature of the list, each of
    which stands there once, however many seeds have it. least 2: one of those that were found again. own: the interval,
    from in_seeds and seeds.
    """
    own = own or (lambda in_seeds, seeds: of_share(in_seeds - 1, seeds - 1))
    worst = (1.0, math.nan)
    ends = {found: own(found, seeds) for found in range(1, seeds + 1)}
    for share in SHARES:
        if least == 0:
            chance = {found: binomial(found - 1, seeds - 1, share) for found in ends}
        else:
            chance = {found: binomial(found, seeds, share) if found >= least else 0.0 for found in ends}
        has = sum(chance[found] for found, (low, high) in ends.items() if low <= share <= high) / sum(chance.values())
        worst = min(worst, (float(has), float(share)))
    return worst


def binomial(hits: int, of: int, share: float) -> float:
    return float(comb(of, hits) * share**hits * (1 - share) ** (of - hits))


def wilson_of_all(in_seeds: int, seeds: int) -> tuple[float, float]:
    """Wilson's interval of in_seeds of seeds, the seed in which it was found among them."""
    z, share = 1.959963984540054, in_seeds / seeds
    centre = (share + z * z / (2 * seeds)) / (1 + z * z / seeds)
    half = z * math.sqrt(share * (1 - share) / seeds + z * z / (4 * seeds**2)) / (1 + z * z / seeds)
    return max(0.0, centre - half), min(1.0, centre + half)


SEEDS = (4, 6, 8, 16)


def means_table(times: int) -> list[str]:
    head = ["what differs", *(f"ours, {seeds}" for seeds in SEEDS), "width, 4", "width, 8", "none, 4"]
    head += [f"{method}, {seeds}" for method in ("resampled", "dyadic-robust") for seeds in (4, 8)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for scenario in SCENARIOS:
        found = {seeds: held(scenario, "ours", seeds, times) for seeds in SEEDS}
        others = [
            held(scenario, method, seeds, times).coverage
            for method in ("resampled", "dyadic-robust")
            for seeds in (4, 8)
        ]
        row = [scenario.name + ("" if scenario.promised else " *")]
        row += [f"{found[seeds].coverage:.3f}" for seeds in SEEDS]
        row += [f"{found[4].width:.2f}", f"{found[8].width:.2f}", f"{found[4].none:.3f}"]
        row += [f"{value:.3f}" for value in others]
        print(" | ".join(row), flush=True)
        lines.append("| " + " | ".join(row) + " |")
    return lines


def differences_table(times: int) -> list[str]:
    lines = ["| difference | " + " | ".join(f"{seeds} seeds" for seeds in SEEDS) + " |", "|---|" + "---:|" * len(SEEDS)]
    for name, both_ways in (
        ("two arms, pairs of the same seeds", False),
        ("one seed at two k, two seeds at one k", True),
    ):
        row = [f"{difference_held(seeds, times // 4, both_ways):.3f}" for seeds in SEEDS]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return lines


def shares_table() -> list[str]:
    cases: Sequence[tuple[str, int, Callable[[int, int], tuple[float, float]] | None]] = (
        ("ours, a latent of one core", 0, None),
        ("ours, a feature of the list", 1, None),
        ("ours, of those found again", 2, None),
        ("Wilson over all seeds, a feature of the list", 1, wilson_of_all),
    )
    lines = [
        "| interval, of what | " + " | ".join(f"{seeds} seeds" for seeds in SEEDS) + " |",
        "|---|" + "---:|" * len(SEEDS),
    ]
    for name, least, own in cases:
        row = [f"{chance:.3f} at {share:.3f}" for chance, share in (share_held(seeds, least, own) for seeds in SEEDS)]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the tables there; what stands below the marker is kept")
    parser.add_argument("--times", type=int, default=4000, help="draws of each scenario")
    args = parser.parse_args()
    tables = [means_table(args.times), differences_table(args.times), shares_table()]
    if args.output is not None:
        write(args.output, tables, args.times)


MARKER = "<!-- below: kept by hand -->"


def write(path: Path, tables: list[list[str]], times: int) -> None:
    kept = path.read_text().partition(MARKER)[2] if path.exists() else "\n"
    means, differences, shares_of = ("\n".join(table) for table in tables)
    deviation = math.sqrt(0.05 * 0.95 / times)
    path.write_text(f"""# How often the 95 % intervals hold the truth

Made by `python jobs/bench/interval_coverage.py --output {path} --times {times}`.

{times} draws each, so that 0.95 is known to {deviation:.4f}; numbers after a comma are seeds. Widths: of ours, in
widths of the interval that endlessly many sweeps would give; none: draws whose values were all equal, which have no
interval. *: not promised, see below.

## Means over pairs and over seeds

{means}

## Differences of two groups over the same seeds ({times // 4} draws)

{differences}

## Reproducibility: the worst true share, by exact counting

{shares_of}

{MARKER}{kept}""")


if __name__ == "__main__":
    main()
