"""Every variant of a chain changes what it should, from the configuration to the trained SAE, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from plans import plans_of
from shards import D, make_dataset

from dmsae_ray.activations.shard import read_rows
from dmsae_ray.core.select import select
from dmsae_ray.distill.mapping import sae_settings, score_settings
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.threshold import calibrate
from dmsae_ray.sae.trainer import Trainer

CORE_CD = torch.randn(3, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("variants") / "d", shards=6)


def plan_of(dataset, *argv, fractions="0.25,0.25"):
    return plans_of(dataset, "--sae.width", "48", "--sae.prefix_fractions", fractions, "--train.lr", "0.003", *argv)[0]


def batches_of(plan, dataset, cycle=1):
    """The cycle's global batches, by the plan's order, read without Ray."""
    order, scale = plan.order(dataset, cycle), dataset.manifest.scale
    units = [
        (number, first)
        for number, entry in enumerate(dataset.manifest.shards)
        for first in range(0, entry.rows, order.unit_rows)
    ]
    shards = [read_rows(dataset.store, entry, order.unit_rows, D, "float16") for entry in dataset.manifest.shards]
    assert len(units) == order.n_units == len(plan.units(dataset))
    for step in range(plan.steps):
        round_, row = order.position(step)
        rows = [
            shards[units[unit][0]][units[unit][1] + order.rows(round_, unit)[row : row + order.lane_rows]]
            for unit in order.units(round_)
        ]
        yield torch.cat(rows).float() / scale


def start(plan, cycle=1) -> MatryoshkaSAE:
    return MatryoshkaSAE.init(sae_settings(plan.config, plan.k, D), CORE_CD, plan.init_seed(cycle))


def trained(plan, dataset):
    """A cycle's SAE, its threshold set as a chain does it, and the last step's figures."""
    settings, sae = sae_settings(plan.config, plan.k, D), start(plan)
    trainer = Trainer(sae, settings)
    for x_BD in batches_of(plan, dataset):
        report = trainer.step(x_BD, log=True)
    rows_ND = dataset.calibration_rows().float() / dataset.manifest.scale
    sae.theta.fill_(calibrate(sae, lambda: rows_ND.split(settings.batch), plan.k, settings))
    return sae, report


def core_pairs(sae, dataset) -> float:
    """Active core latents per calibration row, by the inference rule."""
    return (
        (sae.encode(dataset.calibration_rows().float() / dataset.manifest.scale)[:, : sae.core_size] > 0)
        .double()
        .sum(dim=1)
        .mean()
        .item()
    )


def test_the_gate_exempts_the_core_and_the_budget_says_whether_that_counts(dataset):
    competing, counted, exempt = (
        trained(plan_of(dataset, *argv), dataset)
        for argv in ((), ("--sae.core_gate", "relu"), ("--sae.core_gate", "relu", "--sae.core_budget", "exempt"))
    )
    assert competing[1].l0 == counted[1].l0 == 4, "the core is part of the budget"
    assert exempt[1].free_l0 == 4 and exempt[1].core_l0 > 0, "the core comes on top"
    assert counted[1].core_l0 > competing[1].core_l0 and core_pairs(counted[0], dataset) > core_pairs(
        competing[0], dataset
    )
    assert counted[1].free_l0 < exempt[1].free_l0
    assert [sae.core_gate for sae, _ in (competing, counted, exempt)] == ["batchtopk", "relu", "relu"]


def test_the_core_s_encoder_rows_move_only_where_they_are_not_frozen(dataset):
    frozen, init = plan_of(dataset), plan_of(dataset, "--sae.core_transfer", "init")
    assert torch.equal(start(frozen).encoder_rows(), start(init).encoder_rows())
    assert torch.equal(trained(frozen, dataset)[0].encoder_rows()[:3], CORE_CD)
    sae, _ = trained(init, dataset)
    assert (sae.encoder_rows()[:3] != CORE_CD).any(dim=1).all() and sae.core_size == 3
    assert sae.group_ends == start(frozen).group_ends, "candidates and prefixes are those of a frozen core"


def test_random_rows_in_the_core_s_place_are_frozen_too(dataset):
    plan = plan_of(dataset, "--sae.core_transfer", "random")
    sae, _ = trained(plan, dataset)
    assert torch.equal(sae.encoder_rows()[:3], CORE_CD), "whatever rows are given, see core/random_rows.py"
    seeds = {draw(cycle) for cycle in range(4) for draw in (plan.slot_seed, plan.init_seed, plan.selection_seed)}
    assert len(seeds) == 12, "other rows in every cycle"


def test_the_core_s_decoder_rows_start_where_they_are_told_to(dataset):
    encoder, random = start(plan_of(dataset)), start(plan_of(dataset, "--sae.core_decoder_init", "random"))
    torch.testing.assert_close(encoder.W_dec[:3], torch.nn.functional.normalize(CORE_CD, dim=1))
    assert (torch.nn.functional.cosine_similarity(random.W_dec[:3], CORE_CD).abs() < 0.99).all()
    assert torch.equal(random.W_dec[3:], encoder.W_dec[3:]) and torch.equal(
        random.encoder_rows(), encoder.encoder_rows()
    )


def test_tau_decides_how_much_the_core_must_carry(dataset):
    scores_N = torch.tensor([5, 1, 3, 1], dtype=torch.float64)
    sizes = []
    for tau in ("0.5", "0.8", "1"):
        sizes.append(len(select(scores_N, score_settings(plan_of(dataset, "--attribution.tau", tau).config).tau)))
    assert sizes == [1, 2, 4]


def test_k_is_the_mean_number_of_active_latents_in_training_and_after(dataset):
    x_RD = dataset.calibration_rows().float() / dataset.manifest.scale
    for k in (2, 6):
        sae, report = trained(plan_of(dataset, "--sweep.k", str(k)), dataset)
        assert report.l0 == k and (sae.encode(x_RD) > 0).sum() == k * len(x_RD)


def test_prefix_fractions_cut_the_free_latents_and_decide_who_is_a_candidate(dataset):
    assert start(plan_of(dataset)).group_ends == [3 + 11, 3 + 22, 48]
    other = start(plan_of(dataset, fractions="0.1,0.2,0.4"))
    assert other.group_ends == [3 + 4, 3 + 13, 3 + 31, 48]


@pytest.mark.parametrize("data_seed", ["5", "6"])
def test_initialisation_and_order_of_data_can_be_held_apart(dataset, data_seed):
    held, own = ("--sweep.data_seed", data_seed), ("--sweep.seeds", "3")
    zero, three = plan_of(dataset, *held), plan_of(dataset, *held, *own)
    assert (zero.seed, three.seed) == (0, 3) and zero.key != three.key
    assert same_batches(zero, three, dataset)
    assert not torch.equal(start(zero).W_dec, start(three).W_dec), "another initialisation on the same batches"

    free = plan_of(dataset, *own)
    assert torch.equal(start(free).W_dec, start(three).W_dec) and free.key != three.key
    assert not same_batches(free, three, dataset), "the same initialisation on other batches"
    assert free.order(dataset, 0) == dataclasses.replace(three.order(dataset, 0), data_seed=3), (
        "by default the order is the seed's own"
    )


def same_batches(a, b, dataset) -> bool:
    same = [torch.equal(x, y) for x, y in zip(batches_of(a, dataset), batches_of(b, dataset), strict=True)]
    assert np.all(same) or not np.any(same)
    return same[0]
