"""Saved SAEs measured again by the command, in its own process and without Ray, on a finished sweep's folder."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import command, environment

from dmsae_ray.evaluate import main
from dmsae_ray.sae.sae import MatryoshkaSAE


@pytest.fixture(scope="module")
def output(small_sweep, tmp_path_factory):
    """A copy of the finished sweep's chains and data, with the configuration beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copy(small_sweep.output.parent / "small.yaml", folder)
    kept = shutil.ignore_patterns("mlflow.db", "mlartifacts", "mlflow_home", "sweeps", "pairs", "ray")
    return shutil.copytree(small_sweep.output, folder / "out", ignore=kept)


def evaluate(output, *args) -> int:
    return main(command(output, *args)[3:])


def read(path):
    return json.loads(path.read_text())


def folders(output):
    """label -> folder of each chain."""
    return {read(path)["label"]: path.parent for path in output.glob("chains/*/chain.json")}


def files(output):
    """When each was written, but for what every command leaves: its log, its lock, and what it remembers to have
    found.
    """
    left = ("driver.lock", "dmsae_ray_found.json")
    found = [path for path in output.rglob("*") if path.is_file() and "logs" not in path.parts]
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in found if path.name not in left}


def test_on_the_same_tokens_it_finds_what_the_chain_found(output):
    """Other batches' order of sums apart: one process here, a Ray worker there."""
    before = files(output)
    code = (
        "import sys; from dmsae_ray.evaluate import main; status = main(sys.argv[1:]); assert 'ray' not in "
        "sys.modules; sys.exit(status)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *command(output, "--all")[3:]], env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for label, folder in folders(output).items():
        for cycle in (0, 1):
            found, record = (
                read(folder / f"cycle_{cycle:02d}" / name) for name in ("evaluation-1024.json", "record.json")
            )
            assert (found["label"], found["cycle"], found["chain"]) == (label, cycle, folder.name)
            prefixes = [entry["name"] for entry in found["prefixes"]]
            assert (
                prefixes == ["core"] * bool(cycle) + ["0", "1", "2", "3", "4"]
                and found["prefixes"][-1]["kl"] == found["kl"]
            )
            floats = [name for name, value in record.items() if isinstance(value, float) and name != "finished_at"]
            measured = {name: record[name] for name in floats if name in found}
            assert {"fvu", "kl", "l0", "loss_spliced", "loss_recovered_mean", "dead_share"} < measured.keys()
            assert {name: found[name] for name in measured} == pytest.approx(measured, rel=1e-5)
            for one, other in zip(found["prefixes"], record["prefixes"], strict=True):
                assert one.pop("name") == other.pop("name") and one == pytest.approx(other, rel=1e-5)
    new = files(output).keys() - before.keys()
    assert len(new) == 4 and all(name.endswith("evaluation-1024.json") for name in new), "nothing else is made"
    assert files(output).items() >= before.items(), "nothing is changed"


def test_other_tokens_have_files_of_their_own_and_are_measured_once(output, capfd):
    argv = ("--chain", "seed0-k8", "--evaluate.tokens", "700", "--evaluate.sequences_per_batch", "4")
    assert evaluate(output, *argv) == 0
    out, folder = capfd.readouterr().out, folders(output)["seed0-k8"]
    (made,) = output.glob("chains/*/cycle_*/evaluation-700.json")
    assert made == folder / "cycle_01/evaluation-700.json", (
        "the last cycle of the chain named, though that was trained with other fields"
    )
    found, (references,) = read(made), output.glob("data/*/references-700-4.json")
    assert 700 <= found["evaluation_tokens"] == read(references)["tokens"] < 700 + 128
    assert (
        found["loss_clean"] == read(references)["clean"]
        and found["fvu"] != read(folder / "cycle_01/record.json")["fvu"]
    )
    assert f"{found['fvu']:.3f}" in out and f"{found['kl']:.3f}" in out and "known" not in out
    assert f"{found['evaluation_tokens']:,} tokens in" in out
    begun, running = (
        next(line for line in out.splitlines() if words in line) for words in ("the sweep did", "left for 1 SAEs")
    )
    assert "1 SAEs on 700 tokens each" in begun and "tokens/s, at which it takes" in begun and "tokens/s" in running
    before = files(output)
    assert evaluate(output, *argv) == 0
    out = capfd.readouterr().out
    assert files(output) == before and "seed0-k8 cycle 1: known" in out and f"{found['kl']:.3f}" in out
    key = folder.name
    assert evaluate(output, "--chain", key, *argv[2:]) == 0 and files(output) == before, "by its key, too"
    assert evaluate(output, *argv[:4], "--evaluate.sequences_per_batch", "2") == 0
    again = read(made)
    assert again["evaluate"]["sequences_per_batch"] == 2, "measured as asked for, not taken from other batches"
    assert again["fvu"] == pytest.approx(found["fvu"], rel=1e-5)


def test_other_weights_are_measured_anew(output, capfd):
    path = folders(output)["seed1-k8"] / "cycle_01/sae.safetensors"
    argv = ("--chain", "seed1-k8", "--evaluate.tokens", "500")
    assert evaluate(output, *argv) == 0
    sae, stored = MatryoshkaSAE.load(path)
    with torch.no_grad():
        sae.theta.fill_(1e9)  # silent: nothing but the bias is left
    sae.save(path, stored)
    assert evaluate(output, *argv) == 0
    found = read(path.parent / "evaluation-500.json")
    assert found["l0"] == 0 and found["dead_share"] == 1 and found["core_explained"] is None
    assert "known" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "argv, said",
    [
        (("--chain", "seed7-k8"), "--chain seed7-k8: no chain of this configuration; it has seed0-k8, seed1-k8"),
        (("--evaluate.tokens", "100_000_000"), "evaluate.tokens 100000000: the corpus's evaluation split has only"),
        (("--train.lr", "0.5"), "none of 2 chains asked for is finished"),
        (
            ("--sweep.cycles", "3"),
            "none of 2 chains asked for is finished (with --all, single finished cycles will do)",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(output, argv, said, capfd):
    before = files(output)
    assert evaluate(output, *argv) == 2
    assert said in capfd.readouterr().err
    after = files(output)
    if "--evaluate.tokens" in argv:
        # To know how much text there is the corpus was read to its end, and what was read on the way is kept.
        for found in (before, after):
            for name in [
                name for name in found if name.endswith("tokens/evaluation.safetensors") or name.startswith("tokens/")
            ]:
                del found[name]
    assert after == before


def test_a_damaged_measurement_is_named(output, capfd):
    path = folders(output)["seed0-k8"] / "cycle_01/evaluation-600.json"
    path.write_text("{")
    assert evaluate(output, "--chain", "seed0-k8", "--evaluate.tokens", "600") == 2
    assert f"{path}: damaged" in capfd.readouterr().err
    path.unlink()
    assert evaluate(output, "--chain", "seed0-k8", "--evaluate.tokens", "600") == 0 and path.exists()
