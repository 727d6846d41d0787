"""Going on from a cut with another value: logits, loss, gradient and targets, against transformers and arithmetic by
hand.
"""

from __future__ import annotations

import pytest
import torch
from language_models import (
    IDS_BT,
    LENGTHS,
    PLACES,
    TINY,
    B,
    T,
    at,
    clean_logits,
    folder_of,
    load,
    reference,
    run_reference,
    states_of,
)

from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.lm.site import INSIDE, KINDS


@pytest.mark.parametrize("architecture, kind", PLACES)
def test_the_clean_value_gives_the_model_s_own_logits(architecture, kind):
    for layer in (0, 1, 2, 3) if architecture == "tiny" else (0, 2):
        lm = load(architecture, at(kind, layer))
        cut = lm.cut(IDS_BT)
        before_BTD = cut.value_BTD.clone()
        with torch.no_grad():
            logits_BTV = lm.logits(cut, cut.value_BTD)
            whole_BTV = lm.bridge(IDS_BT, return_type="logits")
        assert torch.equal(logits_BTV, whole_BTV) and torch.equal(cut.value_BTD, before_BTD)
        torch.testing.assert_close(whole_BTV, clean_logits(architecture), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["tiny", "llama"])
def test_another_value_goes_where_the_block_s_arithmetic_says(architecture, kind):
    """The block's output by hand, put into transformers' model: the stream in mid-block reaches the MLP and the sum
    after it.
    """
    layer = 1
    lm, model = load(architecture, at(kind, layer)), reference(architecture)
    block, clean = model.model.layers[layer], states_of(architecture, layer)
    value_BTD = clean[kind] + clean[kind].std() * torch.randn(
        clean[kind].shape, generator=torch.Generator().manual_seed(3)
    )

    def after(mid_BTD):
        if architecture == "llama":
            return mid_BTD + block.mlp(block.post_attention_layernorm(mid_BTD))
        return mid_BTD + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(mid_BTD)))

    with torch.no_grad():
        out_BTD = {
            "hook_resid_pre": lambda: None,
            "hook_resid_mid": lambda: after(value_BTD),
            "hook_attn_out": lambda: after(clean["hook_resid_pre"] + value_BTD),
            "hook_mlp_out": lambda: clean["hook_resid_mid"] + value_BTD,
        }.get(kind, lambda: value_BTD)()
    truth = run_reference(
        model,
        pre_hooks=[(block, lambda module, args: (value_BTD, *args[1:]))] if out_BTD is None else (),
        hooks=() if out_BTD is None else [(block, lambda module, args, output: out_BTD)],
    )
    with torch.no_grad():
        logits_BTV = lm.logits(lm.cut(IDS_BT), value_BTD)
    torch.testing.assert_close(logits_BTV, truth.logits, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(logits_BTV, clean_logits(architecture), atol=0.1)


@pytest.mark.parametrize("architecture, kind", PLACES)
@pytest.mark.parametrize("layer", [0, 2])
def test_gradient_equals_finite_differences(architecture, layer, kind):
    lm = load(architecture, at(kind, layer))
    cut = lm.cut(IDS_BT)
    value_BTD = cut.value_BTD.clone().requires_grad_(True)
    (grad_BTD,) = torch.autograd.grad(lm.loss(cut, value_BTD, IDS_BT, LENGTHS), value_BTD)
    assert torch.all(grad_BTD[2, 17:] == 0) and torch.all(grad_BTD[2, 16] == 0)  # the last real token predicts nothing
    random_BTD = torch.randn(value_BTD.shape, generator=torch.Generator().manual_seed(1))
    # Half along the gradient, so that the difference stands out of fp32's rounding of a loss of a thousand nats.
    direction_BTD = grad_BTD / grad_BTD.norm() + random_BTD / random_BTD.norm()
    step = 1e-3 * float(cut.value_BTD.norm())
    with torch.no_grad():
        plus, minus = (lm.loss(cut, cut.value_BTD + s * step * direction_BTD, IDS_BT, LENGTHS) for s in (1, -1))
    assert float((grad_BTD * direction_BTD).sum()) == pytest.approx(float(plus - minus) / (2 * step), rel=0.01)
    assert all(parameter.grad is None for parameter in lm.bridge.original_model.parameters())


def test_rows_are_real_tokens_but_bos():
    lm = load("tiny", at("hook_resid_post"))
    ids_NT = torch.tensor([[2, 7, 8, 2, 9, 0], [2, 7, 2, 2, 5, 6], [2, 4, 4, 4, 4, 4]])
    rows_NT = lm.rows(ids_NT, torch.tensor([5, 4, 1]))
    assert rows_NT.tolist() == [
        [False, True, True, False, True, False],
        [False, True, False, False, False, False],
        [False] * 6,
    ]


def loss_by_hand(logits_BTV):
    """Summed loss and number of targets, one by one; the second document's BOS is no target."""
    log_p_BTV = torch.log_softmax(logits_BTV, dim=-1)
    targets = [(b, t) for b, length in enumerate(LENGTHS.tolist()) for t in range(1, length) if (b, t) != (1, 20)]
    return -sum(float(log_p_BTV[b, t - 1, IDS_BT[b, t]]) for b, t in targets), len(targets)


@pytest.mark.parametrize("kind", ["hook_resid_post", "hook_attn_out"])
def test_loss_of_packed_documents_predicts_no_bos(kind):
    lm = load("tiny", at(kind))
    expected, targets = loss_by_hand(clean_logits("tiny"))
    cut = lm.cut(IDS_BT)
    assert float(lm.loss(cut, cut.value_BTD, IDS_BT, LENGTHS)) == pytest.approx(expected, rel=1e-5)
    assert int(lm.rows(IDS_BT, LENGTHS).sum()) == targets == int((LENGTHS - 1).sum()) - 1
    assert lm.loss(cut, cut.value_BTD, IDS_BT, torch.ones(B, dtype=torch.int64)) == 0


@pytest.mark.parametrize("kind", ["hook_resid_post", "hook_resid_mid"])
def test_padding_changes_nothing(kind):
    lm = load("tiny", at(kind))
    padded_BT = torch.where(torch.arange(T)[None] < LENGTHS[:, None], IDS_BT, lm.pad_id)
    cuts = [lm.cut(ids) for ids in (IDS_BT, padded_BT)]
    for b, n in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(cuts[0].value_BTD[b, :n], cuts[1].value_BTD[b, :n], rtol=0, atol=1e-5)
    losses = [lm.loss(cut, cut.value_BTD, ids, LENGTHS) for cut, ids in zip(cuts, (IDS_BT, padded_BT), strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    short_BT = IDS_BT[2:, :17]
    short, wide = lm.cut(short_BT), lm.cut(IDS_BT[2:])
    torch.testing.assert_close(
        lm.loss(short, short.value_BTD, short_BT, LENGTHS[2:]),
        lm.loss(wide, wide.value_BTD, IDS_BT[2:], LENGTHS[2:]),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("kind", ["hook_resid_post", *INSIDE])
def test_bfloat16(kind):
    lm = LanguageModel.load(str(TINY), at(kind), dtype="bfloat16")
    cut = lm.cut(IDS_BT)
    assert cut.value_BTD.dtype == torch.float32 and torch.equal(cut.value_BTD, cut.value_BTD.bfloat16().float())
    truth, _ = loss_by_hand(clean_logits("tiny"))
    assert float(lm.loss(cut, cut.value_BTD, IDS_BT, LENGTHS)) == pytest.approx(truth, rel=0.02)


def test_a_middle_that_is_not_the_stream_is_refused():
    """The norm before the MLP gets a copy of the stream, so what is put there never reaches the sum after it."""
    lm = LanguageModel.load(str(folder_of("llama")), at("hook_resid_mid", 1))
    lm.bridge.blocks[1].ln2.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    with pytest.raises(ValueError, match="blocks.1.hook_resid_mid: not the residual stream"):
        lm._check_cut()
