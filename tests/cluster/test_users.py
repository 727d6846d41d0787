"""What people type who share a cluster: the README's lines, and two sweeps at once. No disk is shared, the outputs are
at an S3 server.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
from conftest import SMALL, same_results
from readme import submit_lines
from s3_server import KEYS

from cluster.box import BIN, Box, Node
from cluster.ray_box import CHECKOUT, HANGS, Job, RayBox
from cluster.s3_node import S3Node

MLFLOW = 5000


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[RayBox, S3Node]]:
    """A head, three workers and an S3 server; the cluster takes jobs."""
    with pytest.MonkeyPatch.context() as patch, Box() as made:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        server = S3Node(made)
        ray_box = RayBox(made, 3, 1, None, **KEYS)
        assert ray_box.submit(["true"]).wait() == 0
        yield ray_box, server


def mlflow_server(box: Box) -> str:
    """Address of one on a machine of its own, which keeps everything on its disk."""
    node = box.node("mlflow")
    serve = f"server --host 0.0.0.0 --port {MLFLOW} --allowed-hosts * --workers 1 --backend-store-uri sqlite:////srv/store.db"
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = node.popen(
        [BIN / "python", "-m", "mlflow", *serve.split(), "--artifacts-destination", "/srv/artifacts"],
        env=quiet,
        log=node.disk / "server.log",
    )
    address, end = f"http://{node.address}:{MLFLOW}", monotonic() + 600
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return address
        except OSError:
            assert process.poll() is None and monotonic() < end, (node.disk / "server.log").read_text()
            sleep(0.5)


def asked(address: str, path: str, **body: object) -> dict:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_readme_s_lines_submit_a_sweep_that_comes_to_the_bits_of_one_machine(small_sweep, served, tmp_path):
    ray_box, server = served
    mlflow, client = mlflow_server(ray_box.box), ray_box.client
    ray_box.check_out(client)
    checkout = client.disk / CHECKOUT.lstrip("/")
    (checkout / "small.yaml").write_text(SMALL)
    (client.disk / "root/.ray").mkdir()
    (client.disk / "root/.ray/auth_token").write_text(ray_box.token["RAY_AUTH_TOKEN"])
    addresses = {
        "RAY_ADDRESS": ray_box.dashboard,
        "OUTPUT": server.url("readme"),
        "MLFLOW_TRACKING_URI": mlflow,
        "CONFIG": "small.yaml",
    }
    lines = submit_lines()
    assert all(f"${{{name}:-" in lines for name in addresses)
    done = client.run(["bash", "-ec", f"cd {CHECKOUT}\n{lines}"], env=KEYS | addresses, timeout=HANGS)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "chains: 2 to run" in said and "succeeded" in said, said
    assert said.rpartition("succeeded")[2].count("2 cycles") == 2, said  # the status, from the client
    output = server.copy("readme", tmp_path / "whole")
    same_results(output, small_sweep.output, cycles=4)
    kept = {path.name.partition("-")[0] for path in output.glob("logs/*.log")}
    assert kept == {"sweep", "trial", "worker"}
    experiment = asked(mlflow, "experiments/get-by-name?experiment_name=dmsae_ray")["experiment"]["experiment_id"]
    runs = asked(mlflow, "runs/search", experiment_ids=[experiment])["runs"]
    assert {"seed0-k8", "seed1-k8"} <= {run["info"]["run_name"] for run in runs}, runs


def submitted(ray_box: RayBox, client: Node, url: str, seed: int) -> Job:
    ray_box.check_out(client)
    (client.disk / CHECKOUT.lstrip("/") / "small.yaml").write_text(SMALL)
    sweep = ["python", "-m", "dmsae_ray.sweep", "--config", "small.yaml", "--output", url]
    return ray_box.submit([*sweep, "--sweep.seeds", str(seed)], client)


def test_two_users_at_once_get_their_bits_and_a_third_on_one_s_output_is_refused(small_sweep, served, tmp_path: Path):
    ray_box, server = served
    other = ray_box.box.node("other")
    jobs = [
        submitted(ray_box, ray_box.client, server.url("one"), 0),
        submitted(ray_box, other, server.url("two"), 1),
    ]

    def has(prefix: str, part: str) -> bool:
        return any(part in name for name in server.names(prefix))

    end = monotonic() + HANGS
    while not all(has(prefix, "/writer") for prefix in ("one", "two")):  # a worker group of each is at work
        assert all(job.process.poll() is None for job in jobs) and monotonic() < end, [job.said for job in jobs]
        sleep(0.2)
    third = submitted(ray_box, other, server.url("one"), 0)
    assert third.wait() != 0 and "Traceback" not in third.said, third.said
    assert "in use by another driver" in third.said and "give --output another folder" in third.said, third.said
    for job, prefix in zip(jobs, ("one", "two"), strict=True):
        assert job.wait() == 0, job.said
        output = server.copy(prefix, tmp_path / prefix)
        same_results(output, small_sweep.output, cycles=2)
        assert not list(output.glob("sweeps/*/failed_parts.json"))
