"""The reference losses of a dataset's evaluation sequences, measured once: as a Ray task, or by who has the model
loaded.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.outliers import counted
from dmsae_ray.cluster.present import placed
from dmsae_ray.config import Config, EvaluateConfig
from dmsae_ray.files import refresh, write_json
from dmsae_ray.lm.divergence import divergence
from dmsae_ray.secret_url import SecretUrl

KINDS = 3
"""Reference losses: clean, zero and mean."""


def measure_references(config: Config, dataset: ActivationDataset, folder: Path) -> None:
    """Measure in a Ray task and keep them in this folder."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=config.harvest.gpus_per_actor, max_retries=2, **placed(config))(_measure)
    write_references(folder, config.evaluate, ray.get(task.remote(config, dataset.store.url)))


def write_references(folder: Path, evaluate: EvaluateConfig, losses: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(references_path(folder, evaluate), losses)


def references_of(
    lm, dataset: ActivationDataset, evaluate: EvaluateConfig, device: str | torch.device
) -> dict[str, Any]:
    """Measure them here."""
    sequences = dataset.held_out("evaluation").first_tokens(evaluate.tokens)
    batches = ((ids.to(device), lengths.to(device)) for ids, lengths in sequences.batches(evaluate.sequences_per_batch))
    began = time.monotonic()
    losses = reference_losses(lm, batches, torch.tensor(dataset.manifest.mean), dataset.manifest.max_norm)
    return losses | {"seconds": time.monotonic() - began}


def _measure(config: Config, dataset: SecretUrl) -> dict[str, Any]:
    from dmsae_ray.lm.model import LanguageModel

    torch.set_num_threads(config.harvest.threads)
    refresh(config.home / "models")  # where the model may lie
    device = "cuda" if config.harvest.gpus_per_actor else "cpu"
    return references_of(LanguageModel.of(config.model, device), ActivationDataset(dataset), config.evaluate, device)


@torch.no_grad()
def reference_losses(lm, batches, mean_D: torch.Tensor, max_norm: float | None = None) -> dict[str, Any]:
    """Loss per token that needs no SAE: clean, and with what stands at the hook set to zero or to its mean (BOS kept,
    and rows beyond max_norm, as a splice keeps them).

    `by_sequence` has each sequence's sums of the three in their order, which standard errors need.
    """
    sums, tokens = [torch.zeros(KINDS, 0, dtype=torch.float64)], 0
    for ids_NT, lengths_N in batches:
        rows_NT = lm.rows(ids_NT, lengths_N)
        cut = lm.cut(ids_NT)
        tokens += int(rows_NT.sum())
        counts_NT1 = counted(rows_NT, cut.value_BTD, max_norm)[:, :, None]
        ablated = [
            torch.where(counts_NT1, value_D.to(cut.value_BTD), cut.value_BTD)
            for value_D in (torch.zeros_like(mean_D), mean_D)
        ]
        sums.append(divergence(lm, cut, [cut.value_BTD, *ablated], ids_NT, lengths_N)[0])
    losses_KN = torch.cat(sums, dim=1)
    means = dict(zip(("clean", "zero", "mean"), (losses_KN.sum(dim=1) / tokens).tolist(), strict=True))
    return means | {"tokens": tokens, "by_sequence": losses_KN.tolist()}


def cycle_seconds(config: Config, references: dict[str, Any]) -> tuple[float, float] | None:
    """What a cycle's evaluation and its attribution will take one worker on a device like that of the references; None
    if these say no time.

    In units of running the model on from the hook: a reference is one, each prefix of an SAE is one, and scores are
    three, since a gradient costs two.
    """
    if (per_token := seconds_per_token(references)) is None:
        return None
    prefixes = len(config.sae.prefix_fractions) + 2  # the groups, the rest, and the core alone
    return per_token * prefixes * config.evaluate.tokens, per_token * 3 * config.attribution.tokens


def features_seconds(config: Config, references: dict[str, Any], features: int) -> float | None:
    """What so many features will take to describe, likewise: the text is read once, and each of a feature's contexts
    again without it.
    """
    if (per_token := seconds_per_token(references)) is None:
        return None
    settings = config.features
    again = min(features, settings.most) * settings.contexts * config.model.context if settings.effects else 0
    return per_token * (settings.tokens + again)


def seconds_per_token(references: dict[str, Any]) -> float | None:
    """Of running the model on from the hook; None in references of before, which know no time."""
    return references["seconds"] / (KINDS * references["tokens"]) if "seconds" in references else None


def references_path(dataset_folder: Path, evaluate) -> Path:
    """Where the reference losses of these evaluation settings lie."""
    return dataset_folder / f"references-{evaluate.tokens}-{evaluate.sequences_per_batch}.json"


def read_references(dataset_folder: Path, evaluate) -> dict[str, Any]:
    return json.loads(references_path(dataset_folder, evaluate).read_text())
