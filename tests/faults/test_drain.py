"""A node that is to be taken away: what is trained until then is saved out of turn, and the chain goes on elsewhere."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest
from conftest import HANGS, command, digest_of_rows, environment, free_port, wait_for
from frozen import frozen
from ray_head import BIN, ray_head

STEPS, BATCH, LANES = 480, 512, 4
CHAIN = [
    *("--sweep.seeds", "0", "--sweep.cycles", "1", "--harvest.tokens", "262144", "--train.tokens", str(STEPS * BATCH)),
    *("--train.lanes", str(LANES), "--train.checkpoint_steps", "1000"),  # none before the end
    *("--cluster.cpus_per_worker", "2"),  # only the nodes of the test have so many
]


@contextmanager
def node(address: str, env: dict[str, str]) -> Iterator[tuple[psutil.Popen, str]]:
    """A further node of a cluster with two CPUs: its process, and its id."""
    known = ids(address, env)
    with tempfile.TemporaryDirectory(prefix="node-") as folder:
        ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        start = [str(BIN / "ray"), "start", f"--address={address}", "--num-cpus=2", "--block", f"--temp-dir={folder}"]
        process = psutil.Popen(
            [*start, *(f"--{name}={free_port()}" for name in ports)],
            env=environment(**env, RAY_worker_niceness="0"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: ids(address, env) - known, process)
            (own,) = ids(address, env) - known
            yield process, own
        finally:
            end(process)


def end(process: psutil.Popen) -> None:
    """As its machine's power would."""
    with suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def ids(address: str, env: dict[str, str]) -> set[str]:
    """Of the cluster's nodes."""
    code = "import json, ray; ray.init(); print(json.dumps([n['NodeID'] for n in ray.nodes() if n['Alive']]))"
    found = subprocess.run(
        [BIN / "python", "-c", code],
        env=environment(**env, RAY_ADDRESS=address),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert found.returncode == 0, found.stderr
    return set(json.loads(found.stdout.splitlines()[-1]))


def actors(title: str, *of: psutil.Process) -> list[psutil.Process]:
    """Processes of actors of this name, on these nodes."""
    found = []
    for one in (one for node in of for one in node.children(recursive=True)):
        with suppress(psutil.Error):
            if one.cmdline()[:1] == [f"ray::{title}"]:
                found.append(one)
    return found


@pytest.mark.slow
def test_a_node_that_is_drained_leaves_a_checkpoint_and_another_goes_on_from_it(tmp_path):
    output = tmp_path / "out"

    def steps() -> int:
        found = list(output.glob("chains/*/cycle_00/curve.jsonl"))
        return len(found[0].read_text().splitlines()) if found else 0

    def checkpoint() -> bool:
        return any(output.glob("chains/*/cycle_00/checkpoint.pt"))

    with ray_head(cpus=1, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.2") as (address, head, env):
        with node(address, env) as (goes, taken):
            log = open(tmp_path / "log", "w")
            process = subprocess.Popen(
                command(output, *CHAIN),
                env=environment(**env, RAY_ADDRESS=address),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            wait_for(lambda: steps() > 2, process)
            assert not checkpoint()
            drain = ["drain-node", f"--address={address}", f"--node-id={taken}", "--reason-message=test"]
            drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds=3600"]
            (worker,) = actors("RayTrainWorker", goes)
            # The command takes longer than the training, and so may the start of what tells Ray Train of it.
            with frozen(worker):
                subprocess.run([BIN / "ray", *drain], env=environment(**env), check=True, timeout=HANGS)
                wait_for(lambda: actors("PreemptionWatcher", head, goes), process)
            wait_for(checkpoint, process)
        with node(address, env):
            code = process.wait(timeout=HANGS)
    assert code == 0, (tmp_path / "log").read_text()
    (record,) = [json.loads(path.read_text()) for path in output.glob("chains/*/cycle_00/record.json")]
    (resume,) = record["resumes"]
    assert 4 < resume["step"] < STEPS
    assert record["data_digest"] == digest_of_rows(output, 0, STEPS, BATCH, LANES)  # every row once
