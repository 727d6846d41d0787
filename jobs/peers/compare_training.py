"""Train a Matryoshka SAE with our trainer and with dictionary-learning's on the same batches, and compare where they
end.

    make test-peers        (or: .venv-peers/bin/python jobs/peers/compare_training.py [--steps 500])

For each of several seeds both trainers start from the same weights and see the same batches, in the same order. FVU and
L0 are taken on held-out batches with the gate that training uses, the dead share from the trainers' own counters. The
two count as the same if every mean difference is within the spread (largest - smallest) of our own seeds. Exits with 1
if not.
"""

from __future__ import annotations

import argparse
import sys
from itertools import accumulate
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

from dmsae_ray.sae.sae import TRAINED, MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings, group_sizes
from dmsae_ray.sae.trainer import Trainer

D, WIDTH, K, BATCH, LR = 64, 1024, 4, 256, 3e-3


def data(seed: int, directions: torch.Tensor, count: int) -> torch.Tensor:
    """Batches [count, BATCH, D] of sparse mixtures of the directions, frequent and rare ones, mean squared norm 1."""
    generator = torch.Generator().manual_seed(seed)
    often = 0.2 / torch.arange(1, len(directions) + 1) ** 0.7
    on = torch.rand(count * BATCH, len(directions), generator=generator) < often
    x = (on * torch.rand(on.shape, generator=generator)) @ directions + 0.3 * directions.mean(dim=0)
    return (x / x.square().sum(dim=1).mean().sqrt()).view(count, BATCH, D)


def settings_of(steps: int) -> SAESettings:
    return SAESettings(
        d=D,
        width=WIDTH,
        k=K,
        batch=BATCH,
        lr=LR,
        warmup_steps=steps // 20,
        total_steps=steps,
        decay_steps=steps // 5,
        dead_window_tokens=steps * BATCH // 10,
        threshold_start_step=steps // 20,
    )


def figures(encoder_FD, b_enc_F, W_dec_FD, b_dec_D, silent_F, window: int, held_out: torch.Tensor) -> dict[str, float]:
    """FVU and L0 with BatchTopK on held-out batches, and the share of dead latents."""
    error = variance = kept = 0.0
    for x_BD in held_out:
        p_BF = ((x_BD - b_dec_D) @ encoder_FD.T + b_enc_F).relu()
        z_BF = torch.zeros_like(p_BF)
        top = p_BF.flatten().topk(K * BATCH)
        z_BF.view(-1)[top.indices] = top.values
        error += (z_BF @ W_dec_FD + b_dec_D - x_BD).square().sum().item()
        variance += (x_BD - x_BD.mean(dim=0)).square().sum().item()
        kept += (z_BF > 0).sum().item()
    return {
        "FVU": error / variance,
        "L0": kept / held_out[..., 0].numel(),
        "dead share": (silent_F >= window).float().mean().item(),
    }


@torch.no_grad()
def both(seed: int, steps: int, directions: torch.Tensor, held_out: torch.Tensor) -> tuple[dict, dict]:
    settings = settings_of(steps)
    sizes = group_sizes(WIDTH, settings.prefix_fractions)
    sae = MatryoshkaSAE.init(settings, None, seed)
    theirs = MatryoshkaBatchTopKTrainer(
        steps=steps,
        activation_dim=D,
        dict_size=WIDTH,
        k=K,
        layer=0,
        lm_name="none",
        group_fractions=[size / WIDTH for size in sizes],
        lr=LR,
        warmup_steps=settings.warmup_steps,
        decay_start=steps - settings.decay_steps,
        seed=seed,
        device="cpu",
        threshold_start_step=settings.threshold_start_step,
    )
    assert list(accumulate(theirs.ae.group_sizes.tolist())) == sae.group_ends
    theirs.dead_feature_threshold = settings.dead_window_tokens
    theirs.ae.W_enc.data.copy_(sae.W_enc.T)
    theirs.ae.W_dec.data.copy_(sae.W_dec)
    theirs.ae.b_enc.data.zero_()
    ours = Trainer(sae, settings)
    for step, x_BD in enumerate(data(1000 + seed, directions, steps)):
        ours.step(x_BD)
        with torch.enable_grad():
            theirs.update(step, x_BD.clone())
    window = settings.dead_window_tokens
    return (
        figures(*(getattr(sae, name) for name in TRAINED), ours.silent_F, window, held_out),
        figures(
            theirs.ae.W_enc.T,
            theirs.ae.b_enc,
            theirs.ae.W_dec,
            theirs.ae.b_dec,
            theirs.num_tokens_since_fired,
            window,
            held_out,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    directions = torch.nn.functional.normalize(
        torch.randn(3 * D, D, generator=torch.Generator().manual_seed(12345)), dim=1
    )
    held_out = data(7, directions, 8)
    found = [both(seed, arguments.steps, directions, held_out) for seed in range(arguments.seeds)]
    print(f"{arguments.steps} steps, {arguments.seeds} seeds: ours | dictionary-learning")
    failed = False
    for name in ("FVU", "L0", "dead share"):
        ours, theirs = ([figure[which][name] for figure in found] for which in (0, 1))
        spread = max(ours) - min(ours)
        off = abs(sum(ours) - sum(theirs)) / len(ours)
        same = off <= max(spread, 1e-6)
        failed |= not same
        print(
            f"{name:>10}: {' '.join(f'{v:.4f}' for v in ours)} | {' '.join(f'{v:.4f}' for v in theirs)}  mean "
            f"difference {off:.2g}, spread of seeds {spread:.2g}: {'same' if same else 'DIFFERENT'}"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
