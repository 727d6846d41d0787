"""The main job through its front door, on real Ray, the real small model and real text."""

import json
import shutil
import sqlite3
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
import ray
import torch
from conftest import command, digest_of_rows

import dmsae_ray
from dmsae_ray import report
from dmsae_ray.core.core import Core
from dmsae_ray.sweep import main


def test_ends_with_both_tables_and_says_where_everything_lies(small_sweep):
    out = small_sweep.run.out
    for label in ("seed0-k8", "seed1-k8"):
        assert label in out
    assert "PW-MCC" in out and "null" in out
    assert str(small_sweep.made) in out and "mlflow" in out.lower()


def test_shows_our_lines_and_not_ray_s(small_sweep, study):
    """On a cluster that it joined, and on one of its own."""
    for chatter in (
        "(pid=",
        "INFO worker",
        "raylet",
        "TuneReport",
        "Logical resource usage",
        "FutureWarning",
        "Traceback",
    ):
        assert chatter not in small_sweep.run.out and chatter not in study[1].out, chatter


def test_one_completion_record_per_chain_and_cycle_with_sound_numbers(small_sweep):
    chains = small_sweep.chains()
    assert len(chains) == 2
    for label, folder in chains.items():
        records = [json.loads(path.read_text()) for path in sorted(folder.glob("cycle_*/record.json"))]
        assert [r["cycle"] for r in records] == [0, 1]
        for r in records:
            assert r["label"] == label and r["tokens"] == r["steps"] * 512 == 16_384 and r["rows_dropped"] == 0
            assert r["workers"] == 1 and r["resumes"] == []
            assert r["data_digest"] == digest_of_rows(small_sweep.output, r["cycle"], r["steps"], 512, 8, r["seed"]), (
                "exactly these rows, once"
            )
            assert 0 < r["fvu"] < 1 and r["core_l0"] + r["free_l0"] == pytest.approx(r["l0"])
            assert r["loss_clean"] < r["loss_spliced"] < r["loss_zero"]
            assert r["coverage"] >= 0.9 and sum(r["origins"].values()) == r["core_out"] > 0
            assert r["kept"] + r["left"] == r["core_in"] and r["kept"] + r["entered"] == r["core_out"]
        assert records[0]["core_in"] == 0 and records[1]["core_in"] == records[0]["core_out"]
        # Decoder rows of a core begin as its encoder rows (sae.core_decoder_init).
        given, drift = Core.load(folder / "cycle_00/core.safetensors"), records[1]["decoder_drift"]
        began_C = torch.nn.functional.cosine_similarity(given.W_dec_CD, given.W_enc_CD)
        assert records[0]["decoder_drift"] is None and drift["before"] == pytest.approx(float(began_C.mean()), abs=1e-5)
        assert drift["gap_closed"] == pytest.approx((drift["mean"] - drift["before"]) / (1 - drift["before"]))


def test_the_comparison_holds_scores_beside_their_nulls(small_sweep):
    (path,) = (small_sweep.output / "sweeps").glob("*/comparison.json")
    (pair,) = json.loads(path.read_text())["pairs"]
    assert -1 <= pair["pw_mcc"] <= 1 and 0 <= pair["overlap"] <= 1
    assert set(pair["nulls"]) == {"covariance", "matched_density", "cycle0", "matched_compute"}
    remedy = "on its 32,768 tokens: add an arm to study.arms"
    assert remedy in pair["nulls"]["matched_compute"]["reason"] and "Plain is not available" in small_sweep.run.out
    assert pair["nulls"]["covariance"]["draws"] == 100


def test_mlflow_holds_the_tree_and_nothing_is_left_running(small_sweep):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{small_sweep.output / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dmsae_ray"]
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    kinds = sorted(run.data.tags["dmsae.kind"] for run in runs)
    assert kinds == ["chain"] * 2 + ["sweep"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        parent = run.data.tags.get("mlflow.parentRunId")
        assert (parent is None) == (run.data.tags["dmsae.kind"] == "sweep")
        if parent is not None:
            for cycle in ("cycle_00", "cycle_01"):
                names = [artifact.path for artifact in client.list_artifacts(run.info.run_id, cycle)]
                assert {f"{cycle}/core.safetensors", f"{cycle}/scores.safetensors", f"{cycle}/curve.jsonl"} <= set(
                    names
                )
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
            assert steps[-1] == 63 and steps == sorted(set(steps)), "both cycles, one after the other"


def test_the_same_command_again_does_nothing_that_is_done(small_sweep, capfd):
    before = {path: path.stat().st_mtime_ns for path in small_sweep.output.rglob("*.safetensors")}
    again = here(capfd, small_sweep)
    assert "seed0-k8" in again and "PW-MCC" in again
    assert "ray: " not in again and not ray.is_initialized()  # nothing to compute, so Ray is not even started
    assert {path: path.stat().st_mtime_ns for path in small_sweep.output.rglob("*.safetensors")} == before
    with sqlite3.connect(small_sweep.output / "mlflow.db") as db:
        assert db.execute("select count(*) from runs").fetchone() == (3,)


def test_its_results_are_loaded_in_python(small_sweep):
    sweep = dmsae_ray.load_sweep(small_sweep.output)
    assert list(sweep.chains) == ["seed0-k8", "seed1-k8"] and all(chain.finished for chain in sweep.chains.values())
    chain = sweep.chains["seed1-k8"]
    assert (chain.seed, chain.k, chain.arm, chain.failure) == (1, 8, "base", None)
    folder = small_sweep.chains()["seed1-k8"]
    core, (sae, about) = chain.core(), chain.sae()
    assert core.size == chain.records[-1].core_out == dmsae_ray.load_core(folder / "cycle_01").size
    assert chain.core(0).size == chain.records[0].core_out == sae.core_size
    # Its own rows, through the SAE: what the record says of it holds.
    dataset = sweep.dataset()
    assert about["scale"] == dataset.manifest.scale and about["chain"] == folder.name
    x_BD = next(iter(dataset.some_rows())).float() / about["scale"]
    z_BF = sae.encode(x_BD)
    assert float((z_BF > 0).float().sum(dim=1).mean()) == pytest.approx(8, rel=0.25)
    assert sweep.numbers["evaluation.base.k8.fvu"] == pytest.approx(
        sum(other.records[-1].fvu for other in sweep.chains.values()) / 2
    )
    assert {pair["a"] for pair in sweep.result("comparison")["pairs"]} == {"seed0-k8"}
    with pytest.raises(ValueError, match=r"nothing.json: no such result; there is .*comparison"):
        sweep.result("nothing")
    with pytest.raises(ValueError, match="seed1-k8 has 2 finished cycles, none is 2"):
        chain.core(2)
    assert sweep.consensus_core() is None or sweep.consensus_core().size > 0


def here(capfd, sweep, *args: str) -> str:
    """The command in this process, which has paid for its imports; what it said."""
    assert main(command(sweep.output, *args)[3:]) == 0
    return capfd.readouterr().out


def test_status_says_what_is_done(small_sweep, capfd):
    status = here(capfd, small_sweep, "--status")
    assert status.count("done") == 2 and "no driver at work" in status
    more = here(capfd, small_sweep, "--status", "--sweep.seeds", "0,1,2")
    assert more.count("done") == 2 + 1 and "not finished" in more and "0 of 2 cycles done" in more


def test_clean_removes_only_what_no_finished_result_needs(small_sweep, capfd):
    stray = small_sweep.output / "chains" / "0123456789ab" / "cycle_00"
    stray.mkdir(parents=True)
    (stray / "checkpoint.pt").write_bytes(b"x" * 1000)
    (small_sweep.output / "data" / "0123456789ab").mkdir()
    before = {path: path.read_bytes() for path in small_sweep.output.glob("chains/*/cycle_*/*") if path.parent != stray}
    assert "would remove" in here(capfd, small_sweep, "--clean", "--dry_run") and stray.exists()
    here(capfd, small_sweep, "--clean")
    assert not stray.exists() and not (small_sweep.output / "data" / "0123456789ab").exists()
    assert {path: path.read_bytes() for path in before} == before
    assert here(capfd, small_sweep, "--status").count("done") == 2


def test_a_moved_folder_of_any_name_keeps_its_artifacts_and_what_fails_late_takes_nothing_with_it(
    small_sweep, tmp_path, capfd
):
    """All through the front door: moved, without a cluster for the features, with a store that is gone for good."""
    moved = tmp_path / "a%20b #c?d"
    shutil.copytree(small_sweep.output, moved)
    shutil.copy(small_sweep.output.parent / "small.yaml", tmp_path / "small.yaml")
    (moved / "sweeps").rename(tmp_path / "sweeps")
    shutil.copytree(tmp_path / "sweeps", moved / "sweeps")
    (folder,) = (moved / "sweeps").iterdir()
    (folder / "features.json").unlink()
    away = ["--cluster.address", "127.0.0.1:1", "--track.uri", "http://name:hunter2@127.0.0.1:1"]
    assert report.main(command(moved, *away, module="report")[3:]) == 1
    said = "".join(capfd.readouterr())
    assert (
        "seed0-k8" in said
        and "PW-MCC" in said
        and "error: track.uri http://***@127.0.0.1:1" in said
        and "hunter2" not in said
    )
    (failed,) = json.loads((folder / "failed_parts.json").read_text())
    assert failed["part"] == "features" and "127.0.0.1:1" in failed["reason"] and failed["reason"] in said
    assert failed["part"] in (folder / "report.html").read_text() and (folder / "numbers.json").exists()

    shutil.copy(tmp_path / "sweeps" / folder.name / "features.json", folder / "features.json")
    assert main(command(moved)[3:]) == 0
    assert not (folder / "failed_parts.json").exists() and "sqlite:" in capfd.readouterr().out
    with sqlite3.connect(moved / "mlflow.db") as db:
        places = [place for (place,) in db.execute("select artifact_uri from runs")]
    here = (moved / "mlartifacts").as_uri()
    assert len(places) == 3 and all(
        place.startswith(f"{here}/") and Path(url2pathname(urlparse(place).path)).is_dir() for place in places
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a%20b #c?d", "small.yaml", "sweeps"]
    for path in moved.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
