"""What stands at a hook, and the loss with something else there, against transformers and against arithmetic by hand."""

from __future__ import annotations

import shutil

import pytest
import torch

from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.lm.site import AFTER, INSIDE, KINDS
from dmsae_ray.lm.source import TINY

B, T = 3, 100  # longer than the tiny model's sliding window of 64
LENGTHS = torch.tensor([T, 40, 17])
LAYER = 2
OTHERS = ("llama", "neox", "falcon")
"""Llama: no norms after attention and MLP. NeoX: attention and MLP in parallel. Falcon: parallel, and adds them in place."""
PLACES = [
    (architecture, kind) for architecture in ("tiny", *OTHERS) for kind in KINDS
    if architecture in ("tiny", "llama") or kind != "hook_resid_mid"
]  # fmt: skip


def at(kind: str, layer: int = LAYER) -> str:
    return f"blocks.{layer}.{kind}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of each architecture's model; those but the tiny one are random and strongly nonlinear."""
    from transformers import AutoModelForCausalLM, FalconConfig, GPTNeoXConfig, LlamaConfig

    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 4096, "initializer_range": 0.2}
    configs = {
        "llama": LlamaConfig(intermediate_size=48, num_key_value_heads=2, **shape), "neox": GPTNeoXConfig(intermediate_size=48, **shape),
        "falcon": FalconConfig(**shape),
    }  # fmt: skip
    found = {"tiny": str(TINY)}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for file in TINY.glob("token*"):
            shutil.copy(file, folder)
        found[name] = str(folder)
    return found


@pytest.fixture(scope="module")
def load(models):
    """Loads (architecture, hook) once."""
    loaded = {}

    def get(architecture: str, hook: str) -> LanguageModel:
        if (architecture, hook) not in loaded:
            loaded[architecture, hook] = LanguageModel.load(models[architecture], hook)
        return loaded[architecture, hook]

    return get


@pytest.fixture(scope="module")
def reference(models):
    """The same model in transformers, without TransformerLens."""
    from transformers import AutoModelForCausalLM

    return lambda architecture: AutoModelForCausalLM.from_pretrained(
        models[architecture], dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def ids_BT():
    ids = torch.randint(3, 4096, (B, T), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    ids[1, 20] = 2  # a second document in this sequence
    return ids


@torch.no_grad()
def run_reference(model, ids_BT, pre_hooks=(), hooks=()):
    """Hidden states and logits with (module, function) pairs hooked in."""
    handles = [module.register_forward_pre_hook(function) for module, function in pre_hooks]
    handles += [module.register_forward_hook(function) for module, function in hooks]
    output = model(input_ids=ids_BT, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return output


@torch.no_grad()
def states_of(model, architecture, ids_BT, layer):
    """The stream before, in the middle of and after a block, and what attention and MLP add to it, caught in transformers."""
    block, caught = model.model.layers[layer], {}
    mid, attn_out, mlp_out = (
        (block.pre_feedforward_layernorm, block.post_attention_layernorm, block.post_feedforward_layernorm)
        if architecture == "tiny"
        else (block.post_attention_layernorm, block.self_attn, block.mlp)
    )

    def catch(name, pick):
        return lambda module, args, output: caught.update({name: pick(args, output)})

    def first(args, output):
        return output[0] if isinstance(output, tuple) else output

    run_reference(model, ids_BT, hooks=[
        (block, catch("hook_resid_pre", lambda args, output: args[0])), (block, catch("hook_resid_post", first)),
        (mid, catch("hook_resid_mid", lambda args, output: args[0])), (attn_out, catch("hook_attn_out", first)),
        (mlp_out, catch("hook_mlp_out", first)),
    ])  # fmt: skip
    return caught | {"hook_out": caught["hook_resid_post"]}


@pytest.mark.parametrize("architecture", ["tiny", "llama"])
def test_values_are_those_of_transformers(load, reference, architecture, ids_BT):
    lm, model = load(architecture, at("hook_resid_post", 1)), reference(architecture)
    for layer in (0, lm.n_layers - 1):
        values = lm.sites(ids_BT, [at(kind, layer) for kind in KINDS])
        truth = states_of(model, architecture, ids_BT, layer)
        for kind in KINDS:
            value_BTD = values[at(kind, layer)]
            assert value_BTD.dtype == torch.float32 and value_BTD.shape == (B, T, lm.d) and not value_BTD.requires_grad
            assert torch.equal(value_BTD, truth[kind]), kind
    hidden = run_reference(model, ids_BT).hidden_states
    assert torch.equal(lm.sites(ids_BT, [at("hook_resid_pre", 0)])[at("hook_resid_pre", 0)], hidden[0])
    assert torch.equal(lm.sites(ids_BT, [at("hook_resid_post", 0)])[at("hook_resid_post", 0)], hidden[1])


@pytest.mark.parametrize("architecture", ["tiny", *OTHERS])
def test_a_hook_holds_the_same_bits_alone_and_with_others(load, architecture, ids_BT):
    lm = load(architecture, at("hook_resid_post", 1))
    hooks = [at(kind, layer) for layer in range(3) for kind in KINDS if at(kind, layer) in lm.bridge.hook_dict]
    together = lm.sites(ids_BT, hooks)
    assert list(together) and set(together) == set(hooks)
    for hook in hooks:
        assert torch.equal(lm.sites(ids_BT, [hook])[hook], together[hook]), hook
    assert torch.equal(lm.cut(ids_BT).value_BTD, together[lm.hook])


def counting(lm, run):
    """Blocks that `run` enters, and how often it enters the MLP of block `LAYER`."""
    blocks, mlps = [], []
    handles = [
        block.original_component.register_forward_pre_hook(lambda module, args, number=number: blocks.append(number))
        for number, block in enumerate(lm.bridge.blocks)
    ]
    handles.append(lm.bridge.blocks[LAYER].original_component.mlp.register_forward_pre_hook(lambda module, args: mlps.append(1)))
    run()
    for handle in handles:
        handle.remove()
    return blocks, len(mlps)


@pytest.mark.parametrize("kind, below, above, mlps", [
    ("hook_resid_pre", [0, 1], [2, 3], 1), ("hook_resid_mid", [0, 1, 2], [2, 3], 1), ("hook_attn_out", [0, 1, 2], [2, 3], 1),
    ("hook_mlp_out", [0, 1, 2], [2, 3], 1), ("hook_resid_post", [0, 1, 2], [3], 0), ("hook_out", [0, 1, 2], [3], 0),
])  # fmt: skip
def test_no_block_runs_that_is_not_needed(load, ids_BT, kind, below, above, mlps):
    lm = load("tiny", at(kind))
    cut = lm.cut(ids_BT)
    reads_mlp = kind in (*AFTER, "hook_mlp_out")
    assert counting(lm, lambda: lm.cut(ids_BT)) == (below, int(reads_mlp))
    assert counting(lm, lambda: lm.sites(ids_BT, [at("hook_out", 0), at(kind)])) == (below, int(reads_mlp))
    assert counting(lm, lambda: lm.loss(cut, cut.value_BTD, ids_BT, LENGTHS)) == (above, mlps)


def test_after_the_last_block_none_runs(load, ids_BT):
    lm = load("tiny", at("hook_resid_post", 3))
    cut = lm.cut(ids_BT)
    assert counting(lm, lambda: lm.loss(cut, cut.value_BTD, ids_BT, LENGTHS)) == ([], 0)


@pytest.mark.parametrize("architecture, kind", PLACES)
def test_the_clean_value_gives_the_model_s_own_logits(load, reference, architecture, kind, ids_BT):
    for layer in (0, 1, 2, 3) if architecture == "tiny" else (0, 2):
        lm = load(architecture, at(kind, layer))
        cut = lm.cut(ids_BT)
        before_BTD = cut.value_BTD.clone()
        with torch.no_grad():
            logits_BTV = lm.logits(cut, cut.value_BTD)
            whole_BTV = lm.bridge(ids_BT, return_type="logits")
        assert torch.equal(logits_BTV, whole_BTV) and torch.equal(cut.value_BTD, before_BTD)
        torch.testing.assert_close(whole_BTV, run_reference(reference(architecture), ids_BT).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["tiny", "llama"])
def test_another_value_goes_where_the_block_s_arithmetic_says(load, reference, architecture, kind, ids_BT):
    """The block's output by hand, put into transformers' model: the stream in mid-block reaches the MLP and the sum after it."""
    layer = 1
    lm, model = load(architecture, at(kind, layer)), reference(architecture)
    block, clean = model.model.layers[layer], states_of(model, architecture, ids_BT, layer)
    value_BTD = clean[kind] + clean[kind].std() * torch.randn(clean[kind].shape, generator=torch.Generator().manual_seed(3))

    def after(mid_BTD):
        if architecture == "llama":
            return mid_BTD + block.mlp(block.post_attention_layernorm(mid_BTD))
        return mid_BTD + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(mid_BTD)))

    with torch.no_grad():
        out_BTD = {
            "hook_resid_pre": lambda: None, "hook_resid_mid": lambda: after(value_BTD),
            "hook_attn_out": lambda: after(clean["hook_resid_pre"] + value_BTD),
            "hook_mlp_out": lambda: clean["hook_resid_mid"] + value_BTD,
        }.get(kind, lambda: value_BTD)()  # fmt: skip
    truth = run_reference(
        model, ids_BT, pre_hooks=[(block, lambda module, args: (value_BTD, *args[1:]))] if out_BTD is None else (),
        hooks=() if out_BTD is None else [(block, lambda module, args, output: out_BTD)],
    )  # fmt: skip
    with torch.no_grad():
        logits_BTV = lm.logits(lm.cut(ids_BT), value_BTD)
    torch.testing.assert_close(logits_BTV, truth.logits, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(logits_BTV, run_reference(model, ids_BT).logits, atol=0.1)


@pytest.mark.parametrize("architecture, kind", PLACES)
@pytest.mark.parametrize("layer", [0, 2])
def test_gradient_equals_finite_differences(load, architecture, layer, kind, ids_BT):
    lm = load(architecture, at(kind, layer))
    cut = lm.cut(ids_BT)
    value_BTD = cut.value_BTD.clone().requires_grad_(True)
    (grad_BTD,) = torch.autograd.grad(lm.loss(cut, value_BTD, ids_BT, LENGTHS), value_BTD)
    assert torch.all(grad_BTD[2, 17:] == 0) and torch.all(grad_BTD[2, 16] == 0)  # the last real token predicts nothing
    random_BTD = torch.randn(value_BTD.shape, generator=torch.Generator().manual_seed(1))
    # Half along the gradient, so that the difference stands out of fp32's rounding of a loss of a thousand nats.
    direction_BTD = grad_BTD / grad_BTD.norm() + random_BTD / random_BTD.norm()
    step = 1e-3 * float(cut.value_BTD.norm())
    with torch.no_grad():
        plus, minus = (lm.loss(cut, cut.value_BTD + s * step * direction_BTD, ids_BT, LENGTHS) for s in (1, -1))
    assert float((grad_BTD * direction_BTD).sum()) == pytest.approx(float(plus - minus) / (2 * step), rel=0.01)
    assert all(parameter.grad is None for parameter in lm.bridge.original_model.parameters())


def test_rows_are_real_tokens_but_bos(load):
    lm = load("tiny", at("hook_resid_post"))
    ids_NT = torch.tensor([[2, 7, 8, 2, 9, 0], [2, 7, 2, 2, 5, 6], [2, 4, 4, 4, 4, 4]])
    rows_NT = lm.rows(ids_NT, torch.tensor([5, 4, 1]))
    assert rows_NT.tolist() == [
        [False, True, True, False, True, False], [False, True, False, False, False, False], [False] * 6,
    ]  # fmt: skip


def loss_by_hand(logits_BTV, ids_BT):
    """Summed loss and number of targets, one by one; the second document's BOS is no target."""
    log_p_BTV = torch.log_softmax(logits_BTV, dim=-1)
    targets = [(b, t) for b, length in enumerate(LENGTHS.tolist()) for t in range(1, length) if (b, t) != (1, 20)]
    return -sum(float(log_p_BTV[b, t - 1, ids_BT[b, t]]) for b, t in targets), len(targets)


@pytest.mark.parametrize("kind", ["hook_resid_post", "hook_attn_out"])
def test_loss_of_packed_documents_predicts_no_bos(load, reference, ids_BT, kind):
    lm = load("tiny", at(kind))
    expected, targets = loss_by_hand(run_reference(reference("tiny"), ids_BT).logits, ids_BT)
    cut = lm.cut(ids_BT)
    assert float(lm.loss(cut, cut.value_BTD, ids_BT, LENGTHS)) == pytest.approx(expected, rel=1e-5)
    assert int(lm.rows(ids_BT, LENGTHS).sum()) == targets == int((LENGTHS - 1).sum()) - 1
    assert lm.loss(cut, cut.value_BTD, ids_BT, torch.ones(B, dtype=torch.int64)) == 0


@pytest.mark.parametrize("kind", ["hook_resid_post", "hook_resid_mid"])
def test_padding_changes_nothing(load, ids_BT, kind):
    lm = load("tiny", at(kind))
    padded_BT = torch.where(torch.arange(T)[None] < LENGTHS[:, None], ids_BT, lm.pad_id)
    cuts = [lm.cut(ids) for ids in (ids_BT, padded_BT)]
    for b, n in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(cuts[0].value_BTD[b, :n], cuts[1].value_BTD[b, :n], rtol=0, atol=1e-5)
    losses = [lm.loss(cut, cut.value_BTD, ids, LENGTHS) for cut, ids in zip(cuts, (ids_BT, padded_BT), strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    short_BT = ids_BT[2:, :17]
    short, wide = lm.cut(short_BT), lm.cut(ids_BT[2:])
    torch.testing.assert_close(
        lm.loss(short, short.value_BTD, short_BT, LENGTHS[2:]), lm.loss(wide, wide.value_BTD, ids_BT[2:], LENGTHS[2:]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kind", ["hook_resid_post", *INSIDE])
def test_bfloat16(models, reference, ids_BT, kind):
    lm = LanguageModel.load(models["tiny"], at(kind), dtype="bfloat16")
    cut = lm.cut(ids_BT)
    assert cut.value_BTD.dtype == torch.float32 and torch.equal(cut.value_BTD, cut.value_BTD.bfloat16().float())
    truth, _ = loss_by_hand(run_reference(reference("tiny"), ids_BT).logits, ids_BT)
    assert float(lm.loss(cut, cut.value_BTD, ids_BT, LENGTHS)) == pytest.approx(truth, rel=0.02)


def test_a_middle_that_is_not_the_stream_is_refused(models):
    """The norm before the MLP gets a copy of the stream, so what is put there never reaches the sum after it."""
    lm = LanguageModel.load(models["llama"], at("hook_resid_mid", 1))
    lm.bridge.blocks[1].ln2.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    with pytest.raises(ValueError, match="blocks.1.hook_resid_mid: not the residual stream"):
        lm._check_cut()


def test_a_place_that_is_missing_is_named_with_those_there_are(load, models, ids_BT):
    for architecture in ("neox", "falcon"):
        with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_mid: .*blocks\.1\.hook_resid_pre, .*hook_attn_out, .*hook_mlp_out"):
            LanguageModel.load(models[architecture], at("hook_resid_mid", 1))
    lm = load("neox", at("hook_resid_post", 1))
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_resid_mid: .*GPTNeoXForCausalLM.*blocks\.0\.hook_mlp_out"):
        lm.sites(ids_BT, [at("hook_out", 0), at("hook_resid_mid", 0)])
    with pytest.raises(ValueError, match=r"blocks\.9\.hook_out"):
        lm.sites(ids_BT, [at("hook_out", 9)])
