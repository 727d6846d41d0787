"""Where a language model comes from: the tiny model, a local folder or the hub, and what is known before it is
loaded.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dmsae_ray.corpus.chat import no_template
from dmsae_ray.corpus.local_files import FileState, file_hash
from dmsae_ray.files import present_below
from dmsae_ray.hub import SHARD, is_commit, loaded_weights, repository
from dmsae_ray.place import has_form_of_hub_id

if TYPE_CHECKING:
    from dmsae_ray.config import ModelConfig

TINY = Path(__file__).parent / "tiny"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZING = ("normalizer", "pre_tokenizer", "model", "decoder", "added_tokens")
"""Of a serialised tokenizer: what decides its tokens. Truncation, padding and what it would put around a text are never
used.
"""


@dataclass(frozen=True)
class ModelInfo:
    """What the configuration and the tokenizer say about a model; no weights are loaded for it."""

    name: str
    d: int
    """width of the residual stream"""
    n_layers: int
    vocab: int
    max_context: int
    """longest sequence in tokens"""
    has_tokenizer: bool
    fingerprint: str
    """sha256 over configuration, weights and the tokenizer as it was loaded; the same for a hub model and for its files
    in a folder
    """
    chat_template: str | None = None
    """sha256 of the tokenizer's chat template, which decides tokens only where documents are chat messages"""


def local_folder(name: str) -> Path | None:
    """The folder a model's files lie in, None for a hub id: what is not absolute is one, whatever this process's own
    folder holds.

    Raises ValueError if `name` is a folder without a model, a file, or neither a path nor a hub id.
    """
    folder = TINY if name == "tiny" else Path(name)
    if not folder.is_absolute() and has_form_of_hub_id(name) and ":" not in name:
        return None
    present_below(folder)
    if not folder.exists():
        raise ValueError(
            f"model.name {name}: no such folder; give `tiny`, a model folder, a GGUF file or a hub id such as "
            "google/gemma-2-2b"
        )
    if not folder.is_dir():
        raise ValueError(
            f"model.name {name}: a file; give the folder that holds config.json, tokenizer and weights, or a .gguf file"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.name {name}: no config.json in {folder}; give a folder as save_pretrained writes it")
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(
            f"model.name {name}: no weights (*.safetensors) in {folder}; copy them there, or give a complete folder"
        )
    return folder


def pinned_revision(name: str, revision: str | None) -> str | None:
    """The full commit of a hub model's revision, so that all processes of a run load the same; the revision itself for
    a local one.

    Raises ValueError if the hub has no such model or cannot be asked, and the local cache has none.
    """
    return (
        revision
        if local_folder(name) or is_commit(revision)
        else repository("model", name, revision, "model.name").commit
    )


def info_of(model: ModelConfig) -> ModelInfo:
    """What the `model` section of a configuration names."""
    return model_info(model.name, model.revision, model.bos_token)


def tokenizer_of(model: ModelConfig):
    """The tokenizer of the `model` section of a configuration."""
    return load_tokenizer(model.name, model.revision, model.bos_token)


def model_info(name: str, revision: str | None = None, bos_token: str | None = None) -> ModelInfo:
    """What a model is, without its weights. Looked at once in this process while its files stay the same.

    Raises ValueError if it or its tokenizer cannot be had, or the tokenizer has tokens that the model lacks.
    """
    folder = local_folder(name)
    if folder is None:
        return _info(name, repository("model", name, revision, "model.name").commit, bos_token, ())
    return _info(name, revision, bos_token, model_files(folder))


def model_files(folder: Path) -> tuple[tuple[str, FileState], ...]:
    """Whatever lies in a model's folder, whether it is loaded or not: (its name from there, its state), sorted."""
    return tuple(
        (path.relative_to(folder).as_posix(), FileState.of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )


@lru_cache(maxsize=16)
def _info(
    name: str, revision: str | None, bos_token: str | None, files: tuple[tuple[str, FileState], ...]
) -> ModelInfo:
    folder = local_folder(name)
    config = load_config(name, revision)
    text = config.get_text_config()
    tokenizer = load_tokenizer(name, revision, bos_token)
    check_vocabulary(name, tokenizer, text.vocab_size)
    template = tokenizer.chat_template and hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    return ModelInfo(
        name=name,
        d=text.hidden_size,
        n_layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        max_context=getattr(text, "max_position_embeddings", None) or 2**31,
        has_tokenizer=True,
        fingerprint=fingerprint_of(folder, name, revision, config, tokenizer),
        chat_template=template or None,
    )


def load_config(name: str, revision: str | None = None):
    """The transformers configuration. Raises ValueError with the remedy."""
    from transformers import AutoConfig

    folder = local_folder(name)
    revision = pinned_revision(name, revision)
    try:
        return AutoConfig.from_pretrained(
            folder or name,
            revision=revision if folder is None else None,
            local_files_only=folder is not None,
            trust_remote_code=False,  # left out, transformers asks on the terminal whether to run it
        )
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(name, "config.json", revision, error)) from error


def load_tokenizer(name: str, revision: str | None = None, bos_token: str | None = None):
    """The transformers tokenizer, with `bos_token` for its BOS if given.

    Raises ValueError if it is missing or has no BOS token, or `bos_token` is not the text of one of its tokens.
    """
    from transformers import AutoTokenizer

    from dmsae_ray.corpus.tokens import pad_id_of

    folder = local_folder(name)
    revision = pinned_revision(name, revision)
    if folder is not None and not any((folder / file).is_file() for file in TOKENIZER):
        raise ValueError(
            f"model.name {name}: no tokenizer (tokenizer.json) in {folder}; copy the tokenizer's files there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder or name,
            revision=revision if folder is None else None,
            local_files_only=folder is not None,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(name, "tokenizer", revision, error)) from error
    if bos_token is not None:
        if bos_token not in tokenizer.get_vocab():
            known = ", ".join(repr(token) for token in list(map(str, tokenizer.added_tokens_decoder.values()))[:10])
            raise ValueError(
                f"model.bos_token {bos_token!r}: not one token of the tokenizer of model.name {name}; its special "
                f"ones are {known or 'none'}"
            )
        tokenizer.bos_token = bos_token
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"model.name {name}: its tokenizer has no BOS token, which starts every sequence and is never a row; set "
            "model.bos_token to the text of one it "
            f"has{f', such as {tokenizer.eos_token}' if tokenizer.eos_token else ''}"
        )
    if pad_id_of(tokenizer) >= load_config(name, revision).get_text_config().vocab_size:
        tokenizer.pad_token = tokenizer.bos_token  # one was added without an embedding; padding is never looked at
    return tokenizer


def check_vocabulary(name: str, tokenizer, vocab: int, chat: bool = False) -> None:
    """Every id that may occur has an embedding. Special tokens other than BOS occur only in chat messages.

    Raises ValueError naming one that has not.
    """
    special = set(tokenizer.all_special_ids) | {
        id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    beyond = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= vocab)
    beyond = [(id, token) for id, token in beyond if chat or id not in special or id == tokenizer.bos_token_id]
    if beyond:
        id, token = beyond[-1]
        raise ValueError(
            f"model.name {name}: its tokenizer has {len(beyond):,} tokens beyond the model's {vocab:,} embeddings, "
            f"such as {token!r} with id {id}; use the tokenizer that the model was trained with"
            + (f", or set model.bos_token (it is {tokenizer.bos_token!r})" if id == tokenizer.bos_token_id else "")
        )


def check_chat(model: ModelConfig) -> None:
    """The tokenizer can make text of chat messages, and the model has an embedding for all of it. Raises ValueError."""
    tokenizer = tokenizer_of(model)
    if not tokenizer.chat_template:
        raise ValueError(no_template(model.name, "corpus.text_field"))
    check_vocabulary(model.name, tokenizer, info_of(model).vocab, chat=True)


def fingerprint_of(folder: Path | None, name: str, revision: str | None, config, tokenizer) -> str:
    """sha256 over what decides a model's numbers: configuration, weights, and the tokenizer as it was loaded.

    A folder's files are hashed; of a hub model the hub, or its local cache, tells the hashes of the weights. What is
    beside them, and a commit that changes nothing else, makes no other model. Made of something else, it raises
    `FORMAT_VERSION` of activations/found.py.
    """
    if folder is None:
        files = dict(repository("model", name, revision, "model.name").files)
        configuration = files.get("config.json")
        weights = [(file, files[file]) for file in loaded_weights(files)]
    else:
        configuration = _git_id(folder / "config.json")
        names = loaded_weights(path.name for path in folder.iterdir())
        _check_index(folder, names)
        weights = [(file, file_hash(folder / file)) for file in names]
    if not weights:
        raise ValueError(
            f"model.name {name}: no weights (model.safetensors, or all of its shards); give a model that "
            "transformers can load"
        )
    parts = [
        f"config.json {configuration}",
        *(f"{file} {blob}" for file, blob in weights),
        f"tokenizer {tokenizer_fingerprint(tokenizer)}",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _check_index(folder: Path, shards: list[str]) -> None:
    """The files that an index sends transformers to are these, in this folder. Raises ValueError that names another."""
    shard = SHARD.fullmatch(shards[0]) if shards else None
    index = folder / (f"{shard[1]}.{shard[3]}.index.json" if shard else "")
    if not index.is_file():
        return
    try:
        named = {str(file) for file in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: cannot be read ({error}); save the model again") from error
    if strangers := sorted(named - set(shards)):
        raise ValueError(
            f"{index}: names {strangers[0]!r}, which is none of the weights in its folder; that file was not read. "
            "Save the model again"
        )


def tokenizer_fingerprint(tokenizer) -> str:
    """sha256 of what a loaded tokenizer makes of texts, whatever files say so, and of the ids that start and fill
    sequences.
    """
    from dmsae_ray.corpus.tokens import pad_id_of

    if tokenizer.is_fast:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {part: whole[part] for part in TOKENIZING}
    else:
        content = {"vocabulary": tokenizer.get_vocab(), "options": repr(sorted(tokenizer.init_kwargs.items()))}
    special = {
        "class": type(tokenizer).__name__,
        "bos": tokenizer.bos_token_id,
        "pad": pad_id_of(tokenizer),
        "special": sorted(tokenizer.all_special_ids),
    }
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


def _git_id(path: Path) -> str:
    """What git, and so the hub, names a small file's bytes by."""
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def cannot_load(name: str, part: str, revision: str | None, error: Exception) -> str:
    """The message for a part of a model that transformers could not load."""
    if "trust_remote_code" in str(error):
        return (
            f"model.name {name}: its {part} needs a program that comes with the model, and such programs are never run "
            "here; give a model whose classes are transformers' own"
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"model.name {name}: its {part} are pickled with more than tensors, which would be run where it is read; "
            "save the model as safetensors (save_pretrained)"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = (
        ""
        if local_folder(name)
        else (
            f"; on the hub at revision {revision or 'main'}: check the name, the network, and for a gated model its "
            "licence and the hub token"
        )
    )
    return f"model.name {name}: cannot load its {part} ({reason}){where}"
