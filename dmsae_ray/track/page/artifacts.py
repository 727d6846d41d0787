"""What a sweep's folder holds, as the page reads it: every piece, or in plain words why it is not there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BASE = "base"
"""The arm of the plain grid: always listed first."""


@dataclass(frozen=True)
class Artifacts:
    """The files of a finished sweep. A piece that is not there is empty, and `reasons` says why under its file's name."""

    name: str
    """name of the sweep"""
    rows: list[dict[str, Any]]
    """evaluation.json: one row per finished cycle of each chain, by arm (base first), k, seed, label, cycle"""
    comparison: dict[str, Any]
    """comparison.json"""
    consensus: dict[str, Any]
    """consensus.json"""
    features: dict[str, Any]
    """features.json"""
    expectations: list[dict[str, Any]]
    """the claims of expectations.json"""
    config: dict[str, Any]
    """config.yaml"""
    reasons: dict[str, str]
    """for each piece that is not there: why"""

    @property
    def last(self) -> list[dict[str, Any]]:
        """The rows of every chain's last cycle."""
        return [row for row in self.rows if row["last"]]

    @property
    def arms(self) -> list[str]:
        """All arms with a finished cycle, base first, the others as they come in evaluation.json."""
        return unique(row["arm"] for row in self.rows)

    @property
    def failed(self) -> list[dict[str, str]]:
        """Chains that did not finish: label and reason."""
        return self.comparison.get("failed", [])


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order of first appearance."""
    return list(dict.fromkeys(values))


def read(folder: Path) -> Artifacts:
    """Read a sweep's folder.

    Raises ValueError, naming the file and the remedy, if evaluation.json is missing or a file is not what it should be.
    """
    if not (folder / "evaluation.json").is_file():
        raise ValueError(f"{folder / 'evaluation.json'} is not there: a page needs it; run the sweep that this folder belongs to")
    reasons: dict[str, str] = {}
    evaluation = _read(folder / "evaluation.json", ("rows",), reasons)
    rows = evaluation.get("rows", [])
    for number, row in enumerate(rows):
        missing = sorted({"chain", "arm", "stage", "seed", "k", "cycle", "last"} - row.keys())
        if missing:
            raise ValueError(f"{folder / 'evaluation.json'}: row {number} lacks {', '.join(missing)}; write the file again")
    order = {arm: place for place, arm in enumerate(unique([BASE, *(row["arm"] for row in rows)]))}
    rows = sorted(rows, key=lambda row: (order[row["arm"]], row["k"], row["seed"], row["chain"], row["cycle"]))
    config = _config(folder / "config.yaml", reasons)
    return Artifacts(
        name=str(config.get("name") or folder.name),
        rows=rows,
        comparison=_read(folder / "comparison.json", ("chains", "arms", "pairs"), reasons),
        consensus=_read(folder / "consensus.json", ("groups",), reasons),
        features=_read(folder / "features.json", ("features",), reasons),
        expectations=_read(folder / "expectations.json", ("expectations",), reasons).get("expectations", []),
        config=config,
        reasons=reasons,
    )


WITHOUT = {
    "evaluation.json": "no chain has finished a cycle",
    "comparison.json": "cores have not been compared, which needs two finished chains",
    "consensus.json": "no consensus over chains has been made, which needs two finished chains",
    "features.json": "no features have been described",
    "expectations.json": "nothing was stated in advance about the outcome",
    "config.yaml": "the fields of the run were not stored",
}
"""What the absence of a file, or an empty one, means."""


def _read(path: Path, fields: tuple[str, ...], reasons: dict[str, str]) -> dict[str, Any]:
    """One JSON file; {} if there is none, and the reason noted. The last of `fields` is the one that must not be empty."""
    if not path.is_file():
        reasons[path.name] = f"{WITHOUT[path.name]} ({path.name} is not there)"
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it and run the sweep again") from None
    missing = [field for field in fields if field not in content] if isinstance(content, dict) and content else []
    if not isinstance(content, dict) or missing:
        raise ValueError(f"{path} lacks {', '.join(missing) or 'its fields'}; delete it and run the sweep again")
    if not content or not content[fields[-1]]:
        reasons[path.name] = f"{WITHOUT[path.name]} ({path.name} is empty)"
    return content


def _config(path: Path, reasons: dict[str, str]) -> dict[str, Any]:
    if path.is_file():
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML ({error}); run the sweep again") from None
        if isinstance(config, dict):
            return config
    reasons[path.name] = f"{WITHOUT[path.name]} ({path.name} is not there or empty)"
    return {}
