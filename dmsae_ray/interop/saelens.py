"""SAELens folders (sae-lens 3 to 6): cfg.json and sae_weights.safetensors. Read and written without that package.

What its classes compute: saes/{standard,topk,jumprelu,gated}_sae.py of sae-lens 6.54.12.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from dmsae_ray.files import replacing, write_json
from dmsae_ray.interop.from_files import config_of, tensors_of, text
from dmsae_ray.interop.plain import EXPORTED, About, Gate, Gated, PlainSAE, Threshold, TopK, Unknown

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
VERSION = "6.54.12"
"""Whose format is written: with no version in it, sae-lens empties the metadata."""
AT_RUN_TIME = {
    "constant_norm_rescale": "each row is divided by its own norm",
    "layer_norm": "each row is normalised by its own mean and deviation",
    "expected_average_only_in": "rows are multiplied by a factor that is not in the file",
    "covariance_whitening": "rows are whitened by a matrix that is not in the file",
}
"""normalize_activations: what the file alone does not give in raw units."""


def found_in(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def read(folder: Path) -> PlainSAE:
    """Raises ValueError that names file and field where it is damaged, or no autoencoder."""
    config, tensors = config_of(folder / CONFIG), tensors_of(folder / WEIGHTS)
    kind = _kind(config)
    missing = [name for name in ("W_enc", "W_dec", "b_dec") if name not in tensors]
    if missing:
        raise ValueError(f"{folder / WEIGHTS}: lacks {', '.join(missing)}; it has {', '.join(sorted(tensors))}")
    if "W_skip" in tensors or "transcoder" in kind:
        raise ValueError(f"{folder}: is a transcoder, and reconstructs another place than it reads: no SAE")
    W_enc_FD, W_dec_FD, b_dec_D = tensors["W_enc"].T.contiguous(), tensors["W_dec"], tensors["b_dec"]
    zeros_F = torch.zeros(len(W_dec_FD))
    return PlainSAE(
        W_enc_FD,
        tensors.get("b_enc", zeros_F),
        W_dec_FD,
        b_dec_D,
        b_dec_D if config.get("apply_b_dec_to_input", True) else torch.zeros_like(b_dec_D),
        _gate(kind, config, tensors, W_dec_FD),
        _about(folder, kind, config),
    ).unit()


def _kind(config: dict[str, Any]) -> str:
    """Its architecture; before version 6 a `standard` one might have TopK for an activation function."""
    kind = str(config.get("architecture", "standard"))
    return "topk" if kind == "standard" and config.get("activation_fn_str") == "topk" else kind


def _gate(kind: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], W_dec_FD: torch.Tensor) -> Gate:
    norm = config.get("normalize_activations", "none")
    if norm in AT_RUN_TIME:
        return Unknown(f"normalize_activations is {norm}: {AT_RUN_TIME[norm]}")
    if norm not in ("none", None):
        return Unknown(f"normalize_activations is {norm!r}, which is not known here")
    if config.get("finetuning_scaling_factor") or "scaling_factor" in tensors:
        return Unknown("it was finetuned by a factor for each latent")
    zeros_F, norm_F = torch.zeros(len(W_dec_FD)), W_dec_FD.norm(dim=1)
    rescaled = bool(config.get("rescale_acts_by_decoder_norm"))
    if kind == "standard" and config.get("activation_fn_str", config.get("activation_fn", "relu")) == "relu":
        return Threshold(zeros_F)
    if kind == "topk":
        k = config.get("k") or config.get("activation_fn_kwargs", {}).get("k")
        if not isinstance(k, int):
            return Unknown(f"k is {k!r}")
        return TopK(k, norm_F if rescaled else torch.ones_like(norm_F))
    if kind == "jumprelu" and "threshold" in tensors:
        return Threshold(tensors["threshold"])
    if kind in ("batchtopk", "matryoshka_batchtopk") and "topk_threshold" in tensors:
        theta = tensors["topk_threshold"].reshape(()).repeat(len(W_dec_FD))
        if not rescaled:
            return Threshold(theta)
        # What exceeds it is p * norm: a latent whose decoder row is zeros never does.
        never = torch.full_like(theta, torch.finfo(theta.dtype).max)
        return Threshold(torch.where(norm_F > 0, theta / norm_F.clamp(min=torch.finfo(theta.dtype).tiny), never))
    if kind == "gated" and {"b_gate", "r_mag", "b_mag"} <= tensors.keys():
        return Gated(tensors["b_gate"], tensors["r_mag"], tensors["b_mag"])
    return Unknown(f"architecture {kind!r} with {', '.join(sorted(tensors))} is not known here")


def _about(folder: Path, kind: str, config: dict[str, Any]) -> About:
    said = {**config, **(config.get("metadata") or {})}
    details = {**config, **(said.get("training_architecture_details") or {})}
    return About(
        place=str(folder),
        format=f"SAELens {kind}",
        model=text(said.get("model_name")),
        hook=text(said.get("hook_name") or said.get("hook_point")),
        context=said.get("context_size"),
        prepend_bos=said.get("prepend_bos"),
        k=details.get("k"),
        l0=said.get("l0"),
        prefixes=tuple(details.get("matryoshka_widths") or ()),
    )


def check(sae: PlainSAE) -> Threshold:
    """Raises ValueError if the format has no place for this SAE."""
    if not isinstance(sae.gate, Threshold):
        raise ValueError(f"{sae.about.place}: has no thresholds, which a jumprelu SAE needs")
    return sae.gate


def write(folder: Path, sae: PlainSAE, density_F: torch.Tensor | None = None) -> None:
    """As a `jumprelu` SAE, which every sae-lens since 3 reads: thresholds by latent, float32.

    density_F: share of tokens on which each latent is active, if known. Raises ValueError as `check` does.
    """
    gate, about = check(sae), sae.about
    shift_F = (sae.b_dec_D - sae.b_in_D) @ sae.W_enc_FD.T  # none where b_dec is taken from the input already
    tensors = {
        "W_enc": sae.W_enc_FD.T,
        "b_enc": sae.b_enc_F + shift_F,
        "W_dec": sae.W_dec_FD,
        "b_dec": sae.b_dec_D,
        "threshold": gate.theta_F,
    }
    details: dict[str, Any] = {"k": about.k}
    if about.prefixes:
        details["matryoshka_widths"] = list(about.prefixes)
    metadata = {
        "sae_lens_version": VERSION,
        "model_name": about.model,
        "hook_name": about.hook,
        "hook_head_index": None,
        "context_size": about.context,
        "prepend_bos": about.prepend_bos,
        "l0": about.l0,
        "training_architecture": "matryoshka_batchtopk" if about.prefixes else None,
        "training_architecture_details": details,
        "model_from_pretrained_kwargs": {},
        EXPORTED: 1,
    } | {f"dmsae_{name}": value for name, value in about.more.items()}
    config = {
        "architecture": "jumprelu",
        "d_in": sae.d,
        "d_sae": sae.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(safetensors_bytes({name: t.detach().float().contiguous() for name, t in tensors.items()}))
    if density_F is not None:
        log_F = torch.log10(density_F.float() + 1e-10)
        with replacing(folder / SPARSITY) as temporary:
            temporary.write_bytes(safetensors_bytes({"sparsity": log_F}))
    write_json(folder / CONFIG, config)
