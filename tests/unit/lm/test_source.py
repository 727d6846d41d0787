"""Where a language model comes from and where its weights lie; what it computes is in test_sites.py and
test_cut.py.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmsae_ray.config import ModelConfig
from dmsae_ray.lm.model import LanguageModel, load_tokenizer, model_info
from dmsae_ray.lm.source import TINY

HOOK = "blocks.2.hook_resid_post"
B, T = 3, 100


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.load("tiny", HOOK)


@pytest.fixture(scope="module")
def ids_BT():
    ids = torch.randint(3, 4096, (B, T), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    return ids


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


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
    assert len(info.fingerprint) == 64


LOWER = [f"model.{name}" for name in ("embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1")]


@cache
def loaded(hook):
    """The model without a device map, in memory."""
    lm = LanguageModel.load("tiny", hook)
    assert lm.device.type == "cpu" and not any(weights.is_meta for weights in lm.bridge.original_model.parameters())
    return lm


def what_it_gives(lm, ids_BT):
    """What stands at the hook, a loss from another value there, its gradient, and what stands elsewhere."""
    cut = lm.cut(ids_BT)
    value_BTD = (1.1 * cut.value_BTD).requires_grad_(True)
    loss = lm.loss(cut, value_BTD, ids_BT, torch.tensor([T, 40, 17]))
    return cut.value_BTD, loss.detach(), *torch.autograd.grad(loss, value_BTD), lm.sites(ids_BT, [HOOK])[HOOK]


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu"},
        "auto",
        {"model.layers.2": "disk", "model.layers.3": "disk"} | dict.fromkeys(["lm_head", *LOWER], "cpu"),
        {"model": "disk", "lm_head": "disk"},
    ],
    ids=["cpu", "auto", "upper blocks on disk", "all on disk"],
)
@pytest.mark.parametrize("hook", [HOOK, "blocks.2.hook_resid_mid"])
def test_where_accelerate_keeps_the_weights_changes_no_bit(device_map, hook, folder, ids_BT):
    lm = LanguageModel.load(str(folder), hook, device_map=device_map)
    on_disk = any(parameter.is_meta for parameter in lm.bridge.original_model.parameters())
    assert lm.device.type == "cpu" and on_disk == ("disk" in str(device_map))
    for without, with_map in zip(what_it_gives(loaded(hook), ids_BT), what_it_gives(lm, ids_BT), strict=True):
        assert torch.equal(without, with_map)


def test_a_configuration_s_model(folder):
    section = ModelConfig(name=str(folder), hook="blocks.1.hook_mlp_out", dtype="bfloat16", device_map="auto")
    lm = LanguageModel.of(section, "cpu")
    assert (lm.name, lm.hook, lm.layer, lm.dtype) == (str(folder), "blocks.1.hook_mlp_out", 1, torch.bfloat16)


@pytest.mark.parametrize(
    "hook", ["blocks.4.hook_resid_post", "blocks.2.mlp.hook_out", "nonsense", "hook_embed", "blocks.1.hook_mlp_outs"]
)
def test_unknown_hook_lists_what_there_is(hook):
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_resid_post.*blocks\.3\.hook_resid_post.*hook_mlp_out"):
        LanguageModel.load("tiny", hook)


def test_unknown_dtype():
    with pytest.raises(ValueError, match="model.dtype int8"):
        LanguageModel.load("tiny", HOOK, dtype="int8")


def test_local_folder_needs_no_network(folder, monkeypatch, lm, ids_BT):
    def refuse(*args, **kwargs):
        raise AssertionError("a local model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    local = LanguageModel.load(str(folder), HOOK)
    assert model_info(str(folder)).fingerprint == model_info(lm.name).fingerprint
    assert torch.equal(local.cut(ids_BT).value_BTD, lm.cut(ids_BT).value_BTD)


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
    assert model_info(str(folder)).fingerprint in seen  # other bytes, the same tokenizer
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    seen.add(model_info(str(folder)).fingerprint)
    options = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"bos_token": "<eos>"}))
    seen.add(model_info(str(folder)).fingerprint)
    assert len(seen) == 5
    assert model_info(str(folder), bos_token="<bos>").fingerprint not in {model_info(str(folder)).fingerprint}
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"chat_template": "{{ messages }}"}))
    changed = model_info(str(folder))
    assert (
        changed.chat_template and changed.fingerprint == model_info(str(folder), bos_token="<bos>").fingerprint
    )  # decides chat alone


@pytest.mark.parametrize(
    "removed, message",
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
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


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "{}/elsewhere.safetensors", "other.safetensors"])
def test_an_index_names_the_weights_of_its_folder_alone(folder, name):
    """What stands elsewhere is no part of the fingerprint, either."""
    weights, shards = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for number, keys in enumerate((list(weights)[:5], list(weights)[5:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in keys}, folder / file, {"format": "pt"})
        shards |= dict.fromkeys(keys, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert model_info(str(folder)).fingerprint and LanguageModel.load(str(folder), HOOK).d == 128
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards | {keys[0]: name.format(folder.parent)}}))
    with pytest.raises(
        ValueError, match=r"index\.json: names '.*(elsewhere|other)\.safetensors', which is none of the"
    ):
        model_info(str(folder))


def test_no_such_folder(tmp_path):
    for name in (str(tmp_path / "none"), "./none"):
        with pytest.raises(ValueError, match="no such folder"):
            model_info(name)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="a file; give the folder"):
        model_info(str(tmp_path / "file"))


def test_importing_loads_no_model_library():
    code = (
        "import sys, dmsae_ray.lm.model; sys.exit('transformer_lens' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bos_token_that_is_given_and_what_the_tokenizer_has(folder):
    options = json.loads((folder / "tokenizer_config.json").read_text())
    del options["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match="no BOS token.*set model.bos_token to the text of one it has, such as <eos>"):
        load_tokenizer(str(folder))
    assert load_tokenizer(str(folder), bos_token="<eos>").bos_token_id == 1
    assert LanguageModel.load(str(folder), HOOK, bos_token="<eos>").bos_id == 1
    for wrong in ("<eos><bos>", "<none>", ""):
        with pytest.raises(ValueError, match=r"model\.bos_token '.*': not one token of the tokenizer.*<eos>"):
            load_tokenizer(str(folder), bos_token=wrong)
    assert len({model_info(str(folder), bos_token=token).fingerprint for token in ("<eos>", "<bos>")}) == 2


def test_tokens_without_an_embedding(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"pad_token": "<padding>"})  # never looked at: as good as another
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token_id == 2 and model_info(str(folder)).vocab == 4096
    tokenizer.add_tokens(["an added word"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"1 tokens beyond the model's 4,096 embeddings, such as 'an added word' with id 4097"
    ):
        model_info(str(folder))
    with pytest.raises(ValueError, match="or set model.bos_token"):
        model_info(str(folder), bos_token="an added word")
