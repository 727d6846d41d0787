"""Runs in an MLflow store: found by tag before they are made, appended to without repeating a step.

Knows MLflow and nothing of chains. Only explicit run ids are used, never MLflow's "active run", so that the caller may
be any thread. There is one writer, the sweep driver; the output folder's lock sees to that.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

# MLflow reads these when it is imported. Nobody is told that a sweep runs; and a server that does not answer must not
# hold a sync up for MLflow's own eight attempts of two minutes each, since the next sync tries again anyway.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}.items():
    os.environ.setdefault(_name, _value)

import sqlalchemy  # noqa: E402
from mlflow.entities import Metric, Param, Run, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

from dmsae_ray.files import replacing  # noqa: E402
from dmsae_ray.secret_url import SecretUrl, scrub  # noqa: E402
from dmsae_ray.show.mlflow.own_database import artifacts_of, default_uri, follow_move, no_stray_folder, own_database  # noqa: E402
from dmsae_ray.show.tracking import TrackingError  # noqa: E402

logging.getLogger("alembic").setLevel(logging.WARNING)

SERVERS = ("http:", "https:", "databricks")
OPEN_S = 20.0
"""Longest wait for a server's first answer."""
OPEN_ERRORS = (MlflowException, SQLAlchemyError, OSError, ValueError, ImportError)
"""What opening a store may raise: STORE_ERRORS, and what a URL that means nothing or lacks its driver comes to."""
REMEDY = "Start the server, correct track.uri, or leave track.uri empty for a database in the output folder"
REFUSED = {
    401: "The server asks for a name and password that it knows: set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD where the command runs, or MLFLOW_TRACKING_TOKEN",
    403: "The server does not let this user (MLFLOW_TRACKING_USERNAME) write there: have whoever manages it permit to "
    "edit the experiment, or give track.experiment another name",
}
"""What to do about a server that answers and refuses, by HTTP status."""
STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)
"""What a store that is away, full, locked or of another version raises (requests' errors are OSErrors)."""

RUNS_PER_PAGE = 1000
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
"""limits of MLflow's search and log-batch calls"""
PARAM_LENGTH = 500
TAG_LENGTH = 1000
"""MLflow 3 takes 6000 and 8000; servers of earlier versions took 500 and 5000"""


T = TypeVar("T")


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    step: int
    ms: int
    """unix time in milliseconds"""


def remedy(error: BaseException) -> str:
    """What to do about a store that cannot be opened."""
    if isinstance(error, ImportError):
        # SQLAlchemy takes psycopg for postgresql:// from its 2.1 on, and psycopg2 before; the extra has both.
        postgres = (error.name or "").startswith("psycopg")
        how = 'pip install "dmsae_ray[postgres]"' if postgres else f"install the package that has {error.name or 'it'}"
        return f"This kind of database needs a driver that is not installed: {how}"
    return REFUSED.get(error.get_http_status_code(), REMEDY) if isinstance(error, MlflowException) else REMEDY


def reach(uri: str) -> None:
    """Connect to a database's server once. Raises as SQLAlchemy and the driver do; without it MLflow would try for
    minutes.
    """
    engine = sqlalchemy.create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def now_ms() -> int:
    return int(time.time() * 1000)


def home_id(output: Path) -> str:
    """A name for this output folder that moves with it, so that two folders may share a server without sharing runs."""
    path = output / "mlflow_home"
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


class RunStore:
    """The runs of one output folder in one experiment.

    uri: MLflow tracking URI; None: `default_uri(output)`. Artifacts lie in `<output>/mlartifacts`, unless a server
    decides. Creates the database and the experiment, and writes to it, so that what cannot be used is known now. Raises
    TrackingError if the store cannot be used, or a server has not answered within OPEN_S.
    """

    def __init__(self, uri: SecretUrl | str | None, output: Path, experiment: str):
        self.uri = SecretUrl(uri or default_uri(output))
        self._experiment, self._output = experiment, output
        self._runs: dict[tuple[str, str, str], str] = {}
        """run id by (sweep, kind, key)"""
        self._status: dict[str, str] = {}
        self._tags: dict[str, dict[str, str]] = {}
        self._params: dict[str, set[str]] = {}
        self._last: dict[tuple[str, str], int] = {}
        """last logged step of (run id, metric)"""
        self._metrics: dict[str, set[str]] = {}
        """metrics that a run had when it was read"""
        self._experiment_tags: dict[str, str] = {}
        self._made: set[str] = set()
        """runs that did not exist before"""
        try:
            self.home = home_id(output)
            database = own_database(self.uri.reveal(), output)
            if database is not None:
                follow_move(database, output)
            if self.uri.reveal().startswith(SERVERS):
                self.client, self.experiment_id = self._within(OPEN_S, self._open)
            else:
                if not self._local:
                    self._within(OPEN_S, lambda: reach(self.uri.reveal()))
                self.client, self.experiment_id = self._open()  # making the first tables takes as long as it takes
        except TrackingError:
            raise
        except OPEN_ERRORS as error:
            raise TrackingError(
                f"track.uri {self.uri}: the MLflow store cannot be used ({one_line(error)}). {remedy(error)}"
            ) from error

    @property
    def _local(self) -> bool:
        """Whether the store is a file, which nobody has to answer for."""
        return self.uri.reveal().startswith(("sqlite:", "file:")) or not self.uri.is_url

    def _within(self, seconds: float, act: Callable[[], T]) -> T:
        """What `act` returns or raises; TrackingError if that takes longer: a server that swallows packets is asked
        again and again.
        """
        returned: list[T] = []
        raised: list[BaseException] = []

        def run() -> None:
            try:
                returned.append(act())
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, daemon=True)  # left behind where it hangs; it ends with the process
        thread.start()
        thread.join(seconds)
        if raised:
            raise raised[0]
        if not returned:
            raise TrackingError(f"track.uri {self.uri}: no answer within {seconds:.0f} s. {REMEDY}")
        return returned[0]

    def _open(self) -> tuple[MlflowClient, str]:
        uri = self.uri.reveal()
        with no_stray_folder(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            experiment = self._find_experiment(client)
        self._experiment_tags = dict(client.get_experiment(experiment).tags)
        # A store that can be read alone would show itself after hours.
        client.set_experiment_tag(experiment, "dmsae.opened", str(now_ms()))
        return client, experiment

    def _find_experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            root = None if self.uri.reveal().startswith(SERVERS) else artifacts_of(self._output)
            return client.create_experiment(self._experiment, artifact_location=root)
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"track.experiment {self._experiment!r} is in the trash of {self.uri}: restore it there, or choose "
                "another name"
            )
        return found.experiment_id

    def load(self) -> None:
        """Read which runs there are; forgets what was believed before. Of duplicates, the oldest counts."""
        for known in (self._runs, self._status, self._tags, self._params, self._metrics, self._last):
            known.clear()
        self._made.clear()
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id],
                f"tags.`dmsae.home` = '{self.home}'",
                max_results=RUNS_PER_PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            for run in page:
                self._remember(run)
            token = page.token
            if not token:
                return

    def _remember(self, run: Run) -> None:
        run_id, tags = run.info.run_id, dict(run.data.tags)
        self._runs.setdefault((tags["dmsae.sweep"], tags["dmsae.kind"], tags["dmsae.key"]), run_id)
        self._status[run_id], self._tags[run_id] = run.info.status, tags
        self._params[run_id], self._metrics[run_id] = set(run.data.params), set(run.data.metrics)

    def open(
        self,
        sweep: str,
        kind: str,
        key: str,
        name: str,
        tags: dict[str, str],
        parent: str | None,
        start_ms: int | None = None,
    ) -> str:
        """Id of the run with these first three tags; it is made, RUNNING, if there is none. start_ms: unix time, None:
        now.
        """
        if (sweep, kind, key) not in self._runs:
            tags = {"dmsae.home": self.home, "dmsae.sweep": sweep, "dmsae.kind": kind, "dmsae.key": key} | tags
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            start_ms = now_ms() if start_ms is None else start_ms
            run = self.client.create_run(self.experiment_id, start_time=start_ms, tags=tags, run_name=name)
            self._remember(run)
            self._made.add(run.info.run_id)
        return self._runs[sweep, kind, key]

    def known(self, sweep: str, kind: str, key: str) -> str | None:
        """Id of the run with these tags, None if there is none that is known."""
        return self._runs.get((sweep, kind, key))

    def made_here(self, run_id: str) -> bool:
        """Whether `open` made the run since the store was read: nothing of it can be there that we did not log."""
        return run_id in self._made

    def status(self, run_id: str) -> str:
        return self._status[run_id]

    def running(self, but_of_sweep: str | None = None) -> list[str]:
        """Ids of all runs that are RUNNING, those of one sweep left out."""
        ids = [run_id for run_id, status in self._status.items() if status == "RUNNING"]
        return [run_id for run_id in ids if self._tags[run_id]["dmsae.sweep"] != but_of_sweep]

    def set_status(self, run_id: str, status: str, end_ms: int | None = None) -> None:
        """RUNNING, FINISHED, FAILED or KILLED; does nothing if the run has it already."""
        if self._status[run_id] == status:
            return
        if status == "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        else:
            self.client.set_terminated(run_id, status, end_time=end_ms)
        self._status[run_id] = status

    def params(self, run_id: str, values: dict[str, object]) -> None:
        """Log the parameters that the run lacks. MLflow's are immutable: one that changed keeps its first value."""
        known = self._params[run_id]
        missing = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in values.items() if key not in known]
        for start in range(0, len(missing), PARAMS_PER_BATCH):
            batch = missing[start : start + PARAMS_PER_BATCH]
            self.client.log_batch(run_id, params=batch)
            known.update(param.key for param in batch)

    def tag(self, run_id: str, key: str, value: str | None) -> None:
        """Set a tag, or with None remove it; does nothing if the run has it so already."""
        value = None if value is None else value[:TAG_LENGTH]
        if self._tags[run_id].get(key) == value:
            return
        if value is None:
            self.client.delete_tag(run_id, key)
            del self._tags[run_id][key]
        else:
            self.client.log_batch(run_id, tags=[RunTag(key, value)])
            self._tags[run_id][key] = value

    def experiment_tag(self, key: str, value: str) -> None:
        """Set a tag of the experiment; does nothing if it has it so already."""
        if self._experiment_tags.get(key) != value:
            self.client.set_experiment_tag(self.experiment_id, key, value)
            self._experiment_tags[key] = value

    def get_tag(self, run_id: str, key: str) -> str | None:
        return self._tags[run_id].get(key)

    def append(self, run_id: str, points: Iterable[Point]) -> None:
        """Log points beyond each metric's last step. Steps of a metric must come in rising order; non-finite values,
        which SQL stores refuse, are left out."""
        batch: list[Metric] = []
        ahead: dict[str, int] = {}
        for key, value, step, ms in points:
            if not math.isfinite(value) or step <= max(self._last_step(run_id, key), ahead.get(key, -1)):
                continue
            ahead[key] = step
            batch.append(Metric(key, float(value), ms, step))
            if len(batch) == METRICS_PER_BATCH:
                self._flush(run_id, batch)
        self._flush(run_id, batch)

    def _flush(self, run_id: str, batch: list[Metric]) -> None:
        if batch:
            self.client.log_batch(run_id, metrics=batch)
            self._last.update({(run_id, metric.key): metric.step for metric in batch})
            batch.clear()

    def _last_step(self, run_id: str, key: str) -> int:
        """Last logged step, -1 if none. The store is asked once for each metric that an earlier process logged."""
        if (run_id, key) not in self._last:
            history = self.client.get_metric_history(run_id, key) if key in self._metrics[run_id] else []
            self._last[run_id, key] = max((metric.step for metric in history), default=-1)
        return self._last[run_id, key]


def one_line(error: BaseException) -> str:
    """What a message can show of an error: its first line, without the secrets of URLs."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return scrub(lines[0])[:300]
