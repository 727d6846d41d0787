"""One language model: what stands at places in it, and its loss when something else stands at one of them.

B sequences, T tokens (BOS first, padding right; further BOS inside where documents share a sequence), D width of the
residual stream, V vocabulary.
Importing this module loads no model library; that happens in `load` (transformers and transformer_lens take seconds).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dmsae_ray.corpus.tokens import pad_id_of
from dmsae_ray.lm.site import AFTER, INSIDE, KINDS, layer_of
from dmsae_ray.lm.source import (
    ModelInfo,
    cannot_load,
    load_config,
    load_tokenizer,
    local_folder,
    model_info,
    pinned_revision,
)

__all__ = ["Cut", "LanguageModel", "ModelInfo", "layer_of", "load_tokenizer", "model_info"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IGNORED = -100  # target that cross-entropy leaves out
SPLIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference of a logit between the whole model and the part of it that goes on from a cut."""


@dataclass(frozen=True)
class Cut:
    """Where a model was interrupted: what stands at its hook, and what else it needs to go on from there."""

    value_BTD: torch.Tensor
    """fp32, on the device of the ids it was made from; undefined at padding"""
    _entry_BTD: torch.Tensor | None
    """the stream entering the hook's block, in the model's own precision; None where nothing of the block is needed"""

    def take(self, sequences_P: torch.Tensor) -> Cut:
        """The model interrupted in these of its sequences (indices, any number of times each), without running it
        again.
        """
        entry_BTD = self._entry_BTD
        return Cut(
            self.value_BTD[sequences_P], None if entry_BTD is None else entry_BTD[sequences_P.to(entry_BTD.device)]
        )


class LanguageModel:
    """A frozen model with one hook: `cut` runs it up to the hook, `loss` goes on from there with another value.

    The hook is one of the places of `site.py`. Where it lies inside a block, going on repeats that block.
    """

    def __init__(self, bridge, tokenizer, name: str, hook: str, device: torch.device):
        self.bridge = bridge
        self.tokenizer = tokenizer
        self.name, self.hook = name, hook
        self.device = device
        """where ids go: the device of the embedding"""
        self.bos_id = int(tokenizer.bos_token_id)
        self.pad_id = pad_id_of(tokenizer)
        self.n_layers = len(bridge.blocks)
        self.layer = layer_of(hook, name, self.n_layers)
        self.d = int(bridge.cfg.d_model)
        self.vocabulary = int(bridge.cfg.d_vocab)
        self.dtype = bridge.original_model.get_input_embeddings().weight.dtype
        kind = hook.rpartition(".")[2]
        self._inside, self._mid = kind in INSIDE, kind == "hook_resid_mid"
        self._first = self.layer + (kind in AFTER)  # the first block that runs when the model goes on from the hook
        self._last = f"blocks.{self.n_layers - 1}.hook_out"
        self._blocks_give_tuples = False

    @staticmethod
    def of(model, device: str) -> LanguageModel:
        """The model that the `model` section of a configuration describes. Raises what `load` raises."""
        return LanguageModel.load(
            model.name,
            model.hook,
            dtype=model.dtype,
            device=device,
            revision=model.revision,
            device_map=model.device_map,
            bos_token=model.bos_token,
        )

    @staticmethod
    def load(
        name: str,
        hook: str,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        revision: str | None = None,
        device_map: str | dict[str, str | int] | None = None,
        bos_token: str | None = None,
    ) -> LanguageModel:
        """Load configuration, tokenizer and weights and check that the model can be cut at the hook.

        name: "tiny" (shipped with the package; no network), a local folder (no network) or a hub id at `revision`.
        device_map: what accelerate takes: "auto" spreads the model over the GPUs this process sees, a dict places its
        modules; `device` is then not used.
        bos_token: text of the token that starts every sequence; None: the tokenizer's own BOS.
        Raises ValueError for a model that cannot be had, a tokenizer without BOS, and a hook the model does not have.
        """
        if dtype not in DTYPES:
            raise ValueError(f"model.dtype {dtype}: give one of {', '.join(DTYPES)}")
        folder, revision = local_folder(name), pinned_revision(name, revision)
        config = load_config(name, revision)
        tokenizer = load_tokenizer(name, revision, bos_token)
        layer_of(hook, name, config.get_text_config().num_hidden_layers)
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        if folder is not None:
            transformers_logging.disable_progress_bar()  # a line per load, in every worker, for a read of a local file
        try:
            # Gemma-2 caps attention scores, which only the eager implementation computes exactly.
            hf_model = AutoModelForCausalLM.from_pretrained(
                folder or name,
                revision=revision if folder is None else None,
                local_files_only=folder is not None,
                dtype=DTYPES[dtype],
                device_map=device_map,
                attn_implementation="eager",
                trust_remote_code=False,
            )
        except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
            raise ValueError(cannot_load(name, "weights", revision, error)) from error
        from transformer_lens.model_bridge import TransformerBridge

        if device_map is None:
            hf_model = hf_model.to(device)
        hf_model.eval().requires_grad_(False)
        input_device = _input_device(hf_model)
        try:
            bridge = TransformerBridge.boot_transformers(
                str(folder or name),
                hf_model=hf_model,
                tokenizer=tokenizer,
                dtype=DTYPES[dtype],
                device=None if device_map else str(device),
            )
        except ValueError as error:
            raise ValueError(
                f"model.name {name}: TransformerLens cannot take it ({error}); use another model or device_map"
            ) from error
        model = LanguageModel(bridge, tokenizer, name, hook, input_device)
        model._check_cut()
        return model

    def rows(self, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Which positions count, bool [B, T]: real tokens (below the length) other than BOS, wherever BOS stands.

        They are at once the rows of activations and the targets of the loss: nobody predicts BOS, which starts a
        document.
        """
        real_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B.to(ids_BT.device)[:, None]
        return real_BT & (ids_BT != self.bos_id)

    @torch.no_grad()
    def sites(self, ids_BT: torch.Tensor, hooks: Sequence[str]) -> dict[str, torch.Tensor]:
        """What stands at each hook, fp32 [B, T, D] on the device of `ids_BT`; runs the model once, up to the last of
        them.

        Padding on the right changes nothing at real tokens, since attention is causal; what stands there is undefined.
        Raises ValueError for a hook the model does not have.
        """
        self._check_hooks(hooks)
        values = self._read(ids_BT.to(self.device, torch.int64), hooks)
        return {hook: value_BTD.to(ids_BT.device, torch.float32) for hook, value_BTD in values.items()}

    @torch.no_grad()
    def cut(self, ids_BT: torch.Tensor) -> Cut:
        """Run the model on token ids up to its hook, without gradient."""
        entry = [f"blocks.{self.layer}.hook_in"] if self._inside else []
        values = self._read(ids_BT.to(self.device, torch.int64), [*entry, self.hook])
        return Cut(values[self.hook].to(ids_BT.device, torch.float32), values[entry[0]] if entry else None)

    def logits(self, cut: Cut, value_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of the model that was cut, with `value_BTD` (any device) at the hook.

        Runs the blocks above the hook, and the hook's own where it lies inside one. Keeps the graph to `value_BTD`.
        """
        with self._going_on(cut, value_BTD) as start_BTD:
            return self.bridge(start_BTD, return_type="logits")

    def loss(self, cut: Cut, value_BTD: torch.Tensor, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Summed next-token cross-entropy in nats (fp32 scalar) with `value_BTD` at the hook; targets are the `rows`.

        Keeps the graph to `value_BTD` if that requires grad.
        """
        logits_BTV = self.logits(cut, value_BTD)
        ids_BT = ids_BT.to(logits_BTV.device, torch.int64)
        targets_BT = ids_BT.masked_fill(~self.rows(ids_BT, lengths_B), IGNORED)[:, 1:]
        return torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @torch.no_grad()
    def stream(self, cut: Cut, value_BTD: torch.Tensor) -> torch.Tensor:
        """The stream after the last block, [B, T, D] in the model's precision, with `value_BTD` at the hook. No logits
        are made.
        """
        if self._first == self.n_layers:
            return value_BTD.to(self.device, self.dtype)
        with self._going_on(cut, value_BTD) as start_BTD:
            return self._read(start_BTD, [self._last])[self._last]

    @torch.no_grad()
    def unembed(self, stream_RD: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] from rows of the stream after the last block: final norm, unembedding, and what the model does
        after it.

        Position by position, so that a few rows of a large vocabulary can be had without all others.
        """
        # Each row a sequence of its own: no limit on positions, and masks of one entry.
        with self._entering(self.n_layers, stream_RD[:, None].to(self.device, self.dtype, copy=True), []) as start_R1D:
            return self.bridge(start_R1D, return_type="logits")[:, 0]

    def _read(self, start: torch.Tensor, hooks: Sequence[str]) -> dict[str, torch.Tensor]:
        """Copies of what stands at the hooks in a run from `start` (ids, or what `_going_on` yields), ended at the
        last.

        Copies, because a model may go on in place (transformers' Falcon adds attention's output to the tensor its MLP
        gave).
        """
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        seen = {}

        def keep(name: str) -> Callable:
            def hook_function(tensor_BTD: torch.Tensor, hook) -> None:
                seen[name] = tensor_BTD.detach().clone()
                if len(seen) == len(set(hooks)):
                    raise StopAtLayerException(tensor_BTD)  # the bridge ends the run, as for its own `stop_at_layer`

            return hook_function

        with self.bridge.hooks(fwd_hooks=[(name, keep(name)) for name in dict.fromkeys(hooks)]):
            self.bridge(start, return_type="logits")
        if missing := [name for name in hooks if name not in seen]:
            raise ValueError(
                f"model.name {self.name}: nothing passes through {', '.join(missing)} when it runs; use another hook"
            )
        return seen

    @contextmanager
    def _going_on(
        self, cut: Cut, value_BTD: torch.Tensor, held: Mapping[str, torch.Tensor] | None = None
    ) -> Iterator[torch.Tensor]:
        """While open, a run gives what the cut model gives with `value_BTD` at its hook. Yields what to run the bridge
        on.

        Blocks below compute nothing, and the stream enters the first block that runs. (The bridge's own
        `start_at_layer` computes the lower blocks and drops their result, and has no entry above the last block. This
        way the model itself still makes masks and rotary positions.) held: further hooks and the values they are kept
        at.
        """
        entry_BTD = value_BTD
        if self._inside:
            assert cut._entry_BTD is not None, "a cut inside a block has kept what enters it"
            entry_BTD = cut._entry_BTD
        # Copies, since the model may go on in place.
        entry_BTD = entry_BTD.to(self.device, self.dtype, copy=True)

        def overwrite(tensor_BTD: torch.Tensor, hook) -> None:
            # TransformerLens' hook_resid_mid is the input of the norm before the MLP: what a hook returns there reaches
            # the MLP, but not the sum after it. The block's own tensor reaches both.
            tensor_BTD.copy_(value_BTD)

        replaced = [(hook, _replace(held_BTD)) for hook, held_BTD in (held or {}).items()]
        if self._inside:
            replaced.append((self.hook, overwrite if self._mid else _replace(value_BTD)))
        with self._entering(self._first, entry_BTD, replaced) as start_BTD:
            yield start_BTD

    @contextmanager
    def _entering(
        self, first: int, entry_BTD: torch.Tensor, replaced: list[tuple[str, Callable]]
    ) -> Iterator[torch.Tensor]:
        """While open, blocks before `first` compute nothing and the stream enters there. Yields what to run the bridge
        on.
        """

        def enter(*args, **kwargs):
            return (entry_BTD,) if self._blocks_give_tuples else entry_BTD

        if first == 0:
            replaced = [*replaced, ("blocks.0.hook_in", _replace(entry_BTD))]
        skipped = list(self.bridge.blocks)[:first]
        # Set in the instances' own dictionaries: the bridge's attribute assignment goes on to the module it wraps.
        for block in skipped:
            block.__dict__["forward"] = enter
        try:
            with self.bridge.hooks(fwd_hooks=replaced):
                yield torch.zeros_like(entry_BTD)  # nothing but its shape is looked at
        finally:
            for block in skipped:
                del block.__dict__["forward"]

    def _check_hooks(self, hooks: Sequence[str]) -> None:
        """Raises ValueError that names the hooks of a block, if it has not all of these."""
        have = self.bridge.hook_dict
        for hook in hooks:
            block = f"blocks.{layer_of(hook, self.name, self.n_layers)}"
            if hook not in have:
                names = ", ".join(f"{block}.{kind}" for kind in KINDS if f"{block}.{kind}" in have)
                raise ValueError(
                    f"model.hook {hook}: in {self.name} ({type(self.bridge.original_model).__name__}) there are {names}"
                )

    @torch.no_grad()
    def _check_cut(self) -> None:
        """What stands at the hook can be read and replaced: cut and whole model give the same logits.

        Not so where upper blocks read something else of the lower ones (shared keys and values, per-layer inputs).
        """
        self._check_hooks([self.hook])
        ids_BT = torch.tensor([[self.bos_id, *range(5, 12)]], device=self.device)
        seen = []
        handle = self.bridge.blocks[0].register_forward_hook(lambda module, args, output: seen.append(type(output)))
        whole_BTV = self.bridge(ids_BT, return_type="logits")
        handle.remove()
        self._blocks_give_tuples = issubclass(seen[0], tuple)
        cut = self.cut(ids_BT)
        if cut.value_BTD.shape != (*ids_BT.shape, self.d):
            shape = list(cut.value_BTD.shape)
            raise ValueError(
                f"model.hook {self.hook}: holds {shape} for {list(ids_BT.shape)} tokens, not a vector of {self.d} "
                "for each"
            )
        cut_BTV = self.logits(cut, cut.value_BTD)
        difference = _distance(whole_BTV, cut_BTV)
        if not difference <= SPLIT_TOLERANCE[self.dtype]:
            raise ValueError(
                f"model.name {self.name}: what follows {self.hook} does not give the model's logits from what stands "
                f"there (they differ by {difference:.3g}); this kind of model cannot be attributed through"
            )
        difference = _distance(whole_BTV[0], self.unembed(self.stream(cut, cut.value_BTD)[0]))
        if not difference <= SPLIT_TOLERANCE[self.dtype]:
            raise ValueError(
                f"model.name {self.name}: the stream after the last block does not give the model's logits position by "
                f"position (they differ by {difference:.3g}); what an SAE does to this kind of model cannot be measured"
            )
        if self._mid:
            self._check_mid(cut, ids_BT)

    def _check_mid(self, cut: Cut, ids_BT: torch.Tensor) -> None:
        """What replaces the stream in mid-block reaches the end of the block: doubled there, with the MLP's output
        held, the stream after the block grows by itself. The clean value, which `_check_cut` puts there, could not
        tell.
        """
        mlp_out, after = f"blocks.{self.layer}.hook_mlp_out", f"blocks.{self.layer}.hook_resid_post"
        self._check_hooks([mlp_out])
        clean = self._read(ids_BT, [mlp_out, after])
        with self._going_on(cut, 2 * cut.value_BTD, held={mlp_out: clean[mlp_out]}) as start_BTD:
            moved_BTD = self._read(start_BTD, [after])[after]
        grown_BTD = (moved_BTD.float() - clean[after].float()).to(cut.value_BTD.device)
        if not float((grown_BTD - cut.value_BTD).abs().max()) <= 0.1 * float(cut.value_BTD.abs().max()):
            raise ValueError(
                f"model.hook {self.hook}: not the residual stream in this model; use hook_resid_pre or hook_resid_post"
            )


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.to(a.device, torch.float32)).abs().max())


def _replace(value_BTD: torch.Tensor) -> Callable:
    """A hook function that puts a copy of this value in place."""
    return lambda tensor_BTD, hook: value_BTD.to(tensor_BTD.device, tensor_BTD.dtype, copy=True)


def _input_device(hf_model) -> torch.device:
    """Where ids go. Weights that accelerate keeps elsewhere between calls are on no device: its hook says where they
    will be.
    """
    embedding = hf_model.get_input_embeddings()
    execution_device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if execution_device is None else torch.device(execution_device)
