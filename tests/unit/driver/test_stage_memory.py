"""What each stage needs of a GPU: bounds from shapes, beside what PyTorch's allocator is asked for at small ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from allocator import allocations, peak

from dmsae_ray.attribution.gradients import AttributionSettings, attribute
from dmsae_ray.distill.grid import grid
from dmsae_ray.distill.mapping import sae_settings
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.driver.preflight import disk_bytes
from dmsae_ray.driver.stage_memory import (
    ModelShape,
    attribution,
    chain_stages,
    evaluation,
    features_stage,
    harvest_stage,
)
from dmsae_ray.evaluation.measure import Tally, tally_batch
from dmsae_ray.lm.model import LanguageModel, model_info
from dmsae_ray.sae.sae import MatryoshkaSAE, unit_rows
from dmsae_ray.sweep import main

CONFIGS = Path(__file__).parents[3] / "configs"
N, T = 8, 64
GEMMA = ModelShape(parameters=2_614_341_888, d=2304, heads=8, inner=9216, vocab=256_000, blocks=26, size=2)


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.load("tiny", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def config():
    return load(SweepCommand, ["--output", "/nowhere", "--model.context", str(T)])


@pytest.fixture(scope="module")
def shape(config):
    return ModelShape.of(config, model_info("tiny"))


@pytest.fixture(scope="module")
def sae(lm, config):
    settings = sae_settings(config, config.sweep.k[0], lm.d)
    sae = MatryoshkaSAE.zeros(settings, 0)
    with torch.no_grad():
        W_FD = unit_rows(torch.randn(sae.width, lm.d, generator=torch.Generator().manual_seed(0)))
        sae.encoder_rows().copy_(W_FD)
        sae.W_dec.copy_(W_FD)
        sae.theta.fill_(0.3)
    return sae


@pytest.fixture(scope="module")
def batch(lm):
    ids = torch.randint(3, lm.vocabulary, (N, T), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = lm.bos_id
    return ids, torch.full((N,), T)


def test_the_model_s_weights_are_those_that_are_loaded(lm, shape):
    assert shape.weights == sum(tensor.nbytes for tensor in lm.bridge.original_model.parameters())


def test_evaluation_stays_below_its_bound_and_not_far(lm, config, shape, sae, batch):
    measured = peak(allocations(lambda: tally_batch(Tally(), sae, lm, *batch, 20.0)))
    bound = evaluation(config, shape, N, T, "cpu")
    assert 0.4 * bound < measured < bound, (measured, bound)


@pytest.mark.parametrize("candidates", ["first_group", "all"])
def test_attribution_stays_below_its_bound_and_not_far(lm, config, shape, sae, batch, candidates):
    config = config.model_copy(update={"attribution": config.attribution.model_copy(update={"candidates": candidates})})
    measured = peak(allocations(lambda: attribute(sae, lm, *batch, 20.0, AttributionSettings(candidates=candidates))))
    bound = attribution(config, shape, N, T)
    assert 0.4 * bound < measured < bound, (measured, bound)


def test_harvest_stays_below_its_bound(lm, config, shape, batch):
    measured = peak(allocations(lambda: lm.sites(batch[0], [lm.hook])))
    few = config.model_copy(update={"harvest": config.harvest.model_copy(update={"sequences_per_forward": N})})
    bound = harvest_stage(few, shape).bytes - shape.weights
    assert 0.2 * bound < measured < bound, (measured, bound)


@pytest.mark.parametrize("name", ["gemma2_2b_l12_65k", "gemma2_2b_l12_65k_paper_reading"])
def test_the_gemma_configurations_fit_an_80_gb_gpu(name, tmp_path):
    config = load(SweepCommand, ["--config", str(CONFIGS / f"{name}.yaml"), "--output", str(tmp_path)])
    stages = [
        harvest_stage(config, GEMMA),
        *chain_stages(config, GEMMA, grid(config, "base", "d", "k")),
        features_stage(config, GEMMA),
    ]
    assert config.cluster.lockstep == len(config.sweep.k) == 3, "the three k of a seed read the same batches"
    assert all(stage.bytes < 0.92 * 80e9 for stage in stages), stages
    assert max(stage.bytes for stage in stages) > 20e9, "else the configuration wastes the GPU"


def test_the_disk_that_the_readme_names_is_what_preflight_asks_for(monkeypatch, tmp_path):
    """The hub is not asked: names of chains do not matter here."""
    monkeypatch.setattr("dmsae_ray.driver.preflight.planned", lambda config: grid(config, "base", "d", "k"))
    config = load(SweepCommand, ["--config", str(CONFIGS / "gemma2_2b_l12_65k.yaml"), "--output", str(tmp_path)])
    assert f"{math.ceil(disk_bytes(config, GEMMA.d) / 1e10) / 100} TB of disk" in (CONFIGS / "README.md").read_text()


def test_the_gemma_configurations_pin_what_the_hub_gives():
    for path in CONFIGS.glob("gemma*.yaml"):
        config = load(SweepCommand, ["--config", str(path)])
        assert all(len(revision or "") == 40 for revision in (config.model.revision, config.corpus.revision)), path
        assert config.features.tokens >= 4_000_000, (
            "a latent of density 1e-5 is to be seen more often than features.contexts"
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            ["--cluster.gpus_per_worker", "1"],
            ("training", "evaluation", "attribution: needs up to", "lower attribution.sequences_per_shard (now 32)"),
        ),
        (
            ["--harvest.gpus_per_actor", "0.5"],
            ("harvest: needs up to", "harvest.gpus_per_actor 0.5 x 0.1 GB", "features.sequences_per_batch (now 32)"),
        ),
    ],
)
def test_a_stage_that_does_not_fit_is_named_before_anything_starts(tmp_path, capsys, fields, words):
    code = main(["--output", str(tmp_path / "out"), "--cluster.gpu_gb", "0.05", *fields])
    said = capsys.readouterr()
    assert code == 2 and "error: " in said.err and all(word in said.err for word in words), said.err
    assert not (tmp_path / "out").exists()
