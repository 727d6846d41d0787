"""Ray Train's run over one group of chains, in three processes less than Ray Train would start for it.

Each process costs seconds of processor time and over 100 MB, for every chain. Ray Train's controller is an actor of its
own by default; here it runs in the trial, which only waits for it. Ray Train's manager of datasets has nothing to do
here, since workers open their stream themselves. Its cleaner of placement groups asks the dashboard every second
whether the controller lives; here groups bear the trial's name, and whoever learns of a lost trial removes them
(`release`). Workers join their process group by Ray Train's own functions, but torch is imported by them alone.

The overridden methods are Ray Train's own (Ray 2.60), not promised to stay: pyproject.toml admits no other version.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray._raylet import PlacementGroupID
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from dmsae_ray.kept_log import KeptLog

if TYPE_CHECKING:
    from dmsae_ray.distill.plan import ChainPlan
    from dmsae_ray.lock import Lease

LEAVE_TIMEOUT_S = 30
"""For leaving the process group, when workers end. One that does not answer is killed all the same."""


class TrainRun(DataParallelTrainer):
    """A Ray Train run whose controller is in this process."""

    scaling_policy: ScalingPolicy | None = None
    """in the place of Ray Train's own"""

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unneeded)]

    def _initialize_and_run_controller(self, **parts: Any) -> ray.train.Result:
        if self.scaling_policy is not None:
            parts["scaling_policy"] = self.scaling_policy
        controller = Controller(**parts)
        asyncio.run(controller.run())
        return controller.get_result()


class NamedWorkerGroup(WorkerGroup):
    """A worker group whose placement group bears the run's name."""

    def _start(self) -> None:
        """Ray Train forgets a group that has its workers and then fails to join them: neither they nor their room
        would ever be free again, while it tries anew.
        """
        try:
            super()._start()
        except Exception:
            if self.has_started():
                self._worker_group_state.shutdown()
                self._clear_state()
            raise

    def _create_placement_group(self, scaling_config: Any, context: Any) -> DefaultPlacementGroupHandle:
        # A name of its own each time: that of a group just removed may still be taken.
        name = f"{self._train_run_context.run_config.name}/{secrets.token_hex(4)}"
        bundles = [context.resources_per_worker] * context.num_workers
        group = placement_group(
            bundles, context.placement_strategy, name=name, bundle_label_selector=context.label_selector
        )
        return DefaultPlacementGroupHandle(group)


class Controller(TrainController):
    worker_group_cls = NamedWorkerGroup


def release(runs: str) -> None:
    """Give back what runs whose names begin so still hold of the cluster, after their end or their processes'."""
    for number, group in placement_group_table().items():
        if group["name"].startswith(runs) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))


@dataclass
class GroupConfig(BackendConfig):
    """What ray.train.torch.TorchConfig is, without importing torch where the run is only driven."""

    backend: str
    """of torch.distributed"""
    timeout_s: int
    """of every collective"""

    @property
    def backend_cls(self) -> type[Backend]:
        return _TogetherInTorch


class _TogetherInTorch(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, GroupConfig)
        address, port = worker_group.execute_single(0, get_address_and_port)
        world = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, backend_config.backend, backend_config.timeout_s, address, port, rank, world
                )
                for rank in range(world)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        left = worker_group.execute_async(_leave, len(worker_group) > 1)
        with suppress(ray.exceptions.GetTimeoutError):
            ray.get(left, timeout=LEAVE_TIMEOUT_S)  # raises at the first that is lost, which Ray Train expects


def _join(backend: str, timeout_s: int, address: str, port: int, rank: int, world: int) -> None:
    """In a worker: be part of the process group, torch being imported here first. One worker alone needs none."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    _set_torch_distributed_env_vars()
    if world > 1:
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        _setup_torch_process_group(backend, rank, world, "env://", timeout_s)


def _leave(together: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=together)


def train_chains(loop: dict) -> None:
    """What every worker runs: see distill.worker.train_chains."""
    with kept_log(loop["plans"], loop["lease"], "worker", ray.train.get_context().get_world_rank()):
        import torch
        from ray.train.torch import get_device

        from dmsae_ray.distill import worker

        if (device := get_device()).type == "cuda":
            torch.cuda.set_device(device)
        worker.train_chains(loop)


def kept_log(plans: list[ChainPlan], lease: Lease, of: str, rank: int) -> KeptLog:
    """Keeps what this process of Ray's says, as `logs/<of>-<key of the first chain>-<generation>-<rank>-<word>.log` of
    the output folder; of a cluster's own logs nobody takes care.
    """
    from ray._private.worker import global_worker

    said = global_worker.get_out_file_path(), global_worker.get_err_file_path()
    word = secrets.token_hex(3)
    return KeptLog(
        [Path(path) for path in said if path],
        plans[0].config.home / "logs" / f"{of}-{plans[0].key}-{lease.generation}-{rank}-{word}.log",
        f"{of} {rank} of {', '.join(plan.label for plan in plans)}; pid {os.getpid()} on {socket.gethostname()}",
    )
