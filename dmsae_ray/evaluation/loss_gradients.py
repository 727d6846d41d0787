"""The gradient of the language model's loss at the hook, on held-out text: what the effects of latents on the loss are
made from when cores are compared. Measured once for a dataset, in a Ray task.

Letters: N sequences, T context, M rows, D model dimension.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.outliers import counted
from dmsae_ray.cluster.present import placed
from dmsae_ray.compare.functional import LossRows
from dmsae_ray.config import Config
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.files import refresh, replacing
from dmsae_ray.secret_url import SecretUrl

TOKENS = 16_384
"""Tokens at most whose gradients are kept: 75 MB at 576 dimensions, 300 MB at 2304."""


def measure_gradients(config: Config, dataset: ActivationDataset, folder: Path) -> None:
    """Measure in a Ray task, which writes them to this folder."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=config.harvest.gpus_per_actor, max_retries=2, **placed(config))(_measure)
    ray.get(task.remote(config, dataset.store.url))
    refresh(folder)


def gradients_path(folder: Path, config: Config) -> Path:
    """Where the gradients of a dataset lie, for as many tokens as are evaluated, up to TOKENS."""
    return folder / f"loss-gradients-{min(TOKENS, config.evaluate.tokens)}.safetensors"


def read_gradients(path: Path) -> LossRows:
    """Raises ValueError that names the file if it is missing or damaged."""
    try:
        found = load_file(path)
        return LossRows(found["x"], found["gradient"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); delete it, and the same command measures it again"
        ) from error


def gradients_of(
    lm, sequences: TokenSequences, sequences_per_batch: int, max_norm: float | None, device: str | torch.device = "cpu"
) -> LossRows:
    """Of the summed loss of each sequence, with nothing replaced, at every row whose norm is at most max_norm."""
    rows, gradients = [], []
    for ids_NT, lengths_N in sequences.batches(sequences_per_batch):
        ids_NT, lengths_N = ids_NT.to(device), lengths_N.to(device)
        cut = lm.cut(ids_NT)
        counts_NT = counted(lm.rows(ids_NT, lengths_N), cut.value_BTD, max_norm)
        value_NTD = cut.value_BTD.clone().requires_grad_(True)
        (gradient_NTD,) = torch.autograd.grad(lm.loss(cut, value_NTD, ids_NT, lengths_N), value_NTD)
        rows.append(cut.value_BTD[counts_NT].float().cpu())
        gradients.append(gradient_NTD[counts_NT].float().cpu())
    return LossRows(torch.cat(rows), torch.cat(gradients))


def _measure(config: Config, dataset: SecretUrl) -> None:
    from dmsae_ray.lm.model import LanguageModel

    torch.set_num_threads(config.harvest.threads)
    device = "cuda" if config.harvest.gpus_per_actor else "cpu"
    opened = ActivationDataset(dataset)
    folder = config.home / "data" / opened.manifest.key
    sequences = opened.held_out("evaluation").first_tokens(min(TOKENS, config.evaluate.tokens))
    # As many sequences at once as attribution takes, which needs the same memory.
    found = gradients_of(
        LanguageModel.of(config.model, device),
        sequences,
        config.attribution.sequences_per_shard,
        opened.manifest.max_norm,
        device,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(gradients_path(folder, config)) as temporary:
        temporary.write_bytes(safetensors_bytes({"x": found.x_MD, "gradient": found.gradient_MD}))
