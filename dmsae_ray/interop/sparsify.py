"""sparsify's folders (eai-sparsify 1.3): cfg.json and sae.safetensors. Read without that package.

What its class computes: sparse_coder.py and fused_encoder.py of eai-sparsify 1.3.3.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dmsae_ray.interop.from_files import config_of, tensors_of
from dmsae_ray.interop.plain import About, Gate, PlainSAE, TopK, Unknown

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
PLACES = {"": "hook_resid_post", "mlp": "hook_mlp_out", "attention": "hook_attn_out", "self_attn": "hook_attn_out"}
"""What follows the layer in a hookpoint, which is the folder's name"""


def found_in(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def read(folder: Path) -> PlainSAE:
    """Raises ValueError that names file and field where it is damaged, or no autoencoder."""
    config, tensors = config_of(folder / CONFIG), tensors_of(folder / WEIGHTS)
    if config.get("transcode") or config.get("skip_connection"):
        raise ValueError(f"{folder / CONFIG}: transcode or skip_connection is set: it is a transcoder, no SAE")
    needed = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"{folder / WEIGHTS}: lacks {', '.join(missing)}; it has {', '.join(sorted(tensors))}")
    k, kind = config.get("k"), config.get("activation", "topk")
    W_dec_FD = tensors["W_dec"]
    gate: Gate
    if kind != "topk":
        gate = Unknown(f"activation is {kind!r}, which is not known here")
    elif not isinstance(k, int):
        gate = Unknown(f"k is {k!r}")
    else:
        gate = TopK(k, torch.ones(len(W_dec_FD)))
    place = re.search(r"layers\.(\d+)(?:\.(\w+))?$", folder.name)
    return PlainSAE(
        tensors["encoder.weight"],
        tensors["encoder.bias"],
        W_dec_FD,
        tensors["b_dec"],
        tensors["b_dec"],
        gate,
        About(
            place=str(folder),
            format=f"sparsify {kind}",
            hook=f"blocks.{place[1]}.{PLACES[place[2] or '']}" if place and (place[2] or "") in PLACES else None,
            k=k if isinstance(k, int) else None,
        ),
    ).unit()
