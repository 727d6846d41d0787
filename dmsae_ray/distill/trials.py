"""Ray Tune over the chains. A trial drives one Ray Train run and computes nothing itself.

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
from dmsae_ray.distill.chain import train_chain, write_failure
from dmsae_ray.distill.plan import ChainPlan


def run_chains(plans: list[ChainPlan], concurrent: int, board, scratch: Path) -> None:
    """Run these chains, `concurrent` at a time; returns when each is finished or marked failed.

    board: actor handle with update(label, **fields). scratch: folder for what Tune and Train write, removed at the end.
    """

    def trial(grid: dict) -> None:
        drive(plans[grid["chain"]], board, str(scratch))

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": DRIVER_CPUS}),
        param_space={"chain": tune.grid_search(list(range(len(plans))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=False),
        run_config=tune.RunConfig(name="tune", storage_path=str(scratch), verbose=0),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def drive(plan: ChainPlan, board, scratch: str) -> None:
    """One trial: a Ray Train run over the chain's cycles, with its aggregator. Marks the chain failed instead of raising."""
    cluster = plan.config.cluster
    ray.get(board.update.remote(plan.label, phase="starting", cycle=len(plan.folder.records()), cycles=plan.cycles))
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    trainer = ray.train.torch.TorchTrainer(
        train_chain,
        train_loop_config={"plan": plan, "aggregator": Aggregator.remote(plan.score_settings), "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=f"{plan.key}-{plan.lease.generation}", storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=cluster.retries),
        ),
    )  # fmt: skip
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        if plan.folder.failure() is None:
            write_failure(plan, "error", _root(error))
    failure = plan.folder.failure()
    if failure is not None:
        ray.get(board.update.remote(plan.label, phase="failed", message=failure["reason"]))


def _root(error: BaseException) -> str:
    """What a worker raised, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank in sorted(failures):
        inner = failures[rank]
        return f"worker {rank}: {str(getattr(inner, 'cause', None) or inner).strip().splitlines()[-1]}"
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
