"""Results as named numbers."""

from __future__ import annotations

import pytest

from dmsae_ray.results.numbers import METRICS, numbers_of


def row(arm="base", seed=0, k=16, last=True, **values):
    return {"arm": arm, "seed": seed, "k": k, "last": last, "chain": f"seed{seed}-k{k}", **values}


EVALUATION = [
    row(fvu=0.9, last=False),
    row(fvu=0.2, core_l0=5.0, jaccard=None, decoder_drift={"mean": 0.9}, attribution={"split_half_jaccard": 0.8}),
    row(
        seed=1,
        fvu=0.4,
        core_l0=None,
        decoder_drift=None,
        prefixes=[{"name": "core", "latents": 20, "fvu": 0.6}, {"name": "0", "fvu": 0.5}],
    ),
    row(k=32, fvu=0.1),
    row("relu", fvu=0.3),
]
SPREAD = {"mean": 0.5, "min": 0.4, "max": 0.6, "interval": [0.45, 0.55]}
COMPARISON = {
    "summary": {
        "groups": {
            "base/seed": {
                "pairs": 6,
                "scored": 6,
                "seeds": 4,
                "pw_mcc": SPREAD,
                "overlap": None,
                "nulls": {"covariance": {"p99": SPREAD | {"mean": 0.3, "interval": None}}},
            },
            "base~relu/arm": {"pairs": 2, "scored": 0, "seeds": 0, "pw_mcc": None},
        }
    }
}
CONSENSUS = {
    "seeds": [0, 1, 2],
    "core_size": 2,
    "groups": [{"in_seeds": 3}, {"in_seeds": 2}, {"in_seeds": 1}, {"in_seeds": 1}],
    "rediscovery_summary": {
        "plain/k16": {"consensus": {"found": SPREAD}, "matched": {"found": SPREAD | {"mean": 0.1}, "mmcs": None}}
    },
}


def test_numbers_are_means_of_the_last_cycle_over_an_arm_s_chains_of_one_k():
    numbers = numbers_of(EVALUATION, None, None)
    assert numbers["evaluation.base.k16.fvu"] == pytest.approx(0.3) and numbers["evaluation.base.k32.fvu"] == 0.1
    assert numbers["evaluation.relu.k16.fvu"] == 0.3
    assert numbers["evaluation.base.k16.core_l0"] == 5.0, "over those that have one"
    assert numbers["evaluation.base.k16.decoder_drift.mean"] == 0.9
    assert numbers["evaluation.base.k16.prefix.core.fvu"] == 0.6 and numbers["evaluation.base.k16.prefix.0.fvu"] == 0.5
    assert numbers["evaluation.base.k16.split_half_jaccard"] == 0.8
    assert "evaluation.base.k16.jaccard" not in numbers, "what was not measured is no number"
    assert (numbers["chains.base"], numbers["chains.relu"]) == (3, 1)
    assert len(set(METRICS)) == len(METRICS)


def test_numbers_of_groups_have_their_intervals_and_nulls_beside_them():
    numbers = numbers_of([], COMPARISON, CONSENSUS)
    place = "consistency.base.seed."
    assert (numbers[place + "pw_mcc"], numbers[place + "pw_mcc.low"], numbers[place + "pw_mcc.high"]) == (
        0.5,
        0.45,
        0.55,
    )
    assert numbers[place + "nulls.covariance.p99"] == 0.3 and place + "nulls.covariance.p99.low" not in numbers
    assert place + "overlap" not in numbers and "consistency.base~relu.arm.pw_mcc" not in numbers
    assert numbers["consistency.base~relu.arm.pairs"] == 2
    assert (
        numbers["consensus.in_two_seeds"] == 2
        and numbers["consensus.share_in_two_seeds"] == 0.5
        and numbers["consensus.in_all_seeds"] == 1
    )
    assert (
        numbers["rediscovery.plain.k16.consensus.found"] == 0.5
        and numbers["rediscovery.plain.k16.matched.found"] == 0.1
    )


def test_pairs_of_one_k_have_a_mean_of_their_own():
    pairs = [
        {"group": "base/seed", "k_a": k_a, "k_b": k_b, "pw_mcc": value, "overlap": None, "activation": value / 2}
        for k_a, k_b, value in ((16, 16, 0.4), (16, 16, 0.6), (32, 32, 0.1), (16, 32, 0.9))
    ]
    numbers = numbers_of([], {"summary": {"groups": {}}, "pairs": pairs}, None)
    assert numbers == pytest.approx(
        {
            "consistency.base.seed.k16.pw_mcc": 0.5,
            "consistency.base.seed.k16.activation": 0.25,
            "consistency.base.seed.k32.pw_mcc": 0.1,
            "consistency.base.seed.k32.activation": 0.05,
        }
    )


def test_nothing_gives_no_number():
    assert numbers_of([], None, None) == {}
    assert numbers_of([], {"summary": {"groups": {}}}, {"seeds": [0], "core_size": 0, "groups": []}) == {
        "consensus.groups": 0,
        "consensus.core_size": 0,
    }
    assert numbers_of([row(fvu=float("nan"))], None, None) == {"chains.base": 1}
