"""Scores from partial sums: known cases, the quantile's error, and how sure a score is."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from dmsae_ray.attribution.histogram import BUCKETS, RELATIVE_ERROR, Histogram, bucket_of, bucket_values
from dmsae_ray.attribution.partial import Partial
from dmsae_ray.attribution.scores import ScoreSettings, enough, scores, spearman, split_half


def partial_of(a_RP):
    """Of attributions written down; 0 means not active."""
    a_RP = torch.as_tensor(a_RP, dtype=torch.float64)
    row, latent = a_RP.nonzero(as_tuple=True)
    return Partial(len(a_RP), a_RP.sum(0), a_RP.abs().sum(0), Histogram.of(latent, a_RP[row, latent].abs().float()))


def test_each_aggregator_by_hand():
    partials = [partial_of([[1.0, -3.0], [0.0, -1.0]]), partial_of([[-1.0, 0.0], [0.0, 2.0]])]
    assert scores(partials, ScoreSettings("mean_abs")).tolist() == [0.5, 1.5]
    assert scores(partials, ScoreSettings("mean_signed")).tolist() == [0.0, 0.5]
    # Latent 0 is active with |a| 1, 1 on 2 of 4 tokens, latent 1 with 1, 2, 3 on 3 of 4.
    low = scores(partials, ScoreSettings("quantile", quantile=0.5))
    assert low.tolist() == pytest.approx([1 * 2 / 4, 2 * 3 / 4], rel=RELATIVE_ERROR)
    high = scores(partials, ScoreSettings("quantile", quantile=1.0))
    assert high.tolist() == pytest.approx([1 * 2 / 4, 3 * 3 / 4], rel=RELATIVE_ERROR)


def test_a_bucket_stands_for_its_values_within_the_stated_error_and_no_better():
    exponents = torch.linspace(-31.99, 15.99, 200_001, dtype=torch.float64)
    magnitudes = torch.exp2(exponents).float()
    error = (bucket_values()[bucket_of(magnitudes)] / magnitudes.double() - 1).abs()
    assert 0.98 * RELATIVE_ERROR < float(error.max()) <= RELATIVE_ERROR * (1 + 1e-6)
    assert bool((bucket_of(magnitudes).diff() >= 0).all()), "buckets ascend with what they hold"


def test_the_ends_of_the_range():
    outside = torch.tensor([0.0, 1e-40, 2.0**-33, 2.0**-32, 2.0**16, 1e30])
    assert bucket_of(outside).tolist() == [0, 0, 0, 1, BUCKETS - 1, BUCKETS - 1]
    assert bucket_values()[0] == 0 and bool((bucket_values().diff() > 0).all())


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_against_sorting(q):
    generator = torch.Generator().manual_seed(0)
    latents, drawn = 40, 5000
    latent = (
        torch.randint(0, latents - 1, (drawn,), generator=generator).square() // latents
    )  # some often, the last never
    magnitude = torch.exp(3 * torch.randn(drawn, generator=generator))
    magnitude[::17] = 0
    histogram = Histogram.of(latent, magnitude)
    exact = torch.zeros(latents, dtype=torch.float64)
    for j in latent.unique().tolist():
        exact[j] = float(np.quantile(magnitude[latent == j].double(), q, method="inverted_cdf"))
    found = histogram.quantile(q, latents)
    assert torch.equal(histogram.active(latents), torch.bincount(latent, minlength=latents))
    assert torch.equal(found == 0, exact == 0) and bool(exact.any())
    assert bool(((found - exact).abs() <= RELATIVE_ERROR * exact).all())


def test_histograms_merge_exactly_however_the_values_are_dealt():
    generator = torch.Generator().manual_seed(1)
    latent, magnitude = torch.randint(0, 9, (3000,), generator=generator), torch.rand(3000, generator=generator)
    whole = Histogram.of(latent, magnitude)
    for pieces in (2, 7):
        deal = torch.randint(0, pieces, (3000,), generator=generator)
        parts = [Histogram.of(latent[deal == i], magnitude[deal == i]) for i in range(pieces)]
        for order in (parts, parts[::-1], [Histogram.merged(parts[:2]), *parts[2:]]):
            merged = Histogram.merged(order)
            assert torch.equal(merged.filled_N, whole.filled_N) and torch.equal(merged.counts_N, whole.counts_N)


def test_spearman_is_scipy_s_ties_included():
    generator = torch.Generator().manual_seed(2)
    for size, values in ((2, 50), (30, 4), (200, 1000)):
        a = torch.randint(0, values, (size,), generator=generator).double()
        b = a + torch.randint(0, values, (size,), generator=generator)
        a[0], a[1], b[0], b[1] = 1, 2, 4, 3
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert spearman(torch.ones(3), torch.arange(3.0)) is None


def test_halves_are_the_shards_of_even_and_odd_number():
    even, odd = partial_of([[4.0, 3.0, 2.0, 1.0, 0.0]]), partial_of([[4.0, 2.0, 3.0, 1.0, 0.0]])
    settings = ScoreSettings(tau=0.65)  # the first two of each half: {0, 1} and {0, 2}
    halves = split_half([even, odd, even, odd, even], settings)
    assert halves.jaccard == 1 / 3
    assert halves.spearman == pytest.approx(0.8), "over the four candidates that score: one swap of neighbours"
    assert split_half([even, even, odd, odd], settings).jaccard == 1
    assert enough([even, odd], ScoreSettings(tau=0.65, until_jaccard=0.33)) and not enough(
        [even, odd], ScoreSettings(tau=0.65, until_jaccard=0.34)
    )


def test_what_says_nothing_about_certainty():
    one, silent = partial_of([[4.0, 3.0]]), partial_of([[0.0, 0.0]])
    for partials in ([one], [one, silent]):
        halves = split_half(partials, ScoreSettings())
        assert (halves.spearman, halves.jaccard) == (None, None)
        assert not enough(partials, ScoreSettings(until_jaccard=0.01))
