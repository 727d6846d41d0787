"""One chain's runs in MLflow: the chain run and a run per cycle below it, brought up to what lies on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dmsae_ray.core.score_file import coverage
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.record import CycleRecord
from dmsae_ray.show import figures
from dmsae_ray.show.mlflow.measurements import began_ms, coverage_points, curve_points, cycle_points, ended_ms, flatten
from dmsae_ray.show.mlflow.run_store import Point, RunStore, now_ms
from dmsae_ray.show.tracking import TrackingError


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


@dataclass(frozen=True)
class SweepRun:
    """What a chain's runs need to know of the sweep they are in."""

    run_id: str
    key: str
    label: str


class ChainRuns:
    """One chain of one sweep. A chain that has not started has no run yet. After an error it must be made anew: what it
    remembers to have read may not have been logged."""

    def __init__(self, store: RunStore, sweep: SweepRun, chain: TrackedChain):
        self._store, self._sweep, self._chain = store, sweep, chain
        self._folder = ChainFolder(Path(chain.folder))
        self._settled = False
        """done and logged: nothing on disk can change it any more"""
        self._read: dict[int, tuple[int, int]] = {}
        """by cycle: size and time of curve.jsonl when it was last read"""
        self._step: dict[int, int] = {}
        """by cycle: last step taken from curve.jsonl"""

    def update(self, unfinished: str) -> None:
        """Log what is new. unfinished: status of what is neither done nor failed, RUNNING or KILLED."""
        if self._settled:
            return
        failure, description = self._folder.failure(), self._description()
        if description is None and failure is None:
            return
        records = self._folder.records()[: self._chain.cycles]
        done = len(records) == self._chain.cycles
        run_id = self._open_chain(began_ms(records[0]) if records else None)
        if done and self._store.status(run_id) == "FINISHED":
            self._settled = True
            return
        if not done:
            self._store.set_status(run_id, unfinished if failure is None else "FAILED")
        reason = None if done or failure is None else failure.text()
        self._store.tag(run_id, "failed", reason)
        fields = (description or {}).get("fields", {})
        self._store.params(run_id, dict(flatten(self._chain.config)) | dict(flatten({"chain": fields})))
        for number, record in enumerate(records):
            self._finish_cycle(run_id, number, record)
        self._store.append(run_id, [point for record in records for point in cycle_points(record)])
        if done:
            self._log_coverage(run_id, records)
            self._store.set_status(run_id, "FINISHED", ended_ms(records[-1]))
            self._settled = True
        else:
            failed_here = failure is not None and failure.cycle == len(records)
            self._open_cycle(
                run_id, len(records), "FAILED" if failed_here else unfinished, reason if failed_here else None
            )

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

    def _open_chain(self, start_ms: int | None) -> str:
        chain = self._chain
        return self._store.open(
            self._sweep.key, "chain", chain.key, chain.label, self._tags(), self._sweep.run_id, start_ms
        )

    def _cycle_run(self, chain_run: str, number: int, start_ms: int | None) -> str:
        chain = self._chain
        run_id = self._store.open(
            self._sweep.key,
            "cycle",
            f"{chain.key}/{number}",
            f"{chain.label} cycle {number}",
            self._tags() | {"cycle": str(number)},
            chain_run,
            start_ms,
        )
        self._store.params(
            run_id,
            {
                "chain": chain.label,
                "arm": chain.arm,
                "stage": chain.stage,
                "seed": chain.seed,
                "k": chain.k,
                "cycle": number,
            },
        )
        return run_id

    def _new_curve(self, number: int, ms: int) -> list[Point]:
        """The training curve beyond what was taken before; a file that did not change is not read again."""
        path = self._folder.cycle(number).curve
        if not path.exists():
            return []
        stat = path.stat()
        if self._read.get(number) == (stat.st_size, stat.st_mtime_ns):
            return []
        points = list(curve_points(path, self._step.get(number, -1), ms))
        self._step[number] = max((point.step for point in points), default=self._step.get(number, -1))
        self._read[number] = stat.st_size, stat.st_mtime_ns
        return points

    def _open_cycle(self, chain_run: str, number: int, status: str, reason: str | None) -> None:
        """A cycle that is under way, interrupted or failed; one that has not logged anything has no run."""
        if not self._folder.cycle(number).curve.exists() and reason is None:
            return
        run_id = self._cycle_run(chain_run, number, None)
        self._store.set_status(run_id, status)
        self._store.tag(run_id, "failed", reason)
        self._store.append(run_id, self._new_curve(number, now_ms()))

    def _finish_cycle(self, chain_run: str, number: int, record: CycleRecord) -> None:
        run_id = self._cycle_run(chain_run, number, began_ms(record))
        if self._store.status(run_id) == "FINISHED":
            return
        files = self._folder.cycle(number)
        self._store.tag(run_id, "failed", None)
        points = [*self._new_curve(number, ended_ms(record)), *cycle_points(record)]
        if files.scores.exists():
            points += coverage_points(coverage(files.scores), record.core_out, ended_ms(record))
        self._store.append(run_id, points)
        for path in (files.core, files.scores, files.record):
            if path.exists():  # scores may have been cleaned away since
                self._store.client.log_artifact(run_id, str(path))
        self._store.set_status(run_id, "FINISHED", ended_ms(record))

    def _log_coverage(self, run_id: str, records: Sequence[CycleRecord]) -> None:
        paths = [self._folder.cycle(number).scores for number in range(len(records))]
        curves = [
            (n, coverage(path), records[n].core_out, records[n].coverage)
            for n, path in enumerate(paths)
            if path.exists()
        ]
        if curves:
            config = self._chain.config
            tau = config.get("attribution", {}).get("tau") if config.get("selection", {}).get("size") == "tau" else None
            figure = figures.coverage_curves(
                f"{self._chain.label}: attribution carried by the best candidates", curves, tau
            )
            self._store.client.log_figure(run_id, figure, "coverage.png")
