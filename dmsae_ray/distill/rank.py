"""One worker of a chain's group, and what it speaks with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dmsae_ray.lock import Lease
from dmsae_ray.sae.ranks.collective import Collective


@dataclass(frozen=True)
class Rank:
    """What a worker is from its start to its end; its chains share it."""

    number: int
    """0 is the one that writes"""
    world: int
    """workers of the group"""
    comm: Collective
    device: torch.device
    lease: Lease
    """the right to write below the output folder"""
    aggregator: Any
    """handle of the actor that adds up attribution"""
    board: Any
    """handle of the actor that shows progress"""

    @property
    def writes(self) -> bool:
        return self.number == 0
