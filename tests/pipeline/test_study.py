"""A small study through the front door: arms, transfer, plain SAEs, consensus, features, expectations, report, and two
sweeps beside each other. Chains of the small sweep are reused, so only what is new is trained."""

import json
import shutil

import pytest
import ray
import torch
from conftest import ARMS, command, results, run_command, study_config

from dmsae_ray import report
from dmsae_ray.core.core import Core


def read(output, name):
    return json.loads((results(output) / name).read_text())


def test_every_arm_has_its_chains_and_those_of_the_sweep_are_reused(study, small_sweep):
    output, run = study
    assert "chains: 6 of 8 already finished" in run.out, run.out
    rows = read(output, "evaluation.json")["rows"]
    assert [(row["chain"], row["cycle"], row["stage"], row["from"]) for row in rows] == [
        *[(f"seed{seed}-k8", cycle, "distill", None) for seed in (0, 1) for cycle in (0, 1)],
        ("seed0-k8-random", 0, "distill", None),
        ("seed0-k8-random", 1, "distill", None),
        ("seed0-k16-transfer-from-k8", 0, "transfer", "seed0-k8"),
        ("seed0-k24-transfer-from-k8", 0, "transfer", "seed0-k8"),
        ("seed100-k8-plain", 0, "plain", None),
        ("seed100-k8-plain-long", 0, "plain", None),
        ("seed101-k8-plain-long", 0, "plain", None),
    ]
    for row in rows:
        record = json.loads((output / "chains" / row["folder"] / f"cycle_{row['cycle']:02d}/record.json").read_text())
        assert row["fvu"] == record["fvu"] and row["prefixes"] == record["prefixes"] and row["kl"] == record["kl"]
        assert (row["decoder_drift"] is None) == (record["core_in"] == 0)
        ranks = [rank for rank, _ in row["coverage_curve"]]
        assert record["core_out"] in ranks and row["coverage_curve"][-1][1] == pytest.approx(1)
    (last, *_) = [row for row in rows if row["last"]]
    counts = last["density_histogram"]
    assert sum(counts["core"]) + counts["silent"]["core"] == last["core_out"]
    assert sum(counts["core"]) + sum(counts["free"]) + sum(counts["silent"].values()) == 256


def test_both_transfers_advance_on_one_stream_and_the_others_alone(study):
    """Short form of chains in lockstep by the command, see test_lockstep.py."""
    output, run = study
    assert "groups of up to 2 in lockstep" in run.out
    together = {
        row["chain"]: json.loads((output / "chains" / row["folder"] / "cycle_00/record.json").read_text())["lockstep"]
        for row in read(output, "evaluation.json")["rows"]
        if row["last"]
    }
    assert together == {name: 2 if "transfer" in name else 1 for name in together} and 2 in together.values()


def test_a_transfer_is_trained_on_the_core_of_its_source(study, small_sweep):
    output, _ = study
    rows = {row["chain"]: row for row in read(output, "evaluation.json")["rows"] if row["last"]}
    source, transfer = rows["seed0-k8"], rows["seed0-k16-transfer-from-k8"]
    assert transfer["core_in"] == source["core_out"] and transfer["l0"] == pytest.approx(16, rel=0.1)
    given = Core.load(output / "chains" / source["folder"] / "cycle_01/core.safetensors")
    taken = Core.load(output / "chains" / transfer["folder"] / "cycle_00/core.safetensors")
    kept = taken.latent_ids_C[taken.latent_ids_C < given.size]
    assert torch.equal(taken.W_enc_CD[: len(kept)], given.W_enc_CD[kept]), "frozen rows of the core it began with"
    assert taken.cycle == 2 and taken.entered_C[: len(kept)].max() < 2, "what a member has been through is counted on"


def test_the_comparison_is_by_arm_and_the_base_stands_beside_plain_saes_on_as_many_tokens(study):
    output, run = study
    comparison = read(output, "comparison.json")
    assert comparison["chains"] == [row["chain"] for row in read(output, "evaluation.json")["rows"] if row["last"]]
    assert {(pair["a"], pair["b"], pair["group"]) for pair in comparison["pairs"]} == {
        ("seed0-k8", "seed1-k8", "base/seed"),
        ("seed0-k8", "seed0-k8-random", "base~random/arm"),
        ("seed0-k16-transfer-from-k8", "seed0-k24-transfer-from-k8", "transfer/k"),
        ("seed100-k8-plain", "seed100-k8-plain-long", "plain~plain-long/arm"),
        ("seed100-k8-plain-long", "seed101-k8-plain-long", "plain-long/seed"),
    }
    null = comparison["pairs"][0]["nulls"]["matched_compute"]
    assert null["available"] and null["draws"] == 1 and "the mean of 1 pairs of plain SAEs" in run.out
    long = [row for row in read(output, "evaluation.json")["rows"] if row["arm"] == "plain-long"]
    assert [row["tokens"] for row in long] == [2 * 16_384] * 2
    name = "consistency.base.seed.nulls.matched_compute.mean"
    assert read(output, "numbers.json")[name] == pytest.approx(null["mean"])
    consensus = read(output, "consensus.json")
    sizes = [
        Core.load(output / "chains" / row["folder"] / "cycle_01/core.safetensors").size
        for row in read(output, "evaluation.json")["rows"]
        if row["arm"] == "base" and row["last"]
    ]
    assert sum(len(group["members"]) for group in consensus["groups"]) == sum(sizes), (
        "every latent of every core is in one group"
    )
    assert [row["chain"] for row in consensus["rediscovery"]] == [
        "seed100-k8-plain",
        "seed100-k8-plain-long",
        "seed101-k8-plain-long",
    ]
    for row in consensus["rediscovery"]:
        for name in ("free_consensus", "cycle0_consensus"):
            assert row[name]["available"] == (row[name]["size"] > 0) == (row[name]["reason"] is None)
    features = read(output, "features.json")["features"]
    assert len(features) == min(12, len(consensus["groups"])) and all(feature["contexts"] for feature in features)


def test_expectations_are_judged_and_said(study):
    output, run = study
    entries = read(output, "expectations.json")["expectations"]
    assert [entry["outcome"] for entry in entries] == ["hit", "hit", "miss", "not available"]
    assert "Expected before the run" in run.out and "plain SAEs have a core" in run.out
    assert "plain SAEs have a core" in (results(output) / "report.txt").read_text()


def test_the_report_makes_all_of_it_again_without_training(study, capfd):
    output, _ = study
    folder = results(output)
    names = (
        "comparison.json",
        "consensus.json",
        "features.json",
        "evaluation.json",
        "numbers.json",
        "expectations.json",
    )
    before = {name: json.loads((folder / name).read_text()) for name in names}
    trained = {path: path.stat().st_mtime_ns for path in output.glob("chains/*/cycle_*/*")}
    for name in names:
        (folder / name).unlink()
    run = run_command(output, "--fresh", "--numbers", module="report")
    assert run.code == 0, run.out
    after = {name: json.loads((folder / name).read_text()) for name in names}
    for found in (before, after):
        found["comparison.json"].pop("seconds_per_pair")
    assert after == before
    assert {path: path.stat().st_mtime_ns for path in output.glob("chains/*/cycle_*/*")} == trained, (
        "nothing was trained or touched"
    )
    assert f"evaluation.base.k8.fvu {before['numbers.json']['evaluation.base.k8.fvu']:.6g}" in run.out
    # A second one keeps all that is known, and starts no Ray for it.
    assert report.main(command(output, module="report")[3:]) == 0
    again = capfd.readouterr().out
    assert "Expected before the run" in again and not ray.is_initialized()
    assert "ray: " not in again and "compare: " not in again and "features: " not in again, again


@pytest.mark.slow
def test_training_goes_on_from_a_consensus_core_and_two_sweeps_are_compared(study, small_sweep, tmp_path):
    """The consensus of two seeds may be empty at this size, so the sharper of its groups are forced in by a low
    cosine.
    """
    output = study_config(small_sweep, tmp_path, ARMS.split("study:")[0])
    run = run_command(output, "--compare.cosine", "0.05", "--sweep.seeds", "0,1")
    assert run.code == 0, run.out
    consensus = results(output) / "consensus.safetensors"
    core = Core.load(consensus)
    other = tmp_path / "from"
    shutil.copytree(small_sweep.output / "data", other / "data")
    shutil.copy(tmp_path / "small.yaml", tmp_path / "small2.yaml")
    run = run_command(other, "--sae.core", str(consensus), "--sweep.seeds", "0", "--sweep.cycles", "1")
    assert run.code == 0, run.out
    (row,) = read(other, "evaluation.json")["rows"]
    assert row["core_in"] == core.size and row["stage"] == "distill"
    against = run_command(
        other,
        "--sae.core",
        str(consensus),
        "--sweep.seeds",
        "0",
        "--sweep.cycles",
        "1",
        "--against",
        str(results(output)),
        module="report",
    )
    assert against.code == 0 and "Numbers of both sweeps" in against.out and "evaluation.base.k8.fvu" in against.out, (
        against.out
    )
    (found,) = results(other).glob("against-*.json")
    assert {pair["group"] for pair in json.loads(found.read_text())["pairs"]} == {"base/arm"}


def test_against_what_is_no_sweep_is_refused_at_once(study, tmp_path, capfd):
    output, _ = study
    for folder, words in (
        (tmp_path, "not a sweep's results folder (lacks config.yaml, chains.json, numbers.json)"),
        (results(output), "is this sweep itself"),
    ):
        assert report.main(command(output, "--against", str(folder), module="report")[3:]) == 2
        assert words in capfd.readouterr().err
