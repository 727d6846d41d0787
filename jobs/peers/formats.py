"""Files of other packages' SAEs, made by those packages, for the tests of our readers; and ours, read by them.

    make .venv-peers/.ready
    .venv-peers/bin/python jobs/peers/formats.py record tests/data/formats      writes
    .venv-peers/bin/python jobs/peers/formats.py check                          reads ours

`record` makes one small SAE of each kind, saves it as its package does, and keeps rows with what the package's own
class makes of them: activations and reconstructions. `check` writes random SAEs of ours, at scales other than 1 and
with each gate, reads them with sae-lens and dictionary-learning and compares: the same latents active but for pairs
within 1e-6 of their threshold, activations and reconstructions to 1e-5. Ends with status 1 where something differs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dictionary_learning import dictionary as dl
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

D, F, B, K = 6, 20, 12, 4
CLOSE = 1e-5
NEAR_THRESHOLD = 1e-6


def drawn(module: torch.nn.Module) -> None:
    """Every parameter drawn anew: biases that are not 0 and decoder rows whose norms are not 1 tell readers apart."""
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            continue
        parameter.data = torch.randn_like(parameter) * 0.5
        if name == "threshold":
            parameter.data = parameter.data.abs()


# -- record ------------------------------------------------------------------------------------------------------------


def lens_saes() -> Iterator[tuple[str, Any]]:
    """(name, SAE of sae-lens)"""
    from sae_lens import (
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata

    about = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}

    def metadata() -> SAEMetadata:
        return SAEMetadata(model_name="gpt2", hook_name="blocks.1.hook_resid_pre", context_size=32, prepend_bos=True)

    made = {
        "standard": lambda: StandardSAE(StandardSAEConfig(**about, apply_b_dec_to_input=False, metadata=metadata())),
        "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**about, metadata=metadata())),
        "gated": lambda: GatedSAE(GatedSAEConfig(**about, metadata=metadata())),
        "topk": lambda: TopKSAE(TopKSAEConfig(**about, k=K, metadata=metadata())),
        "topk-rescaled": lambda: TopKSAE(
            TopKSAEConfig(**about, k=K, rescale_acts_by_decoder_norm=True, metadata=metadata())
        ),
    }
    for name, make in made.items():
        yield name, make()


def dl_saes() -> Iterator[tuple[str, Any]]:
    """(dict_class, SAE of dictionary-learning)"""
    yield "AutoEncoder", dl.AutoEncoder(D, F)
    yield "AutoEncoderNew", dl.AutoEncoderNew(D, F)
    yield "GatedAutoEncoder", dl.GatedAutoEncoder(D, F)
    yield "JumpReluAutoEncoder", dl.JumpReluAutoEncoder(D, F)
    yield "AutoEncoderTopK", AutoEncoderTopK(D, F, K)
    yield "BatchTopKSAE", BatchTopKSAE(D, F, K)
    yield "MatryoshkaBatchTopKSAE", MatryoshkaBatchTopKSAE(D, F, K, [5, 5, 10])


def keep(folder: Path, x_BD: Tensor, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> None:
    """What the package makes of some rows. Activations are kept as they add up: times the norm of their decoder row."""
    with torch.no_grad():
        z_BF = encode(x_BD)
        save_file({"x": x_BD, "z": z_BF.contiguous(), "x_hat": decode(z_BF).contiguous()}, folder / "rows.safetensors")


def record(out: Path) -> None:
    torch.manual_seed(0)
    x_BD = torch.randn(B, D) * 2
    for name, sae in lens_saes():
        drawn(sae)
        folder = out / f"saelens-{name}"
        sae.save_model(folder)
        keep(folder, x_BD, sae.encode, sae.decode)
    for name, sae in dl_saes():
        drawn(sae)
        if hasattr(sae, "threshold") and not isinstance(sae.threshold, torch.nn.Parameter):
            sae.threshold.fill_(0.7)
        folder = out / f"dictionary_learning-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": name, "k": K, "layer": 3, "lm_name": "gpt2", "submodule_name": "resid_post_layer_3"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}, indent=1))
        keep(folder, x_BD, sae.encode, sae.decode)
    print(f"recorded: {', '.join(sorted(path.name for path in out.iterdir()))}")


# -- check -------------------------------------------------------------------------------------------------------------


def same(what: str, ours: Any, x_BD: Tensor, z_BF: Tensor, x_hat_BD: Tensor) -> bool:
    """Whether a package computes of our export what we compute."""
    from dmsae_ray.interop.plain import Threshold

    with torch.no_grad():
        p_BF, mine_BF = ours.pre(x_BD), ours.encode(x_BD)
        assert isinstance(ours.gate, Threshold)
        near_BF = (p_BF - ours.gate.theta_F).abs() <= NEAR_THRESHOLD * ours.gate.theta_F.clamp(min=1e-3)
        flips = int((((mine_BF > 0) != (z_BF > 0)) & ~near_BF).sum())
        error = float((mine_BF - z_BF).abs().max() / mine_BF.abs().max())
        rebuilt = float((ours.decode(mine_BF) - x_hat_BD).abs().max() / x_BD.abs().max())
    good = not flips and error < CLOSE and rebuilt < CLOSE
    print(f"{'ok  ' if good else 'DIFF'} {what}: {flips} flips, activations {error:.1e}, reconstruction {rebuilt:.1e}")
    return good


def check() -> bool:
    """Our exports of every gate and scale, by the packages themselves."""
    from sae_lens import SAE

    from dmsae_ray.interop import dictionary_learning, saelens
    from dmsae_ray.interop.ours import about_of, plain_of
    from dmsae_ray.sae.sae import MatryoshkaSAE, unit_rows

    torch.manual_seed(1)
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        for gate in ("batchtopk", "relu"):
            for scale in (1.0, 0.25, 28.18):
                sae = MatryoshkaSAE(16, [24, 48, 96], 8, gate)
                with torch.no_grad():
                    for parameter in (*sae.parameters(), sae.W_enc_core):
                        parameter.copy_(torch.randn_like(parameter) * 0.4)
                    sae.W_dec.copy_(unit_rows(sae.W_dec))
                    sae.theta.fill_(0.3)
                known = {"scale": scale, "hook": "blocks.2.hook_resid_post", "k": 8}
                plain = plain_of(sae, known, replace(about_of(sae, known, "made here"), model="gpt2", context=64))
                x_BD = torch.randn(256, 16) * scale
                folder = Path(temporary) / f"{gate}-{scale}"
                saelens.write(folder / "lens", plain)
                lens = SAE.load_from_disk(folder / "lens")
                assert lens.cfg.metadata.model_name == "gpt2" and lens.cfg.metadata.hook_name == known["hook"]
                z_BF = lens.encode(x_BD)
                good &= same(f"sae-lens, {gate}, scale {scale}", plain, x_BD, z_BF, lens.decode(z_BF))
                if gate == "relu":
                    continue
                dictionary_learning.write(folder / "dl", plain)
                state = torch.load(folder / "dl" / "ae.pt", weights_only=True)
                theirs = MatryoshkaBatchTopKSAE(16, 96, int(state["k"]), state["group_sizes"].tolist())
                theirs.load_state_dict(state)
                z_BF = theirs.encode(x_BD)
                good &= same(f"dictionary-learning, scale {scale}", plain, x_BD, z_BF, theirs.decode(z_BF))
    return good


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        record(Path(sys.argv[2]))
    elif sys.argv[1:] == ["check"]:
        sys.exit(0 if check() else 1)
    else:
        sys.exit(__doc__)
