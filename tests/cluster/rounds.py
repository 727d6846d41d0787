"""One sweep on a cluster in a box, struck again and again, and what must be as if nothing had happened."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import SMALL, same_results

from cluster.box import cannot_slow
from cluster.ray_box import CHECKOUT, HANGS, Job, RayBox
from cluster.s3_node import S3Node
from cluster.stages import CHAINS, CYCLES, DEPTHS, STAGES, Stage, Work, resumes
from cluster.strikes import WORKS, Ended, Missed, Scene, Strike, possible

CHECKPOINT_STEPS = 4
SUBMITS = 12
"""How often a round's sweep is submitted before it counts as lost."""
ARGS = ("--cluster.concurrent", "1", "--train.checkpoint_steps", str(CHECKPOINT_STEPS), "--train.log_steps", "1")
"""One chain after the other, so that the only train worker's work is the phase that is struck; no number changes."""
OF_RAY_DATA = ("_AutoscalingCoordinatorActor", "ActorLocationTracker", "_StatsActor")
"""Ray Data has one of each on a cluster, for all jobs that there will be."""
LEFT = """
import time
from ray.util.state import list_actors, list_placement_groups
end = time.time() + 120
while True:
    actors = [a.class_name for a in list_actors(filters=[("state", "!=", "DEAD")]) if a.class_name not in ray_data]
    groups = [g.name for g in list_placement_groups() if g.state != "REMOVED"]
    if not actors + groups or time.time() > end:
        break
    time.sleep(1)
print(json.dumps(actors + groups))
"""


@dataclass
class Fault:
    """One that is meant, and what came of it."""

    stage: Stage
    strike: Strike
    depth: int
    struck: dict[str, Any] = field(default_factory=dict)
    """empty: its phase was over first"""

    @property
    def victim(self) -> str:
        """Of whose processes one is lost, or stands still."""
        return self.strike.victim or WORKS[self.stage.phase]

    def row(self) -> dict[str, Any]:
        return {"fault": str(self.strike), "phase": self.stage.phase, "stage": str(self.stage)} | self.struck


def drawn(
    rng: random.Random, at_url: bool, faults: int, chains: Sequence[str] = CHAINS, quick: bool = False
) -> list[Fault]:
    """In the order in which they come about: each in another stage. quick: see Strike."""
    stages = [stage for stage in STAGES if stage.chain in ("", *chains)]
    # By phase first: there are as many of compare as of train, which comes once for every chain and cycle.
    chosen: set[Stage] = set()
    while len(chosen) < min(faults, len(stages)):
        phase = rng.choice(sorted({stage.phase for stage in stages}))
        chosen.add(rng.choice([stage for stage in stages if stage.phase == phase]))
    return [
        Fault(stage, rng.choice(_can(stage, at_url, quick)), rng.randint(1, DEPTHS.get(stage.phase, 1)))
        for stage in sorted(chosen, key=STAGES.index)
    ]


def _can(stage: Stage, at_url: bool, quick: bool) -> list[Strike]:
    return [strike for strike in possible(stage.phase, at_url, quick) if "slow" not in strike.name or not cannot_slow()]


class Place:
    """Where a round's output is: a folder that all nodes share, or an S3 server."""

    def __init__(self, ray_box: RayBox, server: S3Node | None, name: str):
        self.ray_box, self.server, self.name = ray_box, server, name

    @property
    def output(self) -> str:
        return f"/share/{self.name}" if self.server is None else self.server.url(self.name)

    def work(self) -> Work:
        if self.server is None:
            assert self.ray_box.share is not None
            folder = self.ray_box.share / self.name
            return Work(lambda: [folder])
        server = self.server
        nodes = (self.ray_box.head, *self.ray_box.workers.values())
        url = server.url(self.name)
        return Work(
            lambda: [
                path.parent
                for node in nodes
                for path in node.disk.glob("tmp/dmsae_ray-*/stands_for")
                if url in _text(path)
            ],
            lambda: server.names(self.name),
        )

    def whole(self, folder: Path) -> Path:
        """The output as a folder of this machine."""
        if self.server is None:
            assert self.ray_box.share is not None
            return self.ray_box.share / self.name
        return self.server.copy(self.name, folder)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


class Round:
    """One sweep that is struck."""

    def __init__(
        self,
        ray_box: RayBox,
        place: Place,
        undisturbed: Path,
        say: Callable[[str], None],
        chains: Sequence[str] = CHAINS,
    ):
        """chains: the first ones of the sweep."""
        self.ray_box, self.place, self.undisturbed, self.say = ray_box, place, undisturbed, say
        self.chains = chains
        self.submits = 0
        self.scene = Scene(ray_box, place.work(), self.submit(), place.server)

    def submit(self) -> Job:
        assert self.submits < SUBMITS, f"{SUBMITS} times submitted, and not finished:\n{self.scene.job.said}"
        self.submits += 1
        box = self.ray_box
        box.check_out(box.client)
        (box.client.disk / CHECKOUT.lstrip("/") / "small.yaml").write_text(SMALL)
        sweep = ["python", "-m", "dmsae_ray.sweep", "--config", "small.yaml", "--output", self.place.output]
        seeds = ",".join(str(CHAINS.index(chain)) for chain in self.chains)
        return box.submit([*sweep, *ARGS, "--sweep.seeds", seeds])

    def run(self, faults: list[Fault], rng: random.Random, folder: Path) -> None:
        """Strikes, each after the last was overcome, and looks at what comes of it. Raises AssertionError."""
        for fault in faults:
            self.strike(fault, rng)
        while (code := self.ended()) != 0:
            if code is not None:
                self.scene.job = self.submit()
            time.sleep(0.5)
        left = self.ray_box.ask(f"ray_data = {OF_RAY_DATA}\n{LEFT}")
        assert left == [], f"left on the cluster: {left}"
        check(self.place.whole(folder), self.undisturbed, faults, self.chains)

    def ended(self) -> int | None:
        """The job's exit status, if it has one; meanwhile Ray is started again where it gave up."""
        self.ray_box.restart_lost()
        return self.scene.job.process.poll()

    def strike(self, fault: Fault, rng: random.Random) -> None:
        scene, began = self.scene, time.monotonic()
        while True:
            try:
                with scene.held(fault.stage, fault.depth) as (node, holder):
                    there = scene.find(fault.victim)
                    alive = ", ".join(f"{process.pid} on {on.name}" for on, process in there)
                    struck: dict[str, Any] = {"node": node.name, "depth": fault.depth, "alive": alive}
                    if fault.stage.phase == "train":
                        struck["steps"] = scene.work.standing(fault.stage.chain, fault.stage.cycle).steps
                    mend = fault.strike.act(scene, node, rng)
                fault.struck = struck | {"after_s": round(time.monotonic() - began, 1)}
                break
            except Missed:
                self.say(f"    missed: {fault.strike} in {fault.stage}")
                return
            except Ended:
                if self.ended() == 0:
                    self.say(f"    missed: {fault.strike} in {fault.stage} (the sweep is finished)")
                    return
                scene.job = self.submit()
        began = time.monotonic()
        if mend is not None:
            mend()
        fault.struck["recovered"] = self.overcome(fault, {process.pid for _, process in there})
        fault.struck["overcome_s"] = round(time.monotonic() - began, 1)
        self.say(f"    {fault.strike} in {fault.stage}: {fault.struck}")

    def overcome(self, fault: Fault, known: set[int]) -> str:
        """Waits until the work goes on, and says by what."""
        scene, end = self.scene, time.monotonic() + HANGS
        while True:
            assert time.monotonic() < end, f"nothing goes on:\n{scene.job.said}"
            if (code := self.ended()) not in (None, 0) or fault.strike.ends_job and code is not None:
                scene.job = self.submit()
                return "submitted again"
            if scene.work.past(fault.stage):
                return "it went on"
            if not fault.strike.ends_job and ({process.pid for _, process in scene.find(fault.victim)} - known):
                return "another took its place"
            time.sleep(0.2)


def check(output: Path, undisturbed: Path, faults: Sequence[Fault], chains: Sequence[str]) -> None:
    """Raises AssertionError if anything is not as if nothing had happened."""
    same_results(output, undisturbed, cycles=len(chains) * CYCLES)
    (results,) = (output / "sweeps").iterdir()
    assert (results / "report.html").exists() and not (results / "failed_parts.json").exists()
    for part in ("data", "tokens", "chains", "pairs", "sweeps"):
        left = [str(path) for path in (output / part).rglob("*tmp*")]
        assert not left, f"temporary files: {left}"
    with sqlite3.connect(output / "mlflow.db") as db:
        runs = db.execute(
            "select status, count(*) from runs where lifecycle_stage = 'active' group by status"
        ).fetchall()
        assert runs == [("FINISHED", len(chains) + 1)], f"MLflow runs, of chains and their comparison: {runs}"
        doubled = db.execute(
            "select run_uuid, key, step, count(*) from metrics group by run_uuid, key, step having count(*) > 1"
        ).fetchall()
        assert not doubled, f"metrics twice: {doubled}"
    for fault in faults:
        if fault.stage.phase != "train" or not fault.struck:
            continue
        work = Work(lambda: [output])
        records = list(work.files(f"chains/{work.key_of(fault.stage.chain)}/cycle_{fault.stage.cycle:02d}/record.json"))
        assert len(records) == 1, records
        steps = resumes(records)
        if fault.strike.loses_steps:
            # A worker that ends with another process does some steps more; they are of the checkpoint's interval still.
            again = fault.struck["steps"] - max(steps, default=0)
            fault.struck["done_again"] = max(0, again)
            assert again <= CHECKPOINT_STEPS, f"{fault.row()}: {again} steps done again"
