import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference_sae import ReferenceTrainer, reference_loss

from dmsae_ray.sae import loss as loss_module
from dmsae_ray.sae.gate import gate
from dmsae_ray.sae.loss import LossModule
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def random_case(seed, core_transfer="frozen"):
    """A random small SAE (float64) with a core, a batch, and settings; about half of them with dead latents."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    d, width, batch = integer(2, 9), integer(6, 30), integer(2, 12)
    core_size = integer(0, width // 2)
    settings = SAESettings(
        d=d,
        width=width,
        k=integer(1, 4),
        batch=batch,
        prefix_fractions=[(0.1, 0.2), (1 / 3,), (1 / 32, 1 / 4, 1 / 2)][seed % 3],
        core_gate=["batchtopk", "relu"][seed % 2],
        core_budget=["counted", "exempt"][seed // 2 % 2],
        core_transfer=core_transfer,
        core_decoder_init=["encoder", "random"][seed // 3 % 2],
        dead_window_tokens=[10**7, 3 * batch][seed // 2 % 2],
        auxk_k=[None, 1, 50][seed % 3],
        lr=1e-2,
        warmup_steps=2,
        decay_steps=3,
        total_steps=9,
    )
    core = torch.randn(core_size, d, dtype=torch.float64, generator=generator)
    sae = MatryoshkaSAE.init(settings, core, seed, torch.float64)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
            parameter += 0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    x_BD = torch.randn(batch, d, dtype=torch.float64, generator=generator)
    silent_F = batch * torch.randint(0, 5, (width,), generator=generator)
    return sae, settings, x_BD, silent_F, generator


def reference_of(sae, settings):
    """A reference trainer that starts where this SAE stands."""
    parameters = {name: getattr(sae, name).detach().clone() for name in NAMES}
    parameters["W_enc"] = sae.encoder().detach().clone()
    return ReferenceTrainer(
        parameters,
        sae.group_ends,
        sae.core_size,
        settings.k,
        settings.lr,
        settings.core_gate,
        settings.core_budget,
        settings.dead_window_tokens,
        settings.warmup_steps,
        settings.decay_steps,
        settings.total_steps,
        settings.auxk_alpha,
        settings.aux_latents,
        settings.clip,
        settings.core_transfer == "frozen",
        settings.decoder == "learned",
        settings.l2,
    )


def gradients_of(sae, flat):
    """Gradients by name, W_enc over all latents with zeros for the frozen rows."""
    gradients = dict(zip(NAMES, sae.views(flat), strict=True))
    gradients["W_enc"] = torch.cat([torch.zeros_like(sae.W_enc_core), gradients["W_enc"]])
    return gradients


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize("core_transfer", ["frozen", "init"])
@pytest.mark.parametrize("seed", range(36))
def test_gradients_are_those_of_autograd(seed, core_transfer, kernels):
    sae, settings, x_BD, silent_F, _ = random_case(seed, core_transfer)
    settings = dataclasses.replace(settings, kernels=kernels)
    reference = reference_of(sae, settings)
    reference.silent = silent_F.clone()
    expected, expected_loss, mask, smallest = reference.gradients(x_BD)

    before = silent_F.clone()
    module = LossModule(sae, settings)
    assert module.ops.name == kernels
    loss, outcome = module(x_BD, silent_F)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert outcome.smallest == pytest.approx(smallest, rel=1e-12)
    assert torch.equal(outcome.silent_F, reference.silent)
    assert torch.equal(silent_F, before), "the forward pass must not change the counters"
    assert torch.equal(outcome.latent_N, mask.nonzero()[:, 1].int())
    for name, gradient in gradients_of(sae, module.flat.grad).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-12, msg=lambda text: f"{name}: {text}")


@st.composite
def any_case(draw):
    """Any shape, group sizes, core, gate, micro-batch, empty rows, none to all of the free latents dead, in float64 or
    float32.
    """
    d, width, batch = draw(st.integers(1, 40)), draw(st.integers(4, 70)), draw(st.integers(1, 20))
    core_size = draw(st.integers(0, width - 4))
    fractions = draw(st.sampled_from([(0.3,), (0.1, 0.2), (1 / 32, 1 / 16, 1 / 8, 1 / 4), (0.5, 0.4), (0.01, 0.02)]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    settings = SAESettings(
        d=d,
        width=width,
        k=draw(st.integers(1, min(width, 12))),
        batch=batch,
        prefix_fractions=fractions,
        core_gate=draw(st.sampled_from(["batchtopk", "relu"])),
        core_budget=draw(st.sampled_from(["counted", "exempt"])),
        core_transfer=draw(st.sampled_from(["frozen", "init"])),
        core_decoder_init=draw(st.sampled_from(["encoder", "random"])),
        dead_window_tokens=1000,
        auxk_k=draw(st.sampled_from([None, 1, 3, 100])),
        auxk_alpha=draw(st.sampled_from([0.0, 1 / 32, 1.0])),
        kernels=draw(st.sampled_from(["compiled", "torch"])),
        screen=draw(st.sampled_from(["bf16", "fp32"])),
        micro_batch=draw(st.sampled_from([None, None, 1, 3, 8])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    core = torch.randn(core_size, d, dtype=dtype, generator=generator)
    sae = MatryoshkaSAE.init(settings, core, 0, dtype)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
            parameter += 0.2 * torch.randn(parameter.shape, dtype=dtype, generator=generator)
        if draw(st.booleans()):
            sae.b_enc -= 2.0  # few positive pairs, many rows without any
    x_BD = torch.randn(batch, d, dtype=dtype, generator=generator)
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    silent_F = torch.where(torch.rand(width, generator=generator) < share, 1000, 0)
    return sae, settings, x_BD, silent_F


@hypothesis_settings(max_examples=150, deadline=None)
@given(any_case())
def test_every_gradient_is_that_of_autograd_given_the_same_kept_pairs(case):
    sae, settings, x_BD, silent_F = case
    kept = {}

    def watched(*arguments, **more):
        kept["pairs"] = gate(*arguments, **more).pairs
        return real(*arguments, **more)

    real = loss_module.gate
    with mock.patch.object(loss_module, "gate", watched):
        loss, flat, outcome = LossModule(sae, settings).compute(x_BD, silent_F)
    mask_BF = torch.zeros(len(x_BD), sae.width, dtype=torch.bool)
    mask_BF[kept["pairs"].row_N.long(), kept["pairs"].latent_N.long()] = True

    leaves = {name: getattr(sae, name).detach().double().requires_grad_() for name in ("b_enc", "W_dec", "b_dec")}
    leaves["W_enc"] = sae.encoder_rows().double().requires_grad_()
    expected, _, _ = reference_loss(
        x_BD.double(),
        leaves["W_enc"],
        leaves["b_enc"],
        leaves["W_dec"],
        leaves["b_dec"],
        sae.group_ends,
        mask_BF,
        outcome.dead_F if settings.auxk_alpha else torch.zeros_like(outcome.dead_F),
        settings.auxk_alpha,
        settings.aux_latents,
    )
    expected.backward()
    tolerance = 1e-10 if x_BD.dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    leaves["W_enc"].grad[: sae.n_frozen] = 0
    for name, gradient in gradients_of(sae, flat).items():
        size = max(1.0, float(leaves[name].grad.abs().max()))
        assert (gradient.double() - leaves[name].grad).abs().max() <= tolerance * size, name


def test_the_cases_hold_dead_latents_on_both_sides_of_the_auxk_limit():
    found = set()
    for seed in range(36):
        sae, settings, x_BD, silent_F, _ = random_case(seed)
        _, outcome = LossModule(sae, settings)(x_BD, silent_F)
        dead = int(outcome.dead_F.sum())
        found.add("none" if dead == 0 else "more" if dead > settings.aux_latents else "fewer")
        assert not outcome.dead_F[: sae.core_size].any(), "core latents do not count as dead"
    assert found == {"none", "fewer", "more"}


def test_auxk_loss_is_zero_where_the_residual_has_no_variance():
    settings = SAESettings(d=3, width=8, k=1, batch=4, dead_window_tokens=4)
    sae = MatryoshkaSAE.init(settings, None, seed=0)
    with torch.no_grad():
        sae.b_enc.fill_(-10.0)  # nothing fires: the residual is x - b_dec, the same for every token
    x_BD = torch.tensor([[0.1, 0.7, -0.3]]).repeat(4, 1)
    _, gradient, outcome = LossModule(sae, settings).compute(x_BD, torch.zeros(8, dtype=torch.int64))
    assert outcome.dead_F.all() and outcome.loss_aux == 0
    assert torch.isfinite(gradient).all()


def test_loss_module_scales_with_an_incoming_gradient():
    sae, settings, x_BD, silent_F, _ = random_case(0)
    once, thrice = LossModule(sae, settings), LossModule(sae, settings)
    once(x_BD, silent_F)[0].backward()
    (3 * thrice(x_BD, silent_F)[0]).backward()
    torch.testing.assert_close(thrice.flat.grad, 3 * once.flat.grad)


def test_the_module_s_one_parameter_is_the_sae_s_memory():
    sae, settings, _, _, _ = random_case(1)
    module = LossModule(sae, settings)
    ((name, flat),) = module.named_parameters()
    assert name == "flat" and flat.numel() == sum(parameter.numel() for parameter in sae.parameters())
    with torch.no_grad():
        flat.fill_(3.0)
    assert all((parameter == 3).all() for parameter in sae.parameters()) and not (sae.W_enc_core == 3).any()


def test_reference_loss_by_hand():
    # One token, two latents of one dimension: prefix 0 rebuilds 1 of 3, prefix 1 rebuilds 3 of 3.
    x = torch.tensor([[3.0]])
    _, loss_rec, _ = reference_loss(
        x,
        torch.tensor([[0.0], [0.0]]),
        torch.tensor([1.0, 2.0]),
        torch.ones(2, 1),
        torch.zeros(1),
        [1, 2],
        torch.ones(1, 2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.bool),
        0.0,
        1,
    )
    assert loss_rec == ((3 - 1) ** 2 + 0) / 4
