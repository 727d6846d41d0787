"""Machines that share no disk: the output is at an S3 server. They come to the bits of one machine, also where one is
cut off while it trains, and comes back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
from conftest import SMALL, same_results
from s3_server import KEYS

from cluster.box import Box, Node
from cluster.ray_box import CHECKOUT, HANGS, Job, RayBox
from cluster.s3_node import S3Node


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> Iterator[tuple[RayBox, S3Node]]:
    """A head, three workers and an S3 server; no folder is shared."""
    with pytest.MonkeyPatch.context() as patch, Box() as made:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        server = S3Node(made)
        yield RayBox(made, 3, 1, None, **KEYS), server


def submitted(ray_box: RayBox, url: str, *args: str) -> Job:
    ray_box.check_out(ray_box.client)
    (ray_box.client.disk / CHECKOUT.lstrip("/") / "small.yaml").write_text(SMALL)
    sweep = ["python", "-m", "dmsae_ray.sweep", "--config", "small.yaml", "--output", url]
    return ray_box.submit([*sweep, *args])


def wait_for(condition: Callable[[], object], job: Job) -> None:
    end = monotonic() + HANGS
    while not condition():
        assert job.process.poll() is None and monotonic() < end, job.said
        sleep(0.2)


def trains(node: Node) -> bool:
    def title(pid: int) -> bytes:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return b""

    return any(title(pid).startswith(b"ray::RayTrainWorker") for pid in node.pids())


def said_by(server: S3Node, prefix: str, node: Node) -> list[str]:
    """The logs of workers on this node that lie with the output."""
    logs = [text.decode() for name, text in server.content(prefix).items() if name.startswith("logs/worker-")]
    return [text for text in logs if f" on {node.name}\n" in text]


def test_machines_without_a_common_disk_come_to_the_bits_of_one(small_sweep, apart, tmp_path):
    ray_box, server = apart
    job = submitted(ray_box, server.url("apart"))
    assert job.wait() == 0 and "chains: 2 to run" in job.said, job.said
    output = server.copy("apart", tmp_path / "whole")
    same_results(output, small_sweep.output, cycles=4)
    (results,) = (output / "sweeps").iterdir()
    assert not (results / "failed_parts.json").exists() and (results / "features.json").exists()


def test_a_machine_that_is_cut_off_and_comes_back_changes_nothing(small_sweep, apart, tmp_path):
    ray_box, server = apart
    # Long enough for the cable to be cut while it trains: a checkpoint in every step.
    job = submitted(ray_box, server.url("cut"), "--sweep.seeds", "0", "--train.checkpoint_steps", "1")
    workers = ray_box.workers.values()

    def training() -> list[Node]:
        names = [name for name in server.names("cut") if name.endswith("checkpoint.pt")]
        return [node for node in workers if trains(node)] if names else []

    wait_for(training, job)
    (victim,) = training()
    victim.cut()
    assert said_by(server, "cut", victim), server.names("cut")  # also if it never came back
    wait_for(lambda: any(trains(node) for node in workers if node is not victim), job)
    victim.mend()
    assert job.wait() == 0, job.said
    output = server.copy("cut", tmp_path / "whole")
    same_results(output, small_sweep.output, cycles=2)
    records = [json.loads(path.read_text()) for path in sorted(output.glob("chains/*/cycle_*/record.json"))]
    assert sum(len(record["resumes"]) for record in records) == 1, records
