"""Gradient and update of one worker on a CUDA device, with one look at its numbers, when all is launched.

From the batch to the new weights nothing waits for the device: lists are as long as they can get (device_gate.py, `find_dead`),
and the update's kernels read from the device whether they may change anything. A step that must not count (the loss or the
gradient is not finite, the loss exploded, a margin was wrong, candidates or dead latents had too few places) so leaves weights
and state as they were, though the host learns of it only at the end.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmsae_ray.sae.gate import check_margins
from dmsae_ray.sae.loss import Outcome

if TYPE_CHECKING:
    from dmsae_ray.sae.step import Trainer

ROUND_DEAD = 128
"""Places for dead latents come in such numbers: fewer shapes, and memory that is used again. They are a function of the state, since
the products over dead latents may sum in another order in another shape."""


def advance(trainer: Trainer, x_BD: Tensor, token_index_B: Tensor | None) -> tuple[Outcome, float, float, float]:
    """As `Trainer._advance`. Raises `Diverged` or `ScreenError`; nothing is changed then."""
    ops, settings = trainer.loss.ops, trainer.settings
    known_F, dead_places = ops.dead_places
    if known_F is not trainer.silent_F:  # the first step, or one from a checkpoint
        dead_places = _rounded_up(int(_near_dead(trainer, trainer.silent_F)))
    while True:
        outcome, numbers = launch_step(trainer, x_BD, token_index_B, dead_places)
        loss_rec, loss_aux, norm, smallest, bound, *counts = numbers.tolist()
        candidates, retries, wrong, short, n_kept, n_dead, near_dead, go = map(int, counts)
        loss = loss_rec + settings.auxk_alpha * loss_aux
        if not go:
            trainer.adam.steps -= 1
        if math.isfinite(loss) and (short or n_dead > dead_places):  # a batch with NaN has whole rows as candidates
            ops.places = max(ops.places, candidates * 5 // 4 if short else 0)
            dead_places = max(dead_places, _rounded_up(n_dead))
            continue
        check_margins(wrong)
        trainer.check(loss)
        trainer.check_norm(norm)
        assert go, "a step that was not allowed to count has a reason"
        ops.dead_places = outcome.silent_F, _rounded_up(near_dead)
        outcome = dataclasses.replace(
            outcome, latent_N=outcome.latent_N[:n_kept], smallest=smallest, bound=bound, candidates=candidates, retries=retries,
            wrong=0, short=False,
        )  # fmt: skip
        return outcome, loss_rec, loss_aux, norm


@torch.no_grad()
def launch_step(trainer: Trainer, x_BD: Tensor, token_index_B: Tensor | None, dead_places: int) -> tuple[Outcome, Tensor]:
    """The outcome, and the numbers that the host wants to see [13]. Asks the device for nothing."""
    settings, loss = trainer.settings, trainer.loss
    guess = x_BD.new_full((), trainer.guess() or math.inf)
    _, gradient, outcome = loss.compute(x_BD, trainer.silent_F, token_index_B, guess, None, dead_places)
    total = outcome.loss_rec + settings.auxk_alpha * outcome.loss_aux.double()
    squares, parallel_F = trainer.adam.squares(gradient)
    norm = squares.sqrt()
    n_dead = outcome.dead_F.sum() if settings.auxk_alpha else torch.zeros_like(squares)
    go = total.isfinite() & (total <= trainer.limit()) & norm.isfinite() & (outcome.wrong == 0) & ~outcome.short & (n_dead <= dead_places)
    clip = (settings.clip / (norm + 1e-6)).clamp(max=1.0)
    trainer.adam.apply(gradient, parallel_F, clip, settings.learning_rate(trainer.steps_done), go=go.int())
    n_kept = (outcome.latent_N < trainer.sae.width).sum()
    numbers = (
        outcome.loss_rec, outcome.loss_aux, norm, outcome.smallest, outcome.bound, outcome.candidates, outcome.retries, outcome.wrong,
        outcome.short, n_kept, n_dead, _near_dead(trainer, outcome.silent_F), go,
    )  # fmt: skip
    return outcome, torch.stack([number.double() for number in numbers])


def _near_dead(trainer: Trainer, silent_F: Tensor) -> Tensor:
    """Free latents that one more silent batch makes dead, 0-dim: as many places are wanted in the next step."""
    settings = trainer.settings
    near_F = silent_F[trainer.sae.core_size :] + settings.batch >= settings.dead_window_tokens
    return near_F.sum() if settings.auxk_alpha else near_F.sum() * 0


def _rounded_up(n: int) -> int:
    return -(-n // ROUND_DEAD) * ROUND_DEAD
