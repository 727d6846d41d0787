"""jobs/slurm.sbatch on a real Slurm: it comes to the bits of one machine, goes back to the queue where its time ends
and goes on from there, and leaves nothing on the nodes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import SMALL, same_results

from cluster.box import BIN, Box, Node
from cluster.slurm_box import SlurmBox, SlurmJob, lacking

ENV = {"PATH": f"{BIN}:/usr/bin:/bin", "RAY_START_OPTIONS": "--object-store-memory=600000000"}
"""Of `sbatch`: the environment that is activated; nodes of a box share one machine's memory."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[SlurmBox]:
    if install := lacking():
        pytest.skip(f"NOT RUN: {install}")
    with Box() as made:
        slurm = SlurmBox(made, tmp_path_factory.mktemp("share"))
        (slurm.share / "small.yaml").write_text(SMALL)
        yield slurm


def sweep(slurm: SlurmBox, name: str, *args: str, options: tuple[str, ...] = ()) -> SlurmJob:
    argv = ["--config", "small.yaml", "--output", f"/share/{name}", *args]
    return slurm.submit(*argv, options=options, **ENV)


def read(node: Node, what: str) -> Iterator[tuple[int, bytes]]:
    for pid in node.pids():
        with suppress(OSError):  # it has ended
            yield pid, Path(f"/proc/{pid}/{what}").read_bytes()


def of_jobs(slurm: SlurmBox) -> list[int]:
    """Processes that Slurm's jobs have started."""
    return [pid for node in slurm.computing for pid, env in read(node, "environ") if b"SLURM_JOB_ID=" in env]


def trainers(slurm: SlurmBox) -> list[int]:
    lines = [line for node in slurm.computing for line in read(node, "cmdline")]
    return [pid for pid, title in lines if title.startswith(b"ray::RayTrainWorker")]


def folders(slurm: SlurmBox) -> list[Path]:
    return [path for node in slurm.computing for path in (node.disk / "tmp").glob("dmsae-*")]


@contextmanager
def another_ray(node: Node) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody's own, with Ray's usual ports and folder."""
    start = [BIN / "ray", "start", "--head", "--block", "--num-cpus=0", "--object-store-memory=100000000"]
    log = node.disk / "another.log"
    process = node.popen(start, env={"RAY_AUTH_MODE": "disabled"}, log=log)
    try:
        yield process
        assert process.poll() is None, log.read_text()
    finally:
        node.end(process)


def test_a_job_comes_to_the_bits_of_one_machine(small_sweep, slurm: SlurmBox):
    """Beside another Ray on the head's node; the token can be read by nobody else."""
    with another_ray(slurm.one):
        job = sweep(slurm, "out")
        job.wait_for(lambda: "ray: joined" in job.said)
        tokens = [folder / "token" for folder in folders(slurm)]
        assert [(path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) for path in tokens] == 2 * [
            (0o600, 0o700)
        ]
        (token,) = {path.read_bytes().strip() for path in tokens}
        assert re.fullmatch(rb"[0-9a-f]{64}", token)
        for node in slurm.computing:
            assert not [line for _, line in read(node, "cmdline") if token in line]
        assert job.wait() == "COMPLETED", job.said
        assert of_jobs(slurm) == [] and folders(slurm) == []
    assert "joined, 4 logical CPUs" in job.said and "chains: 2 to run" in job.said, job.said
    same_results(slurm.share / "out", small_sweep.output, cycles=4)


def test_a_job_whose_time_ends_goes_on_and_comes_to_the_same_bits(small_sweep, slurm: SlurmBox):
    job = sweep(slurm, "late", "--train.checkpoint_steps", "1", options=("--time=60",))
    checkpoints = slurm.share / "late" / "chains"
    job.wait_for(lambda: trainers(slurm) and [*checkpoints.rglob("checkpoint.pt")])
    stopped = trainers(slurm)
    for pid in stopped:  # so that its time ends while it trains
        os.kill(pid, signal.SIGSTOP)
    minutes = int(job.shows("RunTime").split(":")[1])
    assert slurm.ask("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes + 3}") == ""
    # What Slurm says when it has sent the signal.
    job.wait_for(lambda: "CANCELLED AT" in job.said or "interrupted; " in job.said)
    for pid in stopped:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    job.wait_for(lambda: job.shows("Restarts") == "1")
    assert "back to the queue" in job.said and len([*checkpoints.rglob("core.safetensors")]) < 4, job.said
    job.wait_for(lambda: not of_jobs(slurm) or job.shows("JobState") == "RUNNING")
    assert slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=60") == ""
    assert job.wait() == "COMPLETED" and job.shows("Restarts") == "1", job.said
    assert of_jobs(slurm) == [] and folders(slurm) == []
    same_results(slurm.share / "late", small_sweep.output, cycles=4)


def cancel(slurm: SlurmBox, job: SlurmJob) -> None:
    job.wait_for(lambda: "ray: joined" in job.said)
    slurm.ask("scancel", job.number)


def tell_too_soon(slurm: SlurmBox, job: SlurmJob) -> None:
    job.wait_for(lambda: folders(slurm))
    slurm.ask("scancel", "--batch", "--signal=TERM", job.number)


@pytest.mark.parametrize(
    ("strike", "state", "said"),
    [
        pytest.param(cancel, "CANCELLED", "interrupted; ", id="cancelled"),
        pytest.param(tell_too_soon, "FAILED", "before the sweep had begun", id="no-time-to-begin"),
    ],
)
def test_a_job_goes_back_to_the_queue_only_where_that_helps(
    slurm: SlurmBox, strike: Callable[[SlurmBox, SlurmJob], None], state: str, said: str
):
    job = sweep(slurm, "cancelled")
    strike(slurm, job)
    assert (job.wait(), job.shows("Restarts")) == (state, "0") and said in job.said, job.said
    assert of_jobs(slurm) == [] and folders(slurm) == []


def test_a_job_without_all_its_nodes_fails_and_says_which(slurm: SlurmBox):
    last = sweep(slurm, "without", options=("--hold",))
    slurm.ask("scancel", last.number)
    in_the_way = slurm.two.disk / "tmp" / f"dmsae-{int(last.number) + 1}-0"
    in_the_way.mkdir()
    job = sweep(slurm, "without")
    assert job.wait() == "FAILED" and "down two" in job.said and f"cannot make /tmp/{in_the_way.name}" in job.said
    assert of_jobs(slurm) == [] and folders(slurm) == [in_the_way] and not (slurm.share / "without").exists()
    in_the_way.rmdir()
