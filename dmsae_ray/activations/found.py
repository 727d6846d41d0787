"""What was found out about a configuration's model and corpus, and its memory in the output folder.

To name the datasets the tokenizer is loaded, and weights and corpus are hashed: seconds, or minutes. A run does so anew
and writes down what it found; `sweep --status` takes that for as long as nothing that decides it has changed. Imports
nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dmsae_ray.config import Config, CorpusConfig, ModelConfig
from dmsae_ray.corpus.hub_text import hub_content
from dmsae_ray.corpus.local_files import EMBEDDED, FileState, is_hub, is_saved, local_files
from dmsae_ray.files import write_json
from dmsae_ray.identity import dataset_fields, fields_key
from dmsae_ray.lm.source import local_folder, model_files, pinned_revision
from dmsae_ray.ownership import FOUND

FORMAT_VERSION = 1
"""Raised when the same model or corpus would give another `Found`: a fingerprint is made of something else, or other
documents are chat messages.
"""
LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "protobuf")
"""What makes a tokenizer of a model's files."""
MOST = 16
"""Configurations that an output folder remembers; the oldest goes first."""


@dataclass(frozen=True)
class Found:
    """What names the datasets of a configuration, apart from its own fields."""

    model: str
    """the model's fingerprint"""
    corpus: str
    """the corpus's fingerprint"""
    chat_template: str | None
    """stands for the tokenizer's template, where documents are chat messages"""

    def fields(self, config: Config, hook: str) -> dict[str, Any]:
        return dataset_fields(config, self.model, self.corpus, hook, self.chat_template)

    def key(self, config: Config, hook: str) -> str:
        """Names the dataset of a hook."""
        return fields_key(self.fields(config, hook))


def state_of(config: Config) -> str:
    """sha256 over all that decides what will be found, no file being read: a hash, since a source may hold a secret.

    Raises ValueError if model or corpus is not there, or is on the hub and that cannot be asked.
    """
    state = {
        "format_version": FORMAT_VERSION,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "model": _model_state(config.model),
        "corpus": _corpus_state(config.corpus),
    }
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _model_state(model: ModelConfig) -> list:
    folder = local_folder(model.name)
    files = [] if folder is None else [str(folder), model_files(folder)]
    return [model.name, pinned_revision(model.name, model.revision), model.bos_token, files]


def _corpus_state(corpus: CorpusConfig) -> list:
    parts = []
    for part in corpus.parts:
        source, content, files = part.source.reveal(), None, []
        if source == "embedded":
            files = [EMBEDDED]
        elif is_hub(source):
            content = hub_content(source, part.revision)
        else:
            path = Path(source).expanduser()
            # What save_to_disk wrote beside the data says how they are read.
            beside = sorted(file for file in path.rglob("*") if file.is_file()) if is_saved(path) else []
            files = [*local_files(source), *beside]
        states = [(str(file), FileState.of(file)) for file in files]
        parts.append([source, part.weight, part.text_field, part.revision, content, states])
    return [bool(corpus.mixture), parts]


def recall(config: Config) -> Found | None:
    """What a run found in exactly this state; None if none did, or what it wrote down is damaged.

    Raises ValueError as `state_of` does.
    """
    kept = _read(config.home / FOUND)
    try:
        return kept.get(state_of(config)) if kept else None
    except OSError:  # a file goes, or may not be looked at: whoever reads it says so
        return None


def keep(home: Path, state: str, found: Found) -> None:
    """Write it down. Only for who holds the output folder."""
    kept = _read(home / FOUND)
    if kept.pop(state, None) == found:
        return
    last = [*kept.items(), (state, found)][-MOST:]
    write_json(
        home / FOUND, {"format_version": FORMAT_VERSION, "found": {state: asdict(found) for state, found in last}}
    )


def _read(path: Path) -> dict[str, Found]:
    """By state, the oldest first; what cannot be read is left out: it is only a memory."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    found = tree.get("found") if isinstance(tree, dict) else None
    if not isinstance(found, dict):
        return {}
    return {state: Found(**values) for state, values in found.items() if _is_found(values)}


def _is_found(values: object) -> bool:
    return (
        isinstance(values, dict)
        and values.keys() == {field.name for field in fields(Found)}
        and all(isinstance(value, str) or (value is None and name == "chat_template") for name, value in values.items())
    )
