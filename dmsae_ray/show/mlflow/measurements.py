"""A chain's files as the points that MLflow plots. Pure reading: knows the files, not the store.

Letters: P candidates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmsae_ray.compare.course import NUMBERS as COURSE
from dmsae_ray.core.score_file import coverage_ranks
from dmsae_ray.distill.record import CycleRecord
from dmsae_ray.show.mlflow.run_store import Point

COVERAGE_POINTS = 200
"""points of a coverage curve in MLflow; all of it lies in scores.safetensors"""
NOT_MEASURED = {"format_version", "chain", "cycle", "generation", "seed", "k", "finished_at"}
"""fields of record.json that identify the cycle"""


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict with dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def began_ms(record: CycleRecord) -> int:
    """When a finished cycle began, by its completion record."""
    return ended_ms(record) - int(1000 * record.seconds["total"])


def ended_ms(record: CycleRecord) -> int:
    return int(1000 * record.finished_at)


def cycle_points(record: CycleRecord) -> Iterator[Point]:
    """Every number of a completion record as `cycle/<name>`, with step = cycle; a prefix's as
    `cycle/prefix.<name>.<number>`. Other lists count by their length."""
    measured = {key: value for key, value in record.to_json().items() if key not in (*NOT_MEASURED, "prefixes")}
    prefixes = {prefix["name"]: prefix for prefix in record.prefixes}
    for name, value in flatten(measured | {"prefix": prefixes}):
        if isinstance(value, list):
            value = len(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            name = "core_size" if name == "core_out" else name
            yield Point(f"cycle/{name}", value, record.cycle, ended_ms(record))


def curve_points(path: Path, after: int, ms: int) -> Iterator[Point]:
    """Points of curve.jsonl beyond step `after`, as `train/<name>`.

    A line that does not parse was cut by a crash, or is being written: the training that owns the file logs its step
    again. Steps that were trained twice after a crash count once, the first time.
    """
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(row, dict) or row.get("step", -1) <= after:
            continue
        after = step = row.pop("step")
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield Point(f"train/{name}", value, step, ms)


def course_points(comparison: dict[str, Any], ms: int) -> Iterator[Point]:
    """Agreement after each cycle, a mean over the pairs of a group, as `course/<group>.<number>` with step = cycle."""
    for name, group in comparison.get("summary", {}).get("groups", {}).items():
        # MLflow takes no ~ in a metric's name.
        place = name.replace("/", ".").replace("~", " vs ")
        for cycle, point in (group.get("course") or {}).items():
            for number in COURSE:
                if point.get(number):
                    yield Point(f"course/{place}.{number}", point[number]["mean"], int(cycle), ms)


def coverage_points(share_P: np.ndarray, core_size: int, ms: int) -> Iterator[Point]:
    """A few points of a coverage curve; step = rank."""
    for rank in coverage_ranks(len(share_P), core_size, COVERAGE_POINTS):
        yield Point("attribution/coverage", float(share_P[rank - 1]), rank, ms)
