"""What was expected before a run, held against planted numbers: as judged, and as printed."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from dmsae_ray.compare.samples import Origin, Sample, difference
from dmsae_ray.config import ExpectConfig
from dmsae_ray.results.expectations import judge
from dmsae_ray.show.columns import expectation_columns
from dmsae_ray.show.terminal.tables import plain_text
from dmsae_ray.show.terminal.verdicts import expectations_table


def of_chains(values: dict[tuple[int, int], float]) -> Sample:
    """values: by (seed, k)."""
    return Sample(tuple(values.values()), tuple(Origin.of(seed, seed, k, k) for seed, k in values))


def of_pairs(effects: dict[int, float], k: int = 16, by: float = 0.0) -> Sample:
    """Pairs of these seeds, each the sum of its seeds' effects."""
    pairs = list(combinations(effects, 2))
    return Sample(tuple(effects[a] + effects[b] + by for a, b in pairs), tuple(Origin.of(a, b, k, k) for a, b in pairs))


def joined(*samples: Sample) -> Sample:
    return Sample(sum((one.values for one in samples), ()), sum((one.origins for one in samples), ()))


def entry_of(samples: dict[str, Sample], value="value", numbers=None, **bounds):
    numbers = {name: sample.mean for name, sample in samples.items()} | (numbers or {})
    (entry,) = judge([ExpectConfig(claim="c", value=value, **bounds)], numbers, samples)["expectations"]
    return entry


FOUR = of_chains({(0, 16): 0.50, (1, 16): 0.52, (2, 16): 0.48, (3, 16): 0.50})
"""Mean 0.5, with an interval of 0.474 to 0.526."""


@pytest.mark.parametrize(
    "bounds, outcome",
    [
        ({"above": 0.47}, "hit"),
        ({"above": 0.49}, "open"),
        ({"above": 0.51}, "open"),
        ({"above": 0.53}, "miss"),
        ({"below": 0.53}, "hit"),
        ({"below": 0.51}, "open"),
        ({"below": 0.47}, "miss"),
    ],
)
def test_the_interval_decides(bounds, outcome):
    entry = entry_of({"value": FOUR}, **bounds)
    assert (entry["outcome"], entry["by"], entry["why"], entry["over"]) == (outcome, "interval", None, None)
    assert entry["interval"] == pytest.approx([0.474, 0.526], abs=5e-4)
    printed = plain_text(expectations_table([entry]))
    assert printed.splitlines()[-1].split()[0] == outcome and "0.474 to 0.526" in printed


def test_fewer_than_four_seeds_give_means_only_and_that_is_said():
    three = {"value": of_chains({(seed, 16): 0.5 + seed / 100 for seed in range(3)})}
    for above, outcome in ((0.4, "hit"), (0.6, "miss")):
        entry = entry_of(three, above=above)
        assert (entry["outcome"], entry["by"], entry["interval"]) == (outcome, "means", None)
        assert "means only" in entry["why"] and f"{outcome} by means" in plain_text(expectations_table([entry]))
    entry = entry_of({}, value="count", numbers={"count": 3.0, "other": 4.0}, below="other")
    assert (entry["outcome"], entry["by"]) == ("hit", "means") and "count and other is no mean" in entry["why"]


def test_what_a_seed_does_to_both_cancels():
    """Seeds differ by 0.1, the two by 0.02 throughout: each mean alone is unsure of it, their difference is not."""
    rng = np.random.default_rng(0)
    effects = dict(enumerate(rng.normal(0.25, 0.1, 5)))
    better = of_pairs({seed: effect + rng.normal(0.01, 0.002) for seed, effect in effects.items()})
    samples = {"value": better, "null": of_pairs(effects)}
    low, high = samples["value"].interval()
    assert low < samples["null"].mean < high, "of itself it says nothing"
    entry = entry_of(samples, above="null")
    assert (entry["outcome"], entry["by"], entry["over"]) == (
        "hit",
        "interval",
        "the same 10 pairs of seeds 0 to 4 at k 16",
    )
    assert entry["interval"][0] < 0.02 < entry["interval"][1] and entry["interval"][1] < 0.05
    assert "difference 0.0" in plain_text(expectations_table([entry]))
    assert entry_of(samples, below="null")["outcome"] == "miss"
    same = {
        "value": of_pairs({seed: effect + rng.normal(0, 0.02) for seed, effect in effects.items()}),
        "null": samples["null"],
    }
    assert entry_of(same, above="null")["outcome"] == entry_of(same, below="null")["outcome"] == "open"


def test_like_is_compared_with_like():
    """An arm that ran two of four seeds at one of two k is held against the grid's pair of those seeds at that k: there
    it agrees more, though less than the grid does on the whole.
    """
    grid = joined(of_pairs({0: 0.1, 1: 0.1, 2: 0.4, 3: 0.4}), of_pairs({0: 0.3, 1: 0.3, 2: 0.4, 3: 0.5}, k=32))
    arm = of_pairs({0: 0.1, 1: 0.1}, by=0.05)
    assert arm.mean < grid.mean
    entry = entry_of({"value": arm, "grid": grid}, above="grid")
    assert (entry["value"], entry["bound"]) == pytest.approx((0.25, 0.2)) and entry["outcome"] == "hit"
    assert entry["over"] == "the same 1 pair of seeds 0, 1 at k 16" and entry["by"] == "means"


def test_pairs_of_one_seed_against_pairs_of_two():
    """No pair is in both: both over the same seeds, and a seed left out of both at a time."""
    rng = np.random.default_rng(1)
    effects = rng.normal(0.25, 0.05, 4)
    across = joined(*(of_pairs(dict(enumerate(effects)), k) for k in (16, 32)))
    within = Sample(
        tuple(2 * effects + 0.1 + rng.normal(0, 0.005, 4)), tuple(Origin.of(seed, seed, 16, 32) for seed in range(4))
    )
    found = difference(within, across)
    assert found.interval[0] < 0.1 < found.interval[1] and found.interval[1] - found.interval[0] < 0.1
    assert found.over == (
        "the same seeds 0 to 3: 4 pairs of seeds 0 to 3 at k 16, 32 against 12 pairs of seeds 0 to 3 at k 16, 32, at "
        "different k"
    )
    assert entry_of({"value": within, "other": across}, above="other")["outcome"] == "hit"
    assert difference(within.only(lambda origin: origin.seeds[0] < 3), across).interval is None


def test_seeds_that_nothing_has_in_common():
    other = of_chains({(seed, 16): 0.6 + (seed % 2) / 100 for seed in range(100, 104)})
    found = difference(other, FOUR)
    assert "no seed in common" in found.over and found.interval[0] < 0.105 < found.interval[1]
    assert entry_of({"value": other, "base": FOUR}, above="base")["outcome"] == "hit"
    assert entry_of({"value": FOUR, "base": other}, above="base")["outcome"] == "miss"
    two = other.only(lambda origin: origin.seeds[0] < 102)
    assert entry_of({"value": two, "base": FOUR}, above="base")["by"] == "means"


def test_a_value_that_does_not_exist_is_never_a_hit():
    entry = entry_of({}, value="none", numbers={"one": 1.0}, below=1e9)
    assert entry["outcome"] == "not available" and entry["value"] is None and "no number none" in entry["why"]
    entry = entry_of({"value": FOUR, "null": FOUR}, above="nul")
    assert entry["outcome"] == "not available" and entry["bound"] is entry["by"] is entry["interval"] is None
    assert entry["why"] == "no number nul in these results (there is null)"


def test_both_bounds_give_two_entries_and_columns():
    entries = judge([ExpectConfig(claim="c", value="value", above=0.4, below=0.5)], {"value": 0.5}, {"value": FOUR})
    assert [entry["outcome"] for entry in entries["expectations"]] == ["hit", "open"]
    columns = expectation_columns(entries["expectations"])
    assert columns["outcome"] == ["hit", "open"] and columns["interval low"] == pytest.approx([0.474] * 2, abs=5e-4)
