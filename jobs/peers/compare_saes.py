"""SAEs that sae-lens and dictionary-learning train on planted features, compared by python -m dmsae_ray.compare's code.

    make .venv-peers/.ready
    .venv-peers/bin/python jobs/peers/compare_saes.py

Rows are sparse mixtures of 32 directions. Two Matryoshka SAEs of two seeds by sae-lens and one by dictionary-learning
are trained on them, and one by sae-lens on rows of 32 other directions. Expected: the three have in common what was
planted (at least three quarters of it, and nothing that was not), and have next to nothing in common with the fourth.
What sae-lens saves as a training checkpoint and as an inference model is read as the same SAE. Ends with status 1 if
not. What came of it: 31 of the 32 directions, none that was not planted, overlap 0.000 with the fourth.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dmsae_ray.compare.match import cosines
from dmsae_ray.interop import dictionary_learning
from dmsae_ray.interop.plain import PlainSAE
from dmsae_ray.interop.read import read_sae
from dmsae_ray.results.any_saes import Chosen, Settings, check_comparable, choose, compare

D, TRUE, WIDTH, K, BATCH, STEPS = 48, 32, 64, 3, 256, 3000
HOOK = "blocks.2.hook_resid_post"
FOUND, FAR, LEAST = 0.9, 0.1, 0.75
"""Cosine to a planted direction at which it counts as found; share of shared latents between different plantings, at
most; share of what was planted that must be found.
"""


def directions(seed: int) -> torch.Tensor:
    rows = torch.randn(TRUE, D, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def batches(true: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """[BATCH, D] without end: on average K of the directions, each with a size of its own, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        on = torch.rand(BATCH, TRUE, generator=generator) < K / TRUE
        sizes = 1 + torch.rand(BATCH, TRUE, generator=generator)
        yield (on * sizes) @ true * 5 + 0.1 * torch.randn(BATCH, D, generator=generator)


def lens(true: torch.Tensor, seed: int, folder: Path) -> PlainSAE:
    torch.manual_seed(seed)
    metadata = SAEMetadata(model_name="gpt2", hook_name=HOOK, context_size=64, prepend_bos=True)
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D, d_sae=WIDTH, k=K, matryoshka_widths=[32, WIDTH], dtype="float32", device="cpu", metadata=metadata
    )
    sae = MatryoshkaBatchTopKTrainingSAE(config)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=2e-3,
            lr_end=2e-4,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        batches(true, seed),
    )
    trainer.fit()
    sae.save_inference_model(folder / "inference")
    sae.save_model(folder / "training")
    read, training = read_sae(str(folder / "inference")), read_sae(str(folder / "training"))
    x_BD = next(batches(true, 99))
    torch.testing.assert_close(read.encode(x_BD), training.encode(x_BD), rtol=1e-4, atol=1e-4)
    return read


def dl(true: torch.Tensor, seed: int, folder: Path) -> PlainSAE:
    trainer = MatryoshkaBatchTopKTrainer(
        steps=STEPS,
        activation_dim=D,
        dict_size=WIDTH,
        k=K,
        layer=2,
        lm_name="gpt2",
        group_fractions=[0.5, 0.5],
        lr=2e-3,
        warmup_steps=100,
        decay_start=int(0.8 * STEPS),
        device="cpu",
        seed=seed,
        submodule_name="resid_post_layer_2",
    )
    source = batches(true, seed)
    for step in range(STEPS):
        trainer.update(step, next(source) / 10)
    folder.mkdir()
    trainer.ae.scale_biases(10.0)
    torch.save(trainer.ae.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer.config}))
    return dictionary_learning.read(folder)


def truth_of(core: Any, true: torch.Tensor) -> tuple[int, int]:
    """Planted directions that a consensus core has, and its members that are none of them."""
    if core is None:
        return 0, 0
    nearest = cosines(core.W_dec_CD, true)
    return len(set(nearest.argmax(axis=1)[nearest.max(axis=1) >= FOUND])), int((nearest.max(axis=1) < FOUND).sum())


def main() -> int:
    one, other = directions(0), directions(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        saes = {
            "sae-lens seed 1": lens(one, 1, root / "a"),
            "sae-lens seed 2": lens(one, 2, root / "b"),
            "dictionary-learning": dl(one, 3, root / "c"),
            "sae-lens, other features": lens(other, 4, root / "d"),
        }
    check_comparable(list(saes.values()))
    rows = torch.cat([next(batches(one, seed)) for seed in range(50, 58)])
    chosen: list[Chosen] = [choose(label, sae, rows, Settings()) for label, sae in saes.items()]
    alike, consensus = compare(chosen[:3], rows, Settings(share=1.0), print)
    found, strange = truth_of(consensus.core, one)
    every, _ = compare(chosen, None, Settings(), print)
    for pair in every["pairs"]:
        chance = pair["nulls"]["isotropic"]["pw_mcc_p99"]
        print(
            f"{pair['a']} - {pair['b']}: PW-MCC {pair['pw_mcc']:.2f} (random directions at most {chance:.2f}), overlap "
            f"{pair['overlap']:.2f}"
        )
    for one_of in alike["saes"]:
        print(f"{one_of['label']}: {one_of['quality']}")
    far = max(pair["overlap"] for pair in every["pairs"] if "other" in pair["b"])
    print(
        f"of {TRUE} planted directions the three have {found} in common, and {strange} that were not planted; overlap "
        f"with the fourth {far:.3f}"
    )
    return 0 if found >= LEAST * TRUE and strange == 0 and far <= FAR else 1


if __name__ == "__main__":
    sys.exit(main())
