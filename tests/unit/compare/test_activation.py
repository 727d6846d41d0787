"""Activation agreement against known answers."""

import numpy as np
import pytest
import torch
from compared_chains import latents, make_chain, rows, unit_rows

from dmsae_ray.compare.activation import agreement, standardised
from dmsae_ray.compare.match import Matching, hungarian
from dmsae_ray.compare.measured_latents import MeasuredLatents
from dmsae_ray.sae.sae import MatryoshkaSAE


def straight(count) -> Matching:
    return Matching(np.arange(count), np.arange(count), np.ones(count), (count, count))


@pytest.mark.parametrize("gate, transfer", [("batchtopk", "frozen"), ("relu", "frozen"), ("relu", "init")])
def test_latents_are_active_as_in_their_sae(gate, transfer):
    torch.manual_seed(0)
    sae = MatryoshkaSAE(8, [6, 20], core_size=4, core_gate=gate, core_transfer=transfer)
    for tensor in (sae.flat, sae.W_enc_core, sae.b_enc.data, sae.b_dec.data):
        tensor.data.copy_(torch.randn_like(tensor))
    sae.theta.fill_(0.7)
    rows_RD = rows(64, d=8)
    z_RF = sae.encode(rows_RD / 3.0)
    whole = MeasuredLatents.of(sae, torch.zeros(20), scale=3.0)
    assert torch.equal(whole.activations(rows_RD), z_RF) and (z_RF > 0).any()
    some = [3, 4, 11]
    assert torch.allclose(whole.take(torch.tensor(some)).activations(rows_RD), z_RF[:, some], atol=1e-6)
    # Half-precision rows are what a dataset holds.
    assert torch.equal(whole.activations(rows_RD.half()), sae.encode(rows_RD.half().float() / 3.0))


def test_tensors_of_different_saes_are_refused():
    with pytest.raises(ValueError, match=r"theta_N has shape \(3,\), W_dec_ND asks for \(4,\)"):
        MeasuredLatents(
            unit_rows(4, 0), torch.zeros(4), unit_rows(4, 0), torch.zeros(16), torch.zeros(3), torch.zeros(4), 1.0
        )


def test_it_is_the_mean_of_pearson_correlations(monkeypatch):
    monkeypatch.setattr("dmsae_ray.compare.activation.PART", 100)  # 512 rows in six parts, the last one short
    a, b, rows_RD = latents(unit_rows(6, 0), bias=0.2), latents(unit_rows(9, 1), theta=0.1), rows()
    matching = hungarian(a.W_dec_ND, b.W_dec_ND)
    found = agreement(standardised(a, rows_RD), standardised(b, rows_RD), matching)
    z_a, z_b = a.activations(rows_RD).double().numpy(), b.activations(rows_RD).double().numpy()
    expected = [np.corrcoef(z_a[:, i], z_b[:, j])[0, 1] for i, j in zip(matching.left_P, matching.right_P, strict=True)]
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-6) and (found.counted, found.left_out) == (6, 0)


def test_a_core_with_itself_is_one_and_with_others_near_zero():
    core = make_chain(0).core_latents()
    own = standardised(core, rows())
    assert agreement(own, own, straight(10)).mean == pytest.approx(1, abs=1e-6)
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    order = hungarian(core.W_dec_ND, core.W_dec_ND[shuffled])
    assert agreement(own, own.take(shuffled), order).mean == pytest.approx(1, abs=1e-6)
    eye = torch.eye(16)  # orthogonal latents on independent inputs
    first, second = (standardised(latents(eye[part]), rows(20_000)) for part in (slice(8), slice(8, 16)))
    assert abs(agreement(first, second, straight(8)).mean) < 0.01


def test_it_sees_what_the_rows_do_not():
    """Equal rows, another threshold: cosines are 1, and the latents are not used alike."""
    wide, narrow = latents(unit_rows(5, 0), theta=0.0), latents(unit_rows(5, 0), theta=2.0)
    assert 0.2 < agreement(standardised(wide, rows()), standardised(narrow, rows()), straight(5)).mean < 0.9


def test_silent_latents_are_left_out_and_counted():
    a = latents(unit_rows(4, 0))
    a.b_enc_N[1] = -100.0  # never active
    own = standardised(a, rows())
    found = agreement(own, own, straight(4))
    assert found.mean == pytest.approx(1, abs=1e-6) and (found.counted, found.left_out) == (3, 1)
    a.b_enc_N[:] = -100.0
    nothing = agreement(standardised(a, rows()), own, straight(4))
    assert (nothing.mean, nothing.counted, nothing.left_out) == (None, 0, 4)
    empty = agreement(own.take(slice(0)), own, hungarian(a.W_dec_ND[:0], a.W_dec_ND))
    assert (empty.mean, empty.counted, empty.left_out) == (None, 0, 0)
