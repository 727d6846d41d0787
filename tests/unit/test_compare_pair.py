"""Pairs of chains, and what a sweep says of them."""

import json
from dataclasses import replace

import pytest
import torch

from dmsae_ray.compare.match import hungarian, pw_mcc
from dmsae_ray.compare.pair import ChainResult, CompareSettings, PairResult, compare_all, compare_pair
from dmsae_ray.compare.summary import consistency_matrix, summarise
from dmsae_ray.distill.core import Core

D, WIDTH = 16, 60
COV_DD = torch.eye(D, dtype=torch.float64)
SETTINGS = CompareSettings(draws=20)


def unit_rows(count, seed):
    rows = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def make_chain(seed, k=16, size=10, common=0, cycle=2) -> ChainResult:
    """A chain whose core's first `common` members are the same in all chains, in an order of the chain's own."""
    W_enc_FD, W_dec_FD = unit_rows(WIDTH, 1000 * seed + k), unit_rows(WIDTH, 1000 * seed + k + 1)
    core_ids = torch.arange(size) * 2
    order = torch.randperm(common, generator=torch.Generator().manual_seed(seed))
    W_enc_FD[core_ids[:common]], W_dec_FD[core_ids[:common]] = unit_rows(common, 7)[order], unit_rows(common, 8)[order]
    density_F = torch.full((WIDTH,), 0.1)
    core = Core(
        W_enc_CD=W_enc_FD[core_ids], W_dec_CD=W_dec_FD[core_ids], b_enc_C=torch.zeros(size), b_dec_D=torch.zeros(D),
        scores_C=torch.arange(size, dtype=torch.float64), density_C=density_F[core_ids], latent_ids_C=core_ids, theta=0.0,
        scale=1.0, hook="h", model="m", cycle=cycle, seed=seed, k=k, entered_C=torch.full((size,), cycle),
        selected=((cycle,),) * size,
    )  # fmt: skip
    return ChainResult(
        label=f"seed{seed}-k{k}", seed=seed, k=k, core=core, W_dec_FD=W_dec_FD, W_enc_FD=W_enc_FD, density_F=density_F,
        core_ids=core_ids, cycle0_W_enc_ND=unit_rows(20, seed + 50), cycle0_W_dec_ND=unit_rows(20, seed + 70),
    )  # fmt: skip


def test_equal_cores_score_one_and_above_every_null():
    pair = compare_pair(make_chain(0, common=10), make_chain(1, common=10), COV_DD, SETTINGS)
    assert pair.pw_mcc == pytest.approx(1) and pair.overlap == 1 and pair.shared == 10
    assert pair.mmcs_ab == pytest.approx(1) and pair.mmcs_ba == pytest.approx(1)
    assert pair.differs == "seed" and (pair.size_a, pair.size_b) == (10, 10)
    for null in pair.nulls.values():
        assert null.available and null.p99 < 0.8 and null.size == (10, 10)
    assert pair.nulls["cycle0"].core_pw_mcc_same_size == pytest.approx(1)
    assert pair.pw_mcc_dictionary_null < pair.pw_mcc_dictionary < 1


def test_a_core_against_itself_scores_one():
    chain = make_chain(0)
    pair = compare_pair(chain, replace(chain, label="copy", seed=1), COV_DD, SETTINGS)
    assert pair.pw_mcc == pytest.approx(1) and pair.overlap == 1 and pair.pw_mcc_dictionary == pytest.approx(1)


def test_unrelated_cores_lie_within_the_nulls():
    pair = compare_pair(make_chain(0), make_chain(1, size=14), COV_DD, SETTINGS)
    covariance, density = pair.nulls["covariance"], pair.nulls["matched_density"]
    assert abs(pair.pw_mcc - covariance.mean) < 4 * (covariance.p99 - covariance.mean)
    assert abs(pair.pw_mcc - density.mean) < 4 * (density.p99 - density.mean)
    assert covariance.size == density.size == (10, 14)


def test_half_a_common_core():
    pair = compare_pair(make_chain(0, common=5), make_chain(1, common=5), COV_DD, SETTINGS)
    assert 5 <= pair.shared <= 6 and pair.overlap == pair.shared / 10 and pair.pw_mcc < 0.95


@pytest.mark.parametrize("size", [0, 1])
def test_a_core_too_small_has_no_score(size):
    pair = compare_pair(make_chain(0, size=size), make_chain(1), COV_DD, SETTINGS)
    assert [pair.overlap, pair.shared, pair.pw_mcc, pair.mmcs_ab, pair.mmcs_ba] == [None] * 5
    assert f"cores of {size} and 10" in pair.reason
    assert not any(null.available for null in pair.nulls.values())
    assert PairResult.from_dict(json.loads(json.dumps(pair.to_dict()))) == pair
    summary = summarise([pair])
    assert not summary.available and "cores of" in summary.reason and summary.groups["seed"].pw_mcc is None


def test_dictionaries_are_matched_by_prefix():
    a, b = make_chain(0), make_chain(1)
    b.W_dec_FD[:8] = a.W_dec_FD[:8]
    pair = compare_pair(a, b, COV_DD, replace(SETTINGS, max_latents=8))
    assert pair.dictionary_size == 8 and pair.pw_mcc_dictionary == pytest.approx(1)


def test_a_core_of_cycle_0_is_no_news_against_cycle_0():
    null = compare_pair(make_chain(0, cycle=0), make_chain(1), COV_DD, SETTINGS).nulls["cycle0"]
    assert not null.available and "seed0-k16" in null.reason and null.mean is not None


def test_a_small_cycle_0_is_set_against_the_best_of_the_cores():
    # Six candidates in cycle 0, so the cores of ten are cut to their six best: the last six, by make_chain's scores.
    a, b = (
        replace(chain, cycle0_W_enc_ND=chain.cycle0_W_enc_ND[:6], cycle0_W_dec_ND=chain.cycle0_W_dec_ND[:6])
        for chain in (make_chain(0, common=4), make_chain(1, common=4))
    )
    null = compare_pair(a, b, COV_DD, SETTINGS).nulls["cycle0"]
    assert null.size == (6, 6)
    best = pw_mcc(hungarian(a.core.W_dec_CD[4:], b.core.W_dec_CD[4:]))
    assert null.core_pw_mcc_same_size == pytest.approx(best) and best < 0.7


def test_results_survive_json_and_refuse_other_fields():
    pair = compare_pair(make_chain(0), make_chain(1), COV_DD, SETTINGS)
    plain = json.loads(json.dumps(pair.to_dict(), allow_nan=False))
    assert PairResult.from_dict(plain) == pair
    with pytest.raises(ValueError, match="unknown fields \\['colour'\\]"):
        PairResult.from_dict(plain | {"colour": 1})
    plain["nulls"]["cycle0"].pop("p99")
    with pytest.raises(ValueError, match="NullResult: missing fields \\['p99'\\]"):
        PairResult.from_dict(plain)


def test_what_cannot_be_compared():
    a, b = make_chain(0), make_chain(1)
    with pytest.raises(ValueError, match="same seed and k"):
        compare_pair(a, replace(a, label="again"), COV_DD, SETTINGS)
    with pytest.raises(ValueError, match="another dataset"):
        compare_pair(a, b, torch.eye(3), SETTINGS)
    with pytest.raises(ValueError, match="not of one SAE"):
        replace(a, density_F=torch.zeros(3))


def test_all_pairs_and_what_differs():
    chains = [make_chain(seed, k) for seed in (0, 1) for k in (8, 16)]
    seen = []
    pairs = compare_all(chains, COV_DD, SETTINGS, on_pair=lambda done, total: seen.append((done, total)))
    assert [pair.differs for pair in pairs] == ["k", "seed", "both", "both", "seed", "k"]
    assert seen == [(n, 6) for n in range(1, 7)]
    assert pairs[1] == compare_pair(chains[0], chains[2], COV_DD, SETTINGS)
    matrix = consistency_matrix([chain.label for chain in chains], pairs)
    assert all(matrix[i][i] is None for i in range(4))
    assert matrix[0][2] == matrix[2][0] == pairs[1].pw_mcc
    groups = summarise(pairs).groups
    assert {name: group.pairs for name, group in groups.items()} == {"seed": 2, "k": 2, "both": 2}
    assert groups["k"].pw_mcc.max == max(pairs[0].pw_mcc, pairs[5].pw_mcc)
    assert groups["seed"].pw_mcc.interval is None


def test_one_chain_has_no_agreement():
    assert compare_all([make_chain(0)], COV_DD, SETTINGS) == []
    summary = summarise([])
    assert not summary.available and "two chains" in summary.reason and summary.groups == {}
    assert consistency_matrix(["seed0-k16"], []) == [[None]]


def scored_pairs(scores: dict[tuple[int, int], float]) -> list[PairResult]:
    model = compare_pair(make_chain(0, size=1), make_chain(1), COV_DD, SETTINGS)
    return [
        replace(model, a=f"seed{a}", b=f"seed{b}", seed_a=a, seed_b=b, pw_mcc=score, overlap=score / 2)
        for (a, b), score in scores.items()
    ]


def test_intervals_need_four_seeds():
    three = {(0, 1): 0.2, (0, 2): 0.3, (1, 2): 0.4}
    spread = summarise(scored_pairs(three)).groups["seed"].pw_mcc
    assert spread.interval is None and spread.mean == pytest.approx(0.3) and (spread.min, spread.max) == (0.2, 0.4)
    # Seed 3 is the odd one out: an interval over pairs would miss that its three pairs are one chain's doing.
    four = {**three, (0, 3): 0.9, (1, 3): 0.9, (2, 3): 0.9}
    group = summarise(scored_pairs(four)).groups["seed"]
    low, high = group.pw_mcc.interval
    assert group.seeds == 4 and 0.2 <= low < 0.4 and 0.8 < high <= 0.9
    assert group.overlap.interval == pytest.approx((low / 2, high / 2))
    assert summarise(scored_pairs(four)) == summarise(scored_pairs(four))


def test_equal_scores_have_an_interval_of_no_width():
    pairs = scored_pairs({(a, b): 0.5 for a in range(5) for b in range(a)})
    assert summarise(pairs).groups["seed"].pw_mcc.interval == pytest.approx((0.5, 0.5))
    assert json.dumps(summarise(pairs).to_dict(), allow_nan=False)
