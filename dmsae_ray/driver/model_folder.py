"""The language model of a command as a folder or a hub id: behind the commands' doors there is no GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dmsae_ray.config import Config
from dmsae_ray.files import present_below, publish
from dmsae_ray.lm.from_gguf import SOURCE, convert, converted, gguf_file, is_converted
from dmsae_ray.ownership import make_home, mark

MODELS = "models"
"""Folder of the output folder that holds converted models."""

AnyConfig = TypeVar("AnyConfig", bound=Config)


def with_model_folder(config: AnyConfig, make: bool, say: Callable[[str], None] = print) -> AnyConfig:
    """The same configuration, with the folder that a GGUF file is converted to as `model.name`: it lies below the
    output folder, also after that was moved.

    make: convert what is not converted yet. Raises ValueError if it cannot be, or without `make` was not.
    """
    models = config.home / MODELS
    name = Path(config.model.name)
    if name.parent.name == MODELS or gguf_file(config.model.name) is not None:
        present_below(models, SOURCE)
    if name.parent.name == MODELS and not name.exists() and is_converted(models / name.name):
        return _named(config, models / name.name)
    if (file := gguf_file(config.model.name)) is None:
        return config
    try:
        folder = converted(models, file)
    except OSError as error:
        raise ValueError(f"model.name {file}: cannot be read ({error.strerror or error})") from error
    if make:
        make_home(config.home)
        mark(config.home)
        convert(file, folder, say)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == SOURCE):
            publish(path)  # last what says that it is whole
    elif not is_converted(folder):
        raise ValueError(f"model.name {file}: not converted yet, so nothing has been made of it in {config.home}")
    return _named(config, folder)


def _named(config: AnyConfig, folder: Path) -> AnyConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"name": str(folder)})})
