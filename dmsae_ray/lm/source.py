"""Where a language model comes from: the tiny model, a local folder or the hub, and what is known before it is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dmsae_ray.place import has_form_of_hub_id

TINY = Path(__file__).parent / "tiny"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
FINGERPRINTED = ("config.json", "tokenizer.json", "tokenizer.model", *WEIGHTS)


@dataclass(frozen=True)
class ModelInfo:
    """What the configuration and the tokenizer say about a model; no weights are read for it."""

    name: str
    d: int
    """width of the residual stream"""
    n_layers: int
    vocab: int
    max_context: int
    """longest sequence in tokens"""
    has_tokenizer: bool
    fingerprint: str
    """sha256 over configuration, tokenizer and weight files; for a hub model its id and commit"""


def local_folder(name: str) -> Path | None:
    """The folder a model's files lie in, None for a hub id: what is not absolute is one, whatever this process's own folder holds.

    Raises ValueError if `name` is a folder without a model, a file, or neither a path nor a hub id.
    """
    folder = TINY if name == "tiny" else Path(name)
    if not folder.is_absolute() and has_form_of_hub_id(name) and ":" not in name:
        return None
    if not folder.exists():
        raise ValueError(f"model.name {name}: no such folder; give `tiny`, a model folder or a hub id such as google/gemma-2-2b")
    if not folder.is_dir():
        raise ValueError(f"model.name {name}: a file; give the folder that holds config.json, tokenizer and weights")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.name {name}: no config.json in {folder}; give a folder as save_pretrained writes it")
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(f"model.name {name}: no weights (*.safetensors) in {folder}; copy them there, or give a complete folder")
    return folder


def model_info(name: str, revision: str | None = None) -> ModelInfo:
    """What a model is, without its weights. Raises ValueError if it or its tokenizer cannot be had."""
    folder = local_folder(name)
    config = load_config(name, revision)
    text = config.get_text_config()
    load_tokenizer(name, revision)
    return ModelInfo(
        name=name, d=text.hidden_size, n_layers=text.num_hidden_layers, vocab=text.vocab_size,
        max_context=getattr(text, "max_position_embeddings", None) or 2**31, has_tokenizer=True,
        fingerprint=fingerprint_of(folder, name, config),
    )  # fmt: skip


def load_config(name: str, revision: str | None = None):
    """The transformers configuration. Raises ValueError with the remedy."""
    from transformers import AutoConfig

    folder = local_folder(name)
    try:
        return AutoConfig.from_pretrained(folder or name, revision=revision if folder is None else None, local_files_only=folder is not None)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(name, "config.json", revision, error)) from error


def load_tokenizer(name: str, revision: str | None = None):
    """The transformers tokenizer. Raises ValueError if it is missing or has no BOS token."""
    from transformers import AutoTokenizer

    folder = local_folder(name)
    if folder is not None and not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"model.name {name}: no tokenizer (tokenizer.json) in {folder}; copy the tokenizer's files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder or name, revision=revision if folder is None else None, local_files_only=folder is not None
        )
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(name, "tokenizer", revision, error)) from error
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"model.name {name}: its tokenizer has no BOS token, which starts every sequence and is never a row; "
            "set bos_token in tokenizer_config.json or use another model"
        )
    return tokenizer


def fingerprint_of(folder: Path | None, name: str, config) -> str:
    """sha256 over the files that decide a local model's numbers; `<hub id>@<commit>` for a hub model."""
    if folder is None:
        commit = getattr(config, "_commit_hash", None)
        if commit is None:
            raise ValueError(f"model.name {name}: its commit is not known; give the full commit as model.revision")
        return f"{name}@{commit}"
    paths = sorted({path for pattern in FINGERPRINTED for path in folder.glob(pattern)})
    return _hash(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@lru_cache(maxsize=16)
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    """One hash over names and contents; kept while size and time stay the same (a large model takes seconds to read)."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def cannot_load(name: str, part: str, revision: str | None, error: Exception) -> str:
    """The message for a part of a model that transformers could not load."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = "" if local_folder(name) else (
        f"; on the hub at revision {revision or 'main'}: check the name, the network, and for a gated model its licence and the hub token"
    )  # fmt: skip
    return f"model.name {name}: cannot load its {part} ({reason}){where}"
