"""Configuration files as they are written: YAML in UTF-8, no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a mapping has no key twice: of two blocks of one name the first would be dropped without a word."""

    def compose_mapping_node(self, anchor):
        node, known = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in known:
                raise DoubleKey(
                    f"line {line}: {key.value} is given a second time, first in line {known[name]}; join the two"
                )
            known[name] = line
        return node


class DoubleKey(ValueError):
    """A mapping names a key twice."""


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as a dict. Raises ValueError naming file, line and mistake if it cannot be read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give an existing YAML file") from error
    try:
        tree = yaml.load(raw.decode("utf-8-sig"), Loader=_UniqueKeys)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line}: byte 0x{raw[error.start]:02x} is not UTF-8 text ({error.reason}); save the file "
            "as UTF-8"
        ) from error
    except DoubleKey as error:
        raise ValueError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict | None):
        raise ValueError(f"{path}: must hold a mapping of sections, not a {type(tree).__name__}")
    return tree or {}
