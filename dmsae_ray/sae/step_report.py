"""What a step reports, and how training ends that has diverged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXPLODED = 1e3
"""A loss of so many times the first step's has diverged (or times 1/G, the loss of reconstructing nothing, if that is
more).
"""
RECENT = 8
"""Batches whose proven bounds the next guess is made from."""


class Diverged(RuntimeError):
    """Training cannot go on: a batch, the loss or the gradient is not finite, or the loss exploded. No weight was
    changed.
    """

    behind = 0
    """batches given to the trainer since the one meant"""
    rows: tuple[int, ...] = ()
    """this rank's rows of that batch that are not finite"""

    def concerns(self, x_BD: Tensor, behind: int = 0) -> None:
        """Note the batch meant."""
        self.behind, self.rows = behind, tuple((~torch.isfinite(x_BD).all(dim=1)).nonzero().flatten().tolist())


@dataclass(frozen=True)
class StepReport:
    """Figures of one step, over the global batch. Every L0 is pairs per token."""

    step: int
    """the step's index, 0 is the first"""
    lr: float
    loss: float
    loss_rec: float
    """reconstruction part of the loss"""
    loss_aux: float
    """AuxK part, before its weight"""
    fvu: float
    """share of the batch's variance that the reconstruction leaves"""
    l0: float
    core_l0: float
    free_l0: float
    dead_share: float
    """share of free latents silent for the whole dead window"""
    threshold: float
    """running mean of the smallest kept value; 0 before its first step"""
    grad_norm: float
    """before clipping"""
    tokens: int
    """trained on so far, this step included"""
    candidates: float
    """pairs that the screen could not rule out, per kept pair"""
    retries: int
    """scans of the screen beyond the first"""
