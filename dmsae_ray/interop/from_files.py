"""What the readers of other packages' folders have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def config_of(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file if it is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, as fp32. Raises ValueError naming the file if it cannot be read."""
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as a safetensors file ({error})") from error


def text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
