"""Faults through the front door: each ends with the undisturbed result, or with an error that names file and remedy.
Short form of the killed driver: test_kills.py strikes one sweep three times.
"""

import json
import os
import shutil
import signal
import sqlite3
import time

import pytest
import torch
from conftest import command, core_bytes, data_digests, run_command, start, wait_for


def share_data(source, output):
    """Give a new output folder the finished activations, to spend the test's time on the chains."""
    shutil.copytree(source.output / "data", output / "data")


@pytest.mark.slow
def test_killed_driver_continues_to_the_same_cores(small_sweep, tmp_path, capfd):
    from dmsae_ray.sweep import main

    output = tmp_path / "out"
    share_data(small_sweep, output)
    one_chain = ("--sweep.seeds", "0")
    process, log = start(output, *one_chain)
    wait_for(lambda: any(output.glob("chains/*/chain.json")), process)
    assert main(command(output, *one_chain)[3:]) == 2
    refused = capfd.readouterr().err
    assert "in use by another driver" in refused and str(process.pid) in refused

    # In the middle of training a second cycle: one record exists, and a checkpoint of the next cycle.
    def middle():
        return any(
            (f / "cycle_00" / "record.json").exists() and (f / "cycle_01" / "checkpoint.pt").exists()
            for f in (output / "chains").glob("*")
        )

    wait_for(middle, process)
    before = {path: path.read_bytes() for path in output.glob("chains/*/cycle_*/record.json")}
    assert len(before) == 1 and process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with sqlite3.connect(output / "mlflow.db") as db:
        assert db.execute("select count(*) from runs where status = 'RUNNING'").fetchone()[0] > 0

    again = run_command(output, *one_chain)
    assert again.code == 0, again.out
    for path, content in before.items():
        assert path.read_bytes() == content  # nothing finished is computed again
    cores, undisturbed = core_bytes(output), core_bytes(small_sweep.output)
    assert len(cores) == 2 and cores == {place: undisturbed[place] for place in cores}
    records = [json.loads(path.read_text()) for path in output.glob("chains/*/cycle_*/record.json")]
    assert len(records) == 2
    (resumes,) = [r["resumes"] for r in records if r["generation"] == 2]
    (resume,) = resumes  # from the last checkpoint, not from the start
    assert resume["step"] > 0 and resume["step"] % 8 == 0 and (resume["generation"], resume["workers"]) == (2, 1)
    # The rows of a cycle in two halves are those of an undisturbed one, each once.
    assert data_digests(output).items() <= data_digests(small_sweep.output).items()
    with sqlite3.connect(output / "mlflow.db") as db:
        assert db.execute("select count(*) from runs").fetchone() == (2,)
        assert db.execute("select distinct status from runs").fetchall() == [("FINISHED",)]
        doubled = "select run_uuid, key, step, count(*) from metrics group by run_uuid, key, step having count(*) > 1"
        assert db.execute(doubled).fetchall() == []


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_an_added_seed_reuses_finished_chains_and_a_signal_leaves_no_run_running(small_sweep, tmp_path, capfd, number):
    """scancel, docker stop and Kubernetes send SIGTERM. Signals that follow do not end the clean-up half-way."""
    from dmsae_ray.sweep import main

    output = tmp_path / "out"
    shutil.copytree(small_sweep.output, output)
    finished = {path: path.read_bytes() for path in output.glob("chains/*/cycle_*/*")}
    seeds = ("--sweep.seeds", "0,1,2")
    process, log = start(output, *seeds)
    wait_for(lambda: len(list(output.glob("chains/*/cycle_00/curve.jsonl"))) == 3, process)
    for again in (number, number, signal.SIGTERM):
        os.kill(process.pid, again)
        time.sleep(0.3)
        if process.poll() is not None:
            break
    assert process.wait(timeout=150) == 130, log.read_text()
    assert "2 of 3 already finished" in log.read_text() and "interrupted; the same command continues" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert {path: path.read_bytes() for path in finished} == finished
    with sqlite3.connect(output / "mlflow.db") as db:
        assert db.execute("select count(*) from runs where status = 'RUNNING'").fetchone() == (0,)
        assert db.execute("select count(*) from runs where status = 'KILLED'").fetchone()[0] > 0
    assert main(command(output, *seeds, "--status")[3:]) == 0
    assert "no driver at work" in capfd.readouterr().out


def logged(output) -> str:
    """Why chains failed, as MLflow has it."""
    with sqlite3.connect(output / "mlflow.db") as db:
        return "\n".join(value for (value,) in db.execute("select value from tags where key = 'failed'"))


@pytest.mark.slow
def test_a_chain_that_diverges_is_marked_with_its_reason(small_sweep, tmp_path):
    output = tmp_path / "out"
    share_data(small_sweep, output)
    run = run_command(output, "--sweep.seeds", "0", "--train.lr", "1e6", "--sweep.cycles", "1", "--train.clip", "1e9")
    assert run.code == 1, run.out
    (failure,) = [json.loads(path.read_text()) for path in output.glob("chains/*/failed.json")]
    assert (
        failure["kind"] == "diverged"
        and "train.lr" in failure["reason"]
        and f"step {failure['step']}:" in failure["reason"]
    )
    assert f"cycle 0, step {failure['step']}:" in logged(output), "MLflow says where"
    assert "Compared: 0 of 1 chains" in run.out and "not available" in run.out
    with sqlite3.connect(output / "mlflow.db") as db:
        assert db.execute("select count(*) from runs where status = 'RUNNING'").fetchone() == (0,)
        assert db.execute("select count(*) from runs where status = 'FAILED'").fetchone()[0] >= 2


def test_a_diverged_chain_is_not_run_again_and_the_comparison_says_over_how_many(small_sweep, tmp_path):
    from dmsae_ray.distill.grid import planned
    from dmsae_ray.driver.options import SweepCommand, load

    output = tmp_path / "out"
    shutil.copytree(small_sweep.output, output)
    argv = ["--sweep.seeds", "0,1,2"]
    (key,) = [plan.key for plan in planned(load(SweepCommand, command(output, *argv)[3:])) if plan.label == "seed2-k8"]
    (output / "chains" / key).mkdir()
    failure = {"kind": "diverged", "reason": "the loss of step 3 is nan", "cycle": 0, "generation": 1}
    (output / "chains" / key / "failed.json").write_text(json.dumps(failure))
    run = run_command(output, *argv)
    assert run.code == 1 and "starting" not in run.out, "no chain was run"
    assert "Compared: 2 of 3 chains" in run.out and "the loss of step 3 is nan" in run.out


@pytest.mark.slow
def test_nan_in_the_activations_names_the_shard_and_saves_nothing(small_sweep, tmp_path):
    """A shard that is whole, and recorded as such, but holds NaN: only training can notice."""
    from dmsae_ray.activations.dataset import ActivationDataset
    from dmsae_ray.activations.rowgroup import digest_of
    from dmsae_ray.activations.shard import ShardWriter, inspect_shard, read_rows

    output = tmp_path / "out"
    share_data(small_sweep, output)
    (folder,) = (output / "data").glob("*")
    dataset = ActivationDataset(folder)
    store, manifest = dataset.store, dataset.manifest
    entry, per_group = manifest.shards[1], manifest.rows_per_group
    rows = read_rows(store, entry, per_group, manifest.d, manifest.dtype)
    rows[::7, 3] = float("nan")
    raw = rows.view(torch.int16).numpy()
    facts = inspect_shard(store, entry.file)[1] | {
        "digests": [digest_of(raw[i : i + per_group]) for i in range(0, len(raw), per_group)]
    }
    store.write(entry.file, ShardWriter()._encode(raw, per_group, facts))  # `write` refuses such rows
    tree = json.loads(store.read("manifest.json"))
    tree["shards"][1] = inspect_shard(store, entry.file)[0].to_dict()
    store.write("manifest.json", json.dumps(tree).encode())
    path = folder / entry.file
    run = run_command(output, "--sweep.seeds", "0", "--sweep.cycles", "1")
    assert run.code == 1, run.out
    (failed,) = output.glob("chains/*/failed.json")
    failure = json.loads(failed.read_text())
    assert failure["kind"] == "data" and str(path) in failure["reason"] and "NaN" in failure["reason"]
    assert not list(output.glob("chains/*/cycle_*/sae.safetensors")) and not list(
        output.glob("chains/*/cycle_*/record.json")
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model.hook", "blocks.9.hook_resid_post"], ["model.hook blocks.9", "blocks.3.hook_resid_post"]),
        (["--model.name", "/no/such/model"], ["/no/such/model"]),
        (["--corpus.source", "/no/such/text.jsonl"], ["/no/such/text.jsonl"]),
        (["--harvest.tokens", "9000000000000"], ["output folder", "GB more"]),
        (["--harvest.tokens", "90000000"], ["harvest.tokens 90000000", "corpus"]),
        (["--output", "/proc/nothing/here"], ["output folder /proc/nothing/here", "--output"]),
        (["--harvest.dataset", "/tmp"], ["/tmp/manifest.json", "dmsae_ray.harvest"]),
    ],
)
def test_bad_input_ends_with_one_message_before_ray_starts(tmp_path, capfd, argv, words):
    import ray

    from dmsae_ray.sweep import main

    assert main(command(tmp_path / "out", *argv)[3:]) == 2
    said = capfd.readouterr()
    assert not ray.is_initialized()
    for word in words:
        assert word in said.err, said.err


def test_shards_made_otherwise_are_refused_by_field(small_sweep, tmp_path, capfd):
    from dmsae_ray.sweep import main

    (folder,) = (small_sweep.output / "data").glob("*")
    argv = ["--harvest.dataset", str(folder), "--model.hook", "blocks.1.hook_resid_post"]
    assert main(command(tmp_path / "out", *argv)[3:]) == 2
    said = capfd.readouterr().err
    assert "model.hook" in said and "blocks.2.hook_resid_post" in said
