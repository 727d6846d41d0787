"""A placebo chain beside its twin, through the front door."""

import json
import shutil

import pytest
import torch
from conftest import command, run_command
from safetensors.torch import load_file

from dmsae_ray.core.core import Core
from dmsae_ray.core.select import top
from dmsae_ray.sweep import main

PLACEBO = ("--selection.by", "reconstruction", "--selection.size", "match")


@pytest.fixture
def beside(small_sweep, tmp_path):
    """A copy of the finished sweep's output folder to add to; its MLflow database names the original's artifacts, so it
    stays.
    """
    shutil.copytree(
        small_sweep.output, tmp_path / "out", ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts", "sweeps")
    )
    return tmp_path / "out"


def records_of(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("cycle_*/record.json"))]


def test_without_the_chain_to_match_nothing_is_begun(small_sweep, capfd):
    before = sorted(small_sweep.output.rglob("*"))
    assert main(command(small_sweep.output, *PLACEBO, "--sweep.seeds", "0,5")[3:]) == 2
    said = capfd.readouterr().err
    assert "seed5-k8-reconstruction from" in said and "0 of 2 cycles done" in said and "seed0" not in said
    assert "--selection.by attribution --selection.size tau" in said
    assert sorted(small_sweep.output.rglob("*")) == before


@pytest.mark.slow
def test_a_placebo_has_its_twin_s_sizes_and_its_own_criterion(beside, small_sweep):
    run = run_command(beside, *PLACEBO, "--sweep.seeds", "0")
    assert run.code == 0, run.out
    twin = small_sweep.chains()["seed0-k8"]
    (placebo,) = [
        f
        for f in (beside / "chains").glob("*")
        if json.loads((f / "chain.json").read_text())["label"] == "seed0-k8-reconstruction"
    ]
    assert "seed0-k8-reconstruction" in run.out
    theirs, ours = records_of(twin), records_of(placebo)
    assert [r["core_out"] for r in ours] == [r["core_out"] for r in theirs]
    for cycle, (record, other) in enumerate(zip(ours, theirs, strict=True)):
        candidates = record["selection"]["candidates"]
        assert record["selection"] == {"by": "reconstruction", "size": "match", "candidates": candidates}
        assert other["selection"] == {"by": "attribution", "size": "tau", "candidates": candidates}
        core = Core.load(placebo / f"cycle_{cycle:02d}/core.safetensors")
        scores = load_file(placebo / f"cycle_{cycle:02d}/scores.safetensors")
        assert (
            len(scores["values"]) == candidates
            and core.selected_by == "reconstruction"
            and core.size == record["core_out"]
        )
        assert torch.equal(core.latent_ids_C, top(scores["values"], core.size))
        assert torch.equal(core.scores_C, scores["scores"][core.latent_ids_C]), "attribution is measured all the same"
        assert record["coverage"] == pytest.approx(float(core.scores_C.sum() / scores["scores"].sum()))
    # Cycle 0 is the same SAE twice: only what the candidates are ranked by differs.
    first = load_file(placebo / "cycle_00/scores.safetensors")
    assert torch.equal(first["scores"], load_file(twin / "cycle_00/scores.safetensors")["scores"])
    assert ours[0]["fvu"] == theirs[0]["fvu"] and not torch.allclose(first["values"], first["scores"], rtol=0.1)
