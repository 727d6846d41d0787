"""The reference losses of a dataset's evaluation sequences, measured once as a Ray task."""

from __future__ import annotations

from pathlib import Path

import ray
import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.config import Config
from dmsae_ray.distill.evaluate import reference_losses, references_path
from dmsae_ray.files import write_json


def measure_references(config: Config, dataset: ActivationDataset, folder: Path) -> None:
    """Measure and keep them in this folder."""
    task = ray.remote(num_cpus=1, num_gpus=config.harvest.gpus_per_actor, max_retries=2)(_measure)
    losses = ray.get(task.remote(config, dataset.store.url, dataset.manifest.mean))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(references_path(folder, config.evaluate), losses)


def _measure(config: Config, dataset: str, mean_D: list[float]) -> dict[str, float]:
    from dmsae_ray.lm.model import LanguageModel

    torch.set_num_threads(config.harvest.threads)
    device = "cuda" if config.harvest.gpus_per_actor else "cpu"
    lm = LanguageModel.of(config.model, device)
    sequences = ActivationDataset(dataset).held_out("evaluation").first_tokens(config.evaluate.tokens)
    batches = ((ids.to(device), lengths.to(device)) for ids, lengths in sequences.batches(config.evaluate.sequences_per_batch))
    return reference_losses(lm, batches, torch.tensor(mean_D))
