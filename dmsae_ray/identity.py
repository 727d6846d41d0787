"""What names a folder: hashes of all that decides its contents, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dmsae_ray.config import Config

CHAIN_FORMAT = 4
"""Raised when the same fields would give another core: old chains are then kept but not reused."""
DATASET_FORMAT = 4
"""4: the first documents, as many as are needed. 3: one bound for all shards' outliers, of the calibration
sequences.
"""
ORDER_OF_SUMS = {"parallel", "micro_batch"}
"""Fields of `train` that, like the number of workers, change the order of sums and nothing else."""

ADDED: dict[str, dict[str, object]] = {"sae": {"decoder": "learned", "prefixes": "fixed"}, "train": {"l2": 0.0}}
"""Fields that came later, by section, with the value that stands for what was before them: a chain with that value
keeps the key that it had.
"""


def fields_key(fields: dict[str, Any]) -> str:
    """Twelve hex digits that stand for these fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def dataset_fields(
    config: Config,
    model_fingerprint: str,
    corpus_fingerprint: str,
    hook: str | None = None,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """What decides the bytes of a hook's shards (`model.hook`'s by default); its hash names the dataset's folder.

    chat_template: stands for the tokenizer's, where documents are chat messages.
    """
    harvest = config.harvest.model_dump(mode="json", exclude={"actors", "gpus_per_actor", "hooks", "store", "dataset"})
    corpus = config.corpus.model_dump(
        mode="json", include={"documents", "piece_characters", "attribution_share", "evaluation_share", "packing"}
    )
    corpus |= {"chat_template": chat_template} if chat_template else {}
    model = config.model.model_dump(mode="json", include={"dtype", "context"}) | {"hook": hook or config.model.hook}
    parts = config.sweep.n_parts
    return {
        "format": DATASET_FORMAT,
        "model_fingerprint": model_fingerprint,
        "corpus_fingerprint": corpus_fingerprint,
        "corpus": corpus,
        "model": model,
        "harvest": harvest,
    } | ({"sweep": {"parts": parts}} if parts > 1 else {})


def chain_fields(config: Config, seed: int, k: int, dataset_key: str) -> dict[str, Any]:
    """What decides a chain's cores; its hash names the chain's folder.

    The number of cycles is left out on purpose: a longer chain continues a shorter one. So are the number of
    workers, what they share (train.parallel) and train.micro_batch, which change the order of sums alone: a stopped
    chain goes on with others, and its record says with which.
    """
    part = (
        {"part": seed % config.sweep.n_parts, "parts": config.sweep.n_parts}
        if config.sweep.data == "disjoint"
        else None
    )
    return {
        "format": CHAIN_FORMAT,
        "dataset": dataset_key,
        "seed": seed,
        "data_seed": config.data_seed_of(seed),
        "part": part,
        "k": k,
        "sae": config.sae.model_dump(mode="json", exclude={"core"} | _as_before(config, "sae")),
        "train": config.train.model_dump(
            mode="json",
            exclude=ORDER_OF_SUMS | {"checkpoint_steps", "log_steps", "screen"} | _as_before(config, "train"),
        ),
        "attribution": config.attribution.model_dump(mode="json"),
        "selection": config.selection.model_dump(mode="json"),
        "evaluate": config.evaluate.model_dump(mode="json"),
    }


def _as_before(config: Config, section: str) -> set[str]:
    """Fields of the section that came later and say nothing new."""
    return {
        name for name, before in ADDED.get(section, {}).items() if getattr(getattr(config, section), name) == before
    }
