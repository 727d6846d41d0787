"""What can happen to a sweep on a cluster in a box: who is struck, in which phase, and how.

A strike is made while the process whose work the phase is stands still, so that it is that phase which is struck.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
from frozen import frozen

from cluster.box import BIN, Node
from cluster.ray_box import HANGS, PORT, Job, RayBox
from cluster.s3_node import S3Node
from cluster.stages import Stage, Work

COMMAND = "the command"
TITLES = {
    "train worker": "ray::RayTrainWorker",
    "trial": "ray::ImplicitFunc",
    "aggregator": "ray::Aggregator",
    "progress board": "ray::ProgressBoard",
    "shard maker": "ray::MapWorker(MapBatches(ShardMaker)",
}
"""What a process of ours calls itself, from the start."""
WORKS = {
    "harvest": "shard maker",
    "train": "train worker",
    "attribute": "train worker",
    "select": "train worker",
    "compare": COMMAND,
    "results": COMMAND,
}
"""Whose work a phase is."""
SLOW_BYTES = 1e6
"""A second, over a slow cable."""


class Missed(Exception):
    """The phase was over before it could be struck."""


class Ended(Exception):
    """The job came to its end meanwhile."""


@dataclass
class Scene:
    """A sweep at work on a cluster."""

    ray_box: RayBox
    work: Work
    job: Job
    server: S3Node | None
    """where its output is, if that is at a URL"""

    def find(self, victim: str) -> list[tuple[Node, psutil.Process]]:
        """Its processes, with the nodes that they are on; the newest first."""
        found = []
        for node in (self.ray_box.head, *self.ray_box.workers.values()):
            for pid in node.pids() if node.running else ():
                with suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if _is(victim, process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                        found.append((node, process))
        return sorted(found, key=lambda pair: -_began(pair[1]))

    @contextmanager
    def held(self, stage: Stage, depth: int) -> Iterator[tuple[Node, psutil.Process]]:
        """Who works on this stage and where, stopped in it. It runs in short turns and is looked at while it stands
        still, so that it cannot be past that place by the time a busy machine lets us look.

        Raises Missed if the stage is over, Ended if the job is.
        """
        end, at = time.monotonic() + HANGS, None
        while True:
            if self.job.process.poll() is not None:
                raise Ended
            if self.work.past(stage):
                raise Missed
            assert time.monotonic() < end, f"{stage} never came:\n{self.job.said}"
            if at is None or not at[1].is_running() or not self.work.near(stage):
                time.sleep(0.2)
                at = next(iter(self.find(WORKS[stage.phase])), None)
                continue
            with suppress(psutil.NoSuchProcess), frozen(at[1]):
                if self.work.at(stage, depth) and at[1].status() == psutil.STATUS_STOPPED:
                    yield at
                    return
            time.sleep(0.02)


def _is(victim: str, words: list[str]) -> bool:
    if victim == COMMAND:
        return words[1:3] == ["-m", "dmsae_ray.sweep"]
    return bool(words) and words[0].startswith(TITLES[victim])


def _began(process: psutil.Process) -> float:
    try:
        return process.create_time()
    except psutil.NoSuchProcess:
        return 0.0


@dataclass(frozen=True)
class Strike:
    """One kind of fault."""

    name: str
    phases: tuple[str, ...]
    act: Callable[[Scene, Node, random.Random], Callable[[], None] | None]
    """Strikes, given who is at work on which node. What it returns is called once that process goes on, and returns
    when what was struck has been mended.
    """
    victim: str | None = None
    """the process that is killed; None: another thing is struck"""
    ends_job: bool = False
    at_url_alone: bool = False
    loses_steps: bool = True
    """whether training has to go back to its last checkpoint"""
    quick: bool = False
    """whether nothing but the work is waited for"""

    def __str__(self) -> str:
        return self.name


def _kill(victim: str, phases: tuple[str, ...], ends_job: bool = False, loses_steps: bool = True) -> Strike:
    def act(scene: Scene, node: Node, rng: random.Random) -> None:
        there = scene.find(victim)
        assert there, f"no {victim} is alive"
        there[0][1].kill()

    return Strike(f"kill {victim}", phases, act, victim, ends_job, loses_steps=loses_steps, quick=True)


def _power(scene: Scene, node: Node, rng: random.Random) -> Callable[[], None]:
    node.kill()
    return lambda: scene.ray_box.start_worker(node)


def _head(scene: Scene, node: Node, rng: random.Random) -> Callable[[], None]:
    """With it its cluster is lost: its workers stop by themselves, and are started again with it."""
    ray_box = scene.ray_box
    ray_box.kill_head()
    for worker in ray_box.workers.values():
        worker.kill()
    ray_box.client.end(scene.job.process)

    def again() -> None:
        ray_box.start_head()
        for worker in ray_box.workers.values():
            ray_box.start_worker(worker)

    return again


def _cut(scene: Scene, node: Node, rng: random.Random) -> Callable[[], None]:
    seconds = rng.choice([5, 20, 60])
    node.cut()

    def mend() -> None:
        time.sleep(seconds)
        node.mend()

    return mend


def _freeze(scene: Scene, node: Node, rng: random.Random) -> Callable[[], None]:
    seconds = rng.choice([2, 10, 60])

    def thaw() -> None:
        node.stop()
        time.sleep(seconds)
        node.cont()

    return thaw


def _slow(scene: Scene, node: Node, rng: random.Random) -> Callable[[], None]:
    node.slow(SLOW_BYTES)

    def mend() -> None:
        time.sleep(20)
        node.slow(None)

    return mend


def _drain(scene: Scene, node: Node, rng: random.Random) -> Callable[[], None]:
    """Told that it goes in ten seconds, and gone then."""
    ray_box = scene.ray_box
    drain = [BIN / "ray", "drain-node", f"--address={ray_box.head.address}:{PORT}", f"--node-id={ray_box.id_of(node)}"]
    drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=soak", "--deadline-remaining-seconds=10"]
    done = ray_box.head.run(drain, env=ray_box.env)
    assert done.returncode == 0, done.stdout + done.stderr

    def gone() -> None:
        time.sleep(10)
        node.kill()
        ray_box.start_worker(node)

    return gone


def _outage(scene: Scene, node: Node, rng: random.Random) -> Callable[[], None]:
    seconds, server = rng.choice([5, 30, 60]), scene.server
    assert server is not None
    server.freeze()

    def back() -> None:
        time.sleep(seconds)
        server.thaw()

    return back


EVERYWHERE = ("harvest", "train", "attribute", "select", "compare", "results")
CYCLE = ("train", "attribute", "select")
AT_WORK = ("harvest", "train", "attribute")
STRIKES = (
    _kill("train worker", CYCLE),
    _kill("trial", CYCLE),
    _kill("aggregator", CYCLE, loses_steps=False),
    _kill("progress board", CYCLE, loses_steps=False),
    _kill("shard maker", ("harvest",)),
    _kill(COMMAND, EVERYWHERE, ends_job=True),
    Strike("power of a node", ("harvest", *CYCLE), _power),
    Strike("power of the head", EVERYWHERE, _head, ends_job=True),
    Strike("cable of a node", AT_WORK, _cut, loses_steps=False),
    Strike("freeze of a node", AT_WORK, _freeze, loses_steps=False),
    Strike("slow cable of a node", AT_WORK, _slow, loses_steps=False),
    Strike("drain of a node", ("train", "attribute"), _drain),
    Strike("outage of the store", EVERYWHERE, _outage, at_url_alone=True, loses_steps=False),
)


def possible(phase: str, at_url: bool, quick: bool = False) -> list[Strike]:
    """What can happen in a phase; quick: only what takes no time of its own."""
    return [
        strike
        for strike in STRIKES
        if phase in strike.phases and (at_url or not strike.at_url_alone) and (strike.quick or not quick)
    ]
