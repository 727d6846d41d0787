"""MLflow as a projection of the folders on disk.

The sweep driver is the only writer: it reads what the chains left (chain.json, curve.jsonl, record.json, failed.json,
cores and scores) and logs what the store does not hold yet. Workers never touch MLflow, so a crash loses nothing, a
later sync catches up, and deleting the store only means that it is filled again.

    experiment             two shared views of each sweep: the list of its chains and their comparison
      sweep run            parameters, comparison: tables, matrix, summary numbers; the page; the consensus as a model
        chain run          parameters, measurements of each cycle (step = cycle), agreement with its seed partners,
                           training curves (step = optimiser step through all cycles), coverage (step = rank); its data
                           as an input, its core as a model, every cycle's core, scores, curve and record as files

A run is found by its tags `dmsae.home` (output folder), `dmsae.sweep` (sweep key), `dmsae.kind` and `dmsae.key` (sweep
key | chain key). A chain that a second sweep reuses gets runs of its own there, since an MLflow run
has one parent; the folder stays the only truth. A run becomes FINISHED last, so FINISHED means that all of it is
logged.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas

from dmsae_ray.core.core import Core
from dmsae_ray.secret_url import SecretUrl
from dmsae_ray.show import figures
from dmsae_ray.show.columns import chain_row, summary
from dmsae_ray.show.mlflow.chain_metrics import of_pairs
from dmsae_ray.show.mlflow.chain_runs import LAYOUT, ChainRun, SweepRun, TrackedChain
from dmsae_ray.show.mlflow.core_model import log_core, register
from dmsae_ray.show.mlflow.measurements import course_points, flatten
from dmsae_ray.show.mlflow.run_store import STORE_ERRORS, Point, RunStore, now_ms, one_line
from dmsae_ray.show.mlflow.views import places, shared_views
from dmsae_ray.show.tracking import TrackingError

logger = logging.getLogger(__name__)

CLOSE_WAITS = (1, 4, 15, 30, 60)
"""Seconds between the tries to close the runs of a store that is away: a server that is started again is back by then,
and the sweep need not be."""

CONSENSUS = "consensus.safetensors"

Columns = dict[str, list[Any]]
"""A table as columns of plain values."""


class MlflowTracker:
    """The runs of one sweep.

    uri: MLflow tracking URI, None for a sqlite database in `output`; config_dict: the resolved configuration as plain
    types; store: where it was opened already. Creates the database and the experiment; raises TrackingError if the
    store cannot be used. Its methods may be called from any thread.
    """

    def __init__(
        self,
        uri: SecretUrl | str | None,
        output: Path,
        experiment: str,
        sweep_key: str,
        sweep_label: str,
        config_dict: dict[str, Any],
        chains: Iterable[TrackedChain],
        store: RunStore | None = None,
    ):
        self.why_not: str | None = None
        self.page: str | None = None
        self._store = store or RunStore(uri, Path(output), experiment)
        self.uri = self._store.uri
        self._key, self._label, self._config = sweep_key, sweep_label, config_dict
        self._chains = list(chains)
        self._lock = threading.Lock()
        self._sweep: SweepRun | None = None
        """None until the store was read, and again after a sync that was cut short: what was under way may or may not
        have arrived
        """
        self._chain_runs: list[ChainRun] = []
        self._results: tuple[dict[str, Any] | None, dict[str, Columns], dict[str, float], tuple[Path, ...]] | None = (
            None
        )
        self._warned = self._closed = False

    def sync(self) -> bool:
        """Log what is new on disk; True if the store holds it all now. Cheap if nothing changed. Never raises on
        account of the store or of a damaged file: it says so in one line and tries again next time. Does nothing once
        the tracker is closed."""
        with self._lock:
            if self._closed:
                return True
            try:
                self._project("RUNNING")
            except (ValueError, *STORE_ERRORS) as error:
                if not self._warned:
                    logger.warning(
                        "MLflow at %s: not logged (%s); the work goes on, the next sync tries again",
                        self.uri,
                        one_line(error),
                    )
                self._warned = True
                return False
            self._warned = False
            return True

    def log_results(
        self,
        comparison: dict[str, Any] | None,
        tables: dict[str, Columns],
        numbers: dict[str, float],
        files: Iterable[Path] = (),
    ) -> bool:
        """Log the sweep's results on its run, now or with a later sync: comparison.json as a dict (None: it could not
        be made), tables by name, named numbers, files."""
        with self._lock:
            self._results = (comparison, tables, numbers, tuple(Path(file) for file in files))
        return self.sync()

    def close(self, status: str = "FINISHED") -> None:
        """Last sync; no run of this output folder is left RUNNING. status: of the sweep run, FINISHED, FAILED or
        KILLED. Chains and cycles that are neither done nor failed become KILLED; a later tracker of the same sweep
        makes them RUNNING again.

        Raises TrackingError if the store cannot be reached.
        """
        with self._lock:
            # A store that is away is tried again; after an interruption somebody waits.
            for wait in CLOSE_WAITS if status != "KILLED" else ():
                try:
                    return self._close(status)
                except STORE_ERRORS as error:
                    logger.warning(
                        "MLflow at %s: not closed (%s); trying again in %d s", self.uri, one_line(error), wait
                    )
                except ValueError:
                    break  # a damaged file stays so
                time.sleep(wait)
            try:
                self._close(status)
            except (ValueError, *STORE_ERRORS) as error:
                raise TrackingError(
                    f"track.uri {self.uri}: the results could not be logged ({one_line(error)}). They are safe on "
                    "disk: put the cause right and start the same command again; what is missing is logged then, and "
                    "nothing is computed twice"
                ) from error

    def _close(self, status: str) -> None:
        unread: ValueError | None = None
        try:
            self._project("KILLED")
        except STORE_ERRORS:
            raise
        except ValueError as error:  # a damaged file of a chain: what is known of the runs is closed all the same
            unread = error
        sweep = self._store.known(self._key, "sweep", self._key)
        for run_id in self._store.running():
            self._store.set_status(run_id, status if run_id == sweep and unread is None else "KILLED")
        if unread is not None:
            raise unread
        self._closed = True

    def _project(self, unfinished: str) -> SweepRun:
        sweep, self._sweep = self._sweep or self._open(), None  # stays None if this is cut short
        for runs in self._chain_runs:
            runs.update(unfinished)
        if self._results is not None:
            self._log_results(sweep.run_id, *self._results)
            self._results = None
        self._sweep = sweep
        return sweep

    def _open(self) -> SweepRun:
        """Read the store, close what a killed driver left of other sweeps, open or reopen this one."""
        store = self._store
        store.load()
        for run_id in store.running(but_of_sweep=self._key):
            store.set_status(run_id, "KILLED")
        tags = {"stage": "sweep", "sweep": self._label}
        run_id = store.open(self._key, "sweep", self._key, self._label, tags, parent=None)
        store.set_status(run_id, "RUNNING")
        store.params(run_id, dict(flatten(self._config)))
        store.client.log_dict(run_id, self._config, "config.json")
        there = places(store.experiment_id, self._key, store.home, run_id)
        self.page, words = there.compare, there.words(self._label)
        store.tag(run_id, "mlflow.note.content", words)
        for name, state in shared_views(self._key, store.home).items():
            store.experiment_tag(name, state)
        sweep = SweepRun(run_id, self._key, self._label, words)
        self._chain_runs = [ChainRun(store, sweep, chain, place) for place, chain in enumerate(self._chains)]
        return sweep

    def _log_results(
        self,
        run_id: str,
        comparison: dict[str, Any] | None,
        tables: dict[str, Columns],
        numbers: dict[str, float],
        files: tuple[Path, ...],
    ) -> None:
        """Everything once for each results that differ from the last."""
        rows = [chain_row(chain.label, chain.folder, chain.cycles) for chain in self._chains]
        stamp = hashlib.sha256(
            json.dumps([LAYOUT, comparison, tables, numbers], sort_keys=True, default=str).encode()
        ).hexdigest()[:16]
        client = self._store.client
        if self._store.get_tag(run_id, "results") == stamp:
            return
        for path in files:
            client.log_artifact(run_id, str(path))
        for name, columns in tables.items():
            if next(iter(columns.values()), None):  # a table without rows has no types to show
                self._log_table(run_id, columns, f"tables/{name}.json")
        if comparison is not None:
            labels, matrix, nulls = figures.matrices(comparison)
            client.log_text(run_id, matrix_csv(labels, matrix), "tables/consistency.csv")
            failed = [entry["label"] for entry in comparison.get("failed", [])]
            client.log_figure(run_id, figures.consistency_matrix(labels, matrix, nulls, failed), "consistency.png")
        client.log_figure(run_id, figures.core_sizes(rows), "core_sizes.png")
        # The step counts results: a sweep whose failed chain was mended is compared again.
        step, now = int(self._store.get_tag(run_id, "times") or 0), now_ms()
        points = [
            Point(f"compare/{name}", value, step, now)
            for name, value in (summary(comparison) if comparison else {}).items()
        ]
        # MLflow takes no ~ in a metric's name, and groups charts by what stands before a slash.
        points += [Point(f"results/{name.replace('~', ' vs ')}", value, step, now) for name, value in numbers.items()]
        points += course_points(comparison, now) if comparison else []
        self._store.append(run_id, points)
        self._log_agreement(comparison, step, now)
        self._log_consensus(run_id, files)
        self._store.tag(run_id, "times", str(step + 1))
        self._store.tag(run_id, "results", stamp)

    def _log_agreement(self, comparison: dict[str, Any] | None, step: int, now: int) -> None:
        """On each chain's run: how far its core agrees with its seed partners'."""
        pairs = comparison["pairs"] if comparison else []
        for chain in self._chain_runs:
            points = [Point(name, value, step, now) for name, value in of_pairs(chain.label, pairs)]
            if points and chain.run_id:
                self._store.append(chain.run_id, points)

    def _log_consensus(self, run_id: str, files: tuple[Path, ...]) -> None:
        """The consensus core as a model of the sweep's run, and as a version of the sweep's registered model."""
        for path in files:
            if path.name == CONSENSUS:
                core, tags = Core.load(path), {"stage": "consensus", "sweep": self._label}
                model = log_core(self._store, run_id, core, "consensus", tags, core.cycle)
                register(self._store, f"{self._label}-consensus", model, run_id, core)

    def _log_table(self, run_id: str, columns: dict[str, list[Any]], file: str) -> None:
        """Log a table for MLflow's table view. log_table adds rows to a table that is there, so one that is there is
        overwritten in the same format instead."""
        folder = str(Path(file).parent)
        if any(entry.path == file for entry in self._store.client.list_artifacts(run_id, folder)):
            self._store.client.log_text(run_id, pandas.DataFrame(columns).to_json(orient="split", index=False), file)
        else:
            self._store.client.log_table(run_id, columns, file)


def matrix_csv(labels: list[str], matrix: list[list[float | None]]) -> str:
    """PW-MCC of every pair, empty where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["", *labels])
    for label, row in zip(labels, matrix, strict=True):
        writer.writerow([label, *("" if value is None else f"{value:.6f}" for value in row)])
    return stream.getvalue()
