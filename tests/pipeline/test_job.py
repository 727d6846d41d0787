"""`ray start --head --num-cpus=2` and `ray job submit`, with token authentication: the same cores as without."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HANGS, command, core_bytes, environment, free_port
from ray_head import ray_head

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def head():
    """A Ray head with two logical CPUs that asks for a token; gives its dashboard port and a client's environment."""
    port, path = free_port(), f"{BIN}:/usr/bin:/bin"
    with ray_head(cpus=2, dashboard=port, PATH=path) as (address, _, env):
        yield port, environment(**env, RAY_ADDRESS=address, PATH=path)


def test_a_submitted_job_gives_the_same_cores_in_a_lasting_folder(head, small_sweep, tmp_path):
    port, env = head
    output = tmp_path / "lasting"
    # What is new here is the job: rows and one of two chains are there.
    for part in ("data", "tokens", f"chains/{small_sweep.chains()['seed1-k8'].name}"):
        shutil.copytree(small_sweep.output / part, output / part)
    submit = [BIN / "ray", "job", "submit", "--address", f"http://127.0.0.1:{port}", "--working-dir", ".", "--"]
    job = [
        "python",
        "-m",
        "dmsae_ray.sweep",
        "--config",
        str(small_sweep.output.parent / "small.yaml"),
        "--output",
        str(output),
    ]
    end = time.monotonic() + 600
    while True:
        done = subprocess.run([*submit, *job], cwd=REPOSITORY, env=env, text=True, capture_output=True, timeout=HANGS)
        if "No available agent to submit job" not in done.stderr or time.monotonic() > end:
            break  # the head takes jobs some seconds after it said that it has started
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "joined, 2 logical CPUs" in done.stdout and "1 chains at once" in done.stdout
    assert "chains: 1 of 2 already finished" in done.stdout and "PW-MCC" in done.stdout and "succeeded" in done.stdout
    assert core_bytes(output) == core_bytes(small_sweep.output) != {}


@pytest.mark.slow
def test_a_cluster_that_is_too_small_says_what_would_fit(head, small_sweep, tmp_path):
    _, env = head
    output = tmp_path / "out"
    shutil.copytree(small_sweep.output / "data", output / "data")
    sweep = [BIN / "python", *command(output, "--cluster.workers", "4")[1:]]
    done = subprocess.run(sweep, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=HANGS)
    assert done.returncode == 2 and "too small" in done.stdout and "--num-cpus=5" in done.stdout, done.stdout
    assert "1 would fit" in done.stdout and "Traceback" not in done.stdout
