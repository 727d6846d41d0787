"""What the workers of one training run say to each other: sums, maxima and gathered tensors.

The mathematics is written once against `Collective`; `Alone` is the single process, `TorchCollective` the process group
that PyTorch's DistributedDataParallel uses as well.
"""

from __future__ import annotations

import json
import time
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

MEET_S = 0.02
"""Rest between two looks at whether all ranks are there."""


class Collective(Protocol):
    """Every rank must make the same calls in the same order, with tensors of the same shape, on any device: results are
    where the argument was."""

    world: int
    rank: int

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, elementwise; the argument may be overwritten."""

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, elementwise; the argument may be overwritten."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order."""

    def wait_for_all(self) -> None:
        """Return when every rank has called it. Unlike a collective it knows no limit of time: one rank may have
        written to a slow disk for an hour meanwhile. (Of a rank that died Ray Train learns, and ends the others.)"""


class Alone:
    """One process: nothing to exchange."""

    world = 1
    rank = 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def wait_for_all(self) -> None:
        pass


class TorchCollective:
    """The default process group of torch.distributed, which must be initialised.

    device: the one that the group's backend works on, which for NCCL is the worker's GPU; tensors from elsewhere go
    there and come back.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        if not dist.is_initialized():
            raise ValueError("TorchCollective needs an initialised torch.distributed process group")
        self.world = dist.get_world_size()
        self.rank = dist.get_rank()
        self.device = torch.device(device)
        self._waits = 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, op) -> Tensor:
        there = self._there(tensor)
        dist.all_reduce(there, op=op)
        return self._back(there, tensor)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        there = self._there(tensor).contiguous()
        gathered = [torch.empty_like(there) for _ in range(self.world)]
        dist.all_gather(gathered, there)
        return [self._back(part, tensor) for part in gathered]

    def wait_for_all(self) -> None:
        self._waits += 1
        meet(dist.distributed_c10d._get_default_store(), f"dmsae_ray/{self._waits}", self.world)

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device.type == self.device.type else tensor.to(self.device)

    @staticmethod
    def _back(result: Tensor, like: Tensor) -> Tensor:
        return result.to(like.device)


def meet(store: dist.Store, name: str, world: int) -> None:
    """Return when so many have come to this name, however long that takes. The store is one that a process group met
    by.
    """
    if store.add(name, 1) == world:
        store.set(f"{name}/all", b"here")
    while not store.check([f"{name}/all"]):
        time.sleep(MEET_S)


def gather_objects(comm: Collective, value: Any) -> list[Any]:
    """Every rank's value, of plain JSON types, in rank order."""
    parts = gather_ragged(comm, torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8))
    return [json.loads(bytes(part.tolist())) for part in parts]


def gather_ragged(comm: Collective, values_N: Tensor) -> list[Tensor]:
    """Every rank's one-dimensional tensor, in rank order; lengths may differ."""
    if comm.world == 1:
        return [values_N]
    lengths = torch.stack(comm.all_gather(torch.tensor(values_N.numel(), device=values_N.device))).tolist()
    padded = values_N.new_zeros(max(lengths))
    padded[: values_N.numel()] = values_N
    return [part[:length] for part, length in zip(comm.all_gather(padded), lengths, strict=True)]
