"""A node that is to be taken away: what is trained until then is saved out of turn, and the chain goes on elsewhere."""

from __future__ import annotations

import json
import subprocess

import pytest
from conftest import HANGS, command, digest_of_rows, environment, wait_for
from frozen import frozen
from ray_head import BIN, actors, ray_head, ray_node

STEPS, BATCH, LANES = 480, 512, 4
CHAIN = [
    *("--sweep.seeds", "0", "--sweep.cycles", "1", "--harvest.tokens", "262144", "--train.tokens", str(STEPS * BATCH)),
    *("--train.lanes", str(LANES), "--train.checkpoint_steps", "1000"),  # none before the end
    *("--cluster.cpus_per_worker", "2"),  # only the nodes of the test have so many
]


@pytest.mark.slow
def test_a_node_that_is_drained_leaves_a_checkpoint_and_another_goes_on_from_it(tmp_path):
    output = tmp_path / "out"

    def steps() -> int:
        found = list(output.glob("chains/*/cycle_00/curve.jsonl"))
        return len(found[0].read_text().splitlines()) if found else 0

    def checkpoint() -> bool:
        return any(output.glob("chains/*/cycle_00/checkpoint.pt"))

    with ray_head(cpus=1, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.2") as (address, head, env):
        with ray_node(address, env, 2) as (goes, taken):
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
        with ray_node(address, env, 2):
            code = process.wait(timeout=HANGS)
    assert code == 0, (tmp_path / "log").read_text()
    (record,) = [json.loads(path.read_text()) for path in output.glob("chains/*/cycle_00/record.json")]
    (resume,) = record["resumes"]
    assert 4 < resume["step"] < STEPS
    assert record["data_digest"] == digest_of_rows(output, 0, STEPS, BATCH, LANES)  # every row once
