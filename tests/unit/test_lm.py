"""The language model cut at a hook, against transformers."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmsae_ray.lm.model import LanguageModel, load_tokenizer, model_info
from dmsae_ray.lm.source import TINY

HOOK = "blocks.2.hook_resid_post"
B, T = 3, 100  # longer than the tiny model's sliding window of 64


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.load("tiny", HOOK)


@pytest.fixture(scope="module")
def reference():
    """The same model in transformers, without TransformerLens."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()


@pytest.fixture(scope="module")
def ids_BT():
    ids = torch.randint(3, 4096, (B, T), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    return ids


@pytest.fixture(scope="module")
def truth(reference, ids_BT):
    with torch.no_grad():
        return reference(input_ids=ids_BT, output_hidden_states=True, use_cache=False)


def full_loss(logits_BTV, ids_BT, lengths_B):
    """Summed cross-entropy over positions 1..length-1, one sequence at a time."""
    return sum(
        torch.nn.functional.cross_entropy(logits_BTV[b, : n - 1].float(), ids_BT[b, 1:n], reduction="sum")
        for b, n in enumerate(lengths_B.tolist())
    )


def test_shipped_files_are_small_and_described():
    assert (TINY / "model.safetensors").stat().st_size < 4_000_000
    weights = load_file(TINY / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    card = (TINY / "README.md").read_text()
    assert f"{sum(value.numel() for value in weights.values()):,}" in card and "held-out loss" in card


def test_attributes(lm):
    assert (lm.d, lm.layer, lm.n_layers, lm.bos_id, lm.pad_id) == (128, 2, 4, 2, 0)
    info = model_info("tiny")
    assert (info.d, info.n_layers, info.vocab, info.max_context, info.has_tokenizer) == (128, 4, 4096, 256, True)
    assert info.fingerprint == lm.fingerprint and len(info.fingerprint) == 64


@pytest.mark.parametrize("hook, layer", [(HOOK, 2), ("blocks.0.hook_out", 0), ("blocks.3.hook_resid_post", 3)])
def test_residual_and_logits_are_those_of_transformers(hook, layer, truth, reference, ids_BT):
    lm = LanguageModel.load("tiny", hook)
    resid_BTD = lm.residual(ids_BT)
    assert resid_BTD.shape == (B, T, lm.d) and resid_BTD.dtype == torch.float32 and not resid_BTD.requires_grad
    caught = []
    handle = reference.model.layers[layer].register_forward_hook(lambda module, args, output: caught.append(output))
    with torch.no_grad():
        reference(input_ids=ids_BT, use_cache=False)
    handle.remove()
    assert torch.equal(resid_BTD, caught[0])
    if layer + 1 < lm.n_layers:  # transformers' last hidden state is the normalised one
        assert torch.equal(resid_BTD, truth.hidden_states[layer + 1])
    with torch.no_grad():
        assert torch.equal(lm.logits_from_residual(resid_BTD), truth.logits)


def test_only_the_blocks_above_run(lm, ids_BT):
    resid_BTD, calls = lm.residual(ids_BT), []
    handles = [
        layer.register_forward_hook(lambda module, args, output, number=number: calls.append(number))
        for number, block in enumerate(lm.bridge.blocks)
        for layer in [block.original_component]
    ]
    lm.loss_from_residual(resid_BTD, ids_BT, torch.full((B,), T))
    assert calls == [3]
    calls.clear()
    lm.residual(ids_BT)
    assert calls == [0, 1, 2]
    for handle in handles:
        handle.remove()


def test_loss_is_the_full_models_on_padded_input(lm, truth, ids_BT):
    lengths_B = torch.tensor([T, 40, 17])
    loss = lm.loss_from_residual(lm.residual(ids_BT), ids_BT, lengths_B)
    torch.testing.assert_close(loss, full_loss(truth.logits, ids_BT, lengths_B), rtol=1e-6, atol=0)


def test_padding_changes_nothing(lm, ids_BT):
    lengths_B = torch.tensor([T, 40, 17])
    padded_BT = torch.where(torch.arange(T)[None] < lengths_B[:, None], ids_BT, lm.pad_id)
    a_BTD, b_BTD = lm.residual(ids_BT), lm.residual(padded_BT)
    for b, n in enumerate(lengths_B.tolist()):
        torch.testing.assert_close(a_BTD[b, :n], b_BTD[b, :n], rtol=0, atol=1e-5)
    losses = [lm.loss_from_residual(x, ids, lengths_B) for x, ids in ((a_BTD, ids_BT), (b_BTD, padded_BT))]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    short_BTD = lm.residual(ids_BT[2:, :17])
    torch.testing.assert_close(
        lm.loss_from_residual(short_BTD, ids_BT[2:, :17], lengths_B[2:]),
        lm.loss_from_residual(a_BTD[2:], ids_BT[2:], lengths_B[2:]), rtol=1e-5, atol=0,
    )  # fmt: skip
    assert lm.loss_from_residual(a_BTD, ids_BT, torch.ones(B, dtype=torch.int64)) == 0


def test_gradient_equals_finite_differences(lm, ids_BT):
    lengths_B = torch.tensor([T, 40, 17])
    resid_BTD = lm.residual(ids_BT).requires_grad_(True)
    (grad_BTD,) = torch.autograd.grad(lm.loss_from_residual(resid_BTD, ids_BT, lengths_B), resid_BTD)
    assert torch.all(grad_BTD[2, 17:] == 0) and torch.all(grad_BTD[2, 16] == 0)  # the last real token predicts nothing
    direction_BTD = torch.randn(resid_BTD.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    with torch.no_grad():
        plus, minus = (lm.loss_from_residual(resid_BTD + s * step * direction_BTD, ids_BT, lengths_B) for s in (1, -1))
    expected = float(plus - minus) / (2 * step)
    assert float((grad_BTD * direction_BTD).sum()) == pytest.approx(expected, rel=0.03)
    assert all(parameter.grad is None for parameter in lm.bridge.original_model.parameters())


def test_bfloat16(ids_BT, truth):
    lm = LanguageModel.load("tiny", HOOK, dtype="bfloat16")
    lengths_B = torch.full((B,), T)
    resid_BTD = lm.residual(ids_BT)
    assert resid_BTD.dtype == torch.float32
    torch.testing.assert_close(
        lm.loss_from_residual(resid_BTD, ids_BT, lengths_B), full_loss(truth.logits, ids_BT, lengths_B), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("hook", ["blocks.4.hook_resid_post", "blocks.2.hook_mlp_out", "nonsense", "hook_embed"])
def test_unknown_hook_lists_what_there_is(hook):
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_resid_post.*blocks\.3\.hook_resid_post"):
        LanguageModel.load("tiny", hook)


def test_unknown_dtype():
    with pytest.raises(ValueError, match="model.dtype int8"):
        LanguageModel.load("tiny", HOOK, dtype="int8")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


def test_local_folder_needs_no_network(folder, monkeypatch, lm, ids_BT):
    def refuse(*args, **kwargs):
        raise AssertionError("a local model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    local = LanguageModel.load(str(folder), HOOK)
    assert local.fingerprint == lm.fingerprint and torch.equal(local.residual(ids_BT), lm.residual(ids_BT))


def test_fingerprint_follows_weights_configuration_and_tokenizer(folder):
    seen = {model_info(str(folder)).fingerprint}
    (folder / "README.md").write_text("other")
    assert model_info(str(folder)).fingerprint in seen
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    seen.add(model_info(str(folder)).fingerprint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    seen.add(model_info(str(folder)).fingerprint)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    seen.add(model_info(str(folder)).fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize("removed, message", [
    ("config.json", "no config.json"), ("model.safetensors", "no weights"), ("tokenizer.json", "no tokenizer"),
])  # fmt: skip
def test_incomplete_folders_say_what_is_missing(folder, removed, message):
    (folder / removed).unlink()
    with pytest.raises(ValueError, match=message):
        model_info(str(folder))


def test_tokenizer_without_bos(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for call in (load_tokenizer, model_info):
        with pytest.raises(ValueError, match="no BOS token"):
            call(str(folder))


def test_truncated_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot load its weights"):
        LanguageModel.load(str(folder), HOOK)


def test_no_such_folder(tmp_path):
    for name in (str(tmp_path / "none"), "./none"):
        with pytest.raises(ValueError, match="no such folder"):
            model_info(name)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="a file; give the folder"):
        model_info(str(tmp_path / "file"))


def test_importing_loads_no_model_library():
    code = "import sys, dmsae_ray.lm.model; sys.exit('transformer_lens' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
