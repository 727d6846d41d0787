"""dictionary_learning's folders (0.1.0): ae.pt and config.json. Read and written without that package.

What its classes compute: dictionary.py and trainers/*.py of dictionary-learning 0.1.0.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from dmsae_ray.files import replacing, write_json
from dmsae_ray.interop.from_files import config_of, text
from dmsae_ray.interop.plain import EXPORTED, About, Gate, Gated, PlainSAE, Threshold, TopK, Unknown

CONFIG, WEIGHTS = "config.json", "ae.pt"
TRANSPOSED = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
"""Names of torch's Linear layers, whose weights are [outputs, inputs]."""
PLACES = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre", "mlp_out": "hook_mlp_out"}
"""submodule_name, as its demos write it, by TransformerLens name"""


def found_in(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def read(folder: Path) -> PlainSAE:
    """Raises ValueError that names file and field where it is damaged, or of a class that is not known."""
    trainer = config_of(folder / CONFIG).get("trainer", {})
    tensors = _tensors(folder / WEIGHTS)
    kind = str(trainer.get("dict_class", "AutoEncoder"))
    if "encoder.weight" in tensors:
        W_enc_FD, W_dec_FD = tensors["encoder.weight"], tensors.get("decoder.weight", torch.zeros(0, 0)).T.contiguous()
        b_enc_F = tensors.get("encoder.bias")
    elif {"W_enc", "W_dec"} <= tensors.keys():
        W_enc_FD, W_dec_FD, b_enc_F = tensors["W_enc"].T.contiguous(), tensors["W_dec"], tensors.get("b_enc")
    else:
        raise ValueError(f"{folder / WEIGHTS}: has no encoder; it has {', '.join(sorted(tensors))}")
    b_dec_D = next(
        (tensors[name] for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in tensors), None
    )
    if b_dec_D is None:
        raise ValueError(f"{folder / WEIGHTS}: has no decoder bias; it has {', '.join(sorted(tensors))}")
    # Neither of these takes the decoder's bias from what it reads.
    reads_raw = kind in ("JumpReluAutoEncoder", "AutoEncoderNew")
    return PlainSAE(
        W_enc_FD,
        torch.zeros(len(W_dec_FD)) if b_enc_F is None else b_enc_F,
        W_dec_FD,
        b_dec_D,
        torch.zeros_like(b_dec_D) if reads_raw else b_dec_D,
        _gate(kind, trainer, tensors, len(W_dec_FD)),
        _about(folder, kind, trainer, tensors),
    ).unit()


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as tensors alone ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path}: not a dict of tensors")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def _gate(kind: str, trainer: dict[str, Any], tensors: dict[str, torch.Tensor], width: int) -> Gate:
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return Threshold(torch.zeros(width))
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE") and "threshold" in tensors:
        theta = float(tensors["threshold"])
        if theta < 0:
            return Unknown("its threshold was never set: it was trained for too few steps")
        return Threshold(torch.full((width,), theta))
    if kind == "JumpReluAutoEncoder" and "threshold" in tensors:
        return Threshold(tensors["threshold"])
    if kind == "AutoEncoderTopK":
        k = int(tensors["k"]) if "k" in tensors else trainer.get("k")
        return TopK(k, torch.ones(width)) if isinstance(k, int) else Unknown(f"k is {k!r}")
    if kind == "GatedAutoEncoder" and {"gate_bias", "r_mag", "mag_bias"} <= tensors.keys():
        return Gated(tensors["gate_bias"], tensors["r_mag"], tensors["mag_bias"])
    return Unknown(f"dict_class {kind!r} with {', '.join(sorted(tensors))} is not known here")


def _about(folder: Path, kind: str, trainer: dict[str, Any], tensors: dict[str, torch.Tensor]) -> About:
    layer, submodule = trainer.get("layer"), str(trainer.get("submodule_name", ""))
    place = next((hook for name, hook in PLACES.items() if submodule.startswith(name)), None)
    prefixes: tuple[int, ...] = ()
    if "group_sizes" in tensors:
        prefixes = tuple(tensors["group_sizes"].cumsum(0).tolist())
    return About(
        place=str(folder),
        format=f"dictionary_learning {kind}",
        model=text(trainer.get("lm_name")),
        hook=f"blocks.{layer}.{place}" if isinstance(layer, int) and place else None,
        k=trainer.get("k"),
        prefixes=prefixes,
    )


def check(sae: PlainSAE) -> Threshold:
    """Raises ValueError if MatryoshkaBatchTopKSAE has no place for this SAE: it has one threshold for all latents, and
    takes the decoder's bias from what it reads.
    """
    about, gate = sae.about, sae.gate
    if not isinstance(gate, Threshold):
        raise ValueError(f"{about.place}: has no threshold, which dictionary_learning's MatryoshkaBatchTopKSAE needs")
    if bool((gate.theta_F != gate.theta_F[0]).any()):
        raise ValueError(
            f"{about.place}: its latents have different thresholds (an exempt core, sae.core_gate relu, has 0), and "
            "dictionary_learning's MatryoshkaBatchTopKSAE has one for all; export it with --to saelens"
        )
    if about.k is None or about.k != int(about.k) or not bool((sae.b_in_D == sae.b_dec_D).all()):
        raise ValueError(f"{about.place}: k is {about.k}, or its input is not taken less the decoder's bias")
    return gate


def write(folder: Path, sae: PlainSAE) -> None:
    """As a MatryoshkaBatchTopKSAE. Raises ValueError as `check` does."""
    gate, about = check(sae), sae.about
    assert about.k is not None, "checked"
    hook = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", about.hook or "")
    names = {place: name for name, place in PLACES.items()}
    prefixes = (0, *(about.prefixes or (sae.width,)))
    sizes = [high - low for low, high in zip(prefixes, prefixes[1:], strict=False)]
    tensors = {
        "W_enc": sae.W_enc_FD.T,
        "b_enc": sae.b_enc_F,
        "W_dec": sae.W_dec_FD,
        "b_dec": sae.b_dec_D,
        "threshold": gate.theta_F[0],
    }
    state = {name: tensor.detach().float().clone().contiguous() for name, tensor in tensors.items()}
    state |= {"k": torch.tensor(int(about.k), dtype=torch.int), "group_sizes": torch.tensor(sizes)}
    trainer = {
        "trainer_class": "MatryoshkaBatchTopKTrainer",
        "dict_class": "MatryoshkaBatchTopKSAE",
        "activation_dim": sae.d,
        "dict_size": sae.width,
        "k": int(about.k),
        "group_sizes": sizes,
        "layer": int(hook[1]) if hook else None,
        "lm_name": about.model,
        "submodule_name": f"{names[hook[2]]}_layer_{hook[1]}" if hook and hook[2] in names else about.hook,
        "device": "cpu",
        EXPORTED: 1,
    } | {f"dmsae_{name}": value for name, value in about.more.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        torch.save(state, temporary)
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {"ctx_len": about.context}})
