"""A sweep that logs to an MLflow server with a password, on PostgreSQL, both on a machine of their own.

What else a server must show is in pipeline/test_mlflow_server.py, and what a store that fails may not lose, call by
call, in unit/show/test_mlflow.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from conftest import HANGS, environment, free_port, run_command, start

from cluster.box import BIN, Box, Node
from cluster.mlflow_node import POSTGRES_PORT, MlflowNode, missing
from dmsae_ray.show.mlflow import run_store
from dmsae_ray.show.mlflow.run_store import Point, RunStore
from dmsae_ray.show.tracking import TrackingError

AWAY_S = 65.0
LONGER = ("--train.tokens", "1_500_000", "--train.checkpoint_steps", "200", "--cluster.concurrent", "1")
"""A minute or two of training: a server that is away for a minute may be back before its end, or just after."""


@pytest.fixture(scope="module")
def server() -> Iterator[MlflowNode]:
    if lacking := missing():
        pytest.skip(f"NOT RUN: {lacking}")
    with Box() as box:
        yield MlflowNode(box)


def reached(node: Node | None, address: str, port: int) -> bool:
    """Whether a connection is taken, asked from a node or from this machine."""
    if node is None:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return True
        except OSError:
            return False
    ask = f"import socket; socket.create_connection(({address!r}, {port}), timeout=5)"
    return node.run(["python", "-c", ask]).returncode == 0


def test_postgresql_is_reached_from_its_own_machine_alone(server: MlflowNode):
    at = server.node.address
    assert reached(server.node, "127.0.0.1", POSTGRES_PORT)
    assert server.healthy() and not reached(None, at, POSTGRES_PORT) and not reached(server.node, at, POSTGRES_PORT)
    other = server.node.box.node("other")
    assert not reached(other, at, POSTGRES_PORT)
    other.drop()


@pytest.mark.parametrize("name, password", [(None, None), ("lab", "hunter2-hunter2"), ("another", "hunter2-hunter2")])
def test_without_the_password_nothing_is_opened(server: MlflowNode, tmp_path, monkeypatch, name, password):
    for variable, value in zip(server.user, (name, password), strict=True):
        monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable, raising=False)
    with pytest.raises(TrackingError, match=f"401.*{' and '.join(server.user)}"):
        RunStore(server.url, tmp_path, "refused")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "lab")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.user["MLFLOW_TRACKING_PASSWORD"])
    assert "refused" not in server.experiments()
    assert RunStore(server.url, tmp_path, "accepted").experiment_id == server.experiments()["accepted"]


def test_another_user_may_not_write_to_an_experiment(server: MlflowNode, tmp_path, monkeypatch):
    for variable, value in server.user.items():
        monkeypatch.setenv(variable, value)
    RunStore(server.url, tmp_path, "of lab")
    for variable, value in server.add_user("guest").items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(TrackingError, match=r"403.*permit to edit the experiment"):
        RunStore(server.url, tmp_path, "of lab")


def test_a_power_cut_loses_no_run_and_a_server_that_hangs_is_not_waited_for(server: MlflowNode, tmp_path, monkeypatch):
    for variable, value in server.user.items():
        monkeypatch.setenv(variable, value)

    def opened() -> RunStore:
        store = RunStore(server.url, tmp_path, "power")
        store.load()
        return store

    store = opened()
    run = store.open("s", "sweep", "s", "s", {}, None)
    store.append(run, [Point("m", 1.5, step, 1_790_000_000_000) for step in range(3)])
    server.kill()
    server.restart()
    store = opened()
    store.append(run, [Point("m", 1.5, step, 1_790_000_000_000) for step in range(5)])
    assert store.known("s", "sweep", "s") == run
    assert sorted(point.step for point in store.client.get_metric_history(run, "m")) == [0, 1, 2, 3, 4]
    monkeypatch.setattr(run_store, "OPEN_S", 3.0)
    for goes, comes in ((server.freeze, server.thaw), (server.cut, server.mend)):
        goes()
        try:
            with pytest.raises(TrackingError, match="no answer within 3 s"):
                opened()
        finally:
            comes()
    monkeypatch.setattr(run_store, "OPEN_S", 60.0)
    assert opened().status(run) == "RUNNING"
    store.set_status(run, "FINISHED")


def test_a_wrong_password_ends_the_sweep_before_it_begins(server: MlflowNode, tmp_path):
    password = "hunter2-hunter2"
    run = run_command(
        tmp_path / "out", "--track.uri", server.url, **server.user | {"MLFLOW_TRACKING_PASSWORD": password}
    )
    assert run.code == 2 and "Traceback" not in run.out, run.out
    (line,) = [line for line in run.out.splitlines() if line.startswith("error: ")]
    for words in ("track.uri", server.node.address, "401", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        assert words in line, line
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not (tmp_path / "out/tokens").exists() and not (tmp_path / "out/data").exists()
    assert password not in run.out and not any(password.encode() in path.read_bytes() for path in left)


class Logged(NamedTuple):
    """What a store has of one run."""

    status: str
    params: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]
    """every point, of twice the same both"""
    files: list[str]


def logged(uri: str) -> tuple[dict[str, list[Logged]], list[str], list[str]]:
    """Runs of a store by name, the names of its models, and its registered versions."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("dmsae_ray").experiment_id
    runs: dict[str, list[Logged]] = {}
    for run in client.search_runs([experiment], max_results=100):
        run_id = run.info.run_id
        metrics = {
            name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
            for name in run.data.metrics
        }
        folders, files = [""], []
        for folder in folders:
            for entry in client.list_artifacts(run_id, folder or None):
                (folders if entry.is_dir else files).append(entry.path)
        one = Logged(run.info.status, dict(run.data.params), metrics, sorted(files))
        runs.setdefault(run.data.tags["mlflow.runName"], []).append(one)
    models = sorted(model.name for model in client.search_logged_models([experiment]))
    versions = sorted(f"{version.name} {version.version}" for version in client.search_model_versions())
    return runs, models, versions


def points_of_chains(server: MlflowNode) -> int:
    """How many points of training curves the server has, asked by its administrator."""
    query = {
        "experiment_ids": list(server.experiments().values()),
        "filter": "tags.`dmsae.kind` = 'chain'",
        "max_results": 100,
    }
    runs: list[dict[str, Any]] = server.api("runs/search", **query).get("runs", [])
    last = [{one["key"]: int(one["step"]) for one in run["data"].get("metrics", [])} for run in runs]
    return sum(steps.get("train/loss", 0) for steps in last)


def test_a_database_that_is_killed_and_a_server_that_is_away_lose_nothing(server: MlflowNode, tmp_path, monkeypatch):
    """Neither a metric nor a run is lost or there twice: the server has what the folder's own database has when the
    folder is logged to it afterwards.
    """
    output = tmp_path / "out"
    marked = {"AWS_SECRET_ACCESS_KEY": "hunter2-of-a-bucket", "HF_TOKEN": "hf_hunter2"}
    process, log = start(output, "--track.uri", server.url, *LONGER, **server.user, **marked)

    def wait_for(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + HANGS
        while not condition():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)

    try:
        wait_for(lambda: points_of_chains(server) > 0)
        server.kill_postgres()
        wait_for(lambda: "not logged" in log.read_text())
        server.start_postgres()
        before = points_of_chains(server)
        wait_for(lambda: points_of_chains(server) > before)
        server.kill_mlflow()
        time.sleep(AWAY_S)
        server.start_mlflow()
        assert process.wait(HANGS) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(HANGS)
    files = [log, *(path for folder in (output, server.node.disk) for path in folder.rglob("*") if path.is_file())]
    for secret in (*marked.values(), server.user["MLFLOW_TRACKING_PASSWORD"]):
        assert not [path for path in files if holds(path, secret)], "in what the sweep or MLflow keep"

    copy = tmp_path / "copy" / "out"
    shutil.copytree(output, copy)
    shutil.copy(output.parent / "small.yaml", copy.parent)
    again = run_command(copy, *LONGER, module="report")
    assert again.code == 0, again.out
    for name, value in server.user.items():
        monkeypatch.setenv(name, value)
    (runs, *others), (own_runs, *own_others) = logged(server.url), logged(f"sqlite:///{copy}/mlflow.db")
    assert others == own_others and runs.keys() == own_runs.keys() == {"small", "seed0-k8", "seed1-k8"}
    for name, (run, *twice) in runs.items():
        (own,) = own_runs[name]
        assert not twice and run.status == own.status == "FINISHED"
        assert run.metrics == own.metrics and run.files == own.files, name
        if name != "small":  # the sweep's own say where it logged
            assert run.params == own.params
    assert listens(copy) == {"127.0.0.1"}


def holds(path: Path, secret: str) -> bool:
    with suppress(FileNotFoundError):  # PostgreSQL has removed it meanwhile
        return secret.encode() in path.read_bytes()
    return False


def listens(output: Path) -> set[str]:
    """Where `python -m dmsae_ray.ui` on this folder listens."""
    port = free_port()
    command = [BIN / "python", "-m", "dmsae_ray.ui", "--output", output]
    process = psutil.Popen(command, env=environment(MLFLOW_PORT=str(port)), start_new_session=True)
    found: set[str] = set()
    try:
        end = time.monotonic() + HANGS
        while not found:
            assert process.poll() is None and time.monotonic() < end, "it did not start"
            time.sleep(0.5)
            open_now = [one for one in psutil.net_connections("inet") if one.status == "LISTEN"]
            found = {one.laddr.ip for one in open_now if one.laddr.port == port}
        return found
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(HANGS)
