"""The features of a sweep's cores, described by a Ray task: where the language model's GPU is, not where the driver
runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.causes import causes
from dmsae_ray.cluster.present import placed
from dmsae_ray.config import Config
from dmsae_ray.core.core import Core
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.evaluation.references import features_seconds, read_references, references_path
from dmsae_ray.files import discard, file_sha256, move, present, refresh
from dmsae_ray.identity import fields_key
from dmsae_ray.results.features.features import ChainCore, features_key, write_features
from dmsae_ray.results.parts import earlier, known_from, reason_of
from dmsae_ray.secret_url import SecretUrl
from dmsae_ray.show.terminal.progress import duration

TRIES = 3
"""Tasks begun, one after the other, while their workers or nodes are lost."""

SHORT_S = 60
"""What takes less is not announced."""


def describe(
    config: Config,
    dataset: ActivationDataset,
    plans: Sequence[ChainPlan],
    consensus: dict | None,
    path: Path,
    connect: Callable[[], object],
    say: Callable[[str], None],
    fresh: bool = False,
) -> dict | None:
    """features.json of these finished chains; None, and no file, if there are none.

    connect: joins or starts Ray, called only if there is something to do. fresh: do it though the file holds already.
    """
    if not plans:
        discard(path)
        return None
    cores = {plan.label: plan.folder.cycle(plan.cycles - 1).core for plan in plans}
    stamp = None if consensus is None else fields_key(consensus)
    key = features_key(
        config.features, dataset.manifest.key, {label: file_sha256(core) for label, core in cores.items()}, stamp
    )
    for there in () if fresh else (path, earlier(path)):
        if (known := known_from(there, say)) is not None and known.get("key") == key:
            if there != path:
                move(there, path)
            return known
    connect()
    import ray

    chains = [
        ChainCore(plan.label, Core.load(cores[plan.label]), plan.folder.cycle(plan.cycles - 1).sae) for plan in plans
    ]
    features = sum(chain.core.size for chain in chains) if consensus is None else len(consensus["groups"])
    say(
        f"features: reading {config.features.tokens:,} held-out tokens for where they fire and what they do to the loss"
        + _time_said(config, plans[0].references, features)
    )
    # No retries by Ray, whose retries for want of memory never end.
    task = ray.remote(num_cpus=1, num_gpus=config.harvest.gpus_per_actor, max_retries=0, **placed(config))(_describe)
    for left in reversed(range(TRIES)):
        try:
            ray.get(task.remote(config, dataset.store.url, chains, consensus, path, key))
            break
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.ObjectLostError,
        ) as error:
            if not left:
                raise
            say(f"features: their worker was lost ({reason_of(error)}); trying again")
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise ValueError(
                f"out of memory ({reason_of(error)}): lower features.sequences_per_batch (now "
                f"{config.features.sequences_per_batch}) or features.most (now {config.features.most}), or leave more "
                "of the machine's memory free; the same command makes only the features again"
            ) from error
    refresh(path.parent)
    return json.loads(path.read_text())


def _time_said(config: Config, references: Path, features: int) -> str:
    """How long that will take, where it is long and the references know how long the model takes."""
    if not present(references_path(references, config.evaluate)):
        return ""
    seconds = features_seconds(config, read_references(references, config.evaluate), features)
    return "" if seconds is None or seconds < SHORT_S else f"; about {duration(seconds)}"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was what it wanted: the machine's, by Ray's watch over it, or a GPU's."""
    import ray
    import torch

    kinds = MemoryError | ray.exceptions.OutOfMemoryError | torch.OutOfMemoryError
    return any(isinstance(link, kinds) for link in causes(error, contexts=True))


def _describe(
    config: Config, dataset: SecretUrl, chains: list[ChainCore], consensus: dict | None, path: Path, key: str
) -> None:
    import torch

    from dmsae_ray.lm.model import LanguageModel
    from dmsae_ray.lm.source import tokenizer_of

    torch.set_num_threads(config.harvest.threads)
    device = "cuda" if config.harvest.gpus_per_actor else "cpu"
    opened = ActivationDataset(dataset)
    folder = config.home / "sweeps" / path.parent.name
    refresh(config.home / "chains")
    folder.mkdir(parents=True, exist_ok=True)  # of an output at a URL no other machine has it yet
    write_features(
        folder / path.name,
        LanguageModel.of(config.model, device),
        opened.held_out("evaluation"),
        opened.manifest.scale,
        tokenizer_of(config.model),
        chains,
        consensus,
        config.features,
        key,
        device,
        opened.manifest.max_norm,
    )
