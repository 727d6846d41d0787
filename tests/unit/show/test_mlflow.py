"""MLflow shows what lies on disk, once, whatever happened to earlier drivers. A real sqlite store, shared by the
module.
"""

import json
import logging
import shutil
import socket
import sqlite3
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from records import cycle_record
from safetensors.numpy import save_file
from sqlalchemy import event
from sqlalchemy.engine import Engine

from dmsae_ray import load_core
from dmsae_ray import sweep as sweep_
from dmsae_ray.core.core import Core
from dmsae_ray.distill.failure import write_failure
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.record import RECORD_VERSION
from dmsae_ray.lock import Lease
from dmsae_ray.show.columns import chain_columns, chain_row, pair_columns
from dmsae_ray.show.mlflow import run_store
from dmsae_ray.show.mlflow.chain_runs import Data, TrackedChain
from dmsae_ray.show.mlflow.measurements import COVERAGE_POINTS, CURVE_POINTS, curve_rows
from dmsae_ray.show.mlflow.own_database import follow_move
from dmsae_ray.show.mlflow.run_store import METRICS_PER_BATCH, PARAM_LENGTH, Point, RunStore
from dmsae_ray.show.mlflow.tracker import MlflowTracker
from dmsae_ray.show.tracking import TrackingError

pytestmark = pytest.mark.usefixtures("tables_made_once")

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


def core_of(size, cycle=0):
    """A core of this many latents of length 4."""
    W_CD = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
    W_CD /= W_CD.norm(dim=1, keepdim=True)
    ones, ids = torch.ones(size), torch.arange(size)
    return Core(
        W_CD,
        W_CD,
        0 * ones,
        torch.zeros(4),
        ones,
        ones / 2,
        ids,
        0.1,
        2.0,
        "hook",
        "model",
        cycle,
        0,
        16,
        0 * ids + cycle,
        ((cycle,),) * size,
    )


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
    core_of(core_out, cycle).save(path / "core.safetensors")
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
            STEPS + 1,
            Data("model hook", "0123456789ab", "/data/0123456789ab", 1000, 4),
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


def artifacts_of(tracker, run, folder=None):
    return {entry.path for entry in tracker._store.client.list_artifacts(run.info.run_id, folder)}


def test_tree_metrics_and_artifacts_then_nothing_new(sweep, output, request):
    key, (make, (first, second)) = request.node.name, sweep
    finish(first)
    write_curve(second, 0, 0, 20, torn=True)
    tracker = make()
    assert tracker.sync()
    runs = runs_of(tracker, key)
    top, chain = runs["sweep", ""], runs["chain", "-0"]
    assert set(runs) == {("sweep", ""), ("chain", "-0"), ("chain", "-1")}
    assert chain.data.tags["mlflow.parentRunId"] == top.info.run_id
    assert {name: chain.data.tags[name] for name in ("seed", "k", "chain", "stage", "arm")} == {
        "seed": "0",
        "k": "16",
        "chain": "seed0-k16",
        "stage": "distill",
        "arm": "base",
    }
    assert top.data.params["sae.width"] == "2048" and len(top.data.params["sae.note"]) == PARAM_LENGTH
    params = chain.data.params
    assert (params["chain.data_seed"], params["seed"], params["k"], params["arm"]) == ("0", "0", "16", "base")
    assert params["sae.width"] == "2048" and "sweep.cycles" not in params
    # Training goes on through the cycles; what is measured has the cycle as its step.
    assert steps_of(tracker, chain, "train/loss") == [*range(0, 41, 10), *range(41, 82, 10)]
    assert {name for name in chain.data.metrics if name.startswith("train/")} == {"train/loss", "train/fvu"}
    assert chain.data.metrics["core/size"] == 70 and chain.data.metrics["core/jaccard"] == 0.7
    assert steps_of(tracker, chain, "core/size") == [0, 1] and steps_of(tracker, chain, "core/jaccard") == [1]
    ranks = steps_of(tracker, chain, "attribution/coverage")
    assert len(ranks) <= COVERAGE_POINTS and 70 in ranks and ranks[0] == 1 and ranks[-1] == 700
    assert chain.data.metrics["attribution/coverage"] == pytest.approx(1.0)
    assert len(chain.data.metrics) < 30
    assert artifacts_of(tracker, chain) == {"cycle_00", "cycle_01"}
    files = {"core.safetensors", "scores.safetensors", "record.json", "curve.jsonl"}
    assert artifacts_of(tracker, chain, "cycle_01") == {f"cycle_01/{name}" for name in files}
    (data,) = chain.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("model hook", "0123456789ab")
    assert json.loads(data.dataset.source) == {"uri": "/data/0123456789ab"}
    assert (chain.info.status, runs["chain", "-1"].info.status, top.info.status) == ("FINISHED", "RUNNING", "RUNNING")
    assert chain.info.end_time - chain.info.start_time == 90_000

    before, begin = rows_in(output), time.thread_time()
    assert tracker.sync()
    assert time.thread_time() - begin < 0.3
    assert rows_in(output) == before
    assert make().sync()
    assert rows_in(output) == before


def test_a_long_curve_is_thinned_the_same_way_however_often_it_is_read(tmp_path):
    """At most CURVE_POINTS points and the last step, whether it was read at once, in two pieces or after a crash."""
    path, steps = tmp_path / "curve.jsonl", 1003
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(600)))
    early = [step for step, _ in curve_rows(path, -1, steps)]
    with open(path, "a") as file:
        file.write('{"step": 6')
        file.write("".join(f'\n{{"step": {step}, "loss": 1.0}}' for step in range(580, steps)))
    whole = [step for step, _ in curve_rows(path, -1, steps)]
    assert early + [step for step, _ in curve_rows(path, early[-1], steps)] == whole
    assert whole[0] == 0 and whole[-1] == steps - 1 and CURVE_POINTS * 0.9 < len(whole) <= CURVE_POINTS + 1


def test_a_core_is_read_by_every_address(sweep, output, request, monkeypatch):
    key, (make, folders) = request.node.name, sweep
    for folder in folders:
        finish(folder)
    consensus = output / "consensus.safetensors"
    tracker, name = make(), f"sweep {request.node.name}-consensus"
    for size, version in ((30, 1), (30, 1), (31, 2)):  # logged twice it is one version
        core_of(size).save(consensus)
        assert tracker.log_results(None, {}, {"times": float(version)}, [consensus])
        for address in (f"models:/{name}@current", f"models:/{name}/{version}"):
            assert load_core(address, store=output).fingerprint == core_of(size).fingerprint
        tracker = make()
    chain = runs_of(tracker, key)["chain", "-0"]
    (model,) = chain.outputs.model_outputs
    want = Core.load(folders[0] / "cycle_01" / "core.safetensors")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tracker.uri))
    addresses = [f"models:/{model.model_id}", *(f"runs:/{chain.info.run_id}/{end}" for end in ("core", "cycle_01"))]
    for address in addresses:
        assert load_core(address).fingerprint == want.fingerprint, address
    logged = tracker._store.client.get_logged_model(model.model_id)
    assert (logged.name, logged.params["size"], logged.tags["seed"]) == ("core", "70", "0")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(str(tracker.uri))
    try:
        found = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    finally:
        mlflow.set_tracking_uri(before)
    assert (found.metadata.signature.inputs.inputs[0].shape, found.metadata.signature.outputs.inputs[0].shape) == (
        (-1, 4),
        (-1, 70),
    )
    rows_RD = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    p_RC = (rows_RD / want.scale - want.b_dec_D) @ want.W_enc_CD.T + want.b_enc_C
    np.testing.assert_allclose(found.predict(rows_RD.numpy()), p_RC * (p_RC > want.theta), rtol=1e-5)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ValueError, match="give store= a sweep's output folder or a tracking URI"):
        load_core(f"models:/{name}@current")
    with pytest.raises(ValueError, match=r"models:/nothing@current: not found in sqlite"):
        load_core("models:/nothing@current", store=output)
    with pytest.raises(ValueError, match="has no mlflow.db"):
        load_core("models:/nothing@current", store=folders[0])
    with pytest.raises(ValueError, match="leave out store="):
        load_core(folders[0] / "cycle_01", store=output)


@pytest.mark.parametrize(
    "call", ["create_logged_model", "log_model_artifacts", "log_outputs", "finalize_logged_model", "log_inputs"]
)
@pytest.mark.parametrize("arrives", [True, False])
def test_a_server_that_goes_while_a_core_is_logged_leaves_one_model(sweep, monkeypatch, call, arrives):
    """Also where what was sent has arrived, and its answer is lost."""
    (make, (first, _)), key = sweep, f"goes at {call} {arrives}"
    finish(first)
    tracker = make(key, only=[0])
    client, works = tracker._store.client, getattr(tracker._store.client, call)

    def away(*given, **named):
        if arrives:
            works(*given, **named)
        raise OSError("no answer")

    monkeypatch.setattr(client, call, away)
    assert not tracker.sync()
    monkeypatch.setattr(client, call, works)
    assert tracker.sync()
    (run,) = [run for (kind, _), run in runs_of(tracker, key).items() if kind == "chain"]
    mine = f"source_run_id = '{run.info.run_id}'"
    (model,) = client.search_logged_models([tracker._store.experiment_id], filter_string=mine)
    assert str(model.status) == "READY" and [one.model_id for one in run.outputs.model_outputs] == [model.model_id]
    assert len(run.inputs.dataset_inputs) == 1
    core = load_core(f"runs:/{run.info.run_id}/core", store=tracker.uri.reveal())
    assert core.fingerprint == Core.load(first / "cycle_01" / "core.safetensors").fingerprint


def test_a_store_of_an_earlier_version_is_filled_up_without_a_second_run(sweep, request):
    """Its chain runs are finished and have other metrics, its cycles runs of their own: all stay."""
    key, (make, (first, _)) = request.node.name, sweep
    finish(first)
    tracker = make(only=[0])
    store = tracker._store
    store.load()
    top = store.open(key, "sweep", key, "sweep", {"stage": "sweep"}, None)
    chain = store.open(key, "chain", f"{key}-0", "seed0-k16", {"seed": "0"}, top)
    cycle = store.open(key, "cycle", f"{key}-0/0", "seed0-k16 cycle 0", {}, chain)
    store.append(chain, [Point("cycle/core_size", 70, 1, 1_790_000_000_000)])
    store.params(chain, {"chain.data_seed": 0})
    for run in (cycle, chain, top):
        store.set_status(run, "FINISHED")
    for _ in range(2):
        tracker = make(only=[0])
        tracker.close()
    runs = runs_of(tracker, key)
    assert {name: run.info.run_id for name, run in runs.items()} == {
        ("sweep", ""): top,
        ("chain", "-0"): chain,
        ("cycle", "-0/0"): cycle,
    }
    found = runs["chain", "-0"]
    assert found.data.metrics["core/size"] == found.data.metrics["cycle/core_size"] == 70
    assert found.data.tags["dmsae.place"] == "00000" and len(found.outputs.model_outputs) == 1
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_killed_driver_leaves_no_gap_and_no_duplicate(sweep, request, monkeypatch):
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

    def away(*_):
        raise OSError("killed here")

    monkeypatch.setattr(tracker._store.client, "log_outputs", away)  # between the model and its place in the run
    assert not tracker.sync()
    tracker = make(only=[0])
    tracker.close()
    after = runs_of(tracker, key)
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    assert all(after[name].info.run_id == run.info.run_id for name, run in before.items())
    chain = after["chain", "-0"]
    assert steps_of(tracker, chain, "train/fvu") == [*range(0, 41, 10), *range(41, 82, 10)]
    assert steps_of(tracker, chain, "sae/l0") == [0, 1]
    assert not [run for run in after.values() if run.info.end_time is None]
    store = tracker._store
    models = store.client.search_logged_models(
        [store.experiment_id], filter_string=f"source_run_id = '{chain.info.run_id}'"
    )
    assert [model.model_id for model in models] == [model.model_id for model in chain.outputs.model_outputs]
    assert len(models) == 1


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
    assert {run.info.status for run in killed.values()} == {"KILLED"} and ("chain", "-0") in killed
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
    assert runs["chain", "-1"].info.status == "FAILED"
    assert runs["chain", "-1"].data.tags["failed"] == "cycle 0, step 25: loss is nan"
    assert runs["sweep", ""].info.status == "FINISHED"
    (second / "failed.json").unlink()
    write_curve(second, 0, 30, STEPS)
    write_cycle(second, 0, 0, 49, curve=False)
    finish(second, start=1)
    make(only=[1]).close()
    runs = runs_of(tracker, key)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert "failed" not in runs["chain", "-1"].data.tags


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
    chains = [run for (kind, _), run in runs_of(tracker, key).items() if kind == "chain"]
    for chain in chains:
        metrics = chain.data.metrics
        assert (metrics["agreement/pw_mcc"], metrics["agreement/null"], metrics["agreement/cycle0"]) == (0.8, 0.3, 0.2)
        assert metrics["agreement/partners"] == 1 and "agreement/null_density" not in metrics
        assert "report.html" in chain.data.tags["mlflow.note.content"]
    assert len(chains) == 2
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
    run = runs_of(tracker, key)["chain", "-0"]
    assert steps_of(tracker, run, "core/size") == [0, 1] and run.info.status == "FINISHED"
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


class Refusing(BaseHTTPRequestHandler):
    """A server that answers every request with one status, as a tracking server with users does."""

    status = 0

    def do_GET(self) -> None:
        self.send_error(self.status)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize(
    "status, words",
    [
        (401, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the command runs"),
        (403, "permit to edit the experiment, or give track.experiment another name"),
        (404, "correct track.uri"),
    ],
)
def test_a_server_that_refuses_says_what_it_wants(tmp_path, monkeypatch, status, words):
    monkeypatch.setattr(Refusing, "status", status)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://lab:hunter2@127.0.0.1:{server.server_port}"
        with pytest.raises(TrackingError, match=rf"^track\.uri http://\*\*\*@127.*{status}.*{words}") as error:
            RunStore(url, tmp_path, "experiment")
        server.shutdown()
    assert "hunter2" not in str(error.value)


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
