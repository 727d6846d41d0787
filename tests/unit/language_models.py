"""Language models that tests share: the shipped one, and small random ones of other architectures, beside transformers'
own.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.lm.site import KINDS
from dmsae_ray.lm.source import TINY

B, T = 3, 100  # longer than the tiny model's sliding window of 64
LENGTHS = torch.tensor([T, 40, 17])
OTHERS = ("llama", "neox", "falcon")
"""Llama: no norms after attention and MLP. NeoX: attention and MLP in parallel. Falcon: parallel, and one norm for
both.
"""
PLACES = [
    (architecture, kind)
    for architecture in ("tiny", *OTHERS)
    for kind in KINDS
    if architecture in ("tiny", "llama") or kind != "hook_resid_mid"
]


IDS_BT = torch.randint(3, 4096, (B, T), generator=torch.Generator().manual_seed(0))
IDS_BT[:, 0] = 2
IDS_BT[1, 20] = 2  # a second document in this sequence
MADE = tempfile.TemporaryDirectory(prefix="language-models-")


def at(kind: str, layer: int = 2) -> str:
    return f"blocks.{layer}.{kind}"


@cache
def folder_of(architecture: str) -> Path:
    """Where a model lies; those but the tiny one are made here, random and strongly nonlinear."""
    if architecture == "tiny":
        return TINY
    from transformers import AutoModelForCausalLM, FalconConfig, GPTNeoXConfig, LlamaConfig

    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 4096,
        "initializer_range": 0.2,
    }
    config = {
        "llama": lambda: LlamaConfig(intermediate_size=48, num_key_value_heads=2, **shape),
        "neox": lambda: GPTNeoXConfig(intermediate_size=48, **shape),
        "falcon": lambda: FalconConfig(**shape),
    }[architecture]()
    folder = Path(MADE.name) / architecture
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in TINY.glob("token*"):
        shutil.copy(file, folder)
    return folder


@cache
def loaded(architecture: str) -> LanguageModel:
    return LanguageModel.load(str(folder_of(architecture)), at("hook_resid_post"))


@cache
def load(architecture: str, hook: str) -> LanguageModel:
    """A model with a hook, for tests that leave it as it is: weights are loaded once, whatever the hook, and whether
    the model can be cut there is looked at as `LanguageModel.load` does.
    """
    first = loaded(architecture)
    lm = LanguageModel(first.bridge, first.tokenizer, first.name, hook, first.device)
    lm._check_cut()
    return lm


@cache
def reference(architecture: str):
    """The same model in transformers, without TransformerLens."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder_of(architecture), dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def run_reference(model, pre_hooks=(), hooks=()):
    """Hidden states and logits with (module, function) pairs hooked in."""
    handles = [module.register_forward_pre_hook(function) for module, function in pre_hooks]
    handles += [module.register_forward_hook(function) for module, function in hooks]
    output = model(input_ids=IDS_BT, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return output


@cache
def clean_logits(architecture: str) -> torch.Tensor:
    """What transformers gives for `IDS_BT`."""
    return run_reference(reference(architecture)).logits


@torch.no_grad()
def states_of(architecture, layer):
    """The stream before, in the middle of and after a block, and what attention and MLP add to it, caught in
    transformers.
    """
    model = reference(architecture)
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

    run_reference(
        model,
        hooks=[
            (block, catch("hook_resid_pre", lambda args, output: args[0])),
            (block, catch("hook_resid_post", first)),
            (mid, catch("hook_resid_mid", lambda args, output: args[0])),
            (attn_out, catch("hook_attn_out", first)),
            (mlp_out, catch("hook_mlp_out", first)),
        ],
    )
    return caught | {"hook_out": caught["hook_resid_post"]}
