"""What docker/compose.yaml says, read without a container engine.

A key that is not known here is refused, so that nothing in the file is passed over.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

DOCKER = Path(__file__).resolve().parents[1] / "docker"
COMPOSE = DOCKER / "compose.yaml"
SERVICE_KEYS = set(
    "image pull_policy init restart cap_drop security_opt build hostname command environment secrets configs volumes "
    "shm_size ports healthcheck depends_on deploy".split()
)
UNITS = {"b": 1, "k": 1 << 10, "kb": 1 << 10, "m": 1 << 20, "mb": 1 << 20, "g": 1 << 30, "gb": 1 << 30}
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::-([^}]*))?\})")


@dataclass(frozen=True)
class Healthcheck:
    test: list[str]
    timeout_s: float


@dataclass(frozen=True)
class Service:
    """One of them, with its files by their place in it."""

    name: str
    image: str
    command: list[str] | None
    environment: dict[str, str]
    files: dict[str, Path]
    """Secrets and configurations: where the service sees them, and where they are."""
    volumes: dict[str, str]
    """Where the service sees each, by name."""
    healthcheck: Healthcheck | None
    needs: dict[str, str]
    """Services that go first, and the condition."""
    shm_bytes: int
    replicas: int
    ports: list[str]
    told: dict = field(repr=False)
    """the service as the file has it"""


def load(path: Path = COMPOSE, env: Mapping[str, str] = os.environ) -> dict:
    """The file with its variables filled in. Raises ValueError for one that has neither a value nor a default."""

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        return _VARIABLE.sub(one, value) if isinstance(value, str) else value

    def one(match: re.Match[str]) -> str:
        dollar, name, default = match.groups()
        if dollar:
            return "$"
        if default is None and name not in env:
            raise ValueError(f"{path}: ${{{name}}} has no default")
        return env.get(name) or default or ""

    return filled(yaml.safe_load(path.read_text()))


def services(tree: dict, folder: Path = DOCKER) -> dict[str, Service]:
    """folder: what paths in the file start from. Raises ValueError for what is not understood here."""
    return {name: _service(name, told, tree, folder) for name, told in tree["services"].items()}


def in_order(found: Mapping[str, Service]) -> list[Service]:
    """Each after those that it needs. Raises ValueError for a circle, or one that is not there."""
    done: dict[str, Service] = {}
    while len(done) < len(found):
        ready = [s for name, s in found.items() if name not in done and s.needs.keys() <= done.keys()]
        if not ready:
            raise ValueError(f"these wait for each other, or for nothing: {sorted(found.keys() - done.keys())}")
        done |= {service.name: service for service in ready}
    return list(done.values())


def _service(name: str, told: dict, tree: dict, folder: Path) -> Service:
    if strange := told.keys() - SERVICE_KEYS:
        raise ValueError(f"{name}: {sorted(strange)} is not known here")
    files = {}
    for kind, default in (("secrets", "/run/secrets/{}"), ("configs", "/{}")):
        for entry in told.get(kind, []):
            source = entry if isinstance(entry, str) else entry["source"]
            target = default.format(source) if isinstance(entry, str) else entry["target"]
            files[target] = folder / tree[kind][source]["file"]
    volumes = dict(entry.split(":") for entry in told.get("volumes", []))
    if strange := volumes.keys() - tree["volumes"].keys():
        raise ValueError(f"{name}: {sorted(strange)} is no volume of the file")
    command = told.get("command")
    number, unit = re.fullmatch(r"(\d+)([a-z]*)", str(told.get("shm_size", "64m"))).groups()  # type: ignore[union-attr]
    return Service(
        name,
        told["image"],
        shlex.split(command) if isinstance(command, str) else command,
        {key: str(value) for key, value in told.get("environment", {}).items()},
        files,
        volumes,
        _healthcheck(told.get("healthcheck")),
        {other: how["condition"] for other, how in told.get("depends_on", {}).items()},
        int(number) * UNITS[unit or "b"],
        told.get("deploy", {}).get("replicas", 1),
        told.get("ports", []),
        told,
    )


def _healthcheck(told: dict | None) -> Healthcheck | None:
    if told is None or told.get("disable"):
        return None
    how, *test = told["test"]
    if how != "CMD":
        raise ValueError(f"healthcheck {how}: only CMD is known here")
    return Healthcheck(test, float(told["timeout"].removesuffix("s")))
