"""What a comparison reads of one finished chain.

Shape letters: N candidates of cycle 0, C core size, D model dimension, F width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dmsae_ray.compare.course import CycleCore
from dmsae_ray.compare.measured_latents import MeasuredLatents

if TYPE_CHECKING:
    from dmsae_ray.core.core import Core


@dataclass(frozen=True)
class ChainIdentity:
    """Which chain it is: what decides with whom, and as what, it is compared."""

    label: str
    """name of the chain"""
    arm: str
    """group of chains of a study; `base` is the plain grid"""
    seed: int
    """seed of initialisation"""
    data_seed: int
    """seed of the order of data"""
    part: tuple[int, int] | None
    """(part, parts) of the shards it reads; None: all"""
    k: int
    """its active latents per token"""
    rest: str
    """stands for all other fields that decide its cores"""


@dataclass(frozen=True, eq=False)
class ChainResult:
    """A finished chain. Raises ValueError if the core is not of the SAE."""

    chain: ChainIdentity
    core: Core
    """the core its last cycle selected"""
    sae: MeasuredLatents
    """all latents of the SAE in which the core was selected"""
    core_ids_C: torch.Tensor
    """latent ids, int64, of the selected core in that SAE"""
    start: MeasuredLatents
    """all latents of cycle 0's SAE"""
    start_ids_N: torch.Tensor
    """latent ids, int64, of cycle 0's candidates by score descending"""
    start_has_core: bool = False
    """whether cycle 0 was itself given a core, so that it is not what a plain Matryoshka SAE gives"""
    course: tuple[CycleCore, ...] = ()
    """the cores that its cycles selected, in order"""

    def __post_init__(self) -> None:
        if len(self.core_ids_C) != self.core.size or self.core.W_enc_CD.shape[1] != self.sae.W_dec_ND.shape[1]:
            raise ValueError(f"{self.chain.label}: the core is not of this SAE")

    @property
    def label(self) -> str:
        return self.chain.label

    def core_latents(self) -> MeasuredLatents:
        """The core's members, in its own order."""
        return self.sae.take(self.core_ids_C)

    def by_score_C(self) -> torch.Tensor:
        """The core's members by score descending, ties by id."""
        return torch.argsort(self.core.scores_C, descending=True, stable=True)

    def no_start(self) -> str | None:
        """Why cycle 0 says nothing about distillation, if it does not."""
        if self.start_has_core:
            return f"{self.label} began with a core: its cycle 0 is no plain Matryoshka SAE"
        if self.core.cycle == 0:
            return f"the core of {self.label} is itself cycle 0's: nothing has been distilled yet"
        return None
