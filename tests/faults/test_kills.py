"""One chain that is struck: its training goes on from the last checkpoint, with exactly the next row."""

import json
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import HANGS, command, data_digests, digest_of_rows
from frozen import frozen
from victims import (
    LOCAL,
    Victim,
    copy_parts,
    curve,
    cycles,
    frozen_when,
    none_left_running,  # noqa: F401 (a fixture is used by its name)
    results,
    temporaries,
)

from dmsae_ray.cluster.capacity import available_cpus
from dmsae_ray.sweep import main

TRAINER, DRIVER = "ray::RayTrainWorker", "ray::ImplicitFunc"
SEED0 = (*LOCAL, "--sweep.seeds", "0")
ROOM_FOR_ONE = ("--cluster.cpus_per_worker", str(max(3, available_cpus() // 2 + 1)))
"""So many CPUs for a worker that another waits for ever, unless what a lost one held is given back."""
# A dataset and a cycle long enough to be struck at a chosen place: 128 steps of 512 rows, half a pass, a checkpoint
# every 8.
STEPS, BATCH, LANES, EVERY = 128, 512, 8, 8
LONGER = (
    *SEED0,
    "--harvest.tokens",
    "131072",
    "--harvest.rows_per_shard",
    "2048",
    "--train.tokens",
    str(STEPS * BATCH),
    "--train.log_steps",
    "1",
    "--train.checkpoint_steps",
    str(EVERY),
    "--attribution.sequences_per_shard",
    "2",
)


@dataclass(frozen=True)
class Standing:
    """Where a cycle stands, as its folder says."""

    logged: int
    """steps on the training curve"""
    checkpoint: int
    """step of the checkpoint, 0 if there is none"""
    resumes: list[dict]
    """what the checkpoint knows of"""
    saved: bool
    """the SAE is there: training and evaluation are over"""
    scored: int
    """shards of the attribution that are back"""
    done: bool

    @staticmethod
    def of(cycle: Path) -> "Standing":
        step, resumes, path = 0, [], cycle / "checkpoint.pt"
        if path.exists():
            progress = json.loads(torch.load(path, weights_only=True)["progress"])
            round_, row = progress["position"]
            step, resumes = round_ * (512 // (BATCH // LANES)) + row // (BATCH // LANES), progress["resumes"]
        file = cycle / "curve.jsonl"
        return Standing(
            file.read_bytes().count(b"\n") if file.exists() else 0,
            step,
            resumes,
            (cycle / "sae.safetensors").exists(),
            len(list(cycle.glob("attribution/*.safetensors"))),
            (cycle / "record.json").exists(),
        )


def record(cycle: Path) -> dict:
    return json.loads((cycle / "record.json").read_text())


def trainers(victim: Victim) -> list[psutil.Process]:
    """Train workers that have begun their cycle's training: they write its curve anew."""
    begun = max((path.stat().st_mtime for path in victim.output.glob("chains/*/cycle_*/curve.jsonl")), default=0)
    return [worker for worker in victim.find(TRAINER) if worker.create_time() < begun]


def test_worker_trial_and_command_are_killed_and_the_sweep_goes_on_to_the_same_numbers(small_sweep, tmp_path, capfd):
    """One after the other in one sweep; each alone, and ten times, in the slow tests."""
    output = tmp_path / "out"
    copy_parts(small_sweep.output, output, "data", "tokens")
    args = (*SEED0, "--train.checkpoint_steps", "1", "--train.log_steps", "1", *ROOM_FOR_ONE)
    victim = Victim(output, *args)

    def standing(number: int) -> Standing:
        there = [path for path in cycles(output) if path.name == f"cycle_{number:02d}"]
        return Standing.of(there[0]) if there else Standing(0, 0, [], False, 0, False)

    def worker_but(lost: list[psutil.Process]) -> psutil.Process:
        """The train worker that comes, once its workers have ended, after these."""
        victim.wait_for(lambda: [worker for worker in victim.find(TRAINER) if worker not in lost], every=0.05)
        (worker,) = [worker for worker in victim.find(TRAINER) if worker not in lost]
        return worker

    victim.wait_for(lambda: any(output.glob("chains/*/chain.json")))
    assert main(command(output, *args)[3:]) == 2
    refused = capfd.readouterr().err
    assert "in use by another driver" in refused and str(victim.process.pid) in refused
    # The train worker, in the first cycle.
    lost = [worker_but([])]
    with frozen_when(victim, lost[0], lambda: standing(0).checkpoint):
        first = standing(0)
        assert 0 < first.checkpoint < 32 and not first.saved
        assert lost[0].nice() == psutil.Process(victim.process.pid).nice(), "it waits behind everybody else's work"
        lost[0].kill()
    # The trial that drives its successor: the workers end with it, and begin again with the next.
    lost.append(worker_but(lost))
    (driver,) = victim.find(DRIVER)
    with frozen_when(victim, lost[1], lambda: standing(0).checkpoint > first.checkpoint):
        second = standing(0)
        assert first.checkpoint < second.checkpoint < 32 and not second.saved
        driver.kill()
    # The command itself, in the second cycle: one is finished, which is kept.
    worker = worker_but(lost)
    victim.wait_for(lambda: standing(0).done)
    with frozen_when(victim, worker, lambda: standing(1).checkpoint):
        third = standing(1)
        assert 0 < third.checkpoint < 32 and not third.saved
        finished = (cycles(output)[0] / "record.json").read_bytes()
        victim.kill(everything=True)
    with sqlite3.connect(output / "mlflow.db") as db:
        assert db.execute("select count(*) from runs where status = 'RUNNING'").fetchone()[0] > 0

    Victim(output, *args).finish()
    assert (cycles(output)[0] / "record.json").read_bytes() == finished
    (one, two), (three,) = (
        [(resume["step"], resume["generation"]) for resume in record(cycle)["resumes"]] for cycle in cycles(output)
    )
    assert one == (first.checkpoint, 1) and three == (third.checkpoint, 2)
    assert second.checkpoint <= two[0] < 32 and two[1] == 1  # the worker outlived its trial by a moment
    for cycle in cycles(output):
        assert results(cycle) == results(small_sweep.output / cycle.relative_to(output))
        assert [point["step"] for point in curve(cycle)] == list(range(32))
    assert data_digests(output).items() <= data_digests(small_sweep.output).items()
    assert temporaries(output) == []
    with sqlite3.connect(output / "mlflow.db") as db:
        assert db.execute("select status, count(*) from runs group by status").fetchall() == [("FINISHED", 2)]
        doubled = "select run_uuid, key, step, count(*) from metrics group by run_uuid, key, step having count(*) > 1"
        assert db.execute(doubled).fetchall() == []


@pytest.mark.slow
def test_a_killed_train_worker_is_replaced_and_goes_on_from_the_checkpoint(small_sweep, tmp_path):
    output = tmp_path / "out"
    copy_parts(small_sweep.output, output, "data", "tokens")
    # A checkpoint and a point of the curve each step: more places to be struck at, and the same numbers.
    every_step = ("--train.checkpoint_steps", "1", "--train.log_steps", "1")
    victim = Victim(output, *SEED0, "--sweep.cycles", "1", *every_step)
    victim.wait_for(lambda: cycles(output) and (cycles(output)[0] / "checkpoint.pt").exists() and trainers(victim))
    (worker,) = trainers(victim)
    with frozen(worker):
        struck = Standing.of(cycles(output)[0])
        assert 0 < struck.checkpoint < 32 and not struck.saved and victim.alive
        worker.kill()
    victim.wait_for(lambda: [other for other in victim.find(TRAINER) if other.pid != worker.pid])
    victim.finish()
    (cycle,) = cycles(output)
    assert record(cycle)["resumes"] == [{"step": struck.checkpoint, "generation": 1, "workers": 1, "parallel": "ddp"}]
    assert results(cycle) == results(small_sweep.output / cycle.relative_to(output))
    assert [point["step"] for point in curve(cycle)] == list(range(32))
    assert temporaries(output) == []


@pytest.mark.slow
def test_a_superseded_driver_and_its_worker_write_nothing_more(small_sweep, tmp_path):
    """A driver that was cut off while another took the folder over: here the generation alone is raised while it
    works.
    """
    output = tmp_path / "out"
    copy_parts(small_sweep.output, output, "data", "tokens")
    victim, taken_over = (
        Victim(output, *SEED0, "--sweep.cycles", "1", "--train.log_steps", "1", "--cluster.retries", "0"),
        None,
    )
    while taken_over is None:
        victim.wait_for(lambda: cycles(output) and Standing.of(cycles(output)[0]).checkpoint and trainers(victim))
        (worker,) = trainers(victim)
        with frozen(worker):
            now = Standing.of(cycles(output)[0])
            assert victim.alive and now.logged < 32 and not now.saved
            if not temporaries(output):  # else it has asked for its right to write already
                (output / "generation").write_text("2")
                taken_over = {path: path.read_bytes() for path in output.glob("chains/**/*") if path.is_file()}
    assert victim.process.wait(timeout=HANGS) == 2 and "generation 2 has taken over from 1" in victim.said, victim.said
    assert {path: path.read_bytes() for path in output.glob("chains/**/*") if path.is_file()} == taken_over


@pytest.fixture(scope="module")
def undisturbed(small_sweep, tmp_path_factory) -> Path:
    """The output folder of the longer chain, never struck."""
    output = tmp_path_factory.mktemp("chain") / "out"
    copy_parts(small_sweep.output, output, "tokens")
    Victim(output, *LONGER).finish()
    return output


def left_behind(output: Path) -> list[str]:
    """Every file of the chain, and whatever Ray's own bookkeeping left."""
    return sorted(
        str(path.relative_to(output))
        for part in ("chains", "ray")
        for path in (output / part).rglob("*")
        if path.is_file()
    )


def moments(seed: int, n: int) -> list[tuple[int, str, float, str]]:
    """(cycle, phase, place in it, victim), in the order in which a chain comes to them."""
    draw = np.random.default_rng(seed)
    drawn = [
        (
            int(draw.integers(2)),
            int(draw.choice(3, p=[0.6, 0.2, 0.2])),
            float(draw.random()),
            ("driver", "worker")[draw.integers(2)],
        )
        for _ in range(n)
    ]
    return [
        (cycle, ("train", "evaluate", "attribute")[phase], place, victim)
        for cycle, phase, place, victim in sorted(drawn)
    ]


@pytest.mark.slow
def test_a_chain_killed_ten_times_ends_with_the_undisturbed_numbers(undisturbed, tmp_path):
    output, strikes = tmp_path / "out", moments(seed=2, n=10)
    assert {phase for _, phase, _, _ in strikes} == {"train", "evaluate", "attribute"}
    assert {victim for _, _, _, victim in strikes} == {"driver", "worker"}
    copy_parts(undisturbed, output, "data", "tokens")
    args = (*LONGER, "--cluster.retries", "10")
    victim, drivers, expected = Victim(output, *args), 1, {0: [], 1: []}
    for number, phase, place, whom in strikes:

        def there(now: Standing) -> bool:
            if phase == "train":
                return now.logged > place * (STEPS - 2)
            return now.checkpoint == STEPS and (
                phase == "evaluate" or now.saved and now.scored > before.scored + 3 * place
            )

        def at_work() -> bool:
            found = [path for path in cycles(output) if path.name == f"cycle_{number:02d}"]
            return bool(found and there(Standing.of(found[0])) and trainers(victim))

        folder = cycles(output)[number] if len(cycles(output)) > number else None
        before = Standing.of(folder or output)
        victim.wait_for(at_work)
        time.sleep(0.2 * place if phase == "evaluate" else 0)
        folder = cycles(output)[number]
        (worker,) = trainers(victim)
        with frozen(worker):
            struck = Standing.of(folder)
            assert victim.alive and there(struck) and not struck.done, f"{phase} of cycle {number} was over: {struck}"
            assert {"train": struck.logged < STEPS, "evaluate": not struck.saved, "attribute": struck.saved}[phase], (
                struck
            )
            print(f"the {whom} in {phase} of cycle {number}: {struck}")
            if whom == "worker":
                worker.kill()
            else:
                victim.kill(everything=True)
        if whom == "driver":
            victim, drivers = Victim(output, *args), drivers + 1
        # What the next worker group starts from. It tells of its start only in a checkpoint of its own, or in the
        # record.
        again = (
            [{"step": struck.checkpoint, "generation": drivers, "workers": 1, "parallel": "ddp"}]
            if struck.checkpoint
            else []
        )
        expected[number] = struck.resumes + again
    victim.finish()
    assert len(cycles(output)) == 2
    for number, cycle in enumerate(cycles(output)):
        there = undisturbed / cycle.relative_to(output)
        assert record(cycle)["resumes"] == expected[number] and record(there)["resumes"] == []
        assert results(cycle) == results(there)
        assert curve(cycle) == curve(there)
        assert record(cycle)["data_digest"] == digest_of_rows(output, number, STEPS, BATCH, LANES)
    assert sum(map(len, expected.values())) >= 2
    assert left_behind(output) == left_behind(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_a_stopped_chain_goes_on_with_another_number_of_workers(undisturbed, tmp_path, before, after):
    output = tmp_path / "out"
    copy_parts(undisturbed, output, "data", "tokens")
    one_cycle = (*LONGER, "--sweep.cycles", "1")
    victim = Victim(output, *one_cycle, "--cluster.workers", str(before))
    expected, told = [], 0
    if before == 2:  # first one of the two workers alone: its group starts again with as many
        victim.wait_for(
            lambda: cycles(output) and Standing.of(cycles(output)[0]).logged > 20 and len(trainers(victim)) == 2
        )
        first, second = trainers(victim)
        with frozen(first), frozen(second):
            struck = Standing.of(cycles(output)[0])
            assert victim.alive and 0 < struck.checkpoint <= struck.logged < STEPS and not struck.saved
            second.kill()
        expected, told = (
            [{"step": struck.checkpoint, "generation": 1, "workers": 2, "parallel": "ddp"}],
            struck.checkpoint,
        )
    victim.wait_for(
        lambda: cycles(output) and Standing.of(cycles(output)[0]).checkpoint > max(told, 40) and trainers(victim)
    )
    workers = trainers(victim)
    assert len(workers) == before
    with frozen(workers[0]):
        struck = Standing.of(cycles(output)[0])
        assert victim.alive and struck.logged < STEPS and not struck.saved and struck.resumes == expected
        victim.kill(everything=True)
    again = Victim(output, *one_cycle, "--cluster.workers", str(after))
    again.finish()
    (cycle,) = cycles(output)
    there, here = record(undisturbed / cycle.relative_to(output)), record(cycle)
    resumed = {"step": struck.checkpoint, "generation": 2, "workers": after, "parallel": "ddp"}
    assert here["resumes"] == [*expected, resumed] and here["workers"] == after
    # Exactly the next row, whoever takes it.
    assert here["data_digest"] == there["data_digest"] == digest_of_rows(output, 0, STEPS, BATCH, LANES)
    # The same global batches and the same global gate; only the order of sums differs.
    for name in ("fvu", "l0", "theta", "loss_recovered_zero"):
        assert here[name] == pytest.approx(there[name], rel=0.02), name
    assert [point["step"] for point in curve(cycle)] == list(range(STEPS))
    assert temporaries(output) == []


@pytest.mark.slow
def test_a_killed_driver_of_a_chain_is_replaced_and_the_chain_goes_on(small_sweep, tmp_path):
    """Not the command: the trial that drives one chain's workers. They end with it, and begin again with its
    successor.
    """
    output = tmp_path / "out"
    copy_parts(small_sweep.output, output, "data", "tokens")
    victim = Victim(output, *SEED0, "--sweep.cycles", "1", "--train.checkpoint_steps", "1")
    victim.wait_for(lambda: cycles(output) and (cycles(output)[0] / "checkpoint.pt").exists() and trainers(victim))
    (driver,) = victim.find(DRIVER)
    driver.kill()
    victim.wait_for(lambda: [other for other in victim.find(DRIVER) if other.pid != driver.pid])
    victim.finish()
    (cycle,) = cycles(output)
    undisturbed = small_sweep.chains()["seed0-k8"] / "cycle_00"
    assert results(cycle) == results(undisturbed)
    assert record(cycle)["generation"] == 1


@pytest.mark.slow
def test_a_trial_lost_for_good_leaves_its_place_to_the_next_chain(small_sweep, tmp_path):
    """Without a retry its chain fails."""
    output = tmp_path / "out"
    copy_parts(small_sweep.output, output, "data", "tokens")
    args = ("--sweep.cycles", "1", "--cluster.concurrent", "1", *ROOM_FOR_ONE)
    victim = Victim(output, *LOCAL, *args, "--cluster.retries", "0", "--train.checkpoint_steps", "1")
    victim.wait_for(lambda: cycles(output) and (cycles(output)[0] / "checkpoint.pt").exists() and trainers(victim))
    (driver,) = victim.find(DRIVER)
    driver.kill()
    assert victim.process.wait(timeout=HANGS) == 1, victim.said
    first, second = cycles(output)[0].parent, cycles(output)[-1].parent
    records = [(chain / "cycle_00" / "record.json").exists() for chain in output.glob("chains/*")]
    assert first != second and sorted(records) == [False, True], victim.said
    assert "its driver was lost" in victim.said


@pytest.mark.slow
def test_a_worker_lost_before_it_joins_its_group_leaves_its_place_to_the_next(small_sweep, tmp_path):
    output = tmp_path / "out"
    copy_parts(small_sweep.output, output, "data", "tokens")
    victim = Victim(output, *SEED0, "--sweep.cycles", "1", *ROOM_FOR_ONE)
    victim.wait_for(lambda: victim.find(TRAINER))
    (worker,) = victim.find(TRAINER)
    # Torch is first imported where a worker joins.
    with frozen_when(victim, worker, lambda: any("libtorch" in part.path for part in worker.memory_maps())):
        assert not cycles(output), "it had begun"
        worker.kill()
    victim.finish()
    (cycle,) = cycles(output)
    assert results(cycle) == results(small_sweep.output / cycle.relative_to(output))
