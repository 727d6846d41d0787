"""The sqlite database that MLflow keeps an output folder's runs in: its URL, and its paths after the folder was
moved.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sqlalchemy

from dmsae_ray.show.mlflow.views import view_tag

NAME = "mlflow.db"
ARTIFACTS = "mlartifacts"
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns that hold where artifacts lie."""


def database_of(output: Path) -> Path:
    return output.absolute() / NAME


def artifacts_of(output: Path) -> str:
    """Where an output folder's runs keep their artifacts, as MLflow stores it."""
    return (output.absolute() / ARTIFACTS).as_uri()


def default_uri(output: Path) -> str:
    """The store used when the configuration names none. SQLAlchemy unquotes a database's path and cuts it at a question
    mark.
    """
    return "sqlite:///" + str(database_of(output)).replace("%", "%25").replace("?", "%3F")


def own_database(uri: str, output: Path) -> Path | None:
    """The file of a sqlite URL, if it lies in the output folder, and so moves with it."""
    if not uri.startswith("sqlite:"):
        return None
    file = sqlalchemy.make_url(uri).database
    path = None if file in (None, "", ":memory:") else Path(file).absolute()
    return path if path is not None and path.is_relative_to(output.absolute()) else None


@contextlib.contextmanager
def no_stray_folder(uri: str) -> Iterator[None]:
    """MLflow makes the folder that a sqlite URL names as it stands, quoting included (`a%2520b` beside `a%20b`): it
    goes again, if empty.
    """
    folder = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") and "%" in uri else None
    new = [] if folder is None else [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # it is not there, or not empty and so somebody's
                path.rmdir()


def follow_move(database: Path, output: Path) -> str | None:
    """Put the present place of the artifacts where the database names another: MLflow stores it whole with every
    experiment and run, and would bring the old folder back. Returns that other place, None if nothing was to be done.
    Raises OSError if it cannot be written.

    database: one that lies in the output folder, and so is its own: all that lies in a folder called `mlartifacts` is
    meant.
    """
    here = artifacts_of(output)
    if not database.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
            if not connection.execute("select 1 from sqlite_master where name = 'experiments'").fetchone():
                return None  # MLflow has yet to make its tables
            roots = [root for (root,) in connection.execute("select distinct artifact_location from experiments")]
            tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
            there = [(table, column) for table, column in PLACES if table in tables]
            old = [root for root in roots if root and root != here and root.rstrip("/").endswith(f"/{ARTIFACTS}")]
            for root in old:
                for table, column in there:
                    connection.execute(
                        f"update {table} set {column} = ? || substr({column}, ?) where {column} = ? or "
                        f"substr({column}, 1, ?) = ?",
                        (here, len(root) + 1, root, len(root) + 1, f"{root}/"),
                    )
            return old[0] if old else None
    except sqlite3.Error as error:
        raise OSError(f"{database}: {error}") from error


def experiment_id(output: Path, name: str) -> str | None:
    """Id of an experiment in this output folder's database; None if it has none of this name."""
    with contextlib.closing(
        sqlite3.connect(f"{database_of(output).as_uri()}?mode=ro", uri=True, timeout=60)
    ) as connection:
        found = connection.execute("select experiment_id from experiments where name = ?", (name,)).fetchone()
    return None if found is None else str(found[0])


class LastSweep(NamedTuple):
    """The sweep that was logged last, by its tags and its run."""

    key: str
    home: str
    run_id: str
    shared: bool
    """whether MLflow's page has views of it; earlier versions wrote none"""


def last_sweep(output: Path, experiment: str) -> LastSweep | None:
    """Of this output folder's database: the sweep that was opened or logged last; None if there is none."""
    tag = "(select value from tags where tags.run_uuid = runs.run_uuid and key = ?)"
    query = (
        f"select {tag}, {tag}, run_uuid from runs where experiment_id = ? and lifecycle_stage = 'active' and "
        f"{tag} = 'sweep' order by coalesce(end_time, 9e18) desc, start_time desc limit 1"
    )
    with contextlib.closing(
        sqlite3.connect(f"{database_of(output).as_uri()}?mode=ro", uri=True, timeout=60)
    ) as connection:
        found = connection.execute(query, ("dmsae.sweep", "dmsae.home", int(experiment), "dmsae.kind")).fetchone()
        if found is None:
            return None
        key, home, run_id = found
        view = (view_tag(key, home, "chains"), int(experiment))
        shared = connection.execute(
            "select 1 from experiment_tags where key = ? and experiment_id = ?", view
        ).fetchone()
    return LastSweep(key, home, run_id, shared is not None)
