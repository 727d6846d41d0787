"""The reference losses of a dataset's evaluation sequences, measured once: as a Ray task, or by who has the model loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.config import Config, EvaluateConfig
from dmsae_ray.evaluation.measure import reference_losses, references_path
from dmsae_ray.files import write_json
from dmsae_ray.secret_url import SecretUrl


def measure_references(config: Config, dataset: ActivationDataset, folder: Path) -> None:
    """Measure in a Ray task and keep them in this folder."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=config.harvest.gpus_per_actor, max_retries=2)(_measure)
    write_references(folder, config.evaluate, ray.get(task.remote(config, dataset.store.url)))


def write_references(folder: Path, evaluate: EvaluateConfig, losses: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(references_path(folder, evaluate), losses)


def references_of(lm, dataset: ActivationDataset, evaluate: EvaluateConfig, device: str | torch.device) -> dict[str, float]:
    """Measure them here."""
    sequences = dataset.held_out("evaluation").first_tokens(evaluate.tokens)
    batches = ((ids.to(device), lengths.to(device)) for ids, lengths in sequences.batches(evaluate.sequences_per_batch))
    return reference_losses(lm, batches, torch.tensor(dataset.manifest.mean), dataset.manifest.max_norm)


def _measure(config: Config, dataset: SecretUrl) -> dict[str, float]:
    from dmsae_ray.lm.model import LanguageModel

    torch.set_num_threads(config.harvest.threads)
    device = "cuda" if config.harvest.gpus_per_actor else "cpu"
    return references_of(LanguageModel.of(config.model, device), ActivationDataset(dataset), config.evaluate, device)
