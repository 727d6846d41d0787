"""What latents are used for: planted cores that agree in one way and not in another, told apart by the verdict."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from compared_chains import SETTINGS, WIDTH, core_of, latents, make_chain, rows, unit_rows

from dmsae_ray.compare.comparer import Comparer
from dmsae_ray.compare.functional import LossRows, bar, excesses, loss_effects, overlap_of, pearson, ranks
from dmsae_ray.compare.functional_pair import NEIGHBOURS, exchanged
from dmsae_ray.compare.pair import PairResult
from dmsae_ray.compare.subspace import agreement, span

SIZE, D = 12, 32
DRAWS_200 = replace(SETTINGS, draws=200)


def chain(seed, W_enc_CD, W_dec_CD, scores=None, theta=0.5, density=0.1):
    """A chain with this core; its other latents are its own random directions."""
    free_enc, free_dec = unit_rows(WIDTH, 100 + seed, D), unit_rows(WIDTH, 200 + seed, D)
    sae = latents(
        torch.cat([W_enc_CD, free_enc]),
        torch.nn.functional.normalize(torch.cat([W_dec_CD, free_dec]), dim=1),
        theta=theta,
        density=density,
    )
    ids = torch.arange(len(W_enc_CD))
    start = latents(unit_rows(WIDTH, 300 + seed, D), unit_rows(WIDTH, 400 + seed, D), theta=theta, density=density)
    return replace(
        make_chain(seed), sae=sae, core=core_of(sae, ids, seed=seed, scores=scores), core_ids_C=ids, start=start
    )


def pair_of(a, b, gradient_MD=None):
    """gradient_MD: at 600 rows like those on which activations are compared."""
    x_MD = rows(600, seed=5, d=D)
    gradient_MD = (
        torch.randn(600, D, generator=torch.Generator().manual_seed(6)) if gradient_MD is None else gradient_MD
    )
    comparer = Comparer(rows(2000, d=D), DRAWS_200, loss_rows=LossRows(x_MD, gradient_MD))
    return comparer.pair(comparer.side(a), comparer.side(b))


ENC, DEC = unit_rows(SIZE, 1, D), unit_rows(SIZE, 2, D)


def test_one_core_in_two_chains_agrees_in_every_way():
    pair = pair_of(chain(0, ENC, DEC), chain(1, ENC, DEC))
    found = pair.functional
    assert pair.pw_mcc == pytest.approx(1) and found.firing == 1 and found.effect == pytest.approx(1, abs=1e-5)
    assert found.importance == found.importance_pearson == pytest.approx(1)
    assert (found.firing_pairs, found.firing_left_out, found.effect_pairs, found.effect_rows) == (SIZE, 0, SIZE, 600)
    assert [found.beyond(measure) for measure in ("firing", "effect", "importance")] == [True] * 3
    # Nothing is without a partner, so that there is no subspace to speak of, and no verdict on it.
    assert found.subspace is None and found.beyond("subspace") is None and found.unmatched_a == 0
    assert "every latent of a core is shared" in found.nulls["covariance"].reason
    plain = json.loads(json.dumps(pair.to_dict(), allow_nan=False))
    assert PairResult.from_dict(plain) == pair
    plain["functional"]["nulls"]["permuted"].pop("firing_bar")
    with pytest.raises(ValueError, match="FunctionalNull: missing fields \\['firing_bar'\\]"):
        PairResult.from_dict(plain)


def test_unrelated_cores_agree_in_no_way():
    found = pair_of(chain(0, ENC, DEC), chain(1, unit_rows(SIZE, 11, D), unit_rows(SIZE, 12, D))).functional
    assert found.firing == pytest.approx(found.firing_chance, abs=0.05) and abs(found.effect) < 0.1
    assert not found.beyond("firing") and not found.beyond("effect") and not found.beyond("subspace")


def test_one_subspace_in_two_bases_is_told_from_two_subspaces():
    basis_DR = torch.linalg.qr(torch.randn(D, SIZE, generator=torch.Generator().manual_seed(3)))[0]
    turned_RR = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(4)))[0]
    first, second = basis_DR.T, turned_RR @ basis_DR.T
    pair = pair_of(chain(0, first, first), chain(1, second, second))
    # Latent by latent there is little to see.
    assert pair.overlap <= 1 / SIZE and pair.pw_mcc < 0.6
    found = pair.functional
    assert found.subspace > 0.9 and found.beyond("subspace") is True
    assert found.subspace > found.nulls["covariance"].subspace + 0.4 > found.subspace_isotropic
    other = torch.linalg.qr(torch.randn(D, SIZE, generator=torch.Generator().manual_seed(9)))[0].T
    apart = pair_of(chain(0, first, first), chain(1, other, other)).functional
    assert apart.beyond("subspace") is False and apart.subspace == pytest.approx(SIZE / D, abs=0.1)


def test_same_directions_that_fire_on_different_tokens():
    pair = pair_of(chain(0, ENC, DEC), chain(1, unit_rows(SIZE, 11, D), DEC))
    found = pair.functional
    assert pair.pw_mcc == pytest.approx(1), "by decoder rows they are one"
    assert found.firing == pytest.approx(found.firing_chance, abs=0.05)
    assert found.beyond("firing") is False
    assert found.effect < 0.3, "where they happen to fire together one direction has one effect"


def test_same_firing_in_different_directions():
    aside = torch.nn.functional.normalize(unit_rows(SIZE, 13, D) - DEC * (unit_rows(SIZE, 13, D) * DEC).sum(1)[:, None])
    turned = 0.6 * DEC + 0.8 * aside  # at cosine 0.6: partners, but none is shared
    pair = pair_of(chain(0, ENC, DEC), chain(1, ENC, turned))
    assert pair.overlap == 0 and pair.pw_mcc == pytest.approx(0.6, abs=0.02)
    assert pair.functional.firing > 0.95 and pair.functional.beyond("firing") is True


def test_dense_latents_overlap_by_chance():
    a, b = (chain(seed, unit_rows(SIZE, 20 + seed, D), DEC, theta=0.0, density=0.5) for seed in (0, 1))
    # Each on half of the tokens, so two of them share a third.
    found = pair_of(a, b).functional
    assert found.firing == pytest.approx(1 / 3, abs=0.06) and found.firing_chance == pytest.approx(1 / 3, abs=0.03)
    assert found.beyond("firing") is False
    assert pair_of(a, chain(1, a.core.W_enc_CD, DEC, theta=0.0, density=0.5)).functional.beyond("firing") is True


def test_densities_that_differ_widely_make_no_agreement():
    """Dense latents with dense partners and rare ones with rare ones, all independent: exchanging partners makes unlike
    densities meet, which overlap less; the verdict must not come from that."""
    theta_C = torch.linspace(0.0, 1.6, SIZE)
    verdicts = []
    for seed in range(0, 24, 2):
        sides = []
        for own in (seed, seed + 1):
            one = chain(own, unit_rows(SIZE, 600 + own, D), DEC)
            one.sae.theta_N[:SIZE] = theta_C
            sides.append(one)
        verdicts.append(pair_of(*sides).functional)
    assert np.mean([found.firing - found.firing_chance for found in verdicts]) == pytest.approx(0, abs=0.01)
    for found in verdicts:
        assert abs(found.nulls["permuted"].firing - found.firing_chance) < 0.03
    assert sum(found.beyond("firing") is True for found in verdicts) <= 1


def test_the_same_latents_to_which_the_loss_answers_otherwise():
    common, own = torch.zeros(SIZE, D), torch.zeros(SIZE, D)
    common[torch.arange(SIZE), torch.arange(SIZE)] = 1  # each latent has a dimension of its own
    own[:, -1] = 1  # and one that all have
    a, b = chain(0, ENC, 0.8 * common + 0.6 * own), chain(1, ENC, 0.8 * common - 0.6 * own)
    noise = torch.randn(600, D, generator=torch.Generator().manual_seed(7))
    only_own, only_common = noise.clone(), noise.clone()
    only_own[:, :-1], only_common[:, -1] = 0, 0
    against, along = pair_of(a, b, only_own).functional, pair_of(a, b, only_common).functional
    assert against.firing == along.firing == 1
    assert against.effect == pytest.approx(-1, abs=1e-4) and against.beyond("effect") is False
    assert along.effect == pytest.approx(1, abs=1e-4) and along.beyond("effect") is True


def test_importance_is_of_the_chains_own_scores():
    scores = torch.arange(1.0, SIZE + 1).double() ** 2
    shuffled = scores[torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))]
    alike = pair_of(chain(0, ENC, DEC, scores), chain(1, ENC, DEC, scores.log() + 1)).functional
    assert alike.importance == pytest.approx(1) and alike.importance_pearson < 0.95 and alike.beyond("importance")
    otherwise = pair_of(chain(0, ENC, DEC, scores), chain(1, ENC, DEC, shuffled)).functional
    assert otherwise.beyond("importance") is False and otherwise.firing == 1


def test_without_gradients_nothing_is_said_of_effects():
    comparer = Comparer(rows(d=D), SETTINGS)
    found = comparer.pair(comparer.side(chain(0, ENC, DEC)), comparer.side(chain(1, ENC, DEC))).functional
    assert (found.effect, found.effect_rows, found.beyond("effect")) == (None, 0, None) and found.firing == 1
    assert all(null.effect is None for null in found.nulls.values())


def test_a_set_of_cycle_0_that_is_smaller_is_no_null():
    small = replace(chain(0, ENC, DEC), start_ids_N=torch.arange(5))
    null = pair_of(small, chain(1, ENC, DEC)).functional.nulls["cycle0"]
    assert not null.available and "5 and 12 candidates for cores of 12 and 12" in null.reason


def test_silent_latents():
    fires = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    other = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    found = overlap_of(fires, other)
    # One of two silent: no overlap. Both: nothing to say.
    assert (found.mean, found.counted, found.left_out) == (pytest.approx((1 / 3 + 0) / 2), 2, 1)
    assert found.chance == pytest.approx((0.25 / 0.75 + 0) / 2)
    assert overlap_of(fires[2:], other[2:]).mean is None
    table = excesses(fires, other)
    assert table[0, 0] == pytest.approx(1 / 3 - 0.25 / 0.75) and table[1, 0] == pytest.approx(-0.125 / 0.625)
    assert np.isnan(table[1:, 1:]).tolist() == [[False, False], [True, True]]


def test_effects_are_activation_times_gradient_along_the_decoder_row():
    sae = replace(latents(ENC, DEC), scale=3.0)
    loss_rows = LossRows(rows(50, seed=8, d=D), torch.randn(50, D, generator=torch.Generator().manual_seed(8)))
    by_hand = sae.activations(loss_rows.x_MD) * 3.0 * (loss_rows.gradient_MD @ DEC.T)
    found = loss_effects(sae, loss_rows)
    by_hand -= by_hand.mean(dim=0)
    torch.testing.assert_close(found.z_NR.T, by_hand / by_hand.norm(dim=0), rtol=1e-4, atol=1e-6)


def test_partners_are_exchanged_among_like_densities_and_none_stays():
    rng = np.random.default_rng(0)
    for size in range(2, 30):
        density_P = rng.permutation(np.arange(size, dtype=float))
        for _ in range(20):
            other_P = exchanged(density_P, rng)
            assert sorted(other_P) == list(range(size)) and not (other_P == np.arange(size)).any()
            assert np.abs(density_P[other_P] - density_P).max() <= NEIGHBOURS + 2


def test_ranks_and_correlation():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])) == pytest.approx(1)
    assert pearson(np.ones(3), np.arange(3.0)) is None
    assert bar([1.0, 2.0]) == 2 and bar(list(range(101))) == 99


def test_spans():
    rows_ND = unit_rows(4, 30, D).numpy()
    doubled = span(np.concatenate([rows_ND, rows_ND[:2] + 1e-9]))
    assert doubled.shape == (D, 4) and np.allclose(doubled.T @ doubled, np.eye(4))
    assert agreement(doubled, span(rows_ND)) == pytest.approx(1)
    assert agreement(span(np.eye(D)[:3]), span(np.eye(D)[2:8])) == pytest.approx(1 / 3)
    assert agreement(span(np.zeros((2, D))), doubled) is None and agreement(span(rows_ND[:0]), doubled) is None
