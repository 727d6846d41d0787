"""Pairs of chains, compared."""

import json
from dataclasses import replace

import pytest
import torch
from compared_chains import SETTINGS, compare_all, comparer, core_of, latents, make_chain

from dmsae_ray.compare.match import hungarian, pw_mcc
from dmsae_ray.compare.pair import PairResult
from dmsae_ray.compare.pairing import paired


def renamed(chain, **changes):
    return replace(chain, chain=replace(chain.chain, **changes))


def compare_pair(a, b, settings=SETTINGS, **kwargs):
    own = comparer(settings, **kwargs)
    return own.pair(own.side(a), own.side(b))


def test_equal_cores_score_one_and_above_every_null():
    pair = compare_pair(make_chain(0, common=10), make_chain(1, common=10))
    assert pair.pw_mcc == pytest.approx(1) and pair.overlap == 1 and pair.shared == 10
    assert pair.mmcs_ab == pytest.approx(1) and pair.mmcs_ba == pytest.approx(1)
    assert pair.differs == "seed" and (pair.size_a, pair.size_b) == (10, 10)
    for null in pair.nulls.values():
        assert null.available and null.p99 < 0.8 and null.size == (10, 10)
    assert pair.nulls["cycle0"].core_pw_mcc_same_size == pytest.approx(1)
    assert {name: null.available for name, null in pair.dictionary_nulls.items()} == {
        "covariance": True,
        "matched_density": False,
        "cycle0": True,
    }
    assert pair.dictionary_nulls["covariance"].mean < pair.pw_mcc_dictionary < 1
    assert "no free latents" in pair.dictionary_nulls["matched_density"].reason
    # Whole rows are equal, thresholds and biases too: so are the activations, and no null's are.
    assert pair.activation == pytest.approx(1, abs=1e-6) and (
        pair.activation_pairs,
        pair.activation_left_out,
        pair.activation_rows,
    ) == (
        10,
        0,
        512,
    )
    assert pair.nulls["covariance"].activation_mean is None
    for name in ("matched_density", "cycle0"):
        assert pair.nulls[name].activation_p95 < 0.8


def test_a_core_against_itself_scores_one_everywhere():
    chain = make_chain(0)
    pair = compare_pair(chain, renamed(chain, label="copy", seed=1))
    for value in (
        pair.pw_mcc,
        pair.overlap,
        pair.mmcs_ab,
        pair.mmcs_ba,
        pair.mmcs,
        pair.activation,
        pair.pw_mcc_dictionary,
    ):
        assert value == pytest.approx(1, abs=1e-6)
    assert pair.shared == 10 and pair.differs == "init" and pair.nulls["cycle0"].mean == pytest.approx(1)
    assert pair.dictionary_nulls["cycle0"].mean == pytest.approx(1)


def test_disjoint_orthogonal_cores_score_zero_everywhere():
    eye = torch.eye(16)
    saes = [latents(torch.cat([own, eye])) for own in (eye[:8], eye[8:])]
    a, b = (
        replace(make_chain(seed), sae=sae, core=core_of(sae, range(8), seed=seed), core_ids_C=torch.arange(8))
        for seed, sae in enumerate(saes)
    )
    pair = compare_pair(a, b, count=20_000)
    assert pair.pw_mcc == pair.overlap == pair.shared == 0 and abs(pair.activation) < 0.01
    assert pair.mmcs_ab == pair.mmcs_ba == 1, "every direction is somewhere in the other SAE"


def test_unrelated_cores_lie_within_the_nulls():
    pair = compare_pair(make_chain(0), make_chain(1, size=14))
    covariance, density = pair.nulls["covariance"], pair.nulls["matched_density"]
    assert abs(pair.pw_mcc - covariance.mean) < 4 * (covariance.p99 - covariance.mean)
    assert abs(pair.pw_mcc - density.mean) < 4 * (density.p99 - density.mean)
    assert covariance.size == density.size == (10, 14)


def test_half_a_common_core():
    pair = compare_pair(make_chain(0, common=5), make_chain(1, common=5))
    assert 5 <= pair.shared <= 6 and pair.overlap == pair.shared / 10 and pair.pw_mcc < 0.95


@pytest.mark.parametrize("size", [0, 1])
def test_a_core_too_small_has_no_score(size):
    pair = compare_pair(make_chain(0, size=size), make_chain(1))
    assert [pair.overlap, pair.shared, pair.pw_mcc, pair.mmcs_ab, pair.mmcs_ba, pair.mmcs, pair.activation] == [
        None
    ] * 7
    assert f"cores of {size} and 10" in pair.reason
    assert not any(null.available for null in pair.nulls.values())
    assert PairResult.from_dict(json.loads(json.dumps(pair.to_dict()))) == pair
    assert pair.pw_mcc_dictionary is not None, "the dictionaries are there all the same"


def test_dictionaries_are_matched_by_prefix():
    a, b = make_chain(0), make_chain(1)
    b.sae.W_dec_ND[:8] = a.sae.W_dec_ND[:8]
    pair = compare_pair(a, b, replace(SETTINGS, max_latents=8))
    assert pair.dictionary_size == 8 and pair.pw_mcc_dictionary == pytest.approx(1)


@pytest.mark.parametrize(
    "first, words",
    [
        (make_chain(0, cycle=0), "base-seed0-k16 is itself"),
        (replace(make_chain(0), start_has_core=True), "base-seed0-k16 began with"),
    ],
)
def test_where_cycle_0_is_no_null(first, words):
    pair = compare_pair(first, make_chain(1))
    for null in (pair.nulls["cycle0"], pair.dictionary_nulls["cycle0"]):
        assert not null.available and words in null.reason and null.mean is not None


def test_a_small_cycle_0_is_set_against_the_best_of_the_cores():
    # Six candidates in cycle 0, so the cores of ten are cut to their six best: the last six, by make_chain's scores.
    a, b = (replace(make_chain(seed, common=4), start_ids_N=torch.tensor([3, 9, 0, 7, 5, 1])) for seed in (0, 1))
    null = compare_pair(a, b).nulls["cycle0"]
    assert null.size == (6, 6)
    best = pw_mcc(hungarian(a.core.W_dec_CD[4:], b.core.W_dec_CD[4:]))
    assert null.core_pw_mcc_same_size == pytest.approx(best) and best < 0.7
    assert null.mean == pytest.approx(
        pw_mcc(hungarian(a.start.W_dec_ND[a.start_ids_N], b.start.W_dec_ND[b.start_ids_N]))
    )


def test_results_survive_json_and_refuse_other_fields():
    pair = compare_pair(make_chain(0), make_chain(1))
    plain = json.loads(json.dumps(pair.to_dict(), allow_nan=False))
    assert PairResult.from_dict(plain) == pair
    with pytest.raises(ValueError, match="unknown fields \\['colour'\\]"):
        PairResult.from_dict(plain | {"colour": 1})
    plain["nulls"]["cycle0"].pop("p99")
    with pytest.raises(ValueError, match="NullResult: missing fields \\['p99'\\]"):
        PairResult.from_dict(plain)


def test_what_cannot_be_compared():
    a, b = make_chain(0), make_chain(1)
    with pytest.raises(ValueError, match="again are the same in seed, data, k"):
        compare_pair(a, renamed(a, label="again"))
    with pytest.raises(ValueError, match="3 dimensions, chain base-seed0-k16 has 16: another dataset"):
        compare_pair(a, b, d=3)
    other = replace(b, core=core_of(b.sae, range(0, 20, 2), seed=1, hook="elsewhere"))
    with pytest.raises(ValueError, match="of different hooks, h and elsewhere"):
        compare_pair(a, other)
    with pytest.raises(ValueError, match="core is not of this SAE"):
        replace(a, core_ids_C=torch.arange(3))


def test_all_pairs_whatever_was_compared_before():
    chains = [make_chain(seed, k) for seed in (0, 1) for k in (8, 16)]
    pairs = compare_all(chains, comparer())
    assert [pair.differs for pair in pairs] == ["k", "seed", "both", "both", "seed", "k"]
    assert pairs[1] == compare_pair(chains[0], chains[2])
    assert compare_all(chains[:1], comparer()) == []


def test_a_result_takes_the_names_that_its_chains_have_now():
    a, b = make_chain(0), make_chain(1)
    pair = compare_pair(a, b)
    now = pair.of(paired(replace(a.chain, label="x", arm="old"), replace(b.chain, label="y", arm="old")))
    assert (now.a, now.b, now.arm_a, now.group, now.pw_mcc) == ("x", "y", "old", "old/seed", pair.pw_mcc)
