"""What stands at hooks, how far the model runs for it, and what is said of a place that is missing."""

from __future__ import annotations

import pytest
import torch
from language_models import IDS_BT, LENGTHS, OTHERS, B, T, at, folder_of, load, reference, run_reference, states_of

from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.lm.site import AFTER, KINDS


@pytest.mark.parametrize("architecture", ["tiny", "llama"])
def test_values_are_those_of_transformers(architecture):
    lm, model = load(architecture, at("hook_resid_post", 1)), reference(architecture)
    for layer in (0, lm.n_layers - 1):
        values = lm.sites(IDS_BT, [at(kind, layer) for kind in KINDS])
        truth = states_of(architecture, layer)
        for kind in KINDS:
            value_BTD = values[at(kind, layer)]
            assert value_BTD.dtype == torch.float32 and value_BTD.shape == (B, T, lm.d) and not value_BTD.requires_grad
            assert torch.equal(value_BTD, truth[kind]), kind
    hidden = run_reference(model).hidden_states
    assert torch.equal(lm.sites(IDS_BT, [at("hook_resid_pre", 0)])[at("hook_resid_pre", 0)], hidden[0])
    assert torch.equal(lm.sites(IDS_BT, [at("hook_resid_post", 0)])[at("hook_resid_post", 0)], hidden[1])


@pytest.mark.parametrize("architecture", ["tiny", *OTHERS])
def test_a_hook_holds_the_same_bits_alone_and_with_others(architecture):
    lm = load(architecture, at("hook_resid_post", 1))
    hooks = [at(kind, layer) for layer in range(3) for kind in KINDS if at(kind, layer) in lm.bridge.hook_dict]
    together = lm.sites(IDS_BT, hooks)
    assert list(together) and set(together) == set(hooks)
    for hook in hooks:
        assert torch.equal(lm.sites(IDS_BT, [hook])[hook], together[hook]), hook
    assert torch.equal(lm.cut(IDS_BT).value_BTD, together[lm.hook])


def counting(lm, run):
    """Blocks that `run` enters, and how often it enters the MLP of block 2."""
    blocks, mlps = [], []
    handles = [
        block.original_component.register_forward_pre_hook(lambda module, args, number=number: blocks.append(number))
        for number, block in enumerate(lm.bridge.blocks)
    ]
    handles.append(
        lm.bridge.blocks[2].original_component.mlp.register_forward_pre_hook(lambda module, args: mlps.append(1))
    )
    run()
    for handle in handles:
        handle.remove()
    return blocks, len(mlps)


@pytest.mark.parametrize(
    "kind, below, above, mlps",
    [
        ("hook_resid_pre", [0, 1], [2, 3], 1),
        ("hook_resid_mid", [0, 1, 2], [2, 3], 1),
        ("hook_attn_out", [0, 1, 2], [2, 3], 1),
        ("hook_mlp_out", [0, 1, 2], [2, 3], 1),
        ("hook_resid_post", [0, 1, 2], [3], 0),
        ("hook_out", [0, 1, 2], [3], 0),
    ],
)
def test_no_block_runs_that_is_not_needed(kind, below, above, mlps):
    lm = load("tiny", at(kind))
    cut = lm.cut(IDS_BT)
    reads_mlp = kind in (*AFTER, "hook_mlp_out")
    assert counting(lm, lambda: lm.cut(IDS_BT)) == (below, int(reads_mlp))
    assert counting(lm, lambda: lm.sites(IDS_BT, [at("hook_out", 0), at(kind)])) == (below, int(reads_mlp))
    assert counting(lm, lambda: lm.loss(cut, cut.value_BTD, IDS_BT, LENGTHS)) == (above, mlps)


def test_after_the_last_block_none_runs():
    lm = load("tiny", at("hook_resid_post", 3))
    cut = lm.cut(IDS_BT)
    assert counting(lm, lambda: lm.loss(cut, cut.value_BTD, IDS_BT, LENGTHS)) == ([], 0)


@pytest.mark.parametrize("kind", ["hook_mlp_out", "hook_resid_post", "hook_attn_out"])
def test_a_model_that_goes_on_in_place_changes_no_value(kind):
    """As Falcon's block does, but for TransformerLens: it adds attention's output to the very tensor its MLP gave."""
    lm = LanguageModel.load(str(folder_of("llama")), at(kind, 1))
    lm.bridge.blocks[1].mlp.register_forward_hook(lambda module, args, output: output.add_(1.0))
    for block in lm.bridge.blocks[1:]:
        block.original_component.register_forward_pre_hook(lambda module, args: (args[0].add_(1.0), *args[1:]))
    hook, later = lm.hook, at("hook_resid_post", 2)
    alone_BTD = lm.sites(IDS_BT, [hook])[hook]
    assert torch.equal(lm.sites(IDS_BT, [hook, later])[hook], alone_BTD)
    cut = lm.cut(IDS_BT)
    value_BTD, losses = cut.value_BTD.clone().requires_grad_(True), []
    for _ in range(2):
        losses.append(lm.loss(cut, value_BTD, IDS_BT, LENGTHS))  # a leaf that requires grad cannot be written to
    assert torch.equal(value_BTD, alone_BTD) and losses[0] == losses[1]


def test_a_place_that_is_missing_is_named_with_those_there_are():
    for architecture in ("neox", "falcon"):
        with pytest.raises(
            ValueError, match=r"blocks\.1\.hook_resid_mid: .*blocks\.1\.hook_resid_pre, .*hook_attn_out, .*hook_mlp_out"
        ):
            LanguageModel.load(str(folder_of(architecture)), at("hook_resid_mid", 1))
    lm = load("neox", at("hook_resid_post", 1))
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_resid_mid: .*GPTNeoXForCausalLM.*blocks\.0\.hook_mlp_out"):
        lm.sites(IDS_BT, [at("hook_out", 0), at("hook_resid_mid", 0)])
    with pytest.raises(ValueError, match=r"blocks\.9\.hook_out"):
        lm.sites(IDS_BT, [at("hook_out", 9)])
