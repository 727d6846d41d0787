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
    """The files of a finished sweep. A piece that is not there is empty, and `reasons` says why under its file's
    name.
    """

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
    data: dict[str, Any]
    """data.json: facts on the rows that the SAEs were trained on"""
    failed_parts: list[dict[str, str]]
    """failed_parts.json: which parts of the results could not be made, and why: part and reason of each"""
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

    Raises ValueError, naming the file and the remedy, if it has no results at all or a file is not what it should be.
    """
    if not any((folder / name).is_file() for name in (*RESULTS, FAILED_PARTS)):
        needed = f"{', '.join(RESULTS[:-1])} or {RESULTS[-1]}"
        raise ValueError(f"{folder} holds no results: a page needs {needed}; run the sweep that this folder belongs to")
    failed_parts = _failed_parts(folder / FAILED_PARTS)
    reasons: dict[str, str] = {}
    evaluation = _read(folder / "evaluation.json", ("rows",), reasons)
    rows = evaluation.get("rows", [])
    for number, row in enumerate(rows):
        missing = sorted({"chain", "arm", "stage", "seed", "k", "cycle", "last"} - row.keys())
        if missing:
            raise ValueError(
                f"{folder / 'evaluation.json'}: row {number} lacks {', '.join(missing)}; write the file again"
            )
    order = {arm: place for place, arm in enumerate(unique([BASE, *(row["arm"] for row in rows)]))}
    rows = sorted(rows, key=lambda row: (order[row["arm"]], row["k"], row["seed"], row["chain"], row["cycle"]))
    config = _config(folder / "config.yaml", reasons)
    made = Artifacts(
        name=str(config.get("name") or folder.name),
        rows=rows,
        comparison=_read(folder / "comparison.json", ("chains", "arms", "pairs"), reasons),
        consensus=_read(folder / "consensus.json", ("groups",), reasons),
        features=_read(folder / "features.json", ("features",), reasons),
        expectations=_read(folder / "expectations.json", ("expectations",), reasons).get("expectations", []),
        config=config,
        data=_read(folder / "data.json", (), reasons),
        failed_parts=failed_parts,
        reasons=reasons,
    )
    # A part that was tried and failed is not "not measured".
    for part in failed_parts:
        if f"{part['part']}.json" in reasons:
            reasons[f"{part['part']}.json"] = f"it could not be made ({part['reason']})"
    return made


RESULTS = ("evaluation.json", "comparison.json", "consensus.json", "features.json", "expectations.json")
FAILED_PARTS = "failed_parts.json"
WITHOUT = {
    "evaluation.json": "no chain has finished a cycle",
    "comparison.json": "cores have not been compared, which needs two finished chains",
    "consensus.json": "no consensus over chains has been made, which needs two finished chains",
    "features.json": "no features have been described",
    "expectations.json": "nothing was stated in advance about the outcome",
    "config.yaml": "the fields of the run were not stored",
    "data.json": "facts on the rows were not stored",
}
"""What the absence of a file, or an empty one, means."""


def _read(path: Path, fields: tuple[str, ...], reasons: dict[str, str]) -> dict[str, Any]:
    """One JSON file; {} if there is none, and the reason noted. The last of `fields`, if any, must not be empty."""
    if not path.is_file():
        reasons[path.name] = f"{WITHOUT[path.name]} ({path.name} is not there)"
        return {}
    content = _json(path)
    missing = [field for field in fields if field not in content] if isinstance(content, dict) and content else []
    if not isinstance(content, dict) or missing:
        raise ValueError(f"{path} lacks {', '.join(missing) or 'its fields'}; delete it and run the sweep again")
    if not content or (fields and not content[fields[-1]]):
        reasons[path.name] = f"{WITHOUT[path.name]} ({path.name} is empty)"
    return content


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it and run the sweep again") from None


def _failed_parts(path: Path) -> list[dict[str, str]]:
    parts = _json(path) if path.is_file() else []
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and {"part", "reason"} <= part.keys() for part in parts
    ):
        raise ValueError(f"{path} is not a list of parts and reasons; delete it and run the sweep again")
    return parts


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
