"""A GGUF file as a language model: converted once to a folder such as every other local model's.

GGUF is llama.cpp's format, quantised as a rule. transformers dequantises it each time it is loaded; converted once, all
processes read the same weights in fp32, and nothing behind this file knows where they came from. Nothing heavy is
imported before something is converted: `sweep --status` looks here, too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from dmsae_ray.corpus.local_files import FileState, file_hash
from dmsae_ray.files import TEMPORARY, temporary_name, write_json

SOURCE = "gguf.json"
"""In a converted folder: which file it was made of."""
CONVERSION = 1
"""Raised when the same file would be converted to something else."""
SPLIT = re.compile(r".*-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
BYTES = 4
"""Per weight: fp32, in which what a quantised weight stands for is exact."""


def gguf_file(name: str) -> Path | None:
    """The file that a `model.name` stands for: itself, or the only one in a folder without config.json. None if it is
    no GGUF.

    Raises ValueError if there are several, or it is one part of several.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())
        if len(found) > 1:
            raise ValueError(f"model.name {name}: holds {len(found)} GGUF files; name one of them, such as {found[0]}")
        if not found:
            return None
        path = found[0]
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return None
    if SPLIT.fullmatch(path.name):
        raise ValueError(f"model.name {path}: one part of a split GGUF; join them (llama-gguf-split --merge) first")
    return path


def converted(models: Path, file: Path) -> Path:
    """The folder below `models` that a GGUF file is converted to, whether it is there or not: its name has the file's
    stem and the sha256 of its content. Not read again while its size and times stay those that were converted.

    Raises OSError if it cannot be read.
    """
    state = _state(file)
    for folder in sorted(models.glob("*")) if models.is_dir() else ():
        if is_converted(folder) and _source(folder).get("state") == state:
            return folder
    stem = re.sub(r"[^\w.-]+", "_", file.stem, flags=re.ASCII).lstrip(".") or "model"
    return models / f"{stem}-{file_hash(file)[:12]}"


def convert(file: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Make the folder of a GGUF file: fp32 weights, configuration, tokenizer. Does nothing if it is there.

    Raises ValueError if the package `gguf` is missing, the file cannot be read or is of an architecture that
    transformers does not take, or the disk is too small.
    """
    if is_converted(folder):
        return
    weights = count_weights(file)
    home = folder.parent
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if weights * BYTES > free:
        raise ValueError(
            f"model.name {file}: has {weights:,} weights, {weights * BYTES / 1e9:,.1f} GB in fp32, and {home} has "
            f"{free / 1e9:,.1f} GB free; give --output a larger disk"
        )
    say(f"model: converting {file} ({weights:,} weights) to {folder}, once")
    temporary = temporary_name(folder)
    try:
        _write(file, temporary)
        if folder.is_dir():  # of a format before this one, or left by somebody
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_converted(folder: Path) -> bool:
    return _source(folder).get("conversion") == CONVERSION


def count_weights(file: Path) -> int:
    """Weights in a GGUF file, by its header. Raises ValueError if it is none, or the package `gguf` is missing."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(
            f"model.name {file}: GGUF needs the package gguf; install it (pip install 'dmsae_ray[gguf]')"
        ) from error
    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    except (ValueError, IndexError, KeyError, OSError, EOFError) as error:
        raise ValueError(f"model.name {file}: no readable GGUF file ({error}); download it again") from error


def _write(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        where, name = str(file.parent), file.name
        here = {"gguf_file": name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **here)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, trust_remote_code=False, **here)
        # The weights are whole now: with the mark of their quantisation, transformers would refuse to save them.
        del model.config.quantization_config
        model.hf_quantizer = None
        # Part of the model's fingerprint, with the configuration: it is this file's model and no other.
        model.config.gguf_sha256 = file_hash(file)
        model.config.gguf_conversion = CONVERSION
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model.name {file}: transformers cannot take this GGUF ({first}); give the model's folder or hub id"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    _without_version(folder / "config.json")
    write_json(folder / SOURCE, {"conversion": CONVERSION, "file": file.name, "state": _state(file)})


def _without_version(path: Path) -> None:
    """What transformers says of itself is no part of the model: another version of it makes the same folder."""
    tree = json.loads(path.read_text())
    tree.pop("transformers_version", None)
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")


def _source(folder: Path) -> dict:
    try:
        tree = json.loads((folder / SOURCE).read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) and not re.search(f"{TEMPORARY}$", folder.name) else {}


def _state(file: Path) -> list[int]:
    return list(FileState.of(file))
