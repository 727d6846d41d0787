"""Ray Tune over the chains. A trial drives one Ray Train run, of one chain or of several in lockstep, and computes nothing itself.

It asks Ray for a sliver of a CPU, never for its workers' CPUs or GPUs: placement groups do not nest, so a trial that held
them would wait for itself. Resuming is by the chains' own records, never by restoring a Tuner.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import ray
import ray.train
import ray.train.torch
from ray import tune

from dmsae_ray.cluster import DRIVER_CPUS
from dmsae_ray.distill.aggregator import Aggregator
from dmsae_ray.distill.chain import train_chains, write_failure
from dmsae_ray.distill.plan import ChainPlan


def run_chains(plans: list[ChainPlan], concurrent: int, board, scratch: Path) -> None:
    """Run these chains, `concurrent` worker groups at a time; returns when each chain is finished or marked failed.

    board: actor handle with update(label, **fields). scratch: folder for what Tune and Train write, removed at the end.
    """
    groups = in_lockstep(plans)

    def trial(grid: dict) -> None:
        drive(groups[grid["group"]], board, str(scratch))

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": DRIVER_CPUS}),
        param_space={"group": tune.grid_search(list(range(len(groups))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=False),
        run_config=tune.RunConfig(name="tune", storage_path=str(scratch), verbose=0),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def in_lockstep(plans: list[ChainPlan]) -> list[list[ChainPlan]]:
    """Groups of at most `cluster.lockstep` chains that read the same batches in the same order: of several k, arms or seeds."""
    alike: dict[tuple, list[ChainPlan]] = {}
    for plan in plans:
        alike.setdefault(plan.lockstep_key, []).append(plan)
    most = plans[0].config.cluster.lockstep if plans else 1
    return [some[first : first + most] for some in alike.values() for first in range(0, len(some), most)]


def drive(plans: list[ChainPlan], board, scratch: str) -> None:
    """One trial: a Ray Train run over the cycles of one chain, or of several in lockstep, with their aggregator. Marks chains
    failed instead of raising."""
    first, cluster = plans[0], plans[0].config.cluster
    for plan in plans:
        ray.get(board.update.remote(plan.label, phase="starting", cycle=len(plan.folder.records()), cycles=plan.cycles))
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    trainer = ray.train.torch.TorchTrainer(
        train_chains,
        train_loop_config={"plans": plans, "aggregator": Aggregator.remote(first.score_settings), "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=f"{first.key}-{first.lease.generation}", storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=cluster.retries),
        ),
    )  # fmt: skip
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        for plan in plans:
            if not plan.finished() and plan.folder.failure() is None:
                write_failure(plan, "error", _root(error))
    for plan in plans:
        if (failure := plan.folder.failure()) is not None:
            ray.get(board.update.remote(plan.label, phase="failed", message=failure["reason"]))


def _root(error: BaseException) -> str:
    """What a worker raised, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank in sorted(failures):
        inner = failures[rank]
        return f"worker {rank}: {str(getattr(inner, 'cause', None) or inner).strip().splitlines()[-1]}"
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
