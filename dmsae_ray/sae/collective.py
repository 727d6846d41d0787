"""What the workers of one training run say to each other: sums, maxima and gathered tensors.

The mathematics is written once against `Collective`; `Alone` is the single process, `TorchCollective` the process group
that PyTorch's DistributedDataParallel uses as well.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Collective(Protocol):
    """Every rank must make the same calls in the same order, with tensors of the same shape."""

    world: int
    rank: int

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, elementwise; the argument may be overwritten."""

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, elementwise; the argument may be overwritten."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order."""


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


class TorchCollective:
    """The default process group of torch.distributed, which must be initialised."""

    def __init__(self) -> None:
        if not dist.is_initialized():
            raise ValueError("TorchCollective needs an initialised torch.distributed process group")
        self.world = dist.get_world_size()
        self.rank = dist.get_rank()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(gathered, tensor.contiguous())
        return gathered


def gather_ragged(comm: Collective, values_N: Tensor) -> list[Tensor]:
    """Every rank's one-dimensional tensor, in rank order; lengths may differ."""
    if comm.world == 1:
        return [values_N]
    lengths = torch.stack(comm.all_gather(torch.tensor(values_N.numel(), device=values_N.device))).tolist()
    padded = values_N.new_zeros(max(lengths))
    padded[: values_N.numel()] = values_N
    return [part[:length] for part, length in zip(comm.all_gather(padded), lengths, strict=True)]
