"""Our own SAE as a PlainSAE: its scale goes into biases and thresholds, so that it reads raw activations and its
activations are in their units.

    x / s goes in:  p = (x / s - b_dec) @ W_enc^T + b_enc,  x_hat = s * (z @ W_dec + b_dec)
    times s:        s p = (x - s b_dec) @ W_enc^T + s b_enc,  and p > theta where s p > s theta

Weights stay what they are, decoder rows of norm 1 among them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmsae_ray.interop.plain import About, PlainSAE, Threshold
from dmsae_ray.sae.latents import Latents
from dmsae_ray.sae.sae import MatryoshkaSAE


def plain_of(sae: MatryoshkaSAE, known: dict[str, Any], about: About) -> PlainSAE:
    """known: what its file says of it (`load_sae`); its `scale` is used."""
    whole, s = Latents.all_of(sae), known["scale"]
    return PlainSAE(
        W_enc_FD=whole.W_enc_ND,
        b_enc_F=whole.b_enc_N * s,
        W_dec_FD=whole.W_dec_ND,
        b_dec_D=whole.b_dec_D * s,
        b_in_D=whole.b_dec_D * s,
        gate=Threshold(whole.theta_N * s),
        about=about,
    )


def about_of(sae: MatryoshkaSAE, known: dict[str, Any], place: str) -> About:
    """What its file says of it: not the model's name, nor how good it is."""
    facts: dict[str, Any] = {name: known[name] for name in ("chain", "cycle", "seed", "scale") if name in known}
    facts |= {"model_fingerprint": known.get("model"), "core_size": sae.core_size, "core_gate": sae.core_gate}
    return About(
        place=place,
        format="dmsae_ray Matryoshka BatchTopK",
        hook=known.get("hook"),
        k=known.get("k"),
        prefixes=tuple(sae.group_ends),
        more=facts,
    )


def read(path: Path) -> PlainSAE:
    """sae.safetensors of a cycle. Raises ValueError naming the file if it is none."""
    sae, known = MatryoshkaSAE.load(path)
    return plain_of(sae, known, about_of(sae, known, str(path)))
