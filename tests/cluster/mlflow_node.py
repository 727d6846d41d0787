"""An MLflow server with a password, on PostgreSQL, that is a machine of its own in a box."""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import time
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path

from cluster.box import BIN, Box

PORT, POSTGRES_PORT = 5000, 5432
STARTS_S = 300.0
PROGRAMS = "/usr/lib/postgresql/*/bin/initdb"
"""Where Debian has what its PATH does not."""
AS_POSTGRES = "setpriv --reuid=postgres --regid=postgres --clear-groups --".split()
"""PostgreSQL refuses to be root."""
AUTH = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = {database}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@cache
def missing() -> str:
    """What this machine lacks for such a node; empty if nothing."""
    if not sorted(Path("/").glob(PROGRAMS.lstrip("/"))):
        return "apt-get install postgresql"
    try:
        import flask_wtf  # noqa: F401
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"pip install psycopg[binary] flask-wtf ({error})"
    return ""


class MlflowNode:
    """MLflow keeps runs and users in PostgreSQL, artifacts in a folder, all on the node's disk: whatever is killed and
    started again has them still. PostgreSQL listens on the machine's loopback alone; who asks MLflow needs the name and
    password in `user`, as MLflow's own environment variables.
    """

    def __init__(self, box: Box, name: str = "mlflow"):
        self.node = box.node(name)
        self.url = f"http://{self.node.address}:{PORT}"
        self._admin = ("admin", secrets.token_urlsafe(24))
        self._bin = sorted(Path("/").glob(PROGRAMS.lstrip("/")))[-1].parent
        password = secrets.token_hex(24)
        database = f"postgresql+psycopg://postgres:{password}@127.0.0.1:{POSTGRES_PORT}"
        # Secrets reach the servers by their environment and files of their users alone.
        self._write("postgres-password", password, owner="postgres")
        self._write("auth.ini", AUTH.format(database=f"{database}/users"))
        self._env = {
            "MLFLOW_AUTH_CONFIG_PATH": "/srv/auth.ini",
            "MLFLOW_AUTH_ADMIN_PASSWORD": self._admin[1],
            "MLFLOW_BACKEND_STORE_URI": f"{database}/runs",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(24),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes less
        }
        self._make_cluster()
        self.start_postgres()
        for made in ("runs", "users"):
            self._psql(f"create database {made}", password)
        self.start_mlflow()
        self.user = self.add_user("lab")

    def _write(self, name: str, text: str, owner: str = "root") -> None:
        file = self.node.disk / "srv" / name
        file.touch(mode=0o600)
        file.write_text(text)
        subprocess.run(["chown", f"{owner}:", file], check=True)

    def _make_cluster(self) -> None:
        folder = self.node.disk / "srv/postgres"
        folder.mkdir(mode=0o700)
        subprocess.run(["chown", "postgres:", folder], check=True)
        how = "--pgdata=/srv/postgres --auth=scram-sha-256 --pwfile=/srv/postgres-password --encoding=UTF8 --locale=C"
        done = self.node.run([*AS_POSTGRES, self._bin / "initdb", *how.split()])
        assert done.returncode == 0, done.stdout + done.stderr

    def _psql(self, statement: str, password: str) -> None:
        who = ["--host=127.0.0.1", f"--port={POSTGRES_PORT}", "--username=postgres", "--no-psqlrc"]
        done = self.node.run([self._bin / "psql", *who, "--command", statement], env={"PGPASSWORD": password})
        assert done.returncode == 0, done.stderr

    # -- PostgreSQL ----------------------------------------------------------------------------------------------------

    def start_postgres(self) -> None:
        """Also after `kill_postgres`: what was committed is there still."""
        how = ["-D", "/srv/postgres", "-c", "listen_addresses=127.0.0.1", "-c", f"port={POSTGRES_PORT}"]
        command = [*AS_POSTGRES, self._bin / "postgres", *how, "-c", "unix_socket_directories="]
        ready = [self._bin / "pg_isready", "--host=127.0.0.1", f"--port={POSTGRES_PORT}", "--timeout=5"]
        # Processes of a server that was killed end by themselves, a moment later; until then the next one refuses.
        self._postgres = self._started("postgres", command, {}, lambda: self.node.run(ready).returncode == 0)

    def kill_postgres(self) -> None:
        """At once, as `kill -9` of all of it; MLflow runs on without."""
        self.node.end(self._postgres)

    # -- MLflow --------------------------------------------------------------------------------------------------------

    def start_mlflow(self) -> None:
        """Also after `kill_mlflow`."""
        where = ["--host", self.node.address, "--port", str(PORT), "--allowed-hosts", f"{self.node.address}:{PORT}"]
        store = ["--artifacts-destination", "/srv/artifacts", "--workers", "1"]
        command = [BIN / "python", "-m", "mlflow", "server", "--app-name", "basic-auth", *where, *store]
        self._mlflow = self._started("mlflow", command, self._env, self.healthy)

    def kill_mlflow(self) -> None:
        """PostgreSQL runs on."""
        self.node.end(self._mlflow)

    def healthy(self) -> bool:
        """Whether MLflow answers; it need not have a database for that."""
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).read() == b"OK"
        except OSError:
            return False

    def api(self, path: str, **body: object) -> dict:
        """Ask MLflow as its administrator, who sees all runs."""
        who = base64.b64encode(":".join(self._admin).encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {who}"}
        url = f"{self.url}/api/2.0/mlflow/{path}"
        request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
        return json.load(urllib.request.urlopen(request, timeout=120))

    def add_user(self, name: str) -> dict[str, str]:
        """Who may make experiments, and sees no one else's: name and password in MLflow's environment variables."""
        password = secrets.token_urlsafe(24)
        self.api("users/create", username=name, password=password)
        return {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}

    def experiments(self) -> dict[str, str]:
        """Name and id of all that there are."""
        found = self.api("experiments/search", max_results=1000)["experiments"]
        return {experiment["name"]: experiment["experiment_id"] for experiment in found}

    def _started(self, name: str, command: list[object], env: dict[str, str], ready: Callable[[], bool]):
        """A server that is ready; one that ends before it is gets started again, as whoever looks after it would."""
        log, end = self.log_of(name), time.monotonic() + STARTS_S
        process = self.node.popen(command, env=env, log=log)
        while not ready():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.5)
            if process.poll() is not None:
                process = self.node.popen(command, env=env, log=log)
        return process

    def log_of(self, name: str) -> Path:
        """Of `postgres` or `mlflow`."""
        return self.node.disk / f"{name}.log"

    # -- the machine ---------------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Connections stay open, and nobody answers."""
        self.node.stop()

    def thaw(self) -> None:
        self.node.cont()

    def cut(self) -> None:
        """What is sent to it is lost."""
        self.node.cut()

    def mend(self) -> None:
        self.node.mend()

    def kill(self) -> None:
        """The power goes."""
        self.node.kill()

    def restart(self) -> None:
        """After `kill`, with what was on its disk."""
        self.node.boot()
        self.start_postgres()
        self.start_mlflow()
