"""Steps of one worker on a CUDA device, launched one ahead of those that the host has seen the numbers of.

From the batch to the new weights nothing waits for the device: lists are as long as they can get (gate_on_device.py,
`find_dead`), what one step hands to the next stays on the device (`Carried`), and the update's kernels read there
whether they may change anything. A step that must not count (the loss or the gradient is not finite, the loss exploded,
a margin was wrong, candidates or dead latents had too few places) so leaves weights and Adam's state as they were, as
do those launched after it. The host learns of it one step later, while the device is at work on the next: it then
raises, or launches again what had too few places.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor

from dmsae_ray.sae.kept import GUESS, check_margins
from dmsae_ray.sae.loss import Outcome
from dmsae_ray.sae.ops.choose import is_fused
from dmsae_ray.sae.step_report import EXPLODED, RECENT, Diverged

if TYPE_CHECKING:
    from dmsae_ray.sae.trainer import Trainer

ROUND_DEAD = 128
"""Places for dead latents come in such numbers: fewer shapes, and memory that is used again."""


class Carried(NamedTuple):
    """What a step gets from the one before, on the device."""

    silent_F: Tensor
    """tokens since each latent last fired"""
    bounds_R: Tensor
    """proven bounds of the last gates, `inf` where there were fewer"""
    limit: Tensor
    """a loss beyond has exploded; float64, 0-dim"""
    go: Tensor
    """False: a step before must not count, so this may not; 0-dim"""


class Numbers(NamedTuple):
    """What the host wants to know of a step."""

    loss_rec: float
    loss_aux: float
    norm: float
    """of the gradient"""
    smallest: float
    bound: float
    candidates: int
    retries: int
    wrong: int
    short: bool
    n_kept: int
    n_dead: int
    near_dead: int
    """free latents that are dead if they stay silent until the last step that is launched before these numbers are seen
    """
    counts: bool
    """whether the step changed anything"""


@dataclass(frozen=True)
class Flight:
    """A launched step."""

    x_BD: Tensor
    token_index_B: Tensor | None
    before: Carried
    dead_places: int
    outcome: Outcome
    numbers: Tensor
    """on the way to the host"""
    arrived: torch.cuda.Event | None

    def seen(self) -> Numbers:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss_rec, loss_aux, norm, smallest, bound, *counts = self.numbers.tolist()
        candidates, retries, wrong, short, n_kept, n_dead, near_dead, counted = map(int, counts)
        return Numbers(
            loss_rec,
            loss_aux,
            norm,
            smallest,
            bound,
            candidates,
            retries,
            wrong,
            bool(short),
            n_kept,
            n_dead,
            near_dead,
            bool(counted),
        )


class Steps:
    """The steps of a trainer with one rank, whole batches and fused pair operations.

    The trainer's counters are those of the steps seen; its weights and Adam's state may hold those in flight as well.
    """

    LATE = 1
    """steps that may be in flight while their numbers are not wanted"""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._flights: deque[Flight] = deque()
        self._carried: Carried | None = None
        self._places: deque[int] = deque()  # for dead latents, in the steps to be launched next

    def reset(self, dead_places: int | None) -> None:
        """The trainer's state was set from outside. dead_places: what `dead_places` was there, if it is known."""
        self._flights.clear()
        self._carried = None
        self._places = deque([] if dead_places is None else [dead_places])

    def dead_places(self) -> int:
        """Places for dead latents in the next step, once all were seen. A part of the training's state: products over
        dead latents may sum in another order in another shape."""
        assert not self._flights
        self._begin()
        return self._places[0]

    def launch(self, x_BD: Tensor, token_index_B: Tensor | None) -> None:
        self._begin()
        self._launch(x_BD, token_index_B, self._places[0])
        self._places.popleft()

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def _begin(self) -> None:
        """What the first steps get from the host."""
        if self._carried is not None:
            return
        trainer = self.trainer
        silent_F = trainer.silent_F
        new = {"device": silent_F.device}
        self._carried = Carried(
            silent_F,
            torch.full((RECENT,), math.inf, **new),
            torch.tensor(trainer.limit(), dtype=torch.float64, **new),
            torch.ones((), dtype=torch.bool, **new),
        )
        for batches in range(len(self._places) + 1, self.LATE + 2):
            self._places.append(_rounded_up(int(near_dead(trainer, silent_F, batches))))

    def _launch(self, x_BD: Tensor, token_index_B: Tensor | None, dead_places: int) -> None:
        trainer, before = self.trainer, self._carried
        assert before is not None, "`launch` begins, and `_undo` goes back to a step that was launched"
        step = trainer.steps_done + len(self._flights)
        outcome, numbers, self._carried = launch_step(trainer, x_BD, token_index_B, before, step, dead_places)
        arrived = None
        if numbers.is_cuda:
            on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = on_host.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._flights.append(Flight(x_BD, token_index_B, before, dead_places, outcome, numbers, arrived))

    def see(self) -> tuple[Outcome, float, float, float]:
        """Take in the first step in flight; what `Trainer._advance` returns.

        Raises `Diverged` or `ScreenError`; no step is in flight then, and the trainer is where it was before that one.
        """
        trainer, flight = self.trainer, self._flights[0]
        seen = flight.seen()
        if not seen.counts:
            undone = self._undo()
            # A batch with NaN has whole rows as candidates: more places are of no use.
            few = seen.short or seen.n_dead > flight.dead_places
            if not (few and math.isfinite(trainer.loss_of(seen.loss_rec, seen.loss_aux))):
                self._places.extendleft(each.dead_places for each in reversed(undone))
                self._raise(seen, flight, behind=len(undone) - 1)
            if seen.short:
                assert is_fused(trainer.loss.ops), "see `Trainer`: no other operations run ahead"
                trainer.loss.ops.make_room(seen.candidates)
            self._launch(flight.x_BD, flight.token_index_B, max(flight.dead_places, _rounded_up(seen.n_dead)))
            for later in undone[1:]:
                self._launch(later.x_BD, later.token_index_B, later.dead_places)
            return self.see()
        self._flights.popleft()
        self._places.append(_rounded_up(seen.near_dead))
        outcome = replace(
            flight.outcome,
            latent_N=flight.outcome.latent_N[: seen.n_kept],
            smallest=seen.smallest,
            bound=seen.bound,
            candidates=seen.candidates,
            retries=seen.retries,
            wrong=0,
            short=False,
        )
        return outcome, seen.loss_rec, seen.loss_aux, seen.norm

    def _raise(self, seen: Numbers, flight: Flight, behind: int) -> NoReturn:
        check_margins(seen.wrong)
        try:
            self.trainer.check(self.trainer.loss_of(seen.loss_rec, seen.loss_aux))
            self.trainer.check_norm(seen.norm)
        except Diverged as error:
            error.concerns(flight.x_BD, behind)
            raise
        raise AssertionError(f"a step that did not count has a reason: {seen}")

    def _undo(self) -> list[Flight]:
        """Forget the steps in flight, none of which changed anything, and return them."""
        undone = list(self._flights)
        self._flights.clear()
        self._carried = undone[0].before
        self.trainer.adam.steps -= len(undone)
        return undone


@torch.no_grad()
def launch_step(
    trainer: Trainer, x_BD: Tensor, token_index_B: Tensor | None, before: Carried, step: int, dead_places: int
) -> tuple[Outcome, Tensor, Carried]:
    """The outcome, `Numbers` [13] and what the next step gets. Asks the device for nothing."""
    settings, loss = trainer.settings, trainer.loss
    _, gradient, outcome = loss.compute(
        x_BD, before.silent_F, token_index_B, GUESS * before.bounds_R.min(), None, dead_places, step
    )
    total = outcome.loss_rec + settings.auxk_alpha * outcome.loss_aux.double()
    trainer.adam.penalise(gradient)
    squares, parallel_F = trainer.adam.squares(gradient)
    norm = squares.sqrt()
    n_dead = outcome.dead_F.sum() if settings.auxk_alpha else torch.zeros_like(squares)
    go = before.go & total.isfinite() & (total <= before.limit) & norm.isfinite()
    go = go & (outcome.wrong == 0) & ~outcome.short & (n_dead <= dead_places)
    clip = (settings.clip / (norm + 1e-6)).clamp(max=1.0)
    trainer.adam.apply(gradient, parallel_F, clip, settings.learning_rate(step), go=go.int())
    numbers: tuple[Tensor, ...] = Numbers(  # 0-dim, until the host has them
        outcome.loss_rec,
        outcome.loss_aux,
        norm,
        outcome.smallest,
        outcome.bound,
        outcome.candidates,
        outcome.retries,
        outcome.wrong,
        outcome.short,
        (outcome.latent_N < trainer.sae.width).sum(),
        n_dead,
        near_dead(trainer, outcome.silent_F, Steps.LATE + 1),
        go,
    )
    after = Carried(
        outcome.silent_F,
        torch.cat([before.bounds_R[1:], outcome.bound.view(1)]),
        before.limit if step else (EXPLODED * total).clamp(min=EXPLODED / len(trainer.sae.group_ends)),
        go,
    )
    return outcome, torch.stack([number.double() for number in numbers]), after


def near_dead(trainer: Trainer, silent_F: Tensor, batches: int) -> Tensor:
    """Free latents that are dead after so many batches more if they stay silent, 0-dim. None are asked for where there
    is no AuxK.
    """
    settings = trainer.settings
    near_F = silent_F[trainer.sae.core_size :] + batches * settings.batch >= settings.dead_window_tokens
    return near_F.sum() * bool(settings.auxk_alpha)


def _rounded_up(n: int) -> int:
    return -(-n // ROUND_DEAD) * ROUND_DEAD
