"""Record what dictionary-learning's Matryoshka trainer does, for the test that compares ours with it.

    make .venv-peers/.ready
    .venv-peers/bin/python jobs/peers/record_reference_step.py dictionary_learning_updates.safetensors      writes
    .venv-peers/bin/python jobs/peers/record_reference_step.py --check dictionary_learning_updates.safetensors

The file lies in tests/data.

Needs dictionary-learning 0.1.0 in an environment of its own, since its requirements conflict with this package's. For
each small configuration below the file holds the parameters before the first update, the batches, and after each update
the parameters, the loss, the running threshold and the tokens since each latent fired. `--check` records afresh and
compares with the stored file instead of writing it.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version

import torch
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TOLERANCE = 1e-6
"""Between two recordings: processors differ in the last bits of a product."""

SHARED = {
    "updates": 8,
    "steps": 10,
    "warmup_steps": 2,
    "decay_start": 7,
    "threshold_start_step": 2,
    "threshold_beta": 0.9,
}

CONFIGURATIONS = {
    # every latent alive, gradient small
    "alive": {
        "d": 8,
        "width": 32,
        "k": 3,
        "batch": 16,
        "fractions": [1 / 8, 1 / 8, 1 / 4, 1 / 2],
        "lr": 1e-3,
        "dead_window": 10_000_000,
        "scale": 1.0,
        "bias": 0.0,
        "seed": 0,
    },
    # gradient norm far above 1, so that clipping and the order of its neighbours matter
    "clipped": {
        "d": 12,
        "width": 40,
        "k": 4,
        "batch": 12,
        "fractions": [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32],
        "lr": 1e-3,
        "dead_window": 10_000_000,
        "scale": 20.0,
        "bias": 0.0,
        "seed": 1,
    },
    # more dead latents than AuxK takes per token (d // 2 = 4)
    "many_dead": {
        "d": 8,
        "width": 32,
        "k": 1,
        "batch": 8,
        "fractions": [1 / 8, 1 / 8, 1 / 4, 1 / 2],
        "lr": 1e-3,
        "dead_window": 16,
        "scale": 1.0,
        "bias": 0.0,
        "seed": 2,
    },
    # fewer positive pairs than k x batch, odd sizes, some latents dead
    "few_positive": {
        "d": 6,
        "width": 21,
        "k": 6,
        "batch": 10,
        "fractions": [0.2, 0.3, 0.5],
        "lr": 1e-3,
        "dead_window": 20,
        "scale": 1.0,
        "bias": -0.55,
        "seed": 3,
    },
}


def record(configuration: dict) -> dict[str, Tensor]:
    """All tensors of one configuration, stacked over updates."""
    trainer = MatryoshkaBatchTopKTrainer(
        steps=configuration["steps"],
        activation_dim=configuration["d"],
        dict_size=configuration["width"],
        k=configuration["k"],
        layer=0,
        lm_name="none",
        group_fractions=configuration["fractions"],
        lr=configuration["lr"],
        warmup_steps=configuration["warmup_steps"],
        decay_start=configuration["decay_start"],
        threshold_beta=configuration["threshold_beta"],
        threshold_start_step=configuration["threshold_start_step"],
        seed=configuration["seed"],
        device="cpu",
    )
    trainer.dead_feature_threshold = configuration["dead_window"]
    sae = trainer.ae
    torch.manual_seed(configuration["seed"])
    sae.b_enc.data = configuration["bias"] + 0.05 * torch.randn(configuration["width"])
    # Encoder unequal to the decoder, so that a mix-up of the two would show.
    sae.W_enc.data += 0.1 * torch.randn_like(sae.W_enc)
    batches = torch.randn(configuration["updates"], configuration["batch"], configuration["d"])
    batches *= configuration["scale"] / configuration["d"] ** 0.5
    batches += 0.3 * configuration["scale"] * torch.randn(configuration["d"]) / configuration["d"] ** 0.5

    def parameters() -> dict[str, Tensor]:
        named = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        return {name: tensor.detach().contiguous().clone() for name, tensor in named.items()}

    before, after = parameters(), []
    for step, x_BD in enumerate(batches):
        loss = trainer.update(step, x_BD.clone())
        after.append(
            {
                **parameters(),
                "loss": torch.tensor(loss),
                "threshold": torch.as_tensor(sae.threshold).clone(),
                "silent": trainer.num_tokens_since_fired.clone(),
            }
        )
    stacked = {f"after.{name}": torch.stack([update[name] for update in after]) for name in after[0]}
    return {"batches": batches, **{f"before.{name}": tensor for name, tensor in before.items()}, **stacked}


def main() -> None:
    parser = argparse.ArgumentParser(description="Record dictionary-learning's training steps.")
    parser.add_argument("output", help="safetensors file to write, or to compare with")
    parser.add_argument("--check", action="store_true", help="compare a fresh recording with the file")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    configurations = {name: {**SHARED, **fields} for name, fields in CONFIGURATIONS.items()}
    tensors = {
        f"{name}.{key}": tensor
        for name, configuration in configurations.items()
        for key, tensor in record(configuration).items()
    }
    metadata = {
        "source": f"dictionary-learning {version('dictionary-learning')}, MatryoshkaBatchTopKTrainer.update",
        "configurations": json.dumps(configurations, sort_keys=True),
    }
    if not arguments.check:
        save_file(tensors, arguments.output, metadata)
        print(f"{arguments.output}: {len(tensors)} tensors, {len(configurations)} configurations")
        return

    with safe_open(arguments.output, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
        problems = [f"{key} differs" for key in metadata if file.metadata().get(key) != metadata[key]]
    problems += [f"{name} is in one of the two only" for name in tensors.keys() ^ stored.keys()]
    for name in sorted(tensors.keys() & stored.keys()):
        if not torch.allclose(tensors[name].double(), stored[name].double(), rtol=TOLERANCE, atol=TOLERANCE):
            problems.append(f"{name} differs")
    if problems:
        sys.exit(f"{arguments.output} is not what dictionary-learning does now:\n  " + "\n  ".join(problems))
    print(f"{arguments.output}: {len(tensors)} tensors agree within {TOLERANCE:g}")


if __name__ == "__main__":
    main()
