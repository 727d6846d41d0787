"""Selection by hand-worked cases, and provenance over three cycles."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dmsae_ray.core.next_core import next_core
from dmsae_ray.core.score_file import load_scores, save_scores
from dmsae_ray.core.select import carried, count_of, jaccard, rank, select, top
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings


@pytest.mark.parametrize(
    ("scores", "tau", "ids"),
    [
        ([1, 5, 4], 0.9, [1, 2]),  # 5 + 4 of 10 is exactly the share asked for
        ([1, 5, 4], 0.91, [0, 1, 2]),
        ([1, 5, 4], 0.5, [1]),
        ([1, 5, 4], 0.01, [1]),  # never empty
        ([2, 2, 2, 2], 0.5, [0, 1]),  # ties by id
        ([1, 3, 3, 3], 0.3, [1]),
        ([1, 3, 3, 3], 0.6, [1, 2]),
        ([0, 7, 0], 1.0, [1]),  # nothing is gained by scores of zero
        ([0.1] * 30, 0.9, list(range(27))),  # although the running sums give 0.8999999999999999
        ([3], 0.9, [0]),
    ],
)
def test_smallest_set_that_reaches_tau(scores, tau, ids):
    chosen = select(torch.tensor(scores, dtype=torch.float64), tau)
    assert chosen.tolist() == ids and chosen.dtype == torch.int64


def test_no_smaller_set_reaches_tau():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores_N, tau = rng.exponential(size=rng.integers(1, 40)), rng.uniform(0.05, 1)
        chosen = select(torch.from_numpy(scores_N), tau).numpy()
        assert scores_N[chosen].sum() >= tau * scores_N.sum() * (1 - 1e-12)
        best_without_one = np.sort(scores_N)[::-1][: len(chosen) - 1].sum()
        assert best_without_one < tau * scores_N.sum()


def test_ranking_and_curve():
    ranking = rank(torch.tensor([1, 5, 4, 5], dtype=torch.float64))
    assert ranking.ids_N.tolist() == [1, 3, 2, 0]
    assert ranking.scores_N.tolist() == [5, 5, 4, 1]
    assert ranking.share_N.tolist() == pytest.approx([5 / 15, 10 / 15, 14 / 15, 1])


@pytest.mark.parametrize(
    ("scores", "tau", "message"),
    [
        ([0, 0], 0.9, "attribution 0"),
        ([1, float("nan")], 0.9, "finite"),
        ([1, -1], 0.9, "not negative"),
        ([], 0.9, "at least one"),
        ([1], 0.0, "tau"),
        ([1], 1.1, "tau"),
    ],
)
def test_what_cannot_be_selected_from(scores, tau, message):
    with pytest.raises(ValueError, match=message):
        select(torch.tensor(scores, dtype=torch.float64), tau)


@pytest.mark.parametrize(
    ("values", "count", "ids"),
    [
        ([1, 5, 4], 0, []),
        ([1, 5, 4], 1, [1]),
        ([1, 5, 4], 2, [1, 2]),
        ([1, 5, 4], 3, [0, 1, 2]),
        ([2, 2, 2, 2], 2, [0, 1]),  # ties by id
        ([-3, 0, -1, 0], 3, [1, 2, 3]),  # of either sign
        ([], 0, []),
    ],
)
def test_the_largest_values_ties_by_id(values, count, ids):
    chosen = top(torch.tensor(values, dtype=torch.float64), count)
    assert chosen.tolist() == ids and chosen.dtype == torch.int64


def test_what_has_no_largest_values():
    with pytest.raises(ValueError, match="not finite"):
        top(torch.tensor([1.0, float("nan")]), 1)
    for count in (-1, 3):
        with pytest.raises(ValueError, match=f"a core of {count} latents cannot be selected from 2"):
            top(torch.tensor([1.0, 2.0]), count)


@pytest.mark.parametrize(
    ("share", "candidates", "count"),
    [(0.5, 4, 2), (0.5, 5, 3), (0.1, 30, 3), (0.7, 10, 7), (1, 9, 9), (1e-6, 9, 1), (0.3, 1, 1)],
)
def test_fewest_candidates_that_are_a_share_of_all(share, candidates, count):
    assert count_of(share, candidates) == count


def test_share_of_the_attribution_that_any_candidates_carry():
    scores_N = torch.tensor([1, 5, 4, 0], dtype=torch.float64)
    assert [carried(scores_N, torch.tensor(ids)) for ids in ([1], [0, 2], [0, 1, 2, 3], [3], [])] == [0.5, 0.5, 1, 0, 0]
    many_N = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curve_N = rank(many_N).share_N
    for count in (1, 17, 250, 500):
        assert carried(many_N, top(many_N, count)) == curve_N[count - 1], "to the last bit a point of the curve"


def test_scores_file(tmp_path):
    path = tmp_path / "scores.safetensors"
    scores_N = torch.tensor([1, 5, 4], dtype=torch.float64)
    save_scores(path, scores_N)
    assert torch.equal(load_scores(path), scores_N)
    assert load_file(path).keys() == {"ids", "scores", "curve"} and load_file(path)["curve"].tolist() == [0.5, 0.9, 1.0]
    save_scores(path, scores_N, "norm", torch.tensor([3.0, 2.0, 2.5]))
    assert torch.equal(load_scores(path), scores_N) and load_file(path)["values"].tolist() == [3, 2, 2.5]
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["by"] == "norm"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{path}: truncated"):
        load_scores(path)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path}: no such scores file"):
        load_scores(path)


def test_jaccard():
    assert jaccard(kept=2, old_size=3, new_size=4) == 2 / 5
    assert jaccard(0, 3, 4) == 0
    assert jaccard(3, 3, 3) == 1
    assert jaccard(0, 0, 0) is None


def make_sae(core_W_enc_CD, width=8, d=4, seed=0, core_transfer="frozen"):
    """An SAE as if trained: nothing but frozen rows is as it started."""
    settings = SAESettings(d=d, width=width, k=2, batch=4, prefix_fractions=(0.5,), core_transfer=core_transfer)
    sae, generator = MatryoshkaSAE.init(settings, core_W_enc_CD, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.theta.fill_(0.2)
    return sae


SOURCE = {"seed": 1, "k": 16, "scale": 2.0, "hook": "hook", "model": "model"}
SCORES_N = torch.arange(1, 7, dtype=torch.float64)
DENSITY_F = torch.linspace(0.1, 0.8, 8)


def test_provenance_over_three_cycles():
    sae0 = make_sae(torch.zeros(0, 4))
    core0 = next_core(None, sae0, torch.tensor([1, 3, 4]), SCORES_N, DENSITY_F, cycle=0, **SOURCE)
    assert core0.selected == ((0,), (0,), (0,))
    assert core0.scores_C.tolist() == [2, 4, 5]
    assert torch.equal(core0.W_enc_CD, sae0.W_enc[[1, 3, 4]]) and torch.equal(core0.W_dec_CD, sae0.W_dec[[1, 3, 4]])
    assert torch.equal(core0.b_enc_C, sae0.b_enc[[1, 3, 4]])
    assert core0.density_C.tolist() == DENSITY_F[[1, 3, 4]].double().tolist()
    assert core0.survivors_C().all() and core0.selected_by == "attribution"

    # Cycle 1: members 0 and 2 (once latents 1 and 4) stay, free latent 5 enters.
    sae1 = make_sae(core0.W_enc_CD, seed=1)
    core1 = next_core(core0, sae1, torch.tensor([0, 2, 5]), SCORES_N, DENSITY_F, cycle=1, **SOURCE)
    assert core1.selected == ((0, 1), (0, 1), (1,))
    assert core1.entered_C.tolist() == [0, 0, 1]
    assert core1.latent_ids_C.tolist() == [0, 2, 5]
    assert torch.equal(core1.W_enc_CD[:2], core0.W_enc_CD[[0, 2]]) and torch.equal(core1.W_enc_CD[2], sae1.W_enc[2])
    assert core1.theta == 0.2

    # The same core by another criterion differs in nothing but what it says of itself: scores stay attribution.
    placebo = next_core(core0, sae1, torch.tensor([0, 2, 5]), SCORES_N, DENSITY_F, cycle=1, by="random", **SOURCE)
    assert placebo.selected_by == "random" and torch.equal(placebo.scores_C, core1.scores_C)
    assert placebo.selected == core1.selected and torch.equal(placebo.W_enc_CD, core1.W_enc_CD)

    # Cycle 2: the newcomer and one old member stay, two enter.
    sae2 = make_sae(core1.W_enc_CD, seed=2)
    core2 = next_core(core1, sae2, torch.tensor([1, 2, 3, 4]), SCORES_N, DENSITY_F, cycle=2, **SOURCE)
    assert core2.selected == ((0, 1, 2), (1, 2), (2,), (2,))
    assert core2.origins() == {0: 1, 1: 1, 2: 2}
    assert core2.repeated_C(2).tolist() == [True, True, False, False]
    assert core2.survivors_C().tolist() == [True, False, False, False]
    assert torch.equal(core2.W_enc_CD[0], sae0.W_enc[4])


def test_a_core_that_only_starts_latents_carries_their_trained_rows():
    core0 = next_core(None, make_sae(torch.zeros(0, 4)), torch.tensor([1, 3]), SCORES_N, DENSITY_F, cycle=0, **SOURCE)
    sae1 = make_sae(core0.W_enc_CD, seed=1, core_transfer="init")
    core1 = next_core(core0, sae1, torch.tensor([1, 5]), SCORES_N, DENSITY_F, cycle=1, **SOURCE)
    assert core1.selected == ((0, 1), (1,))
    assert torch.equal(core1.W_enc_CD, sae1.W_enc[[1, 5]]) and not torch.equal(core1.W_enc_CD[0], core0.W_enc_CD[1])


def test_random_rows_in_the_core_s_place_have_no_past():
    core0 = next_core(None, make_sae(torch.zeros(0, 4)), torch.tensor([1, 3]), SCORES_N, DENSITY_F, cycle=0, **SOURCE)
    sae1 = make_sae(core0.W_enc_CD, seed=1, core_transfer="random")
    core1 = next_core(core0, sae1, torch.tensor([1, 5]), SCORES_N, DENSITY_F, cycle=1, **SOURCE)
    assert core1.selected == ((1,), (1,)), "what stood there was selected by no earlier cycle"
    assert torch.equal(core1.W_enc_CD[0], core0.W_enc_CD[1]), "yet it was frozen while it stood there"


@pytest.mark.parametrize("change", [{"scale": 2.1}, {"hook": "other"}, {"model": "other"}])
def test_a_core_from_another_source_is_refused(change):
    core0 = next_core(None, make_sae(torch.zeros(0, 4)), torch.tensor([1]), SCORES_N, DENSITY_F, cycle=0, **SOURCE)
    with pytest.raises(ValueError, match="one dataset"):
        next_core(core0, make_sae(core0.W_enc_CD), torch.tensor([0]), SCORES_N, DENSITY_F, cycle=1, **(SOURCE | change))


def test_frozen_rows_that_moved_are_noticed():
    core0 = next_core(None, make_sae(torch.zeros(0, 4)), torch.tensor([1]), SCORES_N, DENSITY_F, cycle=0, **SOURCE)
    with pytest.raises(AssertionError, match="moved"):
        next_core(core0, make_sae(core0.W_enc_CD + 1e-6), torch.tensor([0]), SCORES_N, DENSITY_F, cycle=1, **SOURCE)
