"""MLflow shows what lies on disk, once, whatever happened to earlier drivers. A real sqlite store, shared by the
module.
"""

import json
import logging
import shutil
import socket
import sqlite3
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from records import cycle_record
from safetensors.numpy import save_file
from sqlalchemy import event
from sqlalchemy.engine import Engine

from dmsae_ray import sweep as sweep_
from dmsae_ray.distill.failure import write_failure
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.record import RECORD_VERSION
from dmsae_ray.lock import Lease
from dmsae_ray.show.columns import chain_columns, chain_row, pair_columns
from dmsae_ray.show.mlflow import run_store
from dmsae_ray.show.mlflow.chain_runs import TrackedChain
from dmsae_ray.show.mlflow.own_database import follow_move
from dmsae_ray.show.mlflow.run_store import METRICS_PER_BATCH, PARAM_LENGTH, Point, RunStore
from dmsae_ray.show.mlflow.tracker import MlflowTracker
from dmsae_ray.show.tracking import TrackingError

CYCLES, STEPS = 2, 40
CONFIG = {
    "name": "test",
    "sweep": {"seeds": [0, 1], "k": [16], "cycles": CYCLES},
    "attribution": {"tau": 0.9},
    "sae": {"width": 2048, "note": "x" * 2000},
}


def write_chain(folder, key, seed):
    folder.mkdir(parents=True)
    fields = {"seed": seed, "data_seed": seed, "k": 16, "sae": {"width": 2048}}
    chain = {
        "format_version": RECORD_VERSION,
        "key": key,
        "seed": seed,
        "data_seed": seed,
        "k": 16,
        "label": f"seed{seed}-k16",
        "fields": fields,
    }
    (folder / "chain.json").write_text(json.dumps(chain))
    return folder


def write_curve(folder, cycle, first, last, torn=False):
    """Append the steps first..last as a training would, in strides of ten."""
    path = folder / f"cycle_{cycle:02d}"
    path.mkdir(exist_ok=True)
    with open(path / "curve.jsonl", "a") as file:
        for step in range(first, last + 1, 10):
            row = {
                "step": step,
                "tokens": step * 1024,
                "lr": 3e-4,
                "loss": 1 / (1 + step),
                "fvu": 0.2,
                "l0": 16.0,
                "threshold": None,
            }
            file.write(json.dumps(row) + "\n")
        if torn:
            file.write('{"step": 9')


def write_cycle(folder, cycle, core_in, core_out, curve=True):
    path = folder / f"cycle_{cycle:02d}"
    if curve:
        write_curve(folder, cycle, 0, STEPS)
    scores_P = np.random.default_rng(cycle).exponential(size=700)
    ids_P = np.arange(700)
    save_file(
        {"ids": ids_P, "scores": scores_P, "curve": np.cumsum(np.sort(scores_P)[::-1]) / scores_P.sum()},
        path / "scores.safetensors",
    )
    save_file({"W_enc": np.zeros((core_out, 4), dtype=np.float32)}, path / "core.safetensors")
    record = cycle_record(
        cycle=cycle,
        core_in=core_in,
        core_out=core_out,
        jaccard=None if cycle == 0 else core_in / core_out,
        steps=STEPS,
        tokens_per_s=12000.0,
        fvu=0.16,
        l0=16.1,
        loss_recovered_zero=0.94,
        seconds={"train": 20.0, "attribute": 5.0, "evaluate": 5.0, "total": 30.0},
        finished_at=1_790_000_000.0 + 60 * cycle,
    )
    (path / "record.json").write_text(json.dumps(record))


def finish(folder, start=0):
    sizes = [49, 70]
    for cycle in range(start, CYCLES):
        write_cycle(folder, cycle, sizes[cycle - 1] if cycle else 0, sizes[cycle])


def pair(a, b, value=0.8):
    null = {
        "available": True,
        "reason": None,
        "mean": 0.2,
        "p99": 0.3,
        "overlap_mean": 0.0,
        "overlap_p99": 0.0,
        "mmcs_mean": 0.2,
        "draws": 200,
        "size": [81, 81],
        "density_gap": None,
    }
    gone = null | {"available": False, "reason": "densities differ", "p99": None, "density_gap": 3.1}
    return {
        "a": a,
        "b": b,
        "size_a": 81,
        "size_b": 80,
        "differs": "seed",
        "overlap": 0.7,
        "shared": 56,
        "pw_mcc": value,
        "mmcs_ab": 0.8,
        "mmcs_ba": 0.79,
        "pw_mcc_dictionary": 0.4,
        "nulls": {"covariance": null, "matched_density": gone, "cycle0": null | {"p99": 0.6}},
    }


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """An output folder with a sqlite store that does not wait for the disk: 800 commits of 8 ms each are most of these
    tests' time.
    """

    def hurry(connection, _):
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hurry)
    yield tmp_path_factory.mktemp("a folder")
    event.remove(Engine, "connect", hurry)


@pytest.fixture
def sweep(output, request):
    """(tracker maker, folders of two chains) of a sweep of this test's own."""
    key = request.node.name
    chains = [
        TrackedChain(
            f"{key}-{seed}",
            f"seed{seed}-k16",
            output / "chains" / f"{key}-{seed}",
            seed,
            16,
            CYCLES,
            "base",
            "distill",
            CONFIG,
        )
        for seed in (0, 1)
    ]
    for chain in chains:
        write_chain(chain.folder, chain.key, chain.seed)

    def make(sweep_key=key, only=(0, 1)):
        return MlflowTracker(
            None, output, "experiment", sweep_key, f"sweep {sweep_key}", CONFIG, [chains[i] for i in only]
        )

    return make, [chain.folder for chain in chains]


def runs_of(tracker, key):
    """The sweep's runs in the store, as {(kind, key without the chain's prefix): run}; fails on duplicates."""
    store = tracker._store
    found = store.client.search_runs([store.experiment_id], f"tags.`dmsae.sweep` = '{key}'", max_results=1000)
    runs = {(run.data.tags["dmsae.kind"], run.data.tags["dmsae.key"].removeprefix(key)): run for run in found}
    assert len(runs) == len(found)
    return runs


def steps_of(tracker, run, metric):
    return sorted(point.step for point in tracker._store.client.get_metric_history(run.info.run_id, metric))


def rows_in(output):
    """Rows of every table a sync writes to."""
    with sqlite3.connect(output / "mlflow.db") as database:
        return [
            database.execute(f"select count(*) from {table}").fetchone()[0]
            for table in ("runs", "metrics", "params", "tags")
        ]


def test_tree_metrics_and_artifacts_then_nothing_new(sweep, output, request):
    key, (make, (first, second)) = request.node.name, sweep
    finish(first)
    write_curve(second, 0, 0, 20, torn=True)
    tracker = make()
    assert tracker.sync()
    runs = runs_of(tracker, key)
    top, chain = runs["sweep", ""], runs["chain", "-0"]
    assert set(runs) == {
        ("sweep", ""),
        ("chain", "-0"),
        ("chain", "-1"),
        *(("cycle", f"-0/{n}") for n in range(2)),
        ("cycle", "-1/0"),
    }
    assert chain.data.tags["mlflow.parentRunId"] == top.info.run_id
    cycle = runs["cycle", "-0/1"]
    assert cycle.data.tags["mlflow.parentRunId"] == chain.info.run_id
    assert {name: cycle.data.tags[name] for name in ("seed", "k", "cycle", "chain", "stage")} == {
        "seed": "0",
        "k": "16",
        "cycle": "1",
        "chain": "seed0-k16",
        "stage": "distill",
    }
    assert top.data.params["sae.width"] == "2048" and len(top.data.params["sae.note"]) == PARAM_LENGTH
    assert chain.data.params["chain.data_seed"] == "0"
    assert steps_of(tracker, cycle, "train/loss") == [0, 10, 20, 30, 40]
    assert "train/threshold" not in cycle.data.metrics
    assert cycle.data.metrics["cycle/core_size"] == 70 and cycle.data.metrics["cycle/jaccard"] == 0.7
    assert steps_of(tracker, chain, "cycle/core_size") == [0, 1] and steps_of(tracker, chain, "cycle/jaccard") == [1]
    ranks = steps_of(tracker, cycle, "attribution/coverage")
    assert len(ranks) <= 200 and 70 in ranks and ranks[0] == 1 and ranks[-1] == 700
    assert cycle.data.metrics["attribution/coverage"] == pytest.approx(1.0)
    client = tracker._store.client
    assert {entry.path for entry in client.list_artifacts(cycle.info.run_id)} == {
        "core.safetensors",
        "scores.safetensors",
        "record.json",
    }
    assert [entry.path for entry in client.list_artifacts(chain.info.run_id)] == ["coverage.png"]
    assert (cycle.info.status, chain.info.status) == ("FINISHED", "FINISHED")
    assert cycle.info.end_time - cycle.info.start_time == 30_000
    assert runs["chain", "-1"].info.status == runs["cycle", "-1/0"].info.status == top.info.status == "RUNNING"

    before, begin = rows_in(output), time.thread_time()
    assert tracker.sync()
    assert time.thread_time() - begin < 0.3
    assert rows_in(output) == before
    assert make().sync()
    assert rows_in(output) == before


def test_killed_driver_leaves_no_gap_and_no_duplicate(sweep, request):
    key, (make, (first, _)) = request.node.name, sweep
    write_curve(first, 0, 0, 20, torn=True)
    killed = make(only=[0])
    assert killed.sync()
    before = runs_of(killed, key)
    # The new driver trains steps 20.. again, in the same file, behind the line that was cut.
    with open(first / "cycle_00" / "curve.jsonl", "a") as file:
        file.write("\n")
    write_curve(first, 0, 20, STEPS)
    write_cycle(first, 0, 0, 49, curve=False)
    write_curve(first, 1, 0, 10)
    tracker = make(only=[0])
    assert tracker.sync()
    write_curve(first, 1, 20, STEPS)
    write_cycle(first, 1, 49, 70, curve=False)
    tracker.close()
    after = runs_of(tracker, key)
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    assert all(after[name].info.run_id == run.info.run_id for name, run in before.items())
    for n in range(CYCLES):
        assert steps_of(tracker, after["cycle", f"-0/{n}"], "train/fvu") == [0, 10, 20, 30, 40]
    assert steps_of(tracker, after["chain", "-0"], "cycle/l0") == [0, 1]
    assert not [run for run in after.values() if run.info.end_time is None]


def test_interrupted_is_killed_and_resumed_finishes(sweep, output, request):
    key, (make, (first, _)) = request.node.name, sweep
    write_curve(first, 0, 0, 20)
    abandoned = make(f"{key}-abandoned", only=[0])
    assert abandoned.sync()
    tracker = make(only=[0])
    tracker.sync()
    assert runs_of(abandoned, f"{key}-abandoned")["sweep", ""].info.status == "KILLED"
    tracker.close("KILLED")
    killed = runs_of(tracker, key)
    assert {run.info.status for run in killed.values()} == {"KILLED"} and ("cycle", "-0/0") in killed
    assert tracker.sync() and runs_of(tracker, key)["sweep", ""].info.status == "KILLED"
    tracker = make(only=[0])
    tracker.sync()
    assert {run.info.status for run in runs_of(tracker, key).values()} == {"RUNNING"}
    write_curve(first, 0, 30, STEPS)
    write_cycle(first, 0, 0, 49, curve=False)
    finish(first, start=1)
    tracker.close()
    done = runs_of(tracker, key)
    assert {run.info.status for run in done.values()} == {"FINISHED"}
    assert all(done[name].info.run_id == run.info.run_id for name, run in killed.items())
    with sqlite3.connect(output / "mlflow.db") as database:
        assert database.execute("select count(*) from runs where status = 'RUNNING'").fetchone()[0] == 0


def fail(folder, reason, cycle=None, step=None):
    """failed.json as chains write it."""
    (folder / "generation").write_text("1")
    write_failure(
        SimpleNamespace(folder=ChainFolder(folder)), Lease(folder / "generation", 1), "error", reason, cycle, step
    )


@pytest.mark.parametrize(
    "reason, cycle, step, text",
    [
        ("lost", None, None, "lost"),
        ("lost", 1, None, "cycle 1: lost"),
        ("lost", 1, 3, "cycle 1, step 3: lost"),
        ("cycle 1, step 3: diverged", 1, 3, "cycle 1, step 3: diverged"),
    ],
)
def test_a_failure_says_where_as_far_as_that_is_known(tmp_path, reason, cycle, step, text):
    fail(tmp_path, reason, cycle, step)
    assert ChainFolder(tmp_path).failure().text() == text


def test_failed_chain_says_why_until_it_is_mended(sweep, request):
    key, (make, (_, second)) = request.node.name, sweep
    write_curve(second, 0, 0, 20)
    fail(second, "loss is nan", 0, 25)
    tracker = make(only=[1])
    tracker.close()
    runs = runs_of(tracker, key)
    for name in (("chain", "-1"), ("cycle", "-1/0")):
        assert runs[name].info.status == "FAILED"
        assert runs[name].data.tags["failed"] == "cycle 0, step 25: loss is nan"
    assert runs["sweep", ""].info.status == "FINISHED"
    (second / "failed.json").unlink()
    write_curve(second, 0, 30, STEPS)
    write_cycle(second, 0, 0, 49, curve=False)
    finish(second, start=1)
    make(only=[1]).close()
    runs = runs_of(tracker, key)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert "failed" not in runs["chain", "-1"].data.tags and "failed" not in runs["cycle", "-1/0"].data.tags


def test_results_can_be_downloaded_and_are_replaced(sweep, output, request, tmp_path):
    key, (make, folders) = request.node.name, sweep
    finish(folders[0])
    comparison = {
        "format_version": 1,
        "chains": ["seed0-k16"],
        "failed": [{"label": "seed1-k16", "reason": "x"}],
        "pairs": [],
    }
    tracker = make()
    table = {"pairs": pair_columns([]), "chains": chain_columns([])}
    assert tracker.log_results(comparison, table, {})
    finish(folders[1])
    names = ["seed0-k16", "seed1-k16"]
    report = tmp_path / "report.txt"
    report.write_text("report")
    comparison = {"format_version": 1, "chains": names, "failed": [], "pairs": [pair(*names)]}
    rows = [chain_row(label, folder, CYCLES) for label, folder in zip(names, folders, strict=True)]
    results = (
        comparison,
        {"pairs": pair_columns(comparison["pairs"]), "chains": chain_columns(rows)},
        {"consistency.base~relu.arm.pw_mcc": 0.25},
    )
    assert tracker.log_results(*results, [report])
    run = runs_of(tracker, key)["sweep", ""]
    got = lambda name: open(tracker._store.client.download_artifacts(run.info.run_id, name, str(tmp_path)), "rb").read()  # noqa: E731
    pairs, chains = json.loads(got("tables/pairs.json")), json.loads(got("tables/chains.json"))
    assert len(pairs["data"]) == 1 and len(chains["data"]) == 2
    assert dict(zip(pairs["columns"], pairs["data"][0], strict=True))["covariance p99"] == 0.3
    assert dict(zip(chains["columns"], chains["data"][0], strict=True))["core sizes"] == "49>70"
    assert got("tables/consistency.csv").decode().splitlines()[1] == "seed0-k16,,0.800000"
    assert got("consistency.png").startswith(b"\x89PNG") and got("core_sizes.png").startswith(b"\x89PNG")
    assert got("report.txt") == b"report" and run.data.metrics["results/consistency.base vs relu.arm.pw_mcc"] == 0.25
    assert run.data.metrics["compare/pw_mcc_min"] == 0.8 and run.data.metrics["compare/share_above_covariance"] == 1.0
    assert (
        run.data.metrics["compare/matched_density_available"] == 0
        and "compare/share_above_matched_density" not in run.data.metrics
    )
    assert "tables/pairs.json" in run.data.tags["mlflow.loggedArtifacts"]
    before = rows_in(output)
    assert tracker.log_results(*results, [report])
    assert rows_in(output) == before


def test_store_that_fails_is_warned_of_once_and_caught_up(sweep, request, caplog, monkeypatch):
    key, (make, (first, _)) = request.node.name, sweep
    finish(first)
    tracker = make()
    works = tracker._store.client.log_artifact

    def full(run_id, path, folder=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracker._store.client, "log_artifact", full)
    with caplog.at_level(logging.WARNING, "dmsae_ray"):
        assert not tracker.sync() and not tracker.sync()
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    monkeypatch.setattr("dmsae_ray.show.mlflow.tracker.CLOSE_WAITS", (0, 0))
    with pytest.raises(TrackingError, match=r"sqlite:.*mlflow.db.*start the same command again"):
        tracker.close()
    monkeypatch.setattr(tracker._store.client, "log_artifact", works)
    assert tracker.sync()
    run = runs_of(tracker, key)["cycle", "-0/0"]
    assert steps_of(tracker, run, "train/loss") == [0, 10, 20, 30, 40] and run.info.status == "FINISHED"
    (first / "cycle_00" / "record.json").write_text("{")
    assert make().sync() is False
    assert "cycle_00/record.json" in caplog.text


def test_long_curves_go_in_several_batches(output):
    store = RunStore(None, output, "experiment")
    store.load()
    run_id = store.open("long", "sweep", "long", "long", {}, None)
    points = [
        Point("m", 1.0 if step else float("nan"), step, 1_790_000_000_000) for step in range(METRICS_PER_BATCH + 2)
    ]
    store.append(run_id, points)
    store.append(run_id, points)
    again = RunStore(None, output, "experiment")
    again.load()
    again.append(run_id, [*points, points[-1]._replace(step=5000)])
    steps = sorted(point.step for point in store.client.get_metric_history(run_id, "m"))
    assert steps == [*range(1, METRICS_PER_BATCH + 2), 5000]


@pytest.mark.parametrize(
    "uri, words",
    [
        (
            "http://name:hunter2@127.0.0.1:1",
            ["http://***@127.0.0.1:1: the MLflow store cannot be used", "Start the server"],
        ),
        ("http://127.0.0.1:1/?token=hunter2", ["?token=***: the MLflow store cannot be used"]),
        ("http://127.0.0.1:hunter2@/x", ["the MLflow store cannot be used"]),
        (
            "postgresql://name:hunter2@127.0.0.1:1/db",
            ["postgresql://***@127.0.0.1:1/db: the MLflow store cannot be used"],
        ),
        ("postgresql://name:hunter2@127.0.0.1:port/db", ["the MLflow store cannot be used"]),
        ("mssql+nothing://name:hunter2@127.0.0.1/db", ["the MLflow store cannot be used"]),
        (
            "mysql://name:hunter2@127.0.0.1/db",
            ["the MLflow store cannot be used", "driver that is not installed: install the package that has MySQLdb"],
        ),
        ("nothing://name:hunter2@there", ["the MLflow store cannot be used"]),
        (
            "sqlite:////proc/none/mlflow.db",
            ["sqlite:////proc/none/mlflow.db: the MLflow store cannot be used", "leave track.uri empty"],
        ),
    ],
)
def test_unusable_store_is_named_before_any_work(tmp_path, monkeypatch, capfd, uri, words):
    """Through the front door: before the corpus is read, and without a word of the password."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    began = time.monotonic()
    assert sweep_.main(["--output", str(tmp_path / "out"), "--track.uri", uri]) == 2
    said = capfd.readouterr()
    assert time.monotonic() - began < 15 and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert all(word in said.err for word in [*words, "track.uri"]), said.err
    assert not (tmp_path / "out" / "tokens").exists() and not (tmp_path / "out" / "data").exists()
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    assert "hunter2" not in said.out + said.err


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_missing_driver_of_postgres_is_an_extra(tmp_path, monkeypatch, driver):
    monkeypatch.setitem(sys.modules, driver, None)  # as if it were not installed
    with pytest.raises(
        TrackingError, match=rf'{driver}.* needs a driver that is not installed: pip install "dmsae_ray\[postgres\]"'
    ):
        RunStore(f"postgresql+{driver}://u:p@127.0.0.1:1/db", tmp_path, "experiment")


def test_a_server_that_swallows_packets_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run_store, "OPEN_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections and never answers
        port = mute.getsockname()[1]
        for uri in (f"http://127.0.0.1:{port}", f"postgresql://u:hunter2@127.0.0.1:{port}/db"):
            began = time.monotonic()
            with pytest.raises(TrackingError, match=r"no answer within 0 s\. Start the server|psycopg"):
                RunStore(uri, tmp_path, "experiment")
            assert time.monotonic() - began < 10


def test_an_experiment_in_the_trash_is_named(output):
    store = RunStore(None, output, "in the trash")
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(TrackingError, match="'in the trash' is in the trash of sqlite"):
        RunStore(None, output, "in the trash")


@pytest.mark.parametrize("name", ["a b", "a%20b", "a#b", "a?b", "a%3Fb;c&d=e"])
def test_a_folder_s_name_is_no_part_of_a_url(tmp_path, name):
    """Each has a database of its own, and none beside it."""
    output = tmp_path / name
    output.mkdir()
    store = RunStore(None, output, "experiment")
    run = store.open("s", "sweep", "s", "s", {}, None)
    (tmp_path / "f.txt").write_text("here")
    store.client.log_artifact(run, str(tmp_path / "f.txt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "f.txt"])
    assert sorted(path.name for path in output.iterdir()) == ["mlartifacts", "mlflow.db", "mlflow_home"]
    again = RunStore(None, output, "experiment")
    again.load()
    assert (
        again.known("s", "sweep", "s") == run
        and (output / "mlartifacts" / run / "artifacts" / "f.txt").read_text() == "here"
    )


@pytest.mark.parametrize("uri", [None, "sqlite:///{}/own.db"])
def test_a_moved_folder_takes_its_artifacts_along(tmp_path, uri):
    old, new = tmp_path / "old", tmp_path / "else where"
    old.mkdir()

    def opened(output):
        store = RunStore(uri and uri.format(output), output, "experiment")
        store.load()
        return store, store.open("s", "sweep", "s", "s", {}, None)

    store, run = opened(old)
    (tmp_path / "f.txt").write_text("before")
    store.client.log_artifact(run, str(tmp_path / "f.txt"))
    shutil.move(old, new)
    _artifact_repos_cache.clear()  # MLflow's, of this process: a moved folder is opened by another
    store, same = opened(new)
    assert same == run
    other = store.open("t", "sweep", "t", "t", {}, None)
    for id_ in (run, other):
        (tmp_path / "g.txt").write_text(id_)
        store.client.log_artifact(id_, str(tmp_path / "g.txt"))
    assert [file.path for file in store.client.list_artifacts(run)] == ["f.txt", "g.txt"]
    assert Path(store.client.download_artifacts(run, "f.txt", str(tmp_path))).read_text() == "before"
    assert not old.exists(), "it does not come back"
    assert follow_move(new / ("own.db" if uri else "mlflow.db"), new) is None


def test_the_runs_of_a_store_are_closed_though_a_chain_s_file_is_damaged(sweep, request):
    key, (make, (first, _)) = request.node.name, sweep
    write_curve(first, 0, 0, 20)
    tracker = make(only=[0])
    assert tracker.sync()
    write_cycle(first, 0, 0, 49, curve=False)
    (first / "cycle_00" / "record.json").write_text("{")
    with pytest.raises(TrackingError, match="record.json: damaged"):
        tracker.close("KILLED")
    assert {run.info.status for run in runs_of(tracker, key).values()} == {"KILLED"}
