"""Rows of many families of models, in toy sizes, are what transformers has there, and going on from them changes
nothing.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from language_models import IDS_BT, LENGTHS, run_reference
from transformers import AutoConfig, AutoModelForCausalLM

from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.lm.source import TINY

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "vocab_size": 4096,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    **HEADS,
}
OLD = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 4096, "n_positions": 128}
PARTIAL = {"partial_rotary_factor": 0.5}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 4096},
    "cohere": SHAPE,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 4096},
    "gemma": SHAPE,
    "gemma2": {**SHAPE, "sliding_window": 16},
    "gemma3_text": {**SHAPE, "sliding_window": 16},
    "gpt2": OLD,
    "gpt_neox": {name: value for name, value in SHAPE.items() if name not in ("num_key_value_heads", "head_dim")},
    "gptj": {**OLD, "rotary_dim": 4},
    "granite": SHAPE,
    "llama": SHAPE,
    "mistral": {**SHAPE, "sliding_window": 16},
    "mixtral": {**SHAPE, **EXPERTS},
    "olmo": SHAPE,
    "olmo2": SHAPE,
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 4096,
        "max_position_embeddings": 128,
    },
    "phi": {**SHAPE, **PARTIAL},
    "phi3": SHAPE,
    "qwen2": SHAPE,
    "qwen3": SHAPE,
    "smollm3": SHAPE,
    "stablelm": {**SHAPE, **PARTIAL},
    "starcoder2": SHAPE,
}
MORE = ("bloom", "cohere", "gptj", "granite", "olmo", "smollm3", "stablelm")
"""As well in the long form; the short one, `make test`, has the sixteen others."""
OTHER_ORDER = ("bloom", "cohere", "falcon", "gpt2", "gptj", "phi3", "starcoder2")
"""Equal but for rounding, 6e-7 of the largest value: TransformerLens takes attention apart in another order of sums."""


def make(family: str, folder) -> None:
    config = AutoConfig.for_model(
        family, **FAMILIES[family], initializer_range=0.2, bos_token_id=2, eos_token_id=1, pad_token_id=0
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in TINY.glob("token*"):
        shutil.copy(file, folder)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in MORE else ()) for name in FAMILIES]
)
def test_rows_and_what_follows_are_those_of_transformers(family, tmp_path):
    make(family, tmp_path)
    lm = LanguageModel.load(str(tmp_path), "blocks.1.hook_resid_post")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    blocks = next(
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == lm.n_layers
    )
    caught = {}

    def catch(module, args, output):
        caught["row"] = output[0] if isinstance(output, tuple) else output

    logits_BTV = run_reference(model, hooks=[(blocks[1], catch)]).logits
    cut = lm.cut(IDS_BT)
    if family in OTHER_ORDER:
        torch.testing.assert_close(cut.value_BTD, caught["row"], rtol=0, atol=2e-6 * float(caught["row"].abs().max()))
    else:
        assert torch.equal(cut.value_BTD, caught["row"])
    real_BT = torch.arange(IDS_BT.shape[1]) < LENGTHS[:, None]
    torch.testing.assert_close(lm.logits(cut, cut.value_BTD)[real_BT], logits_BTV[real_BT], rtol=1e-4, atol=1e-4)
    # Another value there makes another model: what follows is really computed from it.
    assert not torch.allclose(lm.logits(cut, cut.value_BTD * 0.5)[real_BT], logits_BTV[real_BT], atol=1e-2)
