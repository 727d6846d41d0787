"""Standard errors of an evaluation against its own jackknife, and of a ratio against draws from a known population."""

from __future__ import annotations

import math

import pytest
import torch
from language_models import load as load_model
from test_measure import SCALE, random_sae

from dmsae_ray.evaluation.measure import Tally, scores_of, tally_batch
from dmsae_ray.evaluation.references import reference_losses
from dmsae_ray.evaluation.standard_error import of_ratio, standard_errors

N, T = 14, 12
NAMES = ("fvu", "kl", "loss_recovered_zero", "loss_recovered_mean")


@pytest.fixture(scope="module")
def lm():
    return load_model("tiny", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def batch(lm):
    """Sequences of 4 to 12 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(3, lm.vocabulary, (N, T), generator=generator)
    ids_NT[:, 0] = lm.bos_id
    return ids_NT, torch.randint(4, T + 1, (N,), generator=generator)


@pytest.fixture(scope="module")
def sae(lm):
    return random_sae(lm, core_size=0)


def mean_row(lm, ids_NT, lengths_N) -> torch.Tensor:
    return lm.cut(ids_NT).value_BTD[lm.rows(ids_NT, lengths_N)].mean(dim=0)


def measured(sae, lm, ids_NT, lengths_N, mean_D, parts=(slice(None),)) -> dict:
    references = reference_losses(lm, [(ids_NT, lengths_N)], mean_D)
    tally = Tally(len(ids_NT), mean_D)
    for part in parts:
        tally_batch(tally, sae, lm, ids_NT[part], lengths_N[part], SCALE, first=part.start or 0)
    return scores_of(tally, sae, references)[0]


def test_they_are_those_of_leaving_out_one_sequence_after_the_other(sae, lm, batch):
    mean_D = mean_row(lm, *batch)
    found = measured(sae, lm, *batch, mean_D)["standard_errors"]
    without = []
    for n in range(N):
        kept_N = torch.arange(N) != n
        without.append(measured(sae, lm, batch[0][kept_N], batch[1][kept_N], mean_D))
    for name in NAMES:
        values_N = torch.tensor([metrics[name] for metrics in without], dtype=torch.float64)
        jackknife = float(((N - 1) / N * (values_N - values_N.mean()).square().sum()).sqrt())
        assert found[name] == pytest.approx(jackknife, rel=0.15) and found[name] > 0, name


def test_they_do_not_depend_on_how_sequences_are_dealt_or_on_rows_that_fill_a_batch(sae, lm, batch):
    mean_D = mean_row(lm, *batch)
    whole = measured(sae, lm, *batch, mean_D)["standard_errors"]
    parts = measured(sae, lm, *batch, mean_D, (slice(9, 14), slice(0, 4), slice(4, 9)))["standard_errors"]
    assert parts == pytest.approx(whole, rel=1e-5)
    # The last batch is filled up with sequences that are BOS alone: in the references, and beyond the tally's end.
    filled = torch.cat([batch[0], batch[0][:6]]), torch.cat([batch[1], torch.ones(6, dtype=torch.int64)])
    tally = Tally(N, mean_D)
    for first in (0, 10):
        ids_NT, lengths_N = (some[first : first + 10] for some in filled)
        tally_batch(tally, sae, lm, ids_NT, lengths_N, SCALE, first=first)
    padded = scores_of(tally, sae, reference_losses(lm, [filled], mean_D))[0]["standard_errors"]
    assert padded == pytest.approx(whole, rel=1e-5)


def test_one_sequence_says_nothing_and_neither_do_references_of_before(sae, lm, batch):
    ids_NT, lengths_N = batch
    mean_D = torch.zeros(lm.d)
    assert measured(sae, lm, ids_NT[:1], lengths_N[:1], mean_D)["standard_errors"] is None
    references, tally = reference_losses(lm, [batch], mean_D), Tally(N, mean_D)
    del references["by_sequence"]
    tally_batch(tally, sae, lm, *batch, SCALE)
    assert scores_of(tally, sae, references)[0]["standard_errors"] is None
    assert standard_errors(None, [[0.0], [0.0], [0.0]]) is None


def test_a_ratio_moves_from_draw_to_draw_by_its_standard_error():
    """1000 draws of 40 lengths and of sums over them whose mean grows with the length, and whose noise does, too."""
    generator = torch.Generator().manual_seed(3)
    b = torch.randint(20, 200, (1000, 40), generator=generator).double()
    a = 0.3 * b + b.sqrt() * torch.randn(1000, 40, generator=generator, dtype=torch.float64)
    ratios = a.sum(dim=1) / b.sum(dim=1)
    said = torch.tensor([of_ratio(*draw) for draw in zip(a, b, strict=True)])
    assert float(said.mean()) == pytest.approx(float(ratios.std()), rel=0.07)
    covered = ((ratios - 0.3).abs() < 1.96 * said).double().mean()
    assert 0.92 < float(covered) < 0.97
    # Text that is all alike has none.
    assert of_ratio(torch.full((5,), 3.0), torch.full((5,), 6.0)) == 0 and not math.isnan(of_ratio(b[0], b[0]))
