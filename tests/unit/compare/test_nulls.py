"""Nulls against known answers."""

import numpy as np
import pytest
import torch
from compared_chains import latents as latents_of
from compared_chains import rows as some_rows

from dmsae_ray.compare.activation import DRAWS, agreement, standardised
from dmsae_ray.compare.covariance import CovarianceNull, Gaussian
from dmsae_ray.compare.cycle0 import Ranked, cycle0_null
from dmsae_ray.compare.density import Densities, FreeDraws, draw_matched, matched_density_null
from dmsae_ray.compare.match import hungarian, mmcs, overlap, pw_mcc
from dmsae_ray.compare.nulls import percentile

D = 12
ROWS_RD = some_rows(400, d=D)


def latents(count, seed, d=D, **kwargs):
    rng = np.random.default_rng(seed)
    return latents_of(rng.standard_normal((count, d)), rng.standard_normal((count, d)), **kwargs)


def covariance_null(gaussian, size, whole_a, whole_b, draws, cosine, seed):
    null = CovarianceNull(gaussian, draws, cosine, seed)
    return null.of(size, null.to_whole(whole_a), null.to_whole(whole_b))


def random_covariance(seed=0):
    half = np.random.default_rng(seed).standard_normal((D, D))
    return half @ np.diag(np.linspace(0.05, 3, D)) @ half.T


def test_gaussian_directions_have_the_covariance():
    cov_DD = random_covariance()
    x_ND = Gaussian.of(cov_DD).directions(np.random.default_rng(0), 50_000)
    assert np.abs(np.cov(x_ND.T) - cov_DD).max() < 0.03 * np.abs(cov_DD).max()


def test_two_random_sets_lie_within_the_null():
    cov_DD = random_covariance()
    root_DD = np.linalg.cholesky(cov_DD)
    rng = np.random.default_rng(3)
    whole = rng.standard_normal((200, D)) @ root_DD.T
    null = covariance_null(Gaussian.of(cov_DD), (25, 40), whole, whole, 100, 0.7, seed=0)
    scores = [
        pw_mcc(hungarian(rng.standard_normal((25, D)) @ root_DD.T, rng.standard_normal((40, D)) @ root_DD.T))
        for _ in range(100)
    ]
    assert null.available and null.draws == 100 and null.size == (25, 40)
    assert null.mean == pytest.approx(np.mean(scores), abs=3 * np.std(scores) / np.sqrt(100) * 1.5)
    assert np.mean(np.array(scores) <= null.p99) >= 0.93
    assert null.mean < null.p99 < 1 and 0 < null.overlap_mean <= null.overlap_p99
    # Any draw of these directions has the same expected largest cosine to the dictionary.
    assert null.mmcs_mean == pytest.approx(mmcs(rng.standard_normal((2000, D)) @ root_DD.T, whole), abs=0.02)


def test_a_null_is_decided_by_its_seed():
    gaussian, whole = Gaussian.of(np.eye(D)), latents(50, 0).W_dec_ND
    first, again, other = (covariance_null(gaussian, (5, 5), whole, whole, 20, 0.7, seed) for seed in (0, 0, 1))
    assert first == again and first.mean != other.mean


def test_narrow_data_raises_the_null():
    # Directions of data that lies along one axis resemble each other: that is what this null is for.
    whole = latents(50, 0).W_dec_ND
    narrow = np.diag([100.0] + [1.0] * (D - 1))
    nulls = [covariance_null(Gaussian.of(cov), (20, 20), whole, whole, 100, 0.7, 0) for cov in (np.eye(D), narrow)]
    assert nulls[1].mean > nulls[0].p99


@pytest.mark.parametrize("cov", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.triu(np.ones((3, 3))), np.ones((2, 3))])
def test_what_is_no_covariance(cov):
    with pytest.raises(ValueError, match="covariance"):
        Gaussian.of(cov)


def test_density_draws_are_equal_where_they_can_be():
    core_C = np.array([0.5, 0.01, 0.01, 0.2])
    free_N = np.repeat([0.5, 0.01, 0.2, 0.9], 12)
    seen = set()
    for seed in range(30):
        picks_C = draw_matched(core_C, free_N, np.random.default_rng(seed))
        assert (free_N[picks_C] == core_C).all()
        assert len(set(picks_C.tolist())) == 4
        seen |= set(picks_C.tolist())
    assert len(seen) > 25  # of the 36 that match: draws differ


def test_density_draws_take_the_nearest_by_ratio():
    # By difference 0.05 would be nearer to 0.1 than 0.19 is; by ratio it is not.
    core_C, free_N = np.array([0.1]), np.array([0.05, 0.06, 0.08, 0.1, 0.15, 0.19, 0.4, 0.9, 0.0001])
    near = {int(draw_matched(core_C, free_N, np.random.default_rng(seed))[0]) for seed in range(200)}
    assert near == {1, 2, 3, 4, 5}  # |log ratio| 0.51, 0.22, 0, 0.41, 0.64; 0.05 is at 0.69


def test_density_draws_can_use_all_that_is_there():
    free_N = np.linspace(0.1, 0.5, 6)
    assert sorted(draw_matched(np.full(6, 0.2), free_N, np.random.default_rng(0))) == list(range(6))


def test_free_latents_are_alive_and_outside_the_core():
    densities = Densities.split(np.array([0.3, 0.0, 0.2, 0.1, 0.0]), np.array([0, 4]))
    assert densities.free_ids_N.tolist() == [2, 3]
    assert densities.core_C.tolist() == [0.3, 0.1]  # a silent member counts with the smallest density there is


def with_densities(some, core, free):
    """The SAE with these densities, the core's first; ids of the core."""
    some.density_N[:] = torch.tensor([*core, *free])
    return some, torch.arange(len(core))


def density_null(a, b, draws=20, rows_RD=ROWS_RD, seed=0):
    """a, b: (SAE, ids of its core)."""
    drawn = [FreeDraws.of(sae, ids, draws, seed, rows_RD) for sae, ids in (a, b)]
    return matched_density_null(*drawn, a[0].W_dec_ND, b[0].W_dec_ND, 0.7)


def test_matched_density_null_never_draws_the_core():
    # The cores are equal and the free latents orthogonal to each other: every draw must score 0.
    eye = np.eye(24)
    a, b = ((latents_of(np.concatenate([eye[:4], free])), torch.arange(4)) for free in (eye[4:14], eye[14:24]))
    null = density_null(a, b, 2 * DRAWS, some_rows(5000, d=24))
    assert null.available and null.mean == 0 and null.overlap_mean == 0 and null.mmcs_mean == 0
    assert null.density_gap == pytest.approx(1) and null.size == (4, 4) and null.draws == 2 * DRAWS
    assert abs(null.activation_mean) < 0.03 and null.activation_draws == DRAWS, "the cores' own latents would score 1"


def test_draws_made_once_give_what_each_draw_gives_alone():
    """The plain reference: every draw's latents taken from the SAEs and matched."""
    (a, ids_a), (b, ids_b) = (latents(60, 0, theta=0.2), torch.arange(0, 12, 2)), (latents(50, 1), torch.arange(9))
    for sae in (a, b):
        sae.density_N[:] = torch.rand(sae.size, generator=torch.Generator().manual_seed(sae.size)) + 0.01
    left, right = (FreeDraws.of(sae, ids, DRAWS + 5, 3, ROWS_RD) for sae, ids in ((a, ids_a), (b, ids_b)))
    scores, overlaps, activations = [], [], []
    for i in range(DRAWS + 5):
        A, B = (drawn.latents.take(drawn.places[i]) for drawn in (left, right))
        decoder = hungarian(A.W_dec_ND, B.W_dec_ND)
        scores.append(pw_mcc(decoder))
        overlaps.append(overlap(hungarian(A.W_enc_ND, B.W_enc_ND), decoder, 0.2))
        activations.append(agreement(standardised(A, ROWS_RD), standardised(B, ROWS_RD), decoder).mean)
    null = matched_density_null(left, right, a.W_dec_ND, b.W_dec_ND, 0.2)
    assert null.mean == pytest.approx(np.mean(scores), abs=1e-12) and null.p99 is None, "of so few draws"
    assert null.overlap_mean == pytest.approx(np.mean(overlaps)) and null.overlap_mean > 0
    assert null.activation_mean == pytest.approx(np.mean(activations[:DRAWS]), abs=1e-6)
    assert null.mmcs_mean < mmcs(left.latents.W_dec_ND, left.latents.W_dec_ND)


def test_saes_that_began_alike_are_not_drawn_alike():
    a, b = (with_densities(latents(210, 0), [0.1] * 10, [0.1] * 200) for _ in "ab")
    b[0].density_N[50] = 0.11
    one, other, again = (FreeDraws.of(*some, 20, 0, ROWS_RD) for some in (a, b, a))
    ids = [drawn.latents.W_dec_ND[drawn.places[0]] for drawn in (one, other, again)]
    assert torch.equal(ids[0], ids[2]) and not torch.equal(ids[0], ids[1])


def test_two_random_sets_lie_within_the_matched_density_null():
    """Cores that are drawn as the null draws score as it does."""
    a, b = latents(400, 0), latents(400, 1)
    rng = np.random.default_rng(5)
    null = density_null((a, rng.permutation(400)[:12]), (b, rng.permutation(400)[:12]), draws=100)
    scores, activations = [], []
    for _ in range(60):
        A, B = (some.take(rng.permutation(400)[:12]) for some in (a, b))
        matching = hungarian(A.W_dec_ND, B.W_dec_ND)
        scores.append(pw_mcc(matching))
        activations.append(agreement(standardised(A, ROWS_RD), standardised(B, ROWS_RD), matching).mean)
    assert null.available and null.density_gap == pytest.approx(1)
    for own, mean, draws in ((scores, null.mean, 100), (activations, null.activation_mean, DRAWS)):
        assert abs(np.mean(own) - mean) < 3 * np.std(own) * np.sqrt(1 / 60 + 1 / draws)
    assert np.mean(np.array(scores) <= null.p99) >= 0.93


def test_a_wide_density_gap_is_flagged_with_its_numbers():
    near = with_densities(latents(14, 0), [0.1] * 4, [0.1] * 10)
    null = density_null(near, with_densities(latents(14, 1), [0.3] * 4, [0.1] * 10))
    assert not null.available and "factor of 3" in null.reason
    assert null.density_gap == pytest.approx(3) and null.mean is not None and null.overlap_mean is not None
    assert density_null(near, with_densities(latents(14, 1), [0.19] * 4, [0.1] * 10)).available


def test_too_few_living_free_latents():
    enough, few = (
        with_densities(latents(14, i), [0.1] * 4, free) for i, free in enumerate(([0.1] * 10, [0.1] * 3 + [0.0] * 7))
    )
    null = density_null(enough, few)
    assert not null.available and "second SAE has 3 free latents" in null.reason and null.mean is None


def ranked(some):
    return Ranked(some, standardised(some, ROWS_RD))


def test_cycle0_takes_the_top_and_cuts_the_cores_alike():
    start_a, start_b = latents(6, 0), latents(3, 1)
    core_a, core_b = latents(4, 2), latents(5, 3)
    null = cycle0_null(*map(ranked, (start_a, start_b, core_a, core_b)), 0.7, mmcs_mean=0.4)
    assert null.available and null.size == (4, 3) and null.draws == 1 and null.mmcs_mean == 0.4
    assert null.mean == null.p99 == pw_mcc(hungarian(start_a.W_dec_ND[:4], start_b.W_dec_ND))
    assert null.core_pw_mcc_same_size == pw_mcc(hungarian(core_a.W_dec_ND, core_b.W_dec_ND[:3]))
    cut = [ranked(core_a), ranked(core_b.take(slice(3)))]
    assert cycle0_null(*cut, *cut, 0.7, None).activation_mean == pytest.approx(null.core_activation_same_size, abs=1e-7)
    told = cycle0_null(*map(ranked, (start_a, start_b, core_a, core_b)), 0.7, None, reason="began with a core")
    assert (told.available, told.reason, told.mean) == (False, "began with a core", null.mean)
    assert not cycle0_null(*map(ranked, (latents(0, 0), start_b, core_a, core_b)), 0.7, None).available


def test_equal_sets_of_cycle_0_agree_in_everything():
    start = ranked(latents(6, 0))
    null = cycle0_null(start, start, start, start, 0.7, None)
    for value in (
        null.mean,
        null.overlap_mean,
        null.activation_mean,
        null.core_pw_mcc_same_size,
        null.core_activation_same_size,
    ):
        assert value == pytest.approx(1, abs=1e-6)


def test_draws_are_shared_between_pairs_of_equal_sizes(monkeypatch):
    """The cost driver: one set of draws per sizes, in either order, and a result that no earlier pair changes."""
    calls = []
    monkeypatch.setattr("dmsae_ray.compare.covariance.hungarian", lambda A, B: calls.append(1) or hungarian(A, B))
    null = CovarianceNull(Gaussian.of(np.eye(D)), 10, 0.7, 0)
    first = null.of((4, 7), 0.5, 0.3)
    other = null.of((7, 4), 0.1, 0.1)
    assert len(calls) == 10 and (first.mean, first.p99) == (other.mean, other.p99)
    assert (first.mmcs_mean, first.size, other.size) == (0.4, (4, 7), (7, 4))
    null.of((5, 5), 0, 0)
    assert len(calls) == 20 and CovarianceNull(Gaussian.of(np.eye(D)), 10, 0.7, 0).of((5, 5), 0, 0) == null.of(
        (5, 5), 0, 0
    )
    whole = null.dictionary((30, 20))
    assert len(calls) == 31 and null.dictionary((30, 20)) == whole and len(calls) == 31
    assert whole.draws == 1 and 0 < whole.mean < 1


def test_the_covariance_of_rows():
    rows_RD = some_rows(5000, d=D) @ torch.from_numpy(np.linalg.cholesky(random_covariance()).T).float() + 3
    gaussian = Gaussian.of_rows(rows_RD)
    found_DD = gaussian.vectors_DD @ np.diag(gaussian.deviation_D**2) @ gaussian.vectors_DD.T
    assert found_DD == pytest.approx(np.cov(rows_RD.double().numpy().T, bias=True), rel=1e-6)


@pytest.mark.parametrize("percent, draws", [(99, 99), (99, 200), (99, 1000), (95, 20)])
def test_a_further_draw_exceeds_a_percentile_as_rarely_as_it_says(percent, draws):
    """Of uniform draws the chance to exceed a value is one less that value; the usual interpolation lies too low."""
    rng = np.random.default_rng(0)
    sets = rng.random((4000, draws))
    exceeded = np.array([1 - percentile(one, percent) for one in sets])
    noise = 3 * exceeded.std() / np.sqrt(len(sets))
    assert 0.6 * (100 - percent) / 100 < exceeded.mean() <= (100 - percent) / 100 + noise
    if draws <= 200:
        assert np.mean(1 - np.quantile(sets, percent / 100, axis=1)) > (100 - percent) / 100 + noise


def test_few_draws_carry_no_percentile():
    assert percentile(range(98), 99) is None and percentile(range(18), 95) is None and percentile([], 95) is None
    assert percentile([0.4], 99) == 0.4, "the one set that there is"
