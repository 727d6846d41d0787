"""Harvests that are struck, with one and with several actors: the same bytes, and nothing finished is made again."""

import time
from pathlib import Path

import numpy as np
import pytest
from conftest import HANGS, command
from frozen import frozen
from ray_head import ray_head
from ray_here import harvest_here
from victims import LOCAL, Victim, copy_parts, none_left_running, temporaries  # noqa: F401 (a fixture is used by its name)

from dmsae_ray.config import Config
from dmsae_ray.driver.options import HarvestCommand, load

SHARDS = ("--harvest.tokens", "131072", "--harvest.rows_per_shard", "2048")
TOTAL = 65
"""64 training shards and the calibration rows."""
MAKER = "ray::MapWorker(MapBatches(ShardMaker))"


def dataset_bytes(output: Path) -> dict[str, bytes]:
    """Every file of the dataset by its place, the manifest among them."""
    (folder,) = (output / "data").glob("*")
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shards(output: Path) -> dict[Path, tuple[int, int]]:
    """Finished shards, each with what changes if it is written again."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in output.glob("data/*/shards/*.parquet")}


def in_the_making(output: Path) -> bool:
    return len(shards(output)) < TOTAL and not list(output.glob("data/*/manifest.json"))


@pytest.fixture(scope="module")
def alone(small_sweep, tmp_path_factory):
    """The undisturbed harvest by one actor, an object of this process: its output folder."""
    output = tmp_path_factory.mktemp("alone") / "out"
    copy_parts(small_sweep.output, output, "tokens")
    options = load(HarvestCommand, command(output, *SHARDS, module="harvest")[3:])
    harvest_here(Config(**options.sections()))
    assert len(shards(output)) == TOTAL
    return output


def test_three_actors_make_the_bytes_of_one_though_their_driver_is_killed(alone, tmp_path):
    """On a cluster that outlives its driver: what the dead driver's actors do next must not matter either. What they
    left undone is made by a single one.
    """
    output, makers = tmp_path / "out", set()
    copy_parts(alone, output, "tokens")
    with ray_head(cpus=4) as (address, head, env):
        args = ("--cluster.address", address, *SHARDS, "--harvest.actors")
        victim = Victim(output, *args, "3", module="harvest", root=head, **env)

        def working() -> int:
            makers.update(pid for pid, title in victim.family().items() if title.startswith(f"{MAKER}.submit"))
            return len(makers)

        victim.wait_for(lambda: working() == 3 and len(shards(output)) >= 4, every=0.05)
        assert in_the_making(output)
        victim.kill()
        end = time.monotonic() + HANGS
        while victim.find(MAKER):  # the cluster ends the actors of a driver that is gone
            assert time.monotonic() < end
            time.sleep(0.1)
        kept = shards(output)
        assert 4 <= len(kept) < TOTAL and in_the_making(output)
        again = Victim(output, *args, "1", module="harvest", root=head, **env)
        again.finish()
    assert f"{TOTAL} shards, {len(kept)} kept from before" in again.said
    assert {path: shards(output)[path] for path in kept} == kept
    assert dataset_bytes(output) == dataset_bytes(alone)
    assert temporaries(output) == []


@pytest.mark.slow
def test_a_killed_actor_is_replaced(alone, tmp_path):
    """The only one, so that nothing is finished unless another takes its place."""
    output = tmp_path / "out"
    copy_parts(alone, output, "tokens")
    victim = Victim(output, *LOCAL, *SHARDS, "--harvest.actors", "1", module="harvest")
    victim.wait_for(lambda: len(shards(output)) >= 20)
    (actor,) = victim.find(MAKER)
    with frozen(actor):
        kept = shards(output)
        assert victim.alive and in_the_making(output)
        actor.kill()
    victim.wait_for(lambda: [maker for maker in victim.find(MAKER) if maker.pid != actor.pid], every=0.05)
    victim.finish()
    assert {path: shards(output)[path] for path in kept} == kept
    assert dataset_bytes(output) == dataset_bytes(alone)
    assert temporaries(output) == []
    done = [
        int(line.split()[1].replace(",", ""))
        for line in victim.said.splitlines()
        if " tokens, " in line and " of " in line
    ]
    assert done == sorted(done) and done[-1] == 131072 + 2048  # a shard that is told of twice would count twice


@pytest.mark.slow
def test_five_kills_of_a_harvest(alone, tmp_path):
    output, draw = tmp_path / "out", np.random.default_rng(5)
    copy_parts(alone, output, "tokens")
    args, survived = (*LOCAL, *SHARDS, "--harvest.actors", "2"), {}
    for strike in range(5):
        more, delay = int(draw.integers(0, 5)), float(draw.uniform(0, 0.3))
        before = len(shards(output))
        victim = Victim(output, *args, module="harvest")
        victim.wait_for(lambda: victim.find(MAKER) and len(shards(output)) >= before + more)
        time.sleep(delay)
        assert victim.alive and victim.find(MAKER) and in_the_making(output), f"strike {strike} came too late"
        # Every other time only the driver dies at once, and its actors when they miss their raylet, seconds and shards
        # later.
        victim.kill(everything=strike % 2 == 0)
        assert in_the_making(output), f"strike {strike} came too late"
        after = shards(output)
        assert {path: after[path] for path in survived} == survived, "a finished shard was made again"
        survived = after
    assert survived
    last = Victim(output, *args, module="harvest")
    last.finish()
    assert f"{len(survived)} kept from before" in last.said
    assert {path: shards(output)[path] for path in survived} == survived
    assert dataset_bytes(output) == dataset_bytes(alone)
    assert temporaries(output) == []
