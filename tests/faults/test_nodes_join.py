"""Nodes that come when a sweep waits for them, or while it trains: by hand, and by Ray's own autoscalers. Short form of
what decides: tests/unit/cluster/test_autoscaler.py, tests/unit/distill/test_trials.py.
"""

from __future__ import annotations

import json

import psutil
import pytest
from conftest import digest_of_rows, free_port, same_results
from ray_head import PATH, actors, autoscaler, ray_head, ray_node, submitted_to
from victims import Victim, copy_parts, frozen, none_left_running  # noqa: F401 (a fixture is used by its name)

POOL = ("--cluster.label_selector", "pool=ours")


def trained_on(*nodes: psutil.Process) -> list[psutil.Process]:
    return actors("RayTrainWorker", *nodes)


@pytest.mark.slow
def test_nodes_that_join_are_waited_for_and_used_while_others_train(small_sweep, tmp_path):
    """The head's only CPU is the spare one; chains run on nodes of the pool alone, which come one after the other."""
    output = tmp_path / "out"
    copy_parts(small_sweep.output, output, "data", "tokens")
    with ray_head(cpus=1) as (address, head, env):
        command = Victim(output, "--cluster.wait_for_nodes", "60", *POOL, **env | {"RAY_ADDRESS": address})
        command.wait_for(lambda: "waiting for nodes (60 minutes at most" in command.said)
        assert "the Ray cluster (1 node, 0 of them with cluster.label_selector pool=ours)" in command.said
        with ray_node(address, env, 1, "--labels=pool=ours") as (first, _):
            command.wait_for(lambda: trained_on(first), every=0.2)
            assert "1 chains at once" in command.said
            (worker,) = trained_on(first)
            with frozen(worker), ray_node(address, env, 1, "--labels=pool=ours") as (second, _):
                command.wait_for(lambda: trained_on(second), every=0.2)
                assert len(trained_on(first)) == 1
                worker.resume()
                command.finish()
        assert not trained_on(head)
    same_results(output, small_sweep.output, cycles=4)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_an_autoscaler_brings_the_nodes_that_a_sweep_asks_for(small_sweep, tmp_path, version):
    """A head without workers: nothing that the work needs is there when the command comes."""
    output = tmp_path / "out"
    copy_parts(small_sweep.output, output, "data", "tokens")
    scaled = autoscaler(version, 3, {"CPU": 1, "object_store_memory": 600_000_000}, {"pool": "ours"})
    with ray_head(cpus=0, scaled=scaled) as (address, head, env):
        command = Victim(output, *POOL, **env | {"RAY_ADDRESS": address})
        command.wait_for(lambda: "waiting for nodes (without end" in command.said)
        assert "its autoscaler was asked for them" in command.said
        command.wait_for(lambda: len(trained_on(head)) == 2, every=0.2)
        command.finish()
        assert "joined, 2 logical CPUs, 0 GPUs" in command.said  # what was asked for meanwhile is no one else's
        assert "those that wait for nodes of the autoscaler included" in command.said
    same_results(output, small_sweep.output, cycles=4)


@pytest.mark.slow
def test_a_chain_goes_on_with_fewer_workers_and_has_all_again_when_a_node_comes(tmp_path):
    """Every row is trained on once, by two workers, by one, and by two."""
    steps, batch, lanes = 480, 512, 4
    output, pool = tmp_path / "out", "--labels=pool=ours"
    args = [
        "--sweep.seeds",
        "0",
        "--sweep.cycles",
        "1",
        "--train.tokens",
        str(steps * batch),
        "--train.batch",
        str(batch),
    ]
    args += ["--harvest.tokens", "262144", "--train.lanes", str(lanes), "--train.checkpoint_steps", "10"]
    args += [
        "--cluster.workers",
        "2",
        "--cluster.min_workers",
        "1",
        "--cluster.cpus_per_worker",
        "1",
        *POOL,
    ]

    def step() -> int:
        points = [
            line for path in output.glob("chains/*/cycle_00/curve.jsonl") for line in path.read_text().splitlines()
        ]
        return json.loads(points[-1])["step"] if points else 0

    with ray_head(cpus=1) as (address, _, env), ray_node(address, env, 1, pool) as (stays, _):
        with ray_node(address, env, 1, pool) as (goes, _):
            command = Victim(output, *args, **env | {"RAY_ADDRESS": address})
            command.wait_for(lambda: step() > 20 and trained_on(stays) and trained_on(goes), every=0.1)
        lost_at = step()
        command.wait_for(lambda: step() > lost_at + 20 and len(trained_on(stays)) == 1, every=0.1)
        (alone,) = trained_on(stays)
        with frozen(alone), ray_node(address, env, 1, pool) as (comes, _):
            alone.resume()
            command.wait_for(lambda: trained_on(stays) and trained_on(comes), every=0.1)
            command.finish()
    (record,) = [json.loads(path.read_text()) for path in output.glob("chains/*/cycle_00/record.json")]
    assert [resume["workers"] for resume in record["resumes"]] == [1, 2], record["resumes"]
    assert record["data_digest"] == digest_of_rows(output, 0, steps, batch, lanes)


@pytest.mark.slow
def test_a_submitted_command_runs_on_a_node_that_stays():
    """By default on the head; the line of USING.md for another."""
    where = "import psutil; print('below', *(above.pid for above in psutil.Process().parents()), 'it runs')"

    def above(*options: str) -> list[int]:
        env = token | {"RAY_ADDRESS": address, "PATH": PATH}
        said = submitted_to(port, env, ["-c", where], *options).stdout
        return [int(number) for number in said.partition("below ")[2].partition(" it runs")[0].split()]

    with (
        ray_head(cpus=1, dashboard=(port := free_port()), PATH=PATH) as (address, head, token),
        ray_node(address, token | {"PATH": PATH}, 1, "--labels=stays=yes") as (stays, _),
        ray_node(address, token | {"PATH": PATH}, 1),
    ):
        assert stays.pid in above("--entrypoint-label-selector", json.dumps({"stays": "yes"}))
        assert head.pid in above()
