import dataclasses

import pytest
import torch

from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.threshold import calibrate

SETTINGS = SAESettings(d=6, width=50, k=4, batch=8)


def case(core_size, settings, dtype):
    generator = torch.Generator().manual_seed(core_size)
    sae = MatryoshkaSAE.init(settings, torch.randn(core_size, 6, generator=generator), 0, dtype)
    x = torch.randn(301, 6, generator=generator, dtype=dtype)
    return sae, x, lambda: x.split(64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 4, 13])
def test_theta_lets_exactly_k_pairs_per_row_through(dtype, k):
    sae, x, chunks = case(5, SETTINGS, dtype)
    sae.theta.fill_(calibrate(sae, chunks, k, SETTINGS))
    kept = sum(int((sae.encode(chunk) > 0).sum()) for chunk in chunks())
    assert kept == k * 301
    everything = sae.pre(x).flatten().sort(descending=True).values
    assert sae.theta.item() == pytest.approx(everything[k * 301].item(), rel=1e-6)


@pytest.mark.parametrize("budget", ["counted", "exempt"])
@pytest.mark.parametrize("k", [1, 4])
def test_exempt_core(budget, k):
    settings = dataclasses.replace(SETTINGS, core_gate="relu", core_budget=budget)
    sae, x, chunks = case(5, settings, torch.float32)
    sae.theta.fill_(calibrate(sae, chunks, k, settings))
    z = torch.cat([sae.encode(chunk) for chunk in chunks()])
    core_pairs, free_pairs = int((z[:, :5] > 0).sum()), int((z[:, 5:] > 0).sum())
    assert core_pairs == int((sae.pre(x)[:, :5] > 0).sum())
    assert free_pairs == (max(301, k * 301 - core_pairs) if budget == "counted" else k * 301)


def test_fewer_positive_pairs_than_the_target_give_zero():
    sae, _, chunks = case(0, SETTINGS, torch.float32)
    with torch.no_grad():
        sae.b_enc.fill_(-2.0)
    assert calibrate(sae, chunks, 40, SETTINGS) == 0.0


def test_a_tie_at_the_target_is_left_out_whole():
    settings = SAESettings(d=1, width=4, k=1, batch=1)
    sae = MatryoshkaSAE.init(settings, None, 0)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.copy_(torch.tensor([3.0, 2.0, 2.0, 1.0]))
    rows = torch.zeros(10, 1)
    thetas = [calibrate(sae, lambda: [rows[:7], rows[7:]], k, settings) for k in (1, 2, 3, 4)]
    assert thetas == [2.0, 2.0, 1.0, 0.0]


def test_no_rows_are_an_error():
    sae, _, _ = case(0, SETTINGS, torch.float32)
    with pytest.raises(ValueError, match="no rows"):
        calibrate(sae, list, 4, SETTINGS)
