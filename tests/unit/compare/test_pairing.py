"""What two chains differ in, and which pairs are compared."""

from collections import Counter
from dataclasses import replace

import pytest
from compared_chains import named

from dmsae_ray.compare.pairing import differences, differs, pairs_across, pairs_within, sample

BASE = named(0, 16)
TABLE = [
    ({"seed": 1, "data_seed": 1}, "seed"),
    ({"seed": 1}, "init"),
    ({"data_seed": 1}, "data"),
    ({"part": (0, 2)}, "data"),
    ({"part": (0, 2), "data_seed": 1}, "data"),
    ({"seed": 1, "part": (1, 2)}, "seed"),
    ({"k": 32}, "k"),
    ({"k": 32, "seed": 1, "data_seed": 1}, "both"),
    ({"k": 32, "seed": 1}, "both"),
    ({"k": 32, "data_seed": 1}, "both"),
    ({"rest": "other"}, "arm"),
    ({"rest": "other", "seed": 1, "k": 32}, "arm"),
]


@pytest.mark.parametrize("changes, expected", TABLE)
def test_what_two_chains_differ_in(changes, expected):
    other = replace(BASE, label="other", **changes)
    assert differs(BASE, other) == differs(other, BASE) == expected
    assert set(differences(BASE, other)) == set(changes), "nothing that differs is dropped"


def test_chains_with_everything_in_common_are_refused():
    with pytest.raises(ValueError, match="again are the same in seed, data, k and all other fields"):
        pairs_within([BASE, replace(BASE, label="again")])
    with pytest.raises(ValueError, match="two chains are called base-seed0-k16"):
        pairs_within([BASE, replace(BASE, seed=1)])


def study():
    base = [named(seed, k) for k in (16, 32) for seed in (0, 1)]
    random = [replace(chain, arm="random", label=f"{chain.label}-random", rest="random") for chain in base]
    order = [named(0, 16, arm="order", data_seed=9)]
    return base + random + order


def test_pairs_within_arms_and_across_at_equal_seed_and_k():
    pairs = pairs_within(study())
    assert Counter(pair.group for pair in pairs) == {
        "base/seed": 2,
        "base/k": 2,
        "base/both": 2,
        "random/seed": 2,
        "random/k": 2,
        "random/both": 2,
        "base~random/arm": 4,
        "base~order/data": 1,
        "random~order/arm": 1,
    }
    assert all((pair.a.seed, pair.a.k) == (pair.b.seed, pair.b.k) for pair in pairs if pair.a.arm != pair.b.arm)
    (across,) = [pair for pair in pairs if pair.group == "random~order/arm"]
    assert across.differences == ("data_seed", "rest")


def test_a_sample_is_drawn_per_group_and_does_not_depend_on_the_order():
    chains = [named(seed, k) for seed in range(6) for k in (8, 16)]
    pairs = pairs_within(chains)
    taken = sample(pairs, 5, seed=0)
    assert Counter(pair.group for pair in taken) == {"base/seed": 5, "base/k": 5, "base/both": 5}
    assert taken == sample(pairs, 5, seed=0) == [pair for pair in pairs if pair in taken]

    def names(some):
        return {frozenset((pair.a.label, pair.b.label)) for pair in some}

    assert names(sample(pairs_within(chains[::-1]), 5, seed=0)) == names(taken)
    assert names(sample(pairs, 5, seed=1)) != names(taken)
    assert sample(pairs, 100, seed=0) == pairs
    # Another chain puts out few of those drawn before.
    more = sample(pairs_within([*chains, named(6, 8)]), 5, seed=0)
    assert len(names(more) & names(taken)) >= 10


def test_pairs_across_two_sweeps():
    left = [named(seed, 16, label=f"x:{seed}") for seed in (0, 1)]
    right = [named(seed, 16, label=f"y:{seed}", rest="wider") for seed in (0, 1)] + [
        named(0, 32, label="y:k32"),
        named(0, arm="random", label="y:r"),
    ]
    pairs = pairs_across(left, right)
    assert [(pair.a.label, pair.b.label, pair.differs) for pair in pairs] == [
        ("x:0", "y:0", "arm"),
        ("x:0", "y:1", "arm"),
        ("x:1", "y:0", "arm"),
        ("x:1", "y:1", "arm"),
    ]
    # A chain that both sweeps have is one chain; with the other sweep's other seeds it is compared.
    same = [replace(chain, label=f"z:{chain.seed}") for chain in left]
    assert [(pair.a.label, pair.b.label, pair.differs) for pair in pairs_across(left, same)] == [
        ("x:0", "z:1", "seed"),
        ("x:1", "z:0", "seed"),
    ]
    with pytest.raises(ValueError, match="two chains are called x:0"):
        pairs_across(left, left)
