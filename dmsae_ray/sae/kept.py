"""What a gate kept of a batch, whichever gate it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dmsae_ray.sae.ops.pairs import Pairs

GUESS = 0.97
"""The proven bound L of the next batch is guessed to exceed this share of the smallest of the last ones. A wrong guess
costs a second scan, never correctness."""


class ScreenError(ArithmeticError):
    """A screened value was farther from the exact one than its margin: this machine's product is worse than assumed."""


@dataclass(frozen=True)
class Kept:
    """The kept pairs of this rank's rows. From `gate_on_device` every number is a 0-dim tensor."""

    pairs: Pairs
    """on the device alone: may end in padding (row B, latent F, value 0)"""
    smallest: float | Tensor
    """smallest value kept by BatchTopK in the global batch (an exempt core left out); 0 if nothing was kept"""
    bound: float | Tensor
    """the proven bound L; a guess for the next batch is GUESS of it"""
    candidates: int | Tensor
    """pairs of this rank that the screen could not rule out"""
    retries: int | Tensor
    """scans beyond the first"""
    wrong: int | Tensor = 0
    """pairs that were beyond their margin: above 0 on the device alone, where `ScreenError` is still to be raised"""
    short: bool | Tensor = False
    """on the device alone: too few places for the candidates, the pairs are of no use"""


def check_margins(wrong: int) -> None:
    """Raises `ScreenError` if values were beyond their margin."""
    if wrong:
        raise ScreenError(
            f"{wrong} screened pre-activations were off by more than their proven margin: this machine's "
            "matrix product is less exact than any order of sums allows. Set train.screen to fp32, and report this "
            "machine"
        )
