"""The parts of a command in the test's own process: a Ray of its own, the harvest's actor class, and the train loop in
Ray Train's local mode. They are the real parts; what is saved is the processes that only drive or hold them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import ray.train
import ray.train.torch
import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.harvester import Harvest
from dmsae_ray.activations.shard import ShardEntry
from dmsae_ray.activations.shard_maker import ShardMaker
from dmsae_ray.activations.shard_plan import ShardPlan
from dmsae_ray.attribution.aggregator import Aggregator
from dmsae_ray.cluster.connection import QUIET
from dmsae_ray.config import Config
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.worker import train_chains
from dmsae_ray.lock import OutputLock
from dmsae_ray.show.terminal.progress import ProgressBoard


@contextmanager
def ray_here(cpus: int, **options) -> Iterator[None]:
    """A Ray whose driver is the test process, with so many logical CPUs. options: of `ray.init`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # As a sweep's own cluster has it.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        for name, value in QUIET.items():
            patch.setenv(name, value)
        # Workers import functions from the test files, and the package from this checkout.
        tests = Path(__file__).parent
        paths = ":".join(str(path) for path in (tests / "pipeline", tests, tests.parent))
        here = {"env_vars": {"PYTHONPATH": paths}}
        ray.init(address="local", num_cpus=cpus, log_to_driver=False, runtime_env=here, **options)
        try:
            yield
        finally:
            ray.shutdown()


class HarvestHere(Harvest):
    """A harvest by one actor, which is an object of this process. Needs no Ray."""

    def _make(self, missing: list[ShardPlan], actors: int) -> Iterator[tuple[str, dict[str, ShardEntry]]]:
        assert actors == 1
        threads = torch.get_num_threads()
        maker = ShardMaker(self.config, self.targets, self.tokens.name, self.plans[0])
        for row in maker({"plans": [json.dumps([plan.to_dict() for plan in missing])]}):
            entries = json.loads(row["entries"][0])
            yield row["plan"][0], {hook: ShardEntry(**entry) for hook, entry in entries.items()}
        torch.set_num_threads(threads)


def harvest_here(config: Config) -> ActivationDataset:
    """The dataset of this configuration, in its output folder."""
    (dataset,) = HarvestHere(config, lambda line: None).run(actors=1).values()
    return dataset


def train_here(plans: list[ChainPlan]) -> None:
    """What a trial has its only worker do, on the Ray that is there: cycles of chains in lockstep, an aggregator beside
    them.
    """
    config, threads = plans[0].config, torch.get_num_threads()
    lock = OutputLock(config.home)
    loop = {
        "plans": plans,
        "lease": lock.lease(),
        "aggregator": Aggregator.remote(),
        "board": ray.remote(num_cpus=0)(ProgressBoard).remote(),
    }
    try:
        ray.train.torch.TorchTrainer(
            train_chains, train_loop_config=loop, scaling_config=ray.train.ScalingConfig(num_workers=0)
        ).fit()
    finally:
        torch.set_num_threads(threads)
        for actor in (loop["aggregator"], loop["board"]):
            ray.kill(actor)
        lock.release()
