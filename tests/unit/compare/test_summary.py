"""Pairs in a few numbers, with the uncertainty of the seeds."""

import json
from dataclasses import replace

import numpy as np
import pytest
from compared_chains import compare_all, comparer, make_chain

from dmsae_ray.compare.summary import NULL_NUMBERS, SCORES, summarise
from dmsae_ray.show.columns import group_columns

(MODEL,) = compare_all([make_chain(0), make_chain(1)], comparer())


def scored_pairs(scores: dict[tuple[int, int], float], **changes):
    return [
        replace(MODEL, a=f"seed{a}", b=f"seed{b}", seed_a=a, seed_b=b, pw_mcc=score, overlap=score / 2, **changes)
        for (a, b), score in scores.items()
    ]


def test_intervals_need_four_seeds():
    three = {(0, 1): 0.2, (0, 2): 0.3, (1, 2): 0.4}
    found = summarise(scored_pairs(three)).groups["base/seed"].scores["pw_mcc"]
    assert found.interval is None and found.values == (0.2, 0.3, 0.4), "the raw values stand for the interval"
    assert found.mean == pytest.approx(0.3) and (found.min, found.max, found.n) == (0.2, 0.4, 3)
    # Seed 3 is the odd one out: an interval over pairs would miss that its three pairs are one chain's doing.
    four = {**three, (0, 3): 0.9, (1, 3): 0.9, (2, 3): 0.9}
    group = summarise(scored_pairs(four)).groups["base/seed"]
    low, high = group.scores["pw_mcc"].interval
    # Without seed 3 the mean is 0.3, without one of the others 0.7 to 0.733; Student's t of three degrees of freedom.
    means = np.array([0.3, 2.2 / 3, 2.1 / 3, 2.0 / 3])
    half = 3.1824463 * np.sqrt(3 / 4 * ((means - means.mean()) ** 2).sum())
    assert (low, high) == pytest.approx((0.6 - half, 1)), "no mean of cosines is above 1"
    assert group.seeds == 4 and group.scores["pw_mcc"].values is None
    assert group.scores["overlap"].interval == pytest.approx((0, 0.3 + half / 2)), "nor a share below 0"
    assert summarise(scored_pairs(four)) == summarise(scored_pairs(four))


def test_equal_scores_have_no_interval():
    """They say nothing of how far another seed would be: an interval of no width would promise what nobody knows."""
    pairs = scored_pairs({(a, b): 0.5 for a in range(5) for b in range(a)})
    score = summarise(pairs).groups["base/seed"].scores["pw_mcc"]
    assert (score.mean, score.interval, score.n) == (0.5, None, 10)
    assert json.loads(json.dumps(summarise(pairs).to_dict(), allow_nan=False))["groups"]["base/seed"]["pw_mcc"] == (
        json.loads(json.dumps(score.to_dict()))
    )


def test_groups_are_by_arms_and_by_what_differs():
    pairs = [
        *scored_pairs({(0, 1): 0.2}),
        *scored_pairs({(0, 0): 0.4, (1, 1): 0.6}, group="base~random/arm", differs="arm"),
    ]
    groups = summarise(pairs, of={"base/seed": 9, "base~random/arm": 2}).groups
    assert {name: (group.pairs, group.of, group.seeds) for name, group in groups.items()} == {
        "base/seed": (1, 9, 2),
        "base~random/arm": (2, 2, 2),
    }
    assert groups["base~random/arm"].scores["pw_mcc"].mean == pytest.approx(0.5)


def test_every_score_and_every_null_is_summed_up():
    group = summarise([MODEL]).groups["base/seed"]
    for name in SCORES:
        assert group.scores[name].mean == pytest.approx(getattr(MODEL, name))
    for null, own in MODEL.nulls.items():
        for number in NULL_NUMBERS:
            found, value = group.nulls[null].numbers[number], getattr(own, number)
            assert (found is None) == (value is None) and (found is None or found.mean == pytest.approx(value))
    assert group.nulls["covariance"].excess["pw_mcc"].mean == pytest.approx(
        MODEL.pw_mcc - MODEL.nulls["covariance"].mean
    )
    assert group.nulls["covariance"].excess["activation"] is None, "directions have no activations"
    cycle0 = MODEL.nulls["cycle0"]
    assert group.nulls["cycle0"].excess["activation"].mean == pytest.approx(
        cycle0.core_activation_same_size - cycle0.activation_mean
    )
    assert group.dictionary_nulls["matched_density"] is None
    assert group.dictionary_nulls["cycle0"].mean == MODEL.dictionary_nulls["cycle0"].mean


def test_groups_as_columns():
    pairs = [
        *scored_pairs({(a, b): 0.5 + 0.1 * a for a in range(4) for b in range(a)}),
        *scored_pairs({(0, 0): 0.4}, group="base~random/arm"),
    ]
    summary = summarise(pairs).to_dict()
    columns = group_columns({"summary": summary})
    assert columns["group"] == ["base/seed", "base~random/arm"] and {len(column) for column in columns.values()} == {2}
    assert columns["pw_mcc"] == pytest.approx([0.7333333, 0.4]) and columns["pw_mcc low"][1] is None
    assert [columns["pw_mcc low"][0], columns["pw_mcc high"][0]] == summary["groups"]["base/seed"]["pw_mcc"]["interval"]
    assert (
        columns["covariance mean"][0] == pytest.approx(MODEL.nulls["covariance"].mean)
        and columns["covariance activation_mean"] == [None] * 2
    )


def test_a_null_that_is_not_available_is_not_summed_up():
    gone = replace(MODEL.nulls["cycle0"], available=False, reason="no")
    null = summarise([MODEL, replace(MODEL, nulls=MODEL.nulls | {"cycle0": gone})]).groups["base/seed"].nulls["cycle0"]
    assert null.available == 1 and null.numbers["mean"].n == 1
    beaten = replace(MODEL, nulls=MODEL.nulls | {"covariance": replace(MODEL.nulls["covariance"], p99=2.0)})
    lost = replace(MODEL, nulls=MODEL.nulls | {"covariance": replace(MODEL.nulls["covariance"], p99=-2.0)})
    assert summarise([beaten, lost, lost, lost]).groups["base/seed"].nulls["covariance"].above == 0.75


def test_without_a_scored_pair_there_is_no_agreement():
    summary = summarise([])
    assert not summary.available and "two chains" in summary.reason and summary.groups == {}
    summary = summarise(compare_all([make_chain(0, size=1), make_chain(1)], comparer()))
    group = summary.groups["base/seed"]
    assert not summary.available and "cores of 1 and 10" in summary.reason and group.scored == 0
    assert (
        group.scores["pw_mcc"] is None
        and group.nulls["covariance"].above is None
        and group.scores["pw_mcc_dictionary"].n == 1
    )
