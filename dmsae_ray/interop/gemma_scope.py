"""Gemma Scope's folders: params.npz alone; layer and model are in the folder's path (Lieberum et al., arXiv
2408.05147)."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from dmsae_ray.interop.plain import About, PlainSAE, Threshold

WEIGHTS = "params.npz"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
PLACES = {"res": "hook_resid_post", "mlp": "hook_mlp_out"}
"""What a repository's name ends with. Those of attention (att) read the heads' outputs side by side, no place here."""


def found_in(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def read(folder: Path) -> PlainSAE:
    """Raises ValueError that names the file where it is damaged."""
    try:
        with np.load(folder / WEIGHTS, allow_pickle=False) as file:
            missing = [name for name in NAMES if name not in file]
            if missing:
                raise ValueError(f"lacks {', '.join(missing)}; it has {', '.join(sorted(file))}")
            tensors = {name: torch.from_numpy(file[name].astype(np.float32)) for name in NAMES}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder / WEIGHTS}: cannot be read ({error})") from error
    path = str(folder.absolute())
    layer, l0 = re.search(r"layer_(\d+)", path), re.search(r"average_l0_(\d+)", path)
    release = re.search(r"gemma-scope-(\w+)-(pt|it)-(res|mlp)\b", path)
    model = f"gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}" if release else None
    return PlainSAE(
        tensors["W_enc"].T.contiguous(),
        tensors["b_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        torch.zeros_like(tensors["b_dec"]),
        Threshold(tensors["threshold"]),
        About(
            place=str(folder),
            format="Gemma Scope jumprelu",
            model=f"google/{model}" if model else None,
            hook=f"blocks.{layer[1]}.{PLACES[release[3]]}" if layer and release else None,
            l0=float(l0[1]) if l0 else None,
            prepend_bos=True,
        ),
    ).unit()
