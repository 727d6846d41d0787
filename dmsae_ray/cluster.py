"""Joining or starting Ray, and what fits on it.

Ray Train rounds what a chain's workers ask for up to whole CPUs and leaves the rest to Ray Data; a dataset without a whole
CPU waits for ever, silently. So capacity is computed here, before anything is started, and one CPU always stays free.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from dmsae_ray.config import Config
from dmsae_ray.stop import keeping_signals

DATA_CPUS = 1
DRIVER_CPUS = 0.01
"""What a Tune trial asks for: it only drives a trainer, whose workers have their own placement group."""

# Read by Ray at import: set before anything imports it.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1", "RAY_free_objects_period_milliseconds": "100", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


@dataclass(frozen=True)
class Capacity:
    """What the cluster has, and how much of the work it holds at once."""

    cpus: float
    gpus: float
    concurrent: int
    harvest_actors: int
    local: bool


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chain_cpus(config: Config) -> int:
    """Whole CPUs that one chain takes away from Ray Data."""
    return config.cluster.workers * math.ceil(config.cluster.cpus_per_worker)


def busy_chains(config: Config) -> int:
    """Chains whose threads keep this machine's CPUs busy."""
    return max(1, available_cpus() // (config.cluster.workers * config.train.threads))


@keeping_signals
def connect(config: Config, chains: int, verbose: bool) -> Capacity:
    """Join the cluster that is there, else start one on this machine.

    Raises ValueError saying what is missing and what would fit, if not even one chain fits.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    quiet = dict(log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.WARNING)
    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or _running_here()
    if address in (None, "local"):
        address = None
        cores = available_cpus()
        wanted = min(config.cluster.concurrent or busy_chains(config), max(1, chains))
        # Logical CPUs: what the work asks for, plus what Ray Data needs. Threads, not these, decide how busy the machine is.
        logical = max(cores, wanted * chain_cpus(config) + DATA_CPUS + 1)
        # A cluster of our own, gone with this process, listens on the network all the same, so Ray asks for a token: one for this run
        # alone. Ray would otherwise leave one in the home folder, which every later `ray start` then asks for.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(address="local", num_cpus=logical, include_dashboard=True, dashboard_port=0, **quiet)
    else:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(
                f"cluster.address {address}: this driver could not join the Ray cluster ({error}). Is it up? `ray stop` clears what a "
                "dead one left, `--cluster.address local` starts another. Where it asks for a token, set RAY_AUTH_MODE=token and the "
                "same token on both sides"
            ) from error
    return capacity(config, ray.cluster_resources(), chains, local=address is None)


def _running_here() -> str | None:
    """Whether `ray start` made a cluster on this machine. Another driver's private cluster does not count: it ends with its driver."""
    from ray._private.utils import read_ray_address

    # "auto", not the address itself: only then does Ray take up a token that lies ready.
    return "auto" if read_ray_address() else None


def capacity(config: Config, resources: dict[str, float], chains: int, local: bool) -> Capacity:
    """How many chains fit at once. Raises ValueError if none does."""
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    cluster = config.cluster
    need_cpus, need_gpus = chain_cpus(config), cluster.workers * cluster.gpus_per_worker
    fits = int((cpus - DATA_CPUS) // need_cpus)
    missing = []
    store_mb, need_mb = resources.get("object_store_memory", 0.0) / 2**20, cluster.workers * cluster.object_store_mb
    if fits < 1:
        missing.append(f"{need_cpus + DATA_CPUS} CPUs ({need_cpus} for a chain's workers, {DATA_CPUS} for Ray Data), it has {cpus:g}")
    if need_gpus:
        fits = min(fits, int(gpus / need_gpus + 1e-9))
        if gpus < need_gpus:
            missing.append(f"{need_gpus:g} GPUs (cluster.workers x cluster.gpus_per_worker), it has {gpus:g}")
    fits = min(fits, int(store_mb // need_mb))
    if store_mb < need_mb:
        missing.append(f"{need_mb} MB of object store (cluster.workers x cluster.object_store_mb), it has {store_mb:,.0f}")
    if config.harvest.gpus_per_actor > gpus:
        missing.append(f"{config.harvest.gpus_per_actor:g} GPUs for a harvest actor, it has {gpus:g}")
    if missing:
        workers = max(0, int(min((cpus - DATA_CPUS) // math.ceil(cluster.cpus_per_worker), store_mb // cluster.object_store_mb)))
        less = f"lower cluster.workers (now {cluster.workers}; {workers} would fit)" if workers else "add nodes"
        if store_mb < need_mb:
            less = f"lower cluster.object_store_mb, {less}" if workers else f"lower cluster.object_store_mb or {less}"
        more = [f"--num-cpus={need_cpus + DATA_CPUS}"] if cpus < need_cpus + DATA_CPUS else []
        more += [f"--object-store-memory={need_mb << 20}"] if store_mb < need_mb else []
        start = f"start Ray with more (ray start --head {' '.join(more)}) or " if more else ""
        raise ValueError(f"the Ray cluster is too small for one chain. It needs {' and '.join(missing)}. To mend it, {start}{less}")
    harvest = int(cpus - DATA_CPUS)
    if config.harvest.gpus_per_actor:
        harvest = min(harvest, int(gpus / config.harvest.gpus_per_actor + 1e-9))
    if local:
        fits = min(fits, cluster.concurrent or busy_chains(config))
        harvest = min(harvest, max(1, available_cpus() // config.harvest.threads))
    return Capacity(
        cpus=cpus, gpus=gpus, local=local,
        concurrent=max(1, min(fits, cluster.concurrent or fits, max(1, chains))),
        harvest_actors=max(1, min(harvest, config.harvest.actors or harvest)),
    )  # fmt: skip


def disconnect(capacity: Capacity, logs: Path) -> None:
    """Leave Ray; of a cluster of our own, keep the logs."""
    import ray
    from ray._private.worker import global_worker

    session = Path(global_worker.node.get_session_dir_path()) / "logs" if capacity.local and ray.is_initialized() else None
    ray.shutdown()
    if session is not None and session.exists():
        # Ray Train hands AWS keys of the environment to its workers, and Ray's agent writes down what it hands on.
        ignored = shutil.ignore_patterns("*.sock", "runtime_env_agent*")
        shutil.copytree(session, logs, dirs_exist_ok=True, ignore=ignored, symlinks=True)
