"""python -m dmsae_ray.ui: open MLflow on a sweep's results (what `make ui` runs)."""

from __future__ import annotations

import os
import socket
import sqlite3
import sys

from dmsae_ray.config import Config
from dmsae_ray.driver.options import HarvestCommand, load
from dmsae_ray.driver.status import driver_alive
from dmsae_ray.files import refresh
from dmsae_ray.secret_url import scrub
from dmsae_ray.show.mlflow.own_database import ARTIFACTS, NAME, database_of, experiment_id, follow_move, last_sweep
from dmsae_ray.show.mlflow.views import places

HOST = "127.0.0.1"


def main(argv: list[str] | None = None) -> int:
    """Replaces this process by MLflow's server on the configuration's store; stop it with Ctrl-C."""
    try:
        config: Config = load(HarvestCommand, sys.argv[1:] if argv is None else argv)
        if config.track.uri:
            print(f"this configuration logs to {config.track.uri}: open that server's address in a browser")
            return 0
        port = free_port(os.environ.get("MLFLOW_PORT", "5000"))
        there = runs_of(config)
    except ValueError as error:
        print(f"error: {scrub(str(error))}", file=sys.stderr)
        return 2
    for what, place in there.items():
        print(f"{what + ':':<9}http://{HOST}:{port}/{place}")
    print(
        f"(MLflow on the last sweep in {config.home}, experiment {config.track.experiment}; Ctrl-C ends it)", flush=True
    )
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # no jobs of ours: eight processes less
    # Named from its own folder: MLflow would make folders of what is quoted in a URL.
    os.chdir(config.home)
    os.execv(
        sys.executable,
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{NAME}",
            "--artifacts-destination",
            ARTIFACTS,
            "--host",
            HOST,
            "--port",
            str(port),
        ],
    )


def free_port(name: str) -> int:
    """The port of this name. Raises ValueError if it is none, or in use."""
    if not name.isdecimal() or not 0 < int(name) < 1 << 16:
        raise ValueError(f"MLFLOW_PORT {name!r}: not a port, a number from 1 to 65535")
    with socket.socket() as server:
        server.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the server itself: one that has just ended does not count
        try:
            server.bind((HOST, int(name)))
        except OSError as error:
            raise ValueError(
                f"port {name} of {HOST}: {error.strerror}, perhaps by an MLflow that was started before; stop that, or "
                "choose another port with MLFLOW_PORT=5001"
            ) from error
    return int(name)


def runs_of(config: Config) -> dict[str, str]:
    """Where the last sweep is in MLflow's page, by what is to be seen there. Raises ValueError if there is none."""
    database = database_of(config.home)
    if not driver_alive(config.home):
        refresh(config.home, alone=True)
    if not database.exists():
        raise ValueError(
            f"{database}: nothing logged yet; run python -m dmsae_ray.sweep first, or give --output the folder of a "
            "sweep"
        )
    try:
        follow_move(database, config.home)
        experiment = experiment_id(config.home, config.track.experiment)
        sweep = None if experiment is None else last_sweep(config.home, experiment)
    except (OSError, sqlite3.Error) as error:
        raise ValueError(f"{database}: cannot be read ({error})") from error
    if experiment is None:
        raise ValueError(
            f"{database}: has no experiment {config.track.experiment!r}; give --track.experiment the name of one "
            "that it has"
        )
    if sweep is None:
        raise ValueError(f"{database}: has no sweep yet; run python -m dmsae_ray.sweep, or python -m dmsae_ray.report")
    if not sweep.shared:
        return {"runs": f"#/experiments/{experiment}/runs (its views: python -m dmsae_ray.report logs them)"}
    return places(experiment, sweep.key, sweep.home, sweep.run_id)._asdict()


if __name__ == "__main__":
    sys.exit(main())
