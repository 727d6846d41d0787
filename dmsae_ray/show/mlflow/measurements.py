"""A chain's files as the points that MLflow plots. Pure reading: knows the files, not the store.

Letters: P candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmsae_ray.compare.course import NUMBERS as COURSE
from dmsae_ray.core.score_file import coverage_ranks
from dmsae_ray.distill.record import CycleRecord
from dmsae_ray.show.mlflow.chain_metrics import of_curve, of_cycle
from dmsae_ray.show.mlflow.run_store import Point

COVERAGE_POINTS = 60
"""points of a coverage curve in MLflow; all of it lies in scores.safetensors"""
CURVE_POINTS = 50
"""points that a cycle's training curve has in MLflow at most, its last step besides; all of it lies in curve.jsonl"""


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
    """The measurements of a finished cycle; step = cycle."""
    for name, value in of_cycle(record):
        yield Point(name, value, record.cycle, ended_ms(record))


def curve_rows(path: Path, after: int, steps: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Steps beyond `after` of a curve.jsonl with their rows, of every stride of steps the first that was logged, and
    the last of all `steps`.

    A line that does not parse was cut by a crash, or is being written: the training that owns the file logs its step
    again. Steps that were trained twice after a crash count once, the first time.
    """
    if not path.exists():
        return
    stride = max(1, math.ceil(steps / CURVE_POINTS))
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        step = row.get("step", -1) if isinstance(row, dict) else -1
        if step > after and (step // stride > after // stride or step == steps - 1):
            after = step
            yield step, row


def curve_points(row: dict[str, Any], step: int, ms: int) -> Iterator[Point]:
    """A line of curve.jsonl; step: in the whole chain."""
    for name, value in of_curve(row):
        yield Point(name, value, step, ms)


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
