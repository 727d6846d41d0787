"""A GGUF file as a model: the same rows as transformers makes of it, converted once, named by its content."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from language_models import IDS_BT

from dmsae_ray.config import Config
from dmsae_ray.driver.model_folder import with_model_folder
from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.lm.source import TINY, info_of
from dmsae_ray.ownership import ours_in, refuse_strangers
from dmsae_ray.sweep import main

D, HIDDEN, LAYERS, HEADS, KV, VOCABULARY = 64, 96, 2, 4, 2, 320
HOOK = "blocks.1.hook_resid_post"


def write_gguf(path: Path, seed: int) -> Path:
    """A random Llama of two layers with 8-bit weights, as llama.cpp writes it, and a byte-level tokenizer of 320
    tokens.
    """
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    letters = json.loads((TINY / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = ["<unk>", "<s>", "</s>", *sorted(token for token in letters if len(token) == 1)]
    tokens += ["ab", *(f"<extra_{n}>" for n in range(VOCABULARY - len(tokens) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (VOCABULARY - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int) -> None:
        weights = rng.standard_normal(shape).astype(np.float32) * 0.2
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(D, dtype=np.float32))

    add("token_embd.weight", VOCABULARY, D)
    add("output.weight", VOCABULARY, D)
    ones("output_norm.weight")
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        ones(f"{block}.attn_norm.weight")
        ones(f"{block}.ffn_norm.weight")
        add(f"{block}.attn_q.weight", D, D)
        add(f"{block}.attn_k.weight", D * KV // HEADS, D)
        add(f"{block}.attn_v.weight", D * KV // HEADS, D)
        add(f"{block}.attn_output.weight", D, D)
        add(f"{block}.ffn_gate.weight", HIDDEN, D)
        add(f"{block}.ffn_up.weight", HIDDEN, D)
        add(f"{block}.ffn_down.weight", D, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "toy-Q8_0.gguf", seed=0)


def configured(name, output, make=True) -> tuple[Config, list[str]]:
    said: list[str] = []
    config = Config(model={"name": str(name), "hook": HOOK, "context": 32}, output=output)
    return with_model_folder(config, make, said.append), said


@pytest.fixture(scope="module")
def made(file, tmp_path_factory):
    return configured(file, tmp_path_factory.mktemp("made") / "out")


def test_rows_are_those_of_the_file_in_transformers(file, made):
    config, said = made
    assert len(said) == 1 and str(file) in said[0] and config.model.name in said[0]
    lm = LanguageModel.of(config.model, "cpu")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids_BT, caught = IDS_BT % VOCABULARY, {}
    with torch.no_grad():
        handle = model.model.layers[1].register_forward_hook(lambda module, args, output: caught.update(row=output))
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        handle.remove()
    row_BTD = caught["row"][0] if isinstance(caught["row"], tuple) else caught["row"]
    cut = lm.cut(ids_BT)
    assert torch.equal(cut.value_BTD, row_BTD) and float(row_BTD.std()) > 0.01
    torch.testing.assert_close(lm.logits(cut, cut.value_BTD), logits_BTV)
    assert lm.bos_id == 1 and len(lm.tokenizer("abba", add_special_tokens=False)["input_ids"]) == 3  # ab, b, a


def test_it_is_converted_once_and_named_by_its_content(file, made, tmp_path):
    config, _ = made
    again, said = configured(file, config.output)
    assert again.model.name == config.model.name and said == []
    # A copy elsewhere, and the folder that holds it alone, are the same model: same folder, nothing to do.
    copy = tmp_path / "copy" / "other.gguf"
    copy.parent.mkdir()
    shutil.copy(file, copy)
    for name in (copy, copy.parent):
        other, _ = configured(name, tmp_path / "out")
        assert info_of(other.model).fingerprint == info_of(config.model).fingerprint
    different, _ = configured(write_gguf(tmp_path / "more" / "toy-Q8_0.gguf", seed=1), config.output)
    assert different.model.name != config.model.name
    assert info_of(different.model).fingerprint != info_of(config.model).fingerprint
    assert len(ours_in(config.home, "models")) == 2
    refuse_strangers(config.home)


def test_an_output_folder_that_moved_keeps_its_model(file, tmp_path):
    config, _ = configured(file, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    moved, said = configured(config.model.name, tmp_path / "second")
    assert Path(moved.model.name).parent == tmp_path / "second" / "models" and said == []
    assert info_of(moved.model).d == D


def test_cleaning_keeps_the_models_that_something_names(file, tmp_path, capsys):
    output = tmp_path / "out"
    files = [file, *(write_gguf(tmp_path / f"{seed}.gguf", seed) for seed in (1, 2))]
    kept, swept, unused = (Path(configured(one, output)[0].model.name) for one in files)
    results = output / "sweeps" / "old-0123456789ab"
    results.mkdir(parents=True)
    (results / "config.yaml").write_text(f"model: {{name: {swept}}}\n")
    (results / "chains.json").write_text("[]")
    halfway = output / "models" / f"{unused.name}.tmp-1-abcdef"
    halfway.mkdir()
    assert main(["--clean", "--model.name", str(file), "--model.hook", HOOK, "--output", str(output)]) == 0
    assert "2 removed" in capsys.readouterr().out
    assert ours_in(output, "models") == sorted([kept, swept])


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_a_model(file, tmp_path, monkeypatch):
    monkeypatch.setattr("dmsae_ray.lm.from_gguf.write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        configured(file, tmp_path / "out")
    monkeypatch.undo()
    assert list((tmp_path / "out" / "models").iterdir()) == []
    _, said = configured(file, tmp_path / "out")
    assert len(said) == 1


def test_what_cannot_be_converted_is_said_with_a_remedy(file, tmp_path, monkeypatch, capsys):
    two = tmp_path / "two"
    for name in ("a.gguf", "b.gguf"):
        two.mkdir(exist_ok=True)
        shutil.copy(file, two / name)
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; name one of them, such as .*a\.gguf"):
        configured(two, tmp_path / "out")
    split = tmp_path / "big-00001-of-00002.gguf"
    shutil.copy(file, split)
    with pytest.raises(ValueError, match="one part of a split GGUF; join them"):
        configured(split, tmp_path / "out")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged\.gguf: no readable GGUF file .*download it again"):
        configured(damaged, tmp_path / "out")
    with pytest.raises(ValueError, match="not converted yet, so nothing has been made of it"):
        configured(file, tmp_path / "empty", make=False)
    assert not (tmp_path / "empty").exists()
    assert main(["--status", "--model.name", str(file), "--output", str(tmp_path / "empty")]) == 2
    assert "not converted yet" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package gguf; install it \(pip install 'dmsae_ray\[gguf\]'\)"):
        configured(file, tmp_path / "out")
