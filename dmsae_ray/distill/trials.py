"""Ray Tune over the chains. A trial drives one Ray Train run, of one chain or of several in lockstep, and computes
nothing itself.

It asks Ray for no CPU or GPU, least of all for its workers': placement groups do not nest, so a trial that held them
would wait for itself, and slivers of many trials add up to the CPU that a worker then lacks. It lives on the node of
the command itself, so that no other lost node takes a trial along. Its process imports no torch, unless it has a
failure to write. Resuming is by the chains' own records, never by restoring a Tuner.
"""

from __future__ import annotations

import functools
import itertools
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.search import BasicVariantGenerator

from dmsae_ray.cluster.metrics import tell_retries
from dmsae_ray.cluster.nodes import Bundle
from dmsae_ray.cluster.present import resources, run_name, runs_named
from dmsae_ray.distill.elastic import Elastic, most_workers, numbers
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.train_run import GroupConfig, TrainRun, kept_log, release, train_chains
from dmsae_ray.lock import Lease

COLLECTIVE_TIMEOUT_S = 4 * 3600
"""Of the workers' collectives: longer than anything one rank does while the others wait for it at a barrier (choosing a
core of 65k latents, writing it to a slow disk). Nobody waits so long for a worker that is lost: Ray notices by itself.
"""
HERE = 0.0001
"""Of the one that each node has of itself, the least that Ray counts: a trial is placed on this node, and none kept
out.
"""
GROUPS_PER_AGGREGATOR = 8
"""Worker groups at work that share one actor: what it adds up comes seldom, but each of its processes imports torch."""


LOOK_S = 5.0
"""Between two looks at how many groups may be at work: nodes join and leave."""


def run_chains(plans: list[ChainPlan], lease: Lease, concurrent: Callable[[], int], board: Any, scratch: Path) -> None:
    """Run these chains, `concurrent()` worker groups at a time, which may change meanwhile; returns when each chain is
    finished or marked failed.

    A trial whose process is lost begins again, `cluster.retries` times: what its chain had finished stays. lease: the
    right to write. board: actor handle with update(label, **fields). scratch: folder for what Tune and Train write,
    removed at the end.
    """
    hand_on_no_keys()
    groups, retries = in_lockstep(plans), plans[0].config.cluster.retries
    starts = Starts(concurrent)

    def trial(grid: dict) -> None:
        group = groups[grid["group"]]
        with kept_log(group, lease, "trial", 0):
            drive(group, lease, grid["aggregator"], board, str(scratch))

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 0, f"node:{ray.util.get_node_ip_address()}": HERE}),
        param_space={"group": tune.grid_search(list(range(len(groups))))},
        tune_config=tune.TuneConfig(search_alg=starts, reuse_actors=False),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=retries),
            callbacks=[ReleaseLost(groups, lease)],
        ),
    )
    try:
        for group, result in zip(groups, tuner.fit(), strict=True):
            settle(group, lease, result.error, board)
    finally:
        for aggregator in starts.aggregators:
            with suppress(Exception):  # a broken cluster is told of by what is on its way out
                ray.kill(aggregator)
        shutil.rmtree(scratch, ignore_errors=True)


class Starts(BasicVariantGenerator):
    """Has Tune begin with the next group whenever fewer are at work than there may be at the time, and gives the trial
    an aggregator: there are no more of these than the groups at work need.
    """

    def __init__(self, concurrent: Callable[[], int]):
        super().__init__()
        self.aggregators: list[Any] = []
        self._concurrent, self._looked, self._served = concurrent, float("-inf"), dict[str, int]()

    def next_trial(self) -> Any:
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            try:
                self.max_concurrent = self._concurrent()
            except Exception as error:  # a head that is away for a moment does not end what is at work
                logging.getLogger(__name__).warning("how many chains fit now is not known: %s", error)
                self.max_concurrent = self.max_concurrent or 1
        trial = super().next_trial()
        if trial is not None:
            trial.config["aggregator"] = self._aggregator_for(trial.trial_id)
        return trial

    def _aggregator_for(self, trial: str) -> Any:
        from dmsae_ray.attribution.aggregator import Aggregator

        busy = Counter(place for other, place in self._served.items() if other in self._live_trials)
        place = next(place for place in itertools.count() if busy[place] < GROUPS_PER_AGGREGATOR)
        if place == len(self.aggregators):
            # mypy does not see that ray's decorator makes another class of it.
            self.aggregators.append(Aggregator.remote())  # type: ignore[attr-defined]
        self._served[trial] = place
        return self.aggregators[place]

    def save_to_dir(self, *where: Any, **named: Any) -> None:
        """Tune would note its searcher for a restart; ours are by the chains' own records."""

    def __reduce__(self) -> Any:
        return BasicVariantGenerator, ()  # nor does a copy of it have anything to do


def hand_on_no_keys() -> None:
    """Ray Tune would put the AWS keys of this process into the runtime environment of every trial, which Ray's
    dashboard shows to whoever may see it, and Ray's agent writes into its log. Trials have those of Ray's processes.
    """
    keys = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(keys)


class ReleaseLost(tune.Callback):
    """What a trial held whose process was lost for good is free again. One that begins again sees to that itself."""

    def __init__(self, groups: list[list[ChainPlan]], lease: Lease):
        self.groups, self.lease = groups, lease

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        try:
            release(runs_of(self.groups[trial.config["group"]], self.lease))
        except ray.exceptions.RayError as error:
            logging.getLogger(__name__).warning("what a lost trial held may still be held: %s", error)


class Retries(ray.train.UserCallback):
    """Counts how often the workers of a trial's chains were lost or failed."""

    def __init__(self, plans: list[ChainPlan]):
        self._plans, self._count = plans, -1
        self.after_exception()

    def after_exception(self, *_: Any, **__: Any) -> None:
        self._count += 1
        tell_retries(self._plans[0].config.name, [plan.label for plan in self._plans], self._count)


def runs_of(plans: list[ChainPlan], lease: Lease) -> str:
    """What the names of these chains' runs begin with, and no other sweep's on the same cluster."""
    return runs_named(plans[0].key, lease.generation)


def settle(plans: list[ChainPlan], lease: Lease, error: BaseException | None, board: Any) -> None:
    """After their trial: no chain is left that is neither finished nor marked failed. error: what the trial ended
    with.
    """
    from dmsae_ray.distill.failure import write_failure

    for plan in plans:
        plan.folder.refresh()
        if plan.finished() or plan.folder.failure() is not None:
            continue
        if error is None:
            reason = "its workers ended without a word"
        else:
            reason = (
                f"its driver was lost, and again after cluster.retries {plan.config.cluster.retries}: {_root(error)}"
            )
        write_failure(plan, lease, "error", f"{reason}. The same command goes on where it stopped")
        ray.get(board.update.remote(plan.label, phase="failed", message=reason))


def in_lockstep(plans: list[ChainPlan]) -> list[list[ChainPlan]]:
    """Groups of at most `cluster.lockstep` chains that read the same batches in the same order: of several k, arms or
    seeds.
    """
    alike: dict[tuple, list[ChainPlan]] = {}
    for plan in plans:
        alike.setdefault(plan.lockstep_key, []).append(plan)
    most = plans[0].config.cluster.lockstep if plans else 1
    return [some[first : first + most] for some in alike.values() for first in range(0, len(some), most)]


def drive(plans: list[ChainPlan], lease: Lease, aggregator: Any, board: Any, scratch: str) -> None:
    """One trial: a Ray Train run over the cycles of one chain, or of several in lockstep. aggregator: actor handle.
    Marks chains failed instead of raising.
    """
    cluster, runs = plans[0].config.cluster, runs_of(plans, lease)
    release(runs)  # of this trial, before it was lost
    for plan in plans:
        ray.get(board.update.remote(plan.label, phase="starting", cycle=len(plan.folder.records()), cycles=plan.cycles))
    asks = resources(plans[0].config, Bundle(cluster.cpus_per_worker, cluster.gpus_per_worker))
    trainer = TrainRun(
        train_chains,
        train_loop_config={"plans": plans, "lease": lease, "aggregator": aggregator, "board": board},
        backend_config=process_group(cluster.gpus_per_worker),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=asks,
            placement_strategy=cluster.placement_strategy,
            label_selector=dict(cluster.label_selector) or None,
        ),
        run_config=ray.train.RunConfig(
            # A trial that begins again must not take up what Ray Train noted of the run that was lost.
            name=run_name(runs, cluster.object_store_mb),
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=cluster.retries),
            callbacks=[Retries(plans)],
        ),
    )
    if len(allowed := numbers(plans[0].config)) > 1:
        labels = [plan.label for plan in plans]

        def saved() -> list | None:
            told = ray.get(board.snapshot.remote())
            found = [told.get(label, {}) for label in labels]
            # What follows a cycle's training would be lost as a whole, and takes no longer with fewer.
            trains = {status.get("phase") for status in found} <= {"train", "done", "failed"}
            return [status.get("saved") for status in found] if trains else None

        most = functools.partial(most_workers, plans[0].config, runs)
        trainer.scaling_policy = Elastic(trainer.scaling_config, allowed, most, saved)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        from dmsae_ray.distill.failure import write_failure

        for plan in plans:
            plan.folder.refresh()
            if not plan.finished() and plan.folder.failure() is None:
                write_failure(plan, lease, "error", _root(error))
    finally:
        release(runs)  # where Ray Train failed at ending it
    for plan in plans:
        plan.folder.refresh()
        if (failure := plan.folder.failure()) is not None:
            ray.get(board.update.remote(plan.label, phase="failed", message=failure.reason))


def process_group(gpus_per_worker: float) -> GroupConfig:
    """The workers'. Ray would give GPU workers NCCL alone, which cannot add up what lies in a CPU's memory."""
    return GroupConfig("cpu:gloo,cuda:nccl" if gpus_per_worker else "gloo", COLLECTIVE_TIMEOUT_S)


def _root(error: BaseException) -> str:
    """What a worker raised, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank in sorted(failures):
        inner = failures[rank]
        return f"worker {rank}: {str(getattr(inner, 'cause', None) or inner).strip().splitlines()[-1]}"
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
