"""Matching against known answers, brute force and scipy."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from dmsae_ray.compare.match import cosines, hungarian, largest_cosines, mmcs, overlap, pw_mcc, shared_pairs, unit


def rows(count, d=8, seed=0):
    return np.random.default_rng(seed).standard_normal((count, d))


def test_a_permuted_copy_scores_one():
    A_ND = rows(20)
    order = np.random.default_rng(1).permutation(20)
    B_ND = 3 * A_ND[order]  # length does not matter
    matching = hungarian(A_ND, torch.from_numpy(B_ND))
    assert (order[matching.right_P] == matching.left_P).all()
    assert pw_mcc(matching) == pytest.approx(1, abs=1e-12)
    assert overlap(matching, matching) == 1
    assert mmcs(A_ND, B_ND) == pytest.approx(1, abs=1e-12)


def test_disjoint_orthogonal_sets_score_zero():
    eye = np.eye(8)
    matching = hungarian(eye[:4], eye[4:])
    assert pw_mcc(matching) == 0 and overlap(matching, matching) == 0 and mmcs(eye[:4], eye[4:]) == 0


def test_the_sign_counts():
    eye = np.eye(4)
    assert pw_mcc(hungarian(eye, -eye)) == 0  # off-diagonal pairs at 0 beat the diagonal at -1
    assert pw_mcc(hungarian(eye[:1], -eye[:1])) == -1


def test_unequal_sizes_average_over_the_smaller_side():
    A_ND, B_MD = rows(5), rows(9, seed=1)
    B_MD[2:7] = A_ND[::-1]
    for left, right in ((A_ND, B_MD), (B_MD, A_ND)):
        matching = hungarian(left, right)
        assert len(matching.cosine_P) == 5 and pw_mcc(matching) == pytest.approx(1)
        assert overlap(matching, matching) == 2 * 5 / 14


def test_sizes_zero_and_one():
    empty, one = np.zeros((0, 8)), rows(1)
    for matching in (hungarian(empty, rows(3)), hungarian(rows(3), empty), hungarian(empty, empty)):
        assert pw_mcc(matching) is None and overlap(matching, matching) is None
    assert mmcs(empty, rows(3)) is None and mmcs(rows(3), empty) is None
    matching = hungarian(one, one)
    assert pw_mcc(matching) == pytest.approx(1) and overlap(matching, matching) == 1


def test_equals_brute_force_and_scipy():
    for seed in range(10):
        A_ND, B_MD = rows(4, seed=seed), rows(6, seed=seed + 100)
        C_NM = unit(A_ND) @ unit(B_MD).T
        best = max(C_NM[range(4), order].sum() for order in permutations(range(6), 4)) / 4
        assert pw_mcc(hungarian(A_ND, B_MD)) == pytest.approx(best, abs=1e-12)
        left, right = linear_sum_assignment(1 - C_NM)
        assert pw_mcc(hungarian(A_ND, B_MD)) == pytest.approx(C_NM[left, right].mean(), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 7), m=st.integers(0, 7), d=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_pw_mcc_is_the_best_assignment_whatever_the_sizes(n, m, d, seed):
    rng = np.random.default_rng(seed)
    A_ND, B_MD = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    found, size = pw_mcc(hungarian(A_ND, B_MD)), min(n, m)
    if not size:
        assert found is None
        return
    C_NM = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in B_MD] for a in A_ND])
    assert found == pytest.approx(C_NM[linear_sum_assignment(C_NM, maximize=True)].mean(), abs=1e-9)
    small, large = (C_NM, m) if n <= m else (C_NM.T, n)
    if large <= 5:
        assert found == pytest.approx(
            max(small[range(size), order].mean() for order in permutations(range(large), size)), abs=1e-9
        )
    assert pw_mcc(hungarian(B_MD, A_ND)) == pytest.approx(found, abs=1e-9)


def test_shared_needs_both_matchings_and_both_cosines():
    eye = np.eye(4)
    tilted = np.sqrt(0.5) * eye + np.sqrt(0.5) * np.roll(eye, 1, axis=1)  # cosine 0.707 to its own row and to the next
    close = hungarian(eye, 0.8 * eye + 0.6 * np.roll(eye, 1, axis=1))
    assert len(shared_pairs(hungarian(eye, eye), close, 0.7)) == 4
    assert len(shared_pairs(hungarian(eye, eye), close, 0.81)) == 0
    assert len(shared_pairs(close, hungarian(eye, eye), 0.81)) == 0
    assert pw_mcc(hungarian(eye, tilted)) == pytest.approx(np.sqrt(0.5))
    # The encoder names other partners for two of four: only the other two are shared, in spite of cosines of 1.
    swapped = eye[[1, 0, 2, 3]]
    assert shared_pairs(hungarian(eye, swapped), hungarian(eye, eye), 0.7).tolist() == [[2, 2], [3, 3]]
    assert overlap(hungarian(eye, swapped), hungarian(eye, eye)) == 0.5


def test_a_row_of_zeros_has_cosine_zero_and_nan_is_refused():
    A_ND = rows(3)
    A_ND[1] = 0
    assert (cosines(A_ND, rows(3, seed=1))[1] == 0).all()
    A_ND[1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        hungarian(A_ND, A_ND)


def test_largest_cosines_in_chunks_equal_the_whole(monkeypatch):
    A_ND, B_MD = rows(7), rows(50, seed=1)
    whole = cosines(A_ND, B_MD).max(axis=1)
    monkeypatch.setattr("dmsae_ray.compare.match.CHUNK", 8)
    assert largest_cosines(A_ND, torch.from_numpy(B_MD)) == pytest.approx(whole, abs=1e-15)
