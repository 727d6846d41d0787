"""One chain's run in MLflow, brought up to what lies on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dmsae_ray.core.core import Core
from dmsae_ray.core.score_file import coverage
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.record import CycleRecord
from dmsae_ray.show.figures import OKABE_ITO
from dmsae_ray.show.mlflow.core_model import log_core
from dmsae_ray.show.mlflow.measurements import (
    began_ms,
    coverage_points,
    curve_points,
    curve_rows,
    cycle_points,
    ended_ms,
    flatten,
)
from dmsae_ray.show.mlflow.run_store import Point, RunStore, now_ms
from dmsae_ray.show.tracking import TrackingError

COLOURS = OKABE_ITO[:6]
"""Without the yellow, which is too light for lines on white, and the black"""
LAYOUT = "2"
"""What a finished run holds. One that was logged by an earlier version is filled up once; what it has stays."""
OF_THE_SWEEP = {"name", "output", "sweep", "study", "compare", "features", "cluster", "track"}
"""Sections that decide nothing of a chain: parameters of the sweep's run alone."""


class Data(NamedTuple):
    """The rows that a chain reads."""

    name: str
    """model and hook"""
    key: str
    source: str
    """where they lie, without secrets"""
    rows: int
    d: int


class TrackedChain(NamedTuple):
    """A chain of the sweep and where it lies."""

    key: str
    label: str
    folder: Path
    seed: int
    k: int
    cycles: int
    """cycles that belong to this sweep; the folder may hold more"""
    arm: str
    stage: str
    """distill, transfer or plain"""
    config: dict[str, Any]
    """the configuration of the chain's arm as plain types"""
    steps: int
    """training steps of a cycle"""
    data: Data


@dataclass(frozen=True)
class SweepRun:
    """What a chain's run needs to know of the sweep it is in."""

    run_id: str
    key: str
    label: str
    words: str
    """description of every run of it: where its page and its chains are"""


class ChainRun:
    """One chain of one sweep. A chain that has not started has no run yet. After an error it must be made anew: what it
    remembers to have read may not have been logged."""

    def __init__(self, store: RunStore, sweep: SweepRun, chain: TrackedChain, place: int):
        self._store, self._sweep, self._chain, self._place = store, sweep, chain, place
        self._folder = ChainFolder(Path(chain.folder))
        self._settled = False
        """done and logged: nothing on disk can change it any more"""
        self._read: dict[int, tuple[int, int]] = {}
        """by cycle: size and time of curve.jsonl when it was last read"""
        self._step: dict[int, int] = {}
        """by cycle: last step taken from curve.jsonl"""

    @property
    def label(self) -> str:
        return self._chain.label

    @property
    def run_id(self) -> str | None:
        """None if the chain has no run yet."""
        return self._store.known(self._sweep.key, "chain", self._chain.key)

    def update(self, unfinished: str) -> None:
        """Log what is new. unfinished: status of what is neither done nor failed, RUNNING or KILLED."""
        if self._settled:
            return
        failure, description = self._folder.failure(), self._description()
        if description is None and failure is None:
            return
        records = self._folder.records()[: self._chain.cycles]
        done = len(records) == self._chain.cycles
        run_id, store = self._open(began_ms(records[0]) if records else None), self._store
        if done and store.status(run_id) == "FINISHED" and store.get_tag(run_id, "dmsae.layout") == LAYOUT:
            self._settled = True
            return
        if not done:
            store.set_status(run_id, unfinished if failure is None else "FAILED")
        store.tag(run_id, "failed", None if done or failure is None else failure.text())
        store.params(run_id, self._params(description or {}))
        points = [point for number, record in enumerate(records) for point in self._curve(number, ended_ms(record))]
        if not done:
            points += self._curve(len(records), now_ms())
        points += [point for record in records for point in cycle_points(record)]
        if done:
            points += self._coverage(records)
        store.append(run_id, points)
        self._files(run_id, len(records))
        if done:
            self._finish(run_id, records[-1])

    def _finish(self, run_id: str, last: CycleRecord) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag  # when run_store has told MLflow how

        chain, store = self._chain, self._store
        profile = json.dumps({"num_rows": chain.data.rows, "num_elements": chain.data.rows * chain.data.d})
        source = json.dumps({"uri": chain.data.source})
        rows = Dataset(chain.data.name, chain.data.key, "local", source, profile=profile)
        store.client.log_inputs(run_id, [DatasetInput(rows, [InputTag("mlflow.data.context", "training")])])
        core = Core.load(self._folder.cycle(last.cycle).core)
        if core.size:
            log_core(store, run_id, core, "core", self._tags(), last.cycle)
        store.set_status(run_id, "FINISHED", ended_ms(last))
        store.tag(run_id, "dmsae.layout", LAYOUT)
        self._settled = True

    def _description(self) -> dict[str, Any] | None:
        path = self._folder.path / "chain.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise TrackingError(
                f"{path}: damaged ({error}); delete it, the next start of the sweep writes it again"
            ) from error

    def _tags(self) -> dict[str, str]:
        chain = self._chain
        return {
            "stage": chain.stage,
            "arm": chain.arm,
            "sweep": self._sweep.label,
            "chain": chain.label,
            "seed": str(chain.seed),
            "k": str(chain.k),
        }

    def _params(self, description: dict[str, Any]) -> dict[str, object]:
        """What decides the chain: its place in the grid, its own fields, the sections of its arm."""
        chain = self._chain
        own = {name: value for name, value in description.get("fields", {}).items() if not isinstance(value, dict)}
        sections = {name: section for name, section in chain.config.items() if name not in OF_THE_SWEEP}
        place = {"seed": chain.seed, "k": chain.k, "arm": chain.arm, "stage": chain.stage}
        return place | dict(flatten({"chain": own})) | dict(flatten(sections))

    def _open(self, start_ms: int | None) -> str:
        chain = self._chain
        # The place makes seed 2 stand before seed 10: MLflow orders tags as text.
        tags = self._tags() | {"dmsae.place": f"{self._place:05d}", "mlflow.note.content": self._sweep.words}
        tags |= {"mlflow.runColor": COLOURS[self._place % len(COLOURS)]}
        run_id = self._store.open(self._sweep.key, "chain", chain.key, chain.label, tags, self._sweep.run_id, start_ms)
        for name, value in tags.items():  # an earlier version's run lacks some
            self._store.tag(run_id, name, value)
        return run_id

    def _curve(self, number: int, ms: int) -> list[Point]:
        """The training curve of a cycle beyond what was taken before; a file that did not change is not read again."""
        path = self._folder.cycle(number).curve
        if not path.exists():
            return []
        stat = path.stat()
        if self._read.get(number) == (stat.st_size, stat.st_mtime_ns):
            return []
        points: list[Point] = []
        for step, row in curve_rows(path, self._step.get(number, -1), self._chain.steps):
            points += curve_points(row, number * self._chain.steps + step, ms)
            self._step[number] = step
        self._read[number] = stat.st_size, stat.st_mtime_ns
        return points

    def _coverage(self, records: Sequence[CycleRecord]) -> list[Point]:
        """Of the last cycle: where all chains' curves can be laid over one another."""
        last = records[-1]
        path = self._folder.cycle(last.cycle).scores
        if not path.exists():  # it may have been cleaned away since
            return []
        return list(coverage_points(coverage(path), last.core_out, ended_ms(last)))

    def _files(self, run_id: str, cycles: int) -> None:
        """The files of the finished cycles, each cycle's once."""
        kept = int(self._store.get_tag(run_id, "dmsae.cycles") or 0)
        for number in range(kept, cycles):
            files = self._folder.cycle(number)
            for path in (files.core, files.scores, files.curve, files.record):
                if path.exists():
                    self._store.client.log_artifact(run_id, str(path), files.path.name)
        if cycles > kept:
            self._store.tag(run_id, "dmsae.cycles", str(cycles))
