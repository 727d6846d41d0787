"""What one rank sends in a training step: counted, and by formula.

Bytes are those of ring algorithms, which process groups use for what is large: to sum n bytes over W ranks each sends
2 n (W - 1) / W, to gather n bytes of each it sends n (W - 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmsae_ray.sae.ops.pairs import DIGIT_BITS
from dmsae_ray.sae.ranks.collective import Collective
from dmsae_ray.sae.settings import SAESettings


def reduced(n_bytes: int, world: int) -> float:
    """Bytes a rank sends when n_bytes of each are summed (or their maximum taken)."""
    return 2 * n_bytes * (world - 1) / world


def gathered(n_bytes: int, world: int) -> float:
    """Bytes a rank sends when n_bytes of each are given to all."""
    return n_bytes * (world - 1)


class Counting:
    """A collective, and what this rank has sent by it."""

    def __init__(self, comm: Collective) -> None:
        self.comm = comm
        self.world, self.rank = comm.world, comm.rank
        self.sent = 0.0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        self.sent += reduced(tensor.nbytes, self.world)
        return self.comm.all_reduce_sum(tensor)

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        self.sent += reduced(tensor.nbytes, self.world)
        return self.comm.all_reduce_max(tensor)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        self.sent += gathered(tensor.nbytes, self.world)
        return self.comm.all_gather(tensor)


@dataclass(frozen=True)
class StepFacts:
    """What of a step, beside its settings, decides how much is sent."""

    pairs: int = 0
    """kept pairs of the rank that has most (gather)"""
    dead: int = 0
    """dead latents, on all ranks together"""
    dead_of_a_rank: int = 0
    """dead latents of the rank that has most (latent)"""
    retries: int = 0
    """the gate's scans beyond the first"""
    spare: bool = True
    """the screen left more pairs than are kept, so that the smallest kept value is searched for"""
    indexed: bool = True
    """rows come with their places in the batch"""


def bytes_per_step(
    settings: SAESettings, world: int, trained: int, n_groups: int, facts: StepFacts, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Bytes one rank sends in a step, by what they are for: all but the logged figures, and the first step's start.

    trained: trained numbers of the whole SAE. For a step as almost all are: the gate has a guess, there are more than k
    pairs per token to choose from, and no tie is cut. The gate sends digit counts, whatever the batch; with T tokens of
    d numbers of s bytes, W ranks, G groups, P trained numbers and N pairs on the rank that has most, the rest is about

        ddp      2 P s (W - 1) / W
        gather   T d s (W - 1) / W  +  N (4 + s) (W - 1)
        latent   T d s (W - 1) / W  +  2 T G d s (W - 1) / W
    """
    if world == 1:
        return {}
    size, bits = dtype.itemsize, 8 * dtype.itemsize
    tokens, d, rows = settings.batch, settings.d, settings.batch // world
    digits = -(-(bits - 1) // DIGIT_BITS) * reduced(8 << DIGIT_BITS, world)
    selection = digits + reduced(16, world) if facts.spare else reduced(size, world)
    sent = {"gate": (2 + facts.retries) * reduced(8, world) + reduced(16, world) + digits + selection}
    aux = facts.dead > 0 and settings.auxk_alpha > 0
    if settings.parallel == "ddp":
        sent["gradient"] = reduced(trained * size, world)
        sent["fired"] = reduced(settings.width, world)
        sent["loss"] = reduced(16, world)
        sent["aux"] = (reduced(8 * d, world) + reduced(size, world)) * aux
        return sent
    sent["rows"] = gathered(rows * d * size, world) + gathered(8 * rows, world) * facts.indexed
    if settings.parallel == "gather":
        sent["pairs"] = gathered(16, world) + gathered(8 * rows, world) + gathered(facts.pairs * (4 + size), world)
        return sent
    sent["sums"] = reduced(tokens * n_groups * d * size, world)
    sent["b_dec"] = reduced(d * size, world)
    sent["norm"] = reduced(8, world)
    sent["dead"] = gathered(8, world)
    if aux:
        sent["aux"] = reduced(tokens * d * size, world)
        if facts.dead > settings.aux_latents:
            largest = min(settings.aux_latents, facts.dead_of_a_rank)
            sent["aux"] += gathered(tokens * largest * size, world) + gathered(8 * tokens * n_groups, world)
    return sent
