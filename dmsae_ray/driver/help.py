"""What `--help` shows: the fields that matter, a section, or every field, each with its words and with the value that a
plain run has.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dmsae_ray.config import Config
from dmsae_ray.secret_url import SecretUrl

ALL = "all"
MATTER = (
    "output",
    "model.name",
    "model.hook",
    "corpus.source",
    "harvest.tokens",
    "sae.width",
    "train.tokens",
    "train.batch",
    "train.lr",
    "sweep.seeds",
    "sweep.k",
    "sweep.cycles",
    "cluster.address",
    "cluster.workers",
    "cluster.gpus_per_worker",
    "track.uri",
)
"""What nearly everybody sets who leaves the quickstart, in the order of work."""
MOST_COLUMNS = 100


def sections() -> dict[str, type[BaseModel]]:
    """Sections of a configuration, in the order of work."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def topic_of(argv: list[str]) -> str | None:
    """What `--help` is to show: "" for the fields that matter, a section, or ALL; None if it was not asked for.

    Raises ValueError if there is no such section.
    """
    places = [place for place, word in enumerate(argv) if word in ("-h", "--help")]
    if not places:
        return None
    topic = argv[places[0] + 1] if places[0] + 1 < len(argv) else ""
    if topic.startswith("-"):
        return ""
    if topic not in ("", ALL, *sections()):
        raise ValueError(f"command line: --help {topic}: no such section; there are {', '.join(sections())} and {ALL}")
    return topic


def help_text(command: type[Config], values: Config, path: Path, topic: str) -> str:
    """values: the configuration of a plain run with this file; topic: see `topic_of`."""
    assert command.__doc__ is not None, "a command's text begins with how it is called"
    called, _, purpose = " ".join(command.__doc__.split()).partition(": ")
    own = {name: field for name, field in command.model_fields.items() if name not in Config.model_fields}
    lines = [f"usage: {called} [--config PATH] [--SECTION.FIELD VALUE ...]", "", *_wrapped(purpose, "")]
    lines += ["", "Options", *_entry("-h, --help [SECTION]", f"show this help message, a section's fields, or `{ALL}`")]
    for name, field in own.items():
        default = path if name == "config" else field.get_default(call_default_factory=True, validated_data={})
        lines += _entry(f"--{name} {_kind(field.annotation)}".rstrip(), field.description, default)
    shown = sections()
    if topic == "":
        lines += ["", f"Fields that matter (values of {path})"]
        for name in MATTER:
            lines += _field(name, values)
        counts = (f"{name} ({len(model.model_fields)})" for name, model in shown.items())
        lines += ["", "Sections and how many fields they have", *_wrapped(", ".join(counts), "  ")]
        lines += _wrapped(f"`--help SECTION` shows one, `--help {ALL}` every field.", "  ")
        return "\n".join(lines)
    if topic == ALL:
        lines += ["", f"The whole (values of {path})"]
        for name in Config.model_fields:
            if name not in shown:
                lines += _field(name, values)
    for name in shown if topic == ALL else [topic]:
        lines += ["", *_wrapped(f"{name}: {' '.join((shown[name].__doc__ or '').split())}", "")]
        for inner in shown[name].model_fields:
            lines += _field(f"{name}.{inner}", values)
    return "\n".join(lines)


def _field(name: str, values: Config) -> Iterator[str]:
    """A field by its dotted name, with its value in a plain run."""
    section, _, inner = name.rpartition(".")
    holder: Any = getattr(values, section) if section else values
    field: FieldInfo = type(holder).model_fields[inner]
    return _entry(f"--{name} {_kind(field.annotation)}", field.description, getattr(holder, inner))


def _entry(flag: str, words: str | None, *default: Any) -> Iterator[str]:
    yield f"  {flag}"
    words = " ".join((words or "").split())
    if default and default[0] is not False:
        words += f" (default: {_plain(default[0])})"
    yield from _wrapped(words, "        ")


def _wrapped(words: str, indent: str) -> list[str]:
    width = min(MOST_COLUMNS, shutil.get_terminal_size().columns)
    return textwrap.wrap(words, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _plain(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None:
        return "empty"
    if isinstance(value, tuple):
        return ",".join(map(_plain, value)) or "empty"
    return str(value) if value != {} else "empty"


def _kind(annotation: Any) -> str:
    """What a field takes, in a word."""
    origin, inner = get_origin(annotation), [one for one in get_args(annotation) if one is not NoneType]
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_kind, inner)))
    if origin is tuple:
        return f"{_kind(inner[0])},..."
    names = {bool: "", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", SecretUrl: "URL"}
    return names.get(annotation, getattr(annotation, "__name__", "VALUE").upper() if origin is None else "MAP")
