"""`ray start --head --num-cpus=2` and `ray job submit`, with token authentication: the same cores as without."""

import secrets
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command, core_bytes, environment

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """A Ray head with two logical CPUs that asks for a token; gives its dashboard port and a client's environment."""
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), PATH=f"{BIN}:/usr/bin:/bin")
    port = free_port()
    start = [BIN / "ray", "start", "--head", "--num-cpus=2", f"--port={free_port()}", f"--dashboard-port={port}"]
    subprocess.run(start, env=env, check=True, capture_output=True, timeout=90)
    yield port, env
    subprocess.run([BIN / "ray", "stop", "--force"], env=env, check=True, capture_output=True, timeout=60)


def test_a_submitted_job_gives_the_same_cores_in_a_lasting_folder(head, small_sweep, tmp_path):
    port, env = head
    output = tmp_path / "lasting"
    submit = [BIN / "ray", "job", "submit", "--address", f"http://127.0.0.1:{port}", "--working-dir", ".", "--"]
    job = ["python", "-m", "dmsae_ray.sweep", "--config", str(small_sweep.output.parent / "small.yaml"), "--output", str(output)]
    done = subprocess.run([*submit, *job], cwd=REPOSITORY, env=env, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "joined, 2 logical CPUs" in done.stdout and "1 chains at once" in done.stdout
    assert "PW-MCC" in done.stdout and "succeeded" in done.stdout
    assert core_bytes(output) == core_bytes(small_sweep.output) != {}


@pytest.mark.slow
def test_a_cluster_that_is_too_small_says_what_would_fit(head, small_sweep, tmp_path):
    _, env = head
    output = tmp_path / "out"
    shutil.copytree(small_sweep.output / "data", output / "data")
    sweep = [BIN / "python", *command(output, "--cluster.workers", "4")[1:]]
    done = subprocess.run(sweep, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    assert done.returncode == 2 and "too small" in done.stdout and "--num-cpus=5" in done.stdout, done.stdout
    assert "1 would fit" in done.stdout and "Traceback" not in done.stdout
