"""Random rows in a core's place: its norms, the activations' covariance, nothing of its directions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dmsae_ray.core.core import Core
from dmsae_ray.core.random_rows import random_rows

D, SIZE = 6, 3000


def core_of(size=SIZE):
    generator = torch.Generator().manual_seed(0)
    rows_CD = torch.randn(size, D, generator=generator) * torch.rand(size, 1, generator=generator).add(0.1)
    return Core(
        W_enc_CD=rows_CD,
        W_dec_CD=torch.nn.functional.normalize(rows_CD, dim=1),
        b_enc_C=torch.zeros(size),
        b_dec_D=torch.zeros(D),
        scores_C=torch.ones(size),
        density_C=torch.full((size,), 0.1),
        latent_ids_C=torch.arange(size),
        theta=0.1,
        scale=1.0,
        hook="hook",
        model="model",
        cycle=0,
        seed=0,
        k=4,
        entered_C=torch.zeros(size),
        selected=((0,),) * size,
    )


def activations():
    """Far from isotropic, and far from 0, fp16."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(4000, D, generator=generator) * torch.tensor([5.0, 2, 1, 1, 0.5, 0.1]) + 40).half()


def test_norms_are_the_core_s_and_directions_have_the_activations_covariance():
    core, rows_ND = core_of(), activations()
    random = random_rows(core, rows_ND, seed=3)
    torch.testing.assert_close(random.W_enc_CD.norm(dim=1), core.W_enc_CD.norm(dim=1), rtol=1e-6, atol=0)
    cosine_C = torch.nn.functional.cosine_similarity(random.W_enc_CD, core.W_enc_CD)
    assert cosine_C.mean().abs() < 0.03, "of the core's directions nothing is left"
    units_CD = torch.nn.functional.normalize(random.W_enc_CD, dim=1)
    gaussian_CD = torch.randn(SIZE, D, generator=torch.Generator().manual_seed(2)) * rows_ND.float().std(dim=0)
    expected_CD = torch.nn.functional.normalize(gaussian_CD, dim=1)
    found, expected = (rows_CD.square().mean(dim=0) for rows_CD in (units_CD, expected_CD))
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.002)
    assert found[0] > 0.5, "isotropic directions would have a sixth along every axis"
    assert units_CD.mean(dim=0).abs().max() < 0.05, "and no direction of the activations' mean"


def test_nothing_else_of_the_core_changes_and_the_seed_decides():
    core, rows_ND = core_of(5), activations()
    random, again, other = (random_rows(core, rows_ND, seed) for seed in (3, 3, 4))
    assert dataclasses.replace(random, W_enc_CD=core.W_enc_CD).fingerprint == core.fingerprint
    assert torch.equal(random.W_enc_CD, again.W_enc_CD) and not torch.equal(random.W_enc_CD, other.W_enc_CD)
    assert random_rows(core_of(0), rows_ND, 3).size == 0


def test_activations_that_do_not_differ_have_no_covariance_to_draw_from():
    with pytest.raises(ValueError, match="do not differ"):
        random_rows(core_of(5), torch.ones(8, D), 3)
