"""One language model: the residual stream at a hook, and the loss from there on.

B sequences, T tokens (BOS first, padding right), D width of the residual stream, V vocabulary.
Importing this module loads no model library; that happens in `load` (transformers and transformer_lens take seconds).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dmsae_ray.corpus.tokens import pad_id_of
from dmsae_ray.lm.source import ModelInfo, cannot_load, fingerprint_of, load_config, load_tokenizer, local_folder, model_info

__all__ = ["LanguageModel", "ModelInfo", "load_tokenizer", "model_info"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HOOK = re.compile(r"blocks\.(\d+)\.(hook_resid_post|hook_out)")
IGNORED = -100  # target that cross-entropy leaves out
SPLIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference of a logit between the whole model and the blocks above the hook, run on the residual stream alone."""


class LanguageModel:
    """A frozen model cut at one hook: `residual` runs the blocks below it, `loss_from_residual` those above.

    The hook is the residual stream after block `layer`, by its TransformerLens name.
    """

    def __init__(self, bridge, tokenizer, hook: str, layer: int, fingerprint: str):
        self.bridge = bridge
        self.tokenizer = tokenizer
        self.hook = hook
        self.layer = layer
        self.fingerprint = fingerprint
        self.bos_id = int(tokenizer.bos_token_id)
        self.pad_id = pad_id_of(tokenizer)
        self.n_layers = len(bridge.blocks)
        embedding = bridge.original_model.get_input_embeddings().weight
        self.d = int(bridge.cfg.d_model)
        self.device, self.dtype = embedding.device, embedding.dtype
        self._blocks_give_tuples = False

    @staticmethod
    def load(
        name: str, hook: str, dtype: str = "float32", device: str | torch.device = "cpu", revision: str | None = None,
        device_map: str | None = None,
    ) -> LanguageModel:  # fmt: skip
        """Load configuration, tokenizer and weights and cut the model at the hook.

        name: "tiny" (shipped with the package; no network), a local folder (no network) or a hub id at `revision`.
        device_map: "auto" spreads a model over several GPUs with accelerate; `device` is then not used.
        Raises ValueError for a model that cannot be had, a tokenizer without BOS, and a hook the model does not have.
        """
        if dtype not in DTYPES:
            raise ValueError(f"model.dtype {dtype}: give one of {', '.join(DTYPES)}")
        folder = local_folder(name)
        config = load_config(name, revision)
        tokenizer = load_tokenizer(name, revision)
        layer = layer_of(hook, name, config.get_text_config().num_hidden_layers)
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        if folder is not None:
            transformers_logging.disable_progress_bar()  # a line per load, in every worker, for a read of a local file
        try:
            # Gemma-2 caps attention scores, which only the eager implementation computes exactly.
            hf_model = AutoModelForCausalLM.from_pretrained(
                folder or name, revision=revision if folder is None else None, local_files_only=folder is not None,
                dtype=DTYPES[dtype], device_map=device_map, attn_implementation="eager",
            )  # fmt: skip
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(cannot_load(name, "weights", revision, error)) from error
        from transformer_lens.model_bridge import TransformerBridge

        if device_map is None:
            hf_model = hf_model.to(device)
        hf_model.eval().requires_grad_(False)
        bridge = TransformerBridge.boot_transformers(
            str(folder or name), hf_model=hf_model, tokenizer=tokenizer, dtype=DTYPES[dtype],
            device=None if device_map else str(device),
        )  # fmt: skip
        if hook not in bridge.hook_dict:
            raise ValueError(f"model.hook {hook}: TransformerLens has no such place in {name} ({type(hf_model).__name__}); use another model")
        model = LanguageModel(bridge, tokenizer, hook, layer, fingerprint_of(folder, name, config))
        model._check_cut(name)
        return model

    @torch.no_grad()
    def residual(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The residual stream at the hook, fp32 [B, T, D], from token ids; runs only the blocks up to the hook.

        Padding on the right changes nothing at real tokens, since attention is causal; what stands there is undefined.
        """
        ids_BT = ids_BT.to(self.device, torch.int64)
        _, cache = self.bridge.run_with_cache(ids_BT, names_filter=[self.hook], stop_at_layer=self.layer + 1)
        return cache[self.hook].float()

    def logits_from_residual(self, resid_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of the blocks above the hook, given the residual stream there."""
        with self._replaced_below(resid_BTD.to(self.device, self.dtype)) as entry_BTD:
            return self.bridge(entry_BTD, return_type="logits")

    def loss_from_residual(self, resid_BTD: torch.Tensor, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Summed next-token cross-entropy in nats (fp32 scalar) over real tokens: targets at positions 1..length-1.

        Runs only the blocks above the hook and keeps the graph to `resid_BTD` if that requires grad.
        """
        logits_BTV = self.logits_from_residual(resid_BTD)
        ids_BT, lengths_B = ids_BT.to(logits_BTV.device, torch.int64), lengths_B.to(logits_BTV.device)
        positions_T = torch.arange(1, ids_BT.shape[1], device=ids_BT.device)
        targets_BT = ids_BT[:, 1:].masked_fill(positions_T >= lengths_B[:, None], IGNORED)
        return torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @contextmanager
    def _replaced_below(self, resid_BTD: torch.Tensor) -> Iterator[torch.Tensor]:
        """While open, blocks below the hook compute nothing and the hook's block gives `resid_BTD`.

        The bridge's own `start_at_layer` computes the lower blocks and drops their result, and has no entry above the last
        block. This way the model itself still makes masks and rotary positions. Yields what to call the bridge with.
        """

        def stand_in(value_BTD: torch.Tensor):
            return (value_BTD,) if self._blocks_give_tuples else value_BTD

        blocks = [self.bridge.blocks[number] for number in range(self.layer + 1)]
        # Set in the instances' own dictionaries: the bridge's attribute assignment goes on to the module it wraps.
        for block in blocks[:-1]:
            block.__dict__["forward"] = lambda hidden_states, *args, **kwargs: stand_in(hidden_states)
        blocks[-1].__dict__["forward"] = lambda hidden_states, *args, **kwargs: stand_in(resid_BTD)
        try:
            yield resid_BTD.detach()
        finally:
            for block in blocks:
                del block.__dict__["forward"]

    @torch.no_grad()
    def _check_cut(self, name: str) -> None:
        """The model is fully described by the residual stream at the hook: cut and whole model give the same logits.

        Not so where upper blocks read something else of the lower ones (shared keys and values, per-layer inputs).
        """
        ids_BT = torch.tensor([[self.bos_id, *range(5, 12)]], device=self.device)
        seen = []
        handle = self.bridge.blocks[self.layer].register_forward_hook(lambda module, args, output: seen.append(type(output)))
        whole_BTV = self.bridge(ids_BT, return_type="logits")
        handle.remove()
        self._blocks_give_tuples = issubclass(seen[0], tuple)
        cut_BTV = self.logits_from_residual(self.residual(ids_BT))
        difference = float((whole_BTV.float() - cut_BTV.float()).abs().max())
        if not difference <= SPLIT_TOLERANCE[self.dtype]:
            raise ValueError(
                f"model.name {name}: the blocks above {self.hook} do not give the model's logits from the residual stream alone "
                f"(they differ by {difference:.3g}); this kind of model cannot be attributed through"
            )


def layer_of(hook: str, name: str, n_layers: int) -> int:
    """The block (0-based) after which a hook lies. Raises ValueError that lists the hooks a model has."""
    match = HOOK.fullmatch(hook)
    if not match or int(match[1]) >= n_layers:
        names = ", ".join(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))
        raise ValueError(f"model.hook {hook}: {name} has {names} (the residual stream after a block; hook_out is the same place)")
    return int(match[1])
