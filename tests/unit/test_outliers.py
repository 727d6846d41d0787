"""Rows of extreme norm: found in a dataset, warned of, and left out of every measurement by the dataset's one bound."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from language_models import load as load_model
from shards import D, make_dataset, some_rows, write

from dmsae_ray.activations.dataset import ActivationDataset, statistics_of
from dmsae_ray.activations.outliers import MULTIPLE, dataset_facts, notes, outliers_of, write_data
from dmsae_ray.activations.shard import read_rows
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.distill.mapping import attribution_settings
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.evaluation.measure import Tally, scores_of, tally_batch
from dmsae_ray.evaluation.references import reference_losses
from dmsae_ray.results.features.contexts import find_peaks
from dmsae_ray.results.features.effects import remove_latents
from dmsae_ray.sae.latents import Latents
from dmsae_ray.sae.sae import MatryoshkaSAE, unit_rows

SCALE = 20.0


def spiky(folder, training=3, calibration=0, size=100.0, outlier_norm=None):
    """A dataset of which some rows are a hundred times as long; the manifest is of before outliers were looked for."""
    dataset = make_dataset(folder, shards=4)
    entries = []
    for place, entry in enumerate(dataset.manifest.shards):
        rows_ND = some_rows(entry.rows, seed=place)
        rows_ND[: training if place == 0 else 0] *= size
        entries.append(write(dataset.store, entry.file, rows_ND))
    rows_ND = some_rows(32, seed=99)
    rows_ND[:calibration] *= size
    held = write(dataset.store, "shards/calibration.parquet", rows_ND)
    fields = dataset.manifest.fields | {"harvest": {"outlier_norm": outlier_norm}}
    dataclasses.replace(
        dataset.manifest,
        shards=entries,
        calibration=held,
        fields=fields,
        **statistics_of(read_rows(dataset.store, held, 8, D, "float16")),
    ).save(dataset.store)
    return ActivationDataset(dataset.store)


def test_a_few_rows_that_hold_the_variance_are_found_wherever_they_are(tmp_path):
    """Those of the training shards count too, though scale and quantiles are the calibration rows'."""
    dataset = spiky(tmp_path / "d")
    rows_ND = torch.cat(list(dataset.some_rows())).double()
    assert len(rows_ND) == 5 * 32
    norms, spread = rows_ND.norm(dim=1), (rows_ND - rows_ND.mean(dim=0)).square().sum(dim=1)
    out = norms > MULTIPLE * dataset.manifest.norm_quantiles["0.5"]
    facts = write_data(dataset, tmp_path / "data.json")
    assert facts == json.loads((tmp_path / "data.json").read_text()) == dataset_facts(dataset)
    found = facts["outliers"]
    assert (found["rows"], found["of_rows"], found["multiple"]) == (int(out.sum()), 160, 10) and found["rows"] == 3
    assert (
        found["share_of_variance"] == pytest.approx(float(spread[out].sum() / spread.sum()))
        and found["share_of_variance"] > 0.9
    )
    assert (
        found["largest"] == pytest.approx(float(norms.max()))
        and found["median"] == dataset.manifest.norm_quantiles["0.5"]
    )
    assert (facts["hook"], facts["rows"], facts["outlier_norm"], facts["dropped"]) == (
        dataset.manifest.hook,
        128,
        None,
        0,
    )
    (line,) = notes(dataset)
    assert line == f"warning: {facts['warning']}" and "3 of 160 rows" in line and "harvest.outlier_norm to 10" in line
    assert f"{found['share_of_variance']:.0%} of the variance" in line


def test_nothing_is_said_of_ordinary_rows(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    assert (
        notes(dataset) == []
        and dataset_facts(dataset)["warning"] is None
        and dataset_facts(dataset)["outliers"]["rows"] == 0
    )


def test_pieces_do_not_matter_and_no_rows_are_refused():
    rows_ND = some_rows(500)
    rows_ND[::100] *= 50
    whole, parts = outliers_of([rows_ND], 3.4), outliers_of(rows_ND.split(7), 3.4)
    assert whole.rows == parts.rows == 5 and whole.share_of_variance == pytest.approx(parts.share_of_variance)
    with pytest.raises(ValueError, match="no rows"):
        outliers_of([], 1.0)


def test_one_bound_for_training_and_attribution(tmp_path):
    """The data's bound holds where attribution names none, and a multiple of its own only where it is tighter."""
    dataset = make_dataset(tmp_path / "d")
    manifest = dataclasses.replace(dataset.manifest, max_norm=7.5)
    median = manifest.norm_quantiles["0.5"]

    def bound(*args):
        config = load(SweepCommand, ["--output", str(tmp_path / "out"), *args])
        return attribution_settings(config, manifest).max_norm

    assert bound("--harvest.outlier_norm", "10") == 7.5 and bound() == 7.5
    assert bound("--harvest.outlier_norm", "10", "--attribution.outlier_norm", "1.5") == pytest.approx(1.5 * median)
    with pytest.raises(ValueError, match="attribution.outlier_norm 12 has nothing to do: harvest.outlier_norm 10"):
        bound("--harvest.outlier_norm", "10", "--attribution.outlier_norm", "12")


@pytest.mark.parametrize("word", ["null", "None"])
def test_outliers_are_left_out_unless_all_rows_are_asked_for(word):
    assert load(SweepCommand, []).harvest.outlier_norm == MULTIPLE
    assert load(SweepCommand, ["--harvest.outlier_norm", word]).harvest.outlier_norm is None


# -- measurements
# --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return load_model("tiny", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def batch(lm):
    ids = torch.randint(3, lm.vocabulary, (3, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = lm.bos_id
    return ids, torch.tensor([24, 20, 9])


@pytest.fixture(scope="module")
def sae(lm):
    sae, generator = MatryoshkaSAE(lm.d, [7, 15, 43], 3, "batchtopk"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        W_FD = unit_rows(torch.randn(43, lm.d, generator=generator))
        sae.encoder_rows().copy_(W_FD)
        sae.W_dec.copy_(W_FD)
        sae.theta.fill_(0.3)
    return sae


def bound_below(lm, batch, rows: int) -> float:
    """A norm that so many rows exceed."""
    norms = lm.cut(batch[0]).value_BTD.norm(dim=2)[lm.rows(*batch)].sort().values
    return float(norms[-rows - 1 : -rows + 1 or None].mean())


@torch.no_grad()
def test_rows_beyond_the_bound_are_not_measured_and_keep_what_stands_there(lm, batch, sae):
    bound = bound_below(lm, batch, 5)
    value_NTD, rows_NT = lm.cut(batch[0]).value_BTD, lm.rows(*batch)
    counts_NT = rows_NT & (value_NTD.norm(dim=2) <= bound)
    assert int(rows_NT.sum() - counts_NT.sum()) == 5
    references, tally = reference_losses(lm, [batch], torch.zeros(lm.d), bound), Tally()
    tally_batch(tally, sae, lm, *batch, SCALE, removal=True, max_norm=bound)
    metrics, density_F = scores_of(tally, sae, references)
    x_RD, x_MD = value_NTD[rows_NT] / SCALE, value_NTD[counts_NT] / SCALE

    def fvu(x_RD):
        return float((x_RD - sae.decode(sae.encode(x_RD))).square().sum() / (x_RD - x_RD.mean(dim=0)).square().sum())

    assert (metrics["evaluation_tokens"], metrics["rows_left_out"]) == (len(x_RD), 5)
    assert metrics["fvu"] == pytest.approx(fvu(x_MD), rel=1e-4) and metrics["fvu_all_rows"] == pytest.approx(
        fvu(x_RD), rel=1e-4
    )
    torch.testing.assert_close(density_F, (sae.encode(x_MD) > 0).double().mean(dim=0))
    spliced_NTD = value_NTD.clone()
    spliced_NTD[counts_NT] = sae.decode(sae.encode(x_MD)) * SCALE
    cut = lm.cut(batch[0])
    assert metrics["loss_spliced"] == pytest.approx(float(lm.loss(cut, spliced_NTD, *batch)) / len(x_RD), rel=1e-4)
    zeroed_NTD = value_NTD.clone()
    zeroed_NTD[counts_NT] = 0
    assert metrics["loss_zero"] == pytest.approx(float(lm.loss(cut, zeroed_NTD, *batch)) / len(x_RD), rel=1e-4)


@torch.no_grad()
def test_without_rows_beyond_it_the_bound_changes_no_bit(lm, batch, sae):
    found = []
    for bound in (None, 1e9):
        tally = Tally()
        tally_batch(tally, sae, lm, *batch, SCALE, removal=True, max_norm=bound)
        found.append(scores_of(tally, sae, reference_losses(lm, [batch], torch.zeros(lm.d), bound))[0])
    assert found[0] == found[1] and found[0]["fvu"] == found[0]["fvu_all_rows"] and found[0]["rows_left_out"] == 0


def test_a_bound_that_leaves_no_row_is_named(lm, batch, sae):
    tally = Tally()
    tally_batch(tally, sae, lm, *batch, SCALE, max_norm=1e-9)
    with pytest.raises(ValueError, match="harvest.outlier_norm"):
        scores_of(tally, sae, {"clean": 1.0, "zero": 2.0, "mean": 2.0})


@torch.no_grad()
def test_features_do_not_fire_beyond_the_bound(lm, batch, sae):
    ids, lengths = batch
    rows_NT, norms_NT = lm.rows(ids, lengths), lm.cut(ids).value_BTD.norm(dim=2)
    sequences = TokenSequences(
        ids.numpy().astype("int32"), lengths.numpy().astype("int32"), rows_NT.sum(dim=1).numpy().astype("int32")
    )
    piece = Latents.some_of(sae, range(43))
    free = find_peaks([piece], lm, sequences, SCALE, 3, 0, 2)
    beyond = [
        (latent, peak)
        for latent, peaks in enumerate(free)
        for peak in peaks
        if norms_NT[peak.sequence, peak.position] > norms_NT[rows_NT].median()
    ]
    bound = float(norms_NT[rows_NT].median())
    bounded = find_peaks([piece], lm, sequences, SCALE, 3, 0, 2, bound)
    assert beyond and all(norms_NT[peak.sequence, peak.position] <= bound for peaks in bounded for peak in peaks)
    latent, peak = beyond[0]
    read = remove_latents([piece], lm, sequences, SCALE, [(latent, peak.sequence)], 2, max_norm=bound)
    assert float(read.activation_PT[0, peak.position]) == 0 and bool(
        (read.activation_PT[0, norms_NT[peak.sequence] > bound] == 0).all()
    )
