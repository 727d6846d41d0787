"""Chains that advance on one stream come to what each comes to alone."""

import json
import shutil

import pytest
from conftest import core_bytes, data_digests, digest_of_rows, run_command, sae_tensors
from ray_here import ray_here, train_here

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.config import Config
from dmsae_ray.distill.grid import plan_chains, planned
from dmsae_ray.distill.trials import in_lockstep
from dmsae_ray.driver.options import SweepCommand, load


def groups_of(*argv):
    command = load(SweepCommand, ["--sweep.seeds", "0,1", "--sweep.k", "8,16,32", *argv])
    return [[plan.label for plan in group] for group in in_lockstep(planned(Config(**command.section_dict())))]


def test_groups_share_their_batches():
    assert groups_of("--cluster.lockstep", "1") == [[f"seed{seed}-k{k}"] for seed in (0, 1) for k in (8, 16, 32)]
    assert sorted(groups_of("--cluster.lockstep", "2")) == [
        ["seed0-k32"],
        ["seed0-k8", "seed0-k16"],
        ["seed1-k32"],
        ["seed1-k8", "seed1-k16"],
    ]
    # One order of data for all: seeds advance together, too.
    (everyone,) = groups_of("--cluster.lockstep", "6", "--sweep.data_seed", "3")
    assert len(everyone) == 6


def by_label(output, found: dict[str, bytes]) -> dict[str, bytes]:
    """The same by the chain's label instead of its key."""
    labels = {
        path.parent.name: json.loads(path.read_text())["label"] for path in (output / "chains").glob("*/chain.json")
    }
    return {
        place.replace(key, label): value
        for place, value in found.items()
        for key, label in labels.items()
        if key in place
    }


def everything(output, label):
    found = {}
    for what in (core_bytes, sae_tensors, data_digests):
        found |= {place: value for place, value in by_label(output, what(output)).items() if f"/{label}/" in place}
    return found


@pytest.fixture
def halfway(small_sweep, tmp_path):
    """Three sparsities of a seed, and the folder of the third: one has its first cycle, one has nothing, one has a
    damaged checkpoint. Gives (output folder, options, their plans, the third's folder).
    """
    output, argv = tmp_path / "out", ["--sweep.seeds", "0", "--sweep.k", "8,16,24", "--cluster.lockstep", "3"]
    for part in ("data", "tokens"):
        shutil.copytree(small_sweep.output / part, output / part)
    ahead = small_sweep.chains()["seed0-k8"]
    shutil.copytree(ahead, output / "chains" / ahead.name)
    shutil.rmtree(output / "chains" / ahead.name / "cycle_01")
    small = small_sweep.output.parent / "small.yaml"
    config = load(SweepCommand, ["--config", str(small), "--output", str(output), *argv])
    (folder,) = (output / "data").glob("*")
    plans = plan_chains(Config(**config.sections()), ActivationDataset(folder))
    (broken,) = [plan.folder for plan in plans if plan.label == "seed0-k24"]
    broken.cycle(0).path.mkdir(parents=True)
    broken.cycle(0).checkpoint.write_bytes(b"half a checkpoint")
    return output, argv, plans, broken


def joined_and_left_behind(output, broken, small_sweep) -> None:
    """What must have become of the three."""
    assert str(broken.cycle(0).checkpoint) in broken.failure().reason and "damaged" in broken.failure().reason
    assert everything(output, "seed0-k8") == everything(small_sweep.output, "seed0-k8") != {}
    together = {
        record["label"]: [
            json.loads((path.parent / f"cycle_{cycle:02d}/record.json").read_text())["lockstep"] for cycle in (0, 1)
        ]
        for path in (output / "chains").glob("*/chain.json")
        for record in [json.loads(path.read_text())]
        if "k24" not in record["label"]
    }
    assert together == {"seed0-k8": [1, 2], "seed0-k16": [1, 2]}, "alone until the other one had caught up"
    for chain in (output / "chains").glob("*/cycle_01"):
        for cycle in (0, 1):
            digest = json.loads((chain.parent / f"cycle_{cycle:02d}/record.json").read_text())["data_digest"]
            assert digest == digest_of_rows(output, cycle, 32, 512, 8), (
                "one order of data: the same rows in the same cycle"
            )


def test_a_chain_that_is_ahead_is_joined_and_one_that_fails_is_left_behind(halfway, small_sweep):
    """The worker's loop in this process."""
    output, _, plans, broken = halfway
    for plan in plans:
        plan.folder.describe(plan.key, plan.label, plan.fields)
    with ray_here(cpus=2, include_dashboard=False):
        train_here(plans)
    joined_and_left_behind(output, broken, small_sweep)


@pytest.mark.slow
def test_the_command_goes_on_in_lockstep_without_the_one_that_fails(halfway, small_sweep):
    """The same through the front door. Short forms: the test above, and test_study.py, whose transfers advance together
    by the command.
    """
    output, argv, _, broken = halfway
    run = run_command(output, *argv)
    assert run.code == 1 and "lockstep" in run.out, run.out
    assert "Compared: 2 of 3 chains" in run.out
    joined_and_left_behind(output, broken, small_sweep)


@pytest.mark.slow
def test_lockstep_gives_every_chain_the_bits_it_has_alone(small_sweep, tmp_path):
    outputs = [tmp_path / name / "out" for name in ("alone", "together")]
    for output, most in zip(outputs, ("1", "4"), strict=True):
        for part in ("data", "tokens"):
            shutil.copytree(small_sweep.output / part, output / part)
        # Both seeds on one order of data: four chains on one stream.
        run = run_command(output, "--sweep.k", "8,16", "--sweep.data_seed", "5", "--cluster.lockstep", most)
        assert run.code == 0, run.out
    for label in ("seed0-k8", "seed1-k8", "seed0-k16", "seed1-k16"):
        assert everything(outputs[0], label) == everything(outputs[1], label) != {}
