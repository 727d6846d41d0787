"""Samples: one quantity, measured once a chain or once a pair of chains, and what two of them can be compared by.

Shape letters: P values, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dmsae_ray.compare import interval
from dmsae_ray.compare.interval import Spread
from dmsae_ray.compare.pair import PairResult


@dataclass(frozen=True)
class Origin:
    """What a value was measured on: a chain, which has its seed and k twice, or a pair of chains."""

    seeds: tuple[int, int]
    ks: tuple[int, int]

    @staticmethod
    def of(seed_a: int, seed_b: int, k_a: int, k_b: int) -> Origin:
        """The same for (a, b) and (b, a)."""
        (first, k_first), (second, k_second) = sorted([(seed_a, k_a), (seed_b, k_b)])
        return Origin((first, second), (k_first, k_second))


@dataclass(frozen=True)
class Sample:
    """Values with their origins."""

    values: tuple[float, ...]
    origins: tuple[Origin, ...]
    within: tuple[float, float] | None = None
    """range that such a value has, if it has one"""

    @property
    def seeds(self) -> frozenset[int]:
        return frozenset(seed for origin in self.origins for seed in origin.seeds)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    def spread(self) -> Spread | None:
        """None without a value."""
        return interval.spread(self.values, *self._sides(), self.within)

    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean over seeds; None where there is none (`interval.mean_variance`)."""
        return interval.over_seeds(np.array(self.values), *self._sides(), self.within)

    def variance(self) -> tuple[float, int] | None:
        """Of the mean, with its degrees of freedom (`interval.mean_variance`)."""
        return interval.mean_variance(np.array(self.values), *self._sides())

    def only(self, keep: Callable[[Origin], bool]) -> Sample:
        """The values of some of the origins."""
        kept = [place for place, origin in enumerate(self.origins) if keep(origin)]
        return Sample(
            tuple(self.values[place] for place in kept), tuple(self.origins[place] for place in kept), self.within
        )

    def at_k(self, k: int) -> Sample:
        """The values of chains of this k, and of pairs of them."""
        return self.only(lambda origin: origin.ks == (k, k))

    def without(self, seed: int) -> Sample:
        """The values that this seed has no part in."""
        return self.only(lambda origin: seed not in origin.seeds)

    def by_origin(self) -> dict[Origin, float]:
        """Mean of the values of each origin."""
        found: dict[Origin, list[float]] = {}
        for origin, value in zip(self.origins, self.values, strict=True):
            found.setdefault(origin, []).append(value)
        return {origin: float(np.mean(values)) for origin, values in found.items()}

    def _sides(self) -> tuple[list[int], list[int]]:
        return [origin.seeds[0] for origin in self.origins], [origin.seeds[1] for origin in self.origins]


def of_pairs(
    pairs: Sequence[PairResult], values: Sequence[float | None], within: tuple[float, float] | None = None
) -> Sample:
    """What was measured of pairs of chains; None where it was not. within: range that such a value has."""
    known = [(pair, value) for pair, value in zip(pairs, values, strict=True) if value is not None]
    return Sample(
        tuple(value for _, value in known),
        tuple(Origin.of(pair.seed_a, pair.seed_b, pair.k_a, pair.k_b) for pair, _ in known),
        within,
    )


@dataclass(frozen=True)
class Difference:
    """One quantity less another, over what both were measured on."""

    first: float
    """mean of the first one there"""
    second: float
    interval: tuple[float, float] | None
    """95 % interval of first - second; None where there is none"""
    over: str
    """what it was taken over, in words"""


def difference(first: Sample, second: Sample) -> Difference:
    """Like with like: over the chains or pairs that both have; where there are none (one is of pairs, one of chains, or
    the pairs differ in something else) over the k and the seeds that both have, a seed left out of both at a time;
    where there is no seed in common, over all, as two independent means.
    """
    if both := set(first.origins) & set(second.origins):
        first, second = (sample.only(both.__contains__) for sample in (first, second))
        of_first, of_second = first.by_origin(), second.by_origin()
        paired = Sample(tuple(of_first[origin] - of_second[origin] for origin in of_first), tuple(of_first))
        ours, theirs = (float(np.mean(list(values.values()))) for values in (of_first, of_second))
        return Difference(ours, theirs, paired.interval(), f"the same {_words(paired)}")
    first, second, same_k = _at_common_k(first, second)
    seeds = first.seeds & second.seeds
    inside = [sample.only(lambda origin: seeds.issuperset(origin.seeds)) for sample in (first, second)]
    difference = first.mean - second.mean
    if all(sample.values for sample in inside):
        first, second = inside
        difference = first.mean - second.mean
        found = _left_out_together(first, second)
        over = f"the same {_seeds(seeds)}: {_words(first)} against {_words(second)}"
    else:
        one, other = first.variance(), second.variance()
        found = None if one is None or other is None else (one[0] + other[0], min(one[1], other[1]))
        over = f"no seed in common: {_words(first)} against {_words(second)}"
    ends = None if found is None else interval.around(difference, *found)
    return Difference(first.mean, second.mean, ends, over + ("" if same_k else ", at different k"))


def _at_common_k(first: Sample, second: Sample) -> tuple[Sample, Sample, bool]:
    """Both at the k that they have in common, and whether there is one."""
    ks = {origin.ks for origin in first.origins} & {origin.ks for origin in second.origins}
    if not ks:
        return first, second, False
    return first.only(lambda origin: origin.ks in ks), second.only(lambda origin: origin.ks in ks), True


def _left_out_together(first: Sample, second: Sample) -> tuple[float, int] | None:
    """Variance and degrees of freedom of the difference of two means over the same seeds, by the jackknife of
    `interval.mean_variance` on both at once: what a seed does to both cancels.
    """
    seeds = sorted(first.seeds & second.seeds)
    if len(seeds) < interval.SEEDS_FOR_INTERVAL:
        return None
    without = [(first.without(seed), second.without(seed)) for seed in seeds]
    if not all(sample.values for both in without for sample in both):
        return None
    means_S = np.array([ours.mean - theirs.mean for ours, theirs in without])
    if interval.equal(means_S):
        return None
    count = min(len(seeds), len(first.values), len(second.values))
    return (len(seeds) - 1) / len(seeds) * float(((means_S - means_S.mean()) ** 2).sum()), count - 1


def _words(sample: Sample) -> str:
    """How many values of what: `6 pairs of seeds 0 to 3 at k 16`."""
    pairs = any(len({*zip(origin.seeds, origin.ks, strict=True)}) > 1 for origin in sample.origins)
    ks = sorted({k for origin in sample.origins for k in origin.ks})
    count = len(sample.values)
    what = f"{'pair' if pairs else 'chain'}{'s' * (count != 1)}"
    return f"{count} {what} of {_seeds(sample.seeds)} at k {', '.join(map(str, ks))}"


def _seeds(seeds: frozenset[int]) -> str:
    ordered = sorted(seeds)
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"seeds {ordered[0]} to {ordered[-1]}"
    return f"seed{'s' * (len(ordered) > 1)} {', '.join(map(str, ordered))}"
