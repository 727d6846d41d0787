"""Whatever the screen, the gate keeps the pairs that the definition names: values by the sampled product, for all
pairs.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference_sae import reference_mask

from dmsae_ray.sae.gate import gate
from dmsae_ray.sae.kept import ScreenError
from dmsae_ray.sae.ops.cpu_ops import NativePairs
from dmsae_ray.sae.ops.pairs import Rounded
from dmsae_ray.sae.ops.torch_ops import TorchPairs
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.screen import Screen
from dmsae_ray.sae.settings import SAESettings

OPS = {"torch": TorchPairs(), "compiled": NativePairs()}

KINDS = {
    "gaussian": lambda x, W: (x, W),
    "packed at the threshold": lambda x, W: (1 + 1e-6 * x, torch.ones_like(W) + 1e-6 * W),
    "all equal": lambda x, W: (torch.ones_like(x), torch.ones_like(W)),
    "few distinct values": lambda x, W: (x.round(), W.round()),
    "huge norms": lambda x, W: (x * 1e12, W * 1e12),
    "overflowing": lambda x, W: (x * 1e25, W * 1e20),
    "tiny norms": lambda x, W: (x * 1e-12, W * 1e-12),
    "denormals": lambda x, W: (x * 1e-22, W * 1e-18),
    "rows below the smallest normal": lambda x, W: (x * 1e-39, W),
    "one outlier row": lambda x, W: (torch.cat([x[:1] * 1e4, x[1:]]), W),
    "one outlier latent": lambda x, W: (x, torch.cat([W[:1] * 1e5, W[1:]])),
    "nothing rounds well": lambda x, W: ((1 + 2.0**-8) * x.sign(), (1 + 2.0**-8) * W.sign()),
    "zero rows": lambda x, W: (x * (torch.arange(len(x)) % 2)[:, None], W * (torch.arange(len(W)) % 3 > 0)[:, None]),
    "cancelling bias": lambda x, W: (x, W),
}


def case(kind, seed, d, width, batch, k, core, core_gate="batchtopk", core_budget="counted", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x_BD, W_FD = (torch.randn(n, d, generator=generator, dtype=dtype) for n in (batch, width))
    x_BD, W_FD = KINDS[kind](x_BD, W_FD)
    settings = SAESettings(d=d, width=width, k=k, batch=batch, core_gate=core_gate, core_budget=core_budget)
    sae = MatryoshkaSAE(d, [core + (width - core) // 2, width], core, core_gate, dtype)
    with torch.no_grad():
        sae.W_enc_core.copy_(W_FD[:core])
        sae.W_enc.copy_(W_FD[core:])
        if kind == "cancelling bias":
            sae.b_enc.copy_(-(x_BD @ W_FD.T).mean(dim=0) - 3)
        elif seed % 2:
            sae.b_enc.copy_(
                0.01
                * (x_BD @ W_FD.T).nan_to_num(0, 0, 0).abs().mean()
                * torch.randn(width, generator=generator, dtype=dtype)
            )
    return sae, settings, x_BD


def check(sae, settings, x_BD, kernels, mode, guess):
    ops = OPS[kernels]
    screen = Screen(sae, ops, mode)
    centred_BD, rows = ops.centre(x_BD, sae.b_dec.detach(), screen.low)
    every = torch.ones(len(x_BD), sae.width).nonzero(as_tuple=True)
    values_N = ops.values(centred_BD, sae.encoder_rows(), sae.b_enc.detach(), *(index.int() for index in every))
    p_BF = values_N.view(len(x_BD), sae.width)
    expected, smallest = reference_mask(p_BF, settings.k, sae.core_size, settings.core_gate, settings.core_budget)
    kept = gate(centred_BD, rows, screen, settings, guess=guess)
    found = torch.zeros_like(expected)
    found[kept.pairs.row_N.long(), kept.pairs.latent_N.long()] = True
    assert torch.equal(found, expected)
    assert torch.equal(kept.pairs.value_N, p_BF[expected])
    assert kept.smallest == smallest
    return kept, p_BF


@pytest.mark.parametrize("mode", ["bf16", "fp32"])
@pytest.mark.parametrize("kernels", ["torch", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_pairs_are_the_defined_ones(kind, kernels, mode):
    for seed in range(4):
        sae, settings, x_BD = case(
            kind, seed, d=70, width=90, batch=24, k=[3, 7, 40, 60][seed], core=[0, 5, 9, 0][seed]
        )
        check(sae, settings, x_BD, kernels, mode, guess=None)
        check(sae, settings, x_BD, kernels, mode, guess=[0.3, 1.0, 30.0, math.inf][seed])


@hypothesis_settings(max_examples=120, deadline=None)
@given(st.data())
def test_kept_pairs_are_the_defined_ones_for_any_shape(data):
    draw = data.draw
    width, batch = draw(st.integers(2, 80)), draw(st.integers(1, 20))
    core_gate = draw(st.sampled_from(["batchtopk", "relu"]))
    sae, settings, x_BD = case(
        draw(st.sampled_from(sorted(KINDS))),
        draw(st.integers(0, 9)),
        draw(st.integers(1, 100)),
        width,
        batch,
        draw(st.integers(1, width)),
        draw(st.integers(0, width - 1)),
        core_gate,
        draw(st.sampled_from(["counted", "exempt"])),
        draw(st.sampled_from([torch.float32, torch.float64])),
    )
    guess = draw(st.sampled_from([None, -1.0, 0.0, 0.1, 1.0, 8.0, 1e30]))
    check(sae, settings, x_BD, draw(st.sampled_from(sorted(OPS))), draw(st.sampled_from(["bf16", "fp32"])), guess)


@pytest.mark.parametrize("mode", ["bf16", "fp32"])
def test_a_good_guess_leaves_few_candidates_and_a_bad_one_costs_only_time(mode):
    sae, settings, x_BD = case("gaussian", 0, d=128, width=2000, batch=300, k=20, core=0)
    with torch.no_grad():
        sae.W_enc.div_(sae.W_enc.norm(dim=1, keepdim=True))
    good, p_BF = check(sae, settings, x_BD, "compiled", mode, guess=None)
    assert good.retries == 0 and good.candidates < 3 * 20 * 300
    assert good.bound <= good.smallest and good.bound > 0.9 * good.smallest
    again, _ = check(sae, settings, x_BD, "compiled", mode, guess=0.97 * good.bound)
    assert again.retries == 0 and again.candidates <= 2 * 20 * 300
    high, _ = check(sae, settings, x_BD, "compiled", mode, guess=1.5 * p_BF.max().item())
    assert high.retries > 0


def test_changed_weights_are_seen():
    sae, settings, x_BD = case("gaussian", 0, d=16, width=40, batch=10, k=3, core=4)
    ops = OPS["compiled"]
    screen = Screen(sae, ops, "bf16")
    before = screen.latents()
    assert screen.latents() is before
    with torch.no_grad():
        sae.W_enc.mul_(-1)
    assert torch.equal(screen.latents().low_ND, sae.encoder_rows().bfloat16())
    check(sae, settings, x_BD, "compiled", "bf16", None)


@pytest.mark.parametrize("kernels", ["torch", "compiled"])
def test_a_product_that_is_off_by_more_than_its_margin_is_an_error(kernels, monkeypatch):
    sae, settings, x_BD = case("gaussian", 0, d=64, width=80, batch=20, k=4, core=0)
    ops = OPS[kernels]
    screen = Screen(sae, ops, "bf16")
    latents = screen.latents()
    latents.low_ND[7] *= 1.1  # as a broken product would
    centred_BD, rows = ops.centre(x_BD, sae.b_dec.detach(), True)
    with pytest.raises(ScreenError, match="train.screen"):
        gate(centred_BD, rows, screen, settings)


def test_rounding_errors_are_bounded_from_above():
    ops = OPS["compiled"]
    x = torch.randn(50, 333, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 15, 50)[:, None]
    for rounded in (ops.round(x, True), TorchPairs().round(x, True)):
        assert isinstance(rounded, Rounded)
        assert torch.equal(rounded.low_ND, x.bfloat16())
        exact = (x.double() - rounded.low_ND.double()).norm(dim=1)
        torch.testing.assert_close(rounded.error_N.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(rounded.norm_N.double(), x.double().norm(dim=1), rtol=1e-6, atol=0)
