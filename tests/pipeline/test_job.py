"""`ray start --head` and `ray job submit`, with token authentication."""

import shutil
import subprocess

import pytest
from conftest import HANGS, command, environment
from panels import asked_metrics, exported
from ray_head import BIN, PATH, ray_head

from dmsae_ray.cluster.metrics import GAUGES


def test_a_submitted_job_runs_the_whole_sweep_in_a_lasting_folder(small_sweep):
    """That its cores are those of a plain command is held wherever one is compared with the small sweep: by the killed
    command of test_kills.py, for instance, and by the chains of test_workers.py.
    """
    said = small_sweep.run.out
    assert "joined, 3 logical CPUs" in said and "2 chains at once" in said and "chains: 2 to run" in said, said
    assert "PW-MCC" in said and "succeeded" in said
    assert all(len(list(folder.glob("cycle_*/core.safetensors"))) == 2 for folder in small_sweep.chains().values())


def test_whatever_the_panels_ask_for_is_exported_while_it_runs(small_sweep):
    there = exported((small_sweep.output.parent / "metrics").read_text())
    assert asked_metrics() <= there.keys(), asked_metrics() - there.keys()
    for name, (_, tags) in GAUGES.items():
        assert set(tags) <= there[f"ray_{name}"], name


@pytest.mark.slow
def test_a_cluster_that_is_too_small_says_what_would_fit(small_sweep, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(small_sweep.output / "data", output / "data")
    sweep = [BIN / "python", *command(output, "--cluster.workers", "4")[1:]]
    with ray_head(cpus=2, PATH=PATH) as (address, _, env):
        client = environment(**env, RAY_ADDRESS=address, PATH=PATH)
        done = subprocess.run(
            sweep, env=client, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=HANGS
        )
    assert done.returncode == 2 and "too small" in done.stdout and "--num-cpus=5" in done.stdout, done.stdout
    assert "1 would fit" in done.stdout and "Traceback" not in done.stdout
