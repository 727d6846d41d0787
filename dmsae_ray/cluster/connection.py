"""Joining or starting Ray.

Ray waits for ever, silently, for what no node can give. So what the work asks for is compared with the nodes before
anything is started, node by node, and one CPU always stays free for what is not training.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmsae_ray.cluster.address import check_answers, cluster_address
from dmsae_ray.cluster.autoscaler import wait_for_nodes
from dmsae_ray.cluster.capacity import DATA_CPUS, Capacity, available_cpus, busy_chains, capacity, capacity_now
from dmsae_ray.cluster.present import node_of, nodes_now
from dmsae_ray.cluster.temporary import private_folder, remove
from dmsae_ray.cluster.waiting import Waits
from dmsae_ray.config import Config
from dmsae_ray.stop import deaf, keeping_signals

STARTS = 3
TOO_SLOW = "timed out during startup"

# Read by Ray at import: set before anything imports it.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_free_objects_period_milliseconds": "100",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}


@keeping_signals
def connect(config: Config, chains: int, verbose: bool, say: Callable[[str], None] = lambda line: None) -> Capacity:
    """Join the cluster that is there, else start one on this machine.

    chains: to be trained; 0: only the language model will be run. Raises ValueError saying what is missing and what
    would fit, if not even one chain fits, or if no cluster answers.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address = cluster_address(config)
    if address is not None:
        check_answers(config, address, say)
    import ray

    folder = None
    quiet = dict(log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.WARNING)
    if address is None:
        # A cluster of our own, gone with this process, listens on the network all the same, so Ray asks for a token,
        # whatever the environment says of other clusters: one for this run alone. Ray would otherwise leave one in the
        # home folder, which every later `ray start` then asks for.
        os.environ.pop("RAY_AUTH_MODE", None)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Nobody drains the only node of a cluster that is ours alone; to watch for it takes a process for each chain.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray would run its workers at niceness 15: on a machine that anybody else uses they hardly get a turn.
        os.environ.setdefault("RAY_worker_niceness", "0")
        folder = private_folder()
        how = dict(num_cpus=logical_cpus(config, chains), include_dashboard=False, _temp_dir=str(folder / "ray"))
        try:
            _start(say, **how, **quiet)
        except BaseException:
            remove(folder)
            raise
    else:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(
                f"cluster.address {address}: this driver could not join the Ray cluster ({error}). Is it up? `ray "
                "stop` clears what a dead one left, `--cluster.address local` starts another. Where it asks for a "
                "token, set RAY_AUTH_MODE=token and the same token on both sides"
            ) from error
    try:
        if address is None:
            found = capacity(config, nodes_now(), chains, local=True)
        else:
            found = wait_for_nodes(config, lambda: capacity_now(config, chains), say)
    except BaseException:
        with deaf():
            ray.shutdown()
        if folder is not None:
            remove(folder)
        raise
    return replace(found, waits=Waits(config, say).start(), folder=folder)


def _start(say: Callable[[str], None], **options: Any) -> None:
    """A Ray of our own. Its parts must be up within a time that Ray fixes (half a minute), so a machine that others
    keep busy gets another chance. Raises ValueError if that was not enough either."""
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:  # Ray raises nothing narrower
            ray.shutdown()
            if TOO_SLOW not in str(error):
                raise
            if not left:
                raise ValueError(
                    f"Ray could not start on this machine within the time it allows itself (tried {STARTS} times: "
                    f"{str(error).strip()}). Is the machine very busy, or out of memory? Give the same command when it "
                    "is not, or join a running cluster with --cluster.address"
                ) from error
            say("ray: did not start within the time it allows itself; trying again")


def logical_cpus(config: Config, chains: int) -> int:
    """CPUs to tell a Ray of our own of: what the work asks for, and more. Threads, not these, decide how busy the
    machine is.
    """
    wanted = min(config.cluster.concurrent or busy_chains(config), max(1, chains))
    return max(
        available_cpus(), wanted * config.cluster.workers * math.ceil(config.cluster.cpus_per_worker) + DATA_CPUS + 1
    )


def check_fits_here(config: Config, chains: int) -> None:
    """Where no cluster is to be joined: what would be started on this machine will do. Raises ValueError; starts
    nothing.
    """
    if cluster_address(config) is not None:
        return
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    cpus = logical_cpus(config, chains)
    here = ResourceAndLabelSpec(num_cpus=cpus).resolve(is_head=True, node_ip_address="127.0.0.1")
    has = here.to_resource_dict()
    node = node_of(has, has, here.labels)
    capacity(config, [node], chains, local=True)


def disconnect(capacity: Capacity, logs: Path) -> None:
    """Leave Ray; of a cluster of our own, keep the logs."""
    import ray
    from ray._private.worker import global_worker

    if capacity.waits is not None:
        capacity.waits.stop()
    session = (
        Path(global_worker.node.get_session_dir_path()) / "logs" if capacity.local and ray.is_initialized() else None
    )
    kept = True
    try:
        with deaf():
            ray.shutdown()
        if session is not None and session.exists():
            kept = keep_logs(session, logs)
    finally:
        if capacity.folder is not None and kept:
            remove(capacity.folder)


def keep_logs(session: Path, logs: Path) -> bool:
    """Copy Ray's logs; returns whether they are there. Never raises for want of room or rights: another error, which
    matters more, may be on its way out.
    """
    # Ray Train hands AWS keys of the environment to its workers, and Ray's agent writes down what it hands on.
    ignored = shutil.ignore_patterns("*.sock", "runtime_env_agent*")
    try:
        shutil.copytree(session, logs, dirs_exist_ok=True, ignore=ignored, symlinks=True)
    except OSError as error:  # shutil.Error is one, with a list of all files
        why = error.strerror or f"{len(error.args[0])} files, the first: {error.args[0][0][2]}"
        logging.getLogger(__name__).warning("Ray's logs were not kept in %s (%s); they lie in %s", logs, why, session)
        return False
    return True
