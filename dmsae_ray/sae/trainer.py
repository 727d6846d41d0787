"""One training step, in the order of dictionary-learning 0.1.0's `MatryoshkaBatchTopKTrainer.update`.

Shapes: B tokens of this rank's batch, D = d, F width.

Gradient; its component parallel to each decoder row removed; norm of the whole gradient clipped; Adam; decoder rows
brought back to norm 1. In the first step b_dec is the geometric median of the global batch, and the learning rate is 0
if there is a warm-up.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmsae_ray.sae.adam import Adam
from dmsae_ray.sae.kept import GUESS
from dmsae_ray.sae.loss import LossModule, Outcome
from dmsae_ray.sae.median import geometric_median
from dmsae_ray.sae.ranks.collective import Alone, Collective
from dmsae_ray.sae.ranks.exchange import all_rows, order_of
from dmsae_ray.sae.ranks.partition import Shard
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.step_report import EXPLODED, RECENT, Diverged, StepReport

if TYPE_CHECKING:
    from dmsae_ray.sae.steps_on_device import Steps

STATE_VERSION = 2
"""Raised when older training states cannot be continued."""


class Trainer:
    """An SAE in training: its optimiser, counters and running threshold.

    `sae` is what this rank trains: the one given, or with `settings.parallel` latent its part of it, a copy; `whole` is
    the whole one on every rank. `step` raises `Diverged` on all ranks together. A batch changes the state only if its
    step succeeds, but for b_dec in the first step.

    On a CUDA device (one rank, whole batches) steps are launched one ahead of those whose numbers were seen, so that it
    never waits: `step` then raises for the batch before its own, and the counters here are one step late. `settle`
    takes in the last; `step` with `log`, `whole` and `state_dict` do so first.
    """

    def __init__(
        self,
        sae: MatryoshkaSAE,
        settings: SAESettings,
        comm: Collective = Alone(),
        model: nn.Module | None = None,
    ) -> None:
        """sae: alike on all ranks. model: with several ranks and parallel `ddp`, and only then, the `LossModule` of
        this SAE wrapped in DistributedDataParallel (`forward_sync_buffers=False` saves a broadcast per step)."""
        if (sae.width, sae.d) != (settings.width, settings.d):
            raise ValueError(f"the SAE is {sae.width} x {sae.d}, its settings say {settings.width} x {settings.d}")
        if settings.batch % comm.world:
            raise ValueError(f"batch {settings.batch} is not a multiple of the {comm.world} workers")
        averages = settings.parallel == "ddp" and comm.world > 1
        assert averages == (model is not None), (
            "several ranks in mode ddp, and no others, need a model that averages gradients"
        )
        self._shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in sae.state_dict().items()}
        self._core_size = sae.core_size
        self._shard = Shard(sae, comm.world, comm.rank) if settings.parallel == "latent" and comm.world > 1 else None
        if self._shard is not None:
            sae = self._shard.part_of(sae)
        self.sae = sae
        self.settings = settings
        self.comm = comm
        self.model = model
        self.loss: LossModule
        if model is None:
            ids_N = None if self._shard is None else self._shard.ids_N.to(sae.b_dec.device)
            self.loss = LossModule(sae, settings, comm, ids_N, self._core_size)
        else:
            self.loss = model.module
        self.adam = Adam(sae, settings, self.loss.ops, self.loss.screen, self.loss.latents)
        self.steps_done = 0
        self.silent_F = torch.zeros(sae.width, dtype=torch.int64, device=sae.b_dec.device)
        """tokens since each latent last fired"""
        self.threshold_sum = 0.0
        """uncorrected running mean of the smallest kept value"""
        self.threshold_steps = 0
        """values that have gone into it"""
        self.first_loss: float | None = None
        self._bounds: deque[float] = deque(maxlen=RECENT)  # not part of the state: they decide speed only
        self._ahead: Steps | None = None
        if self.loss.ops.fused and comm.world == 1 and settings.micro_batch is None:
            from dmsae_ray.sae import steps_on_device  # which imports this module

            self._ahead = steps_on_device.Steps(self)

    @property
    def threshold(self) -> float:
        """Bias-corrected running mean of the smallest kept value; 0 before the first."""
        if self.threshold_steps == 0:
            return 0.0
        return self.threshold_sum / (1 - self.settings.threshold_beta**self.threshold_steps)

    def step(self, x_BD: Tensor, token_index_B: Tensor | None = None, log: bool = False) -> StepReport | None:
        """Train on one batch. x_BD: this rank's rows, divided by the dataset's scale, an equal share of the global
        batch.

        token_index_B: place of each row in the global batch (int64; by default ranks follow one another); with it the
        result does not depend on which rank holds which row. On a CUDA device neither may be overwritten before the
        next call has returned. log: return the step's figures (on all ranks alike, since they are summed over ranks);
        this changes no state. Raises `Diverged`, or ValueError if the batch does not fit the settings.
        """
        settings, sae = self.settings, self.sae
        expected = (settings.batch // self.comm.world, settings.d)
        if x_BD.shape != expected or x_BD.dtype != sae.b_dec.dtype:
            raise ValueError(
                f"a batch must be {sae.b_dec.dtype} of shape {expected}, got {x_BD.dtype} of shape {tuple(x_BD.shape)}"
            )
        if self.steps_done == 0 and (self._ahead is None or self._ahead.in_flight == 0):
            self._start(x_BD, token_index_B)
        seen: tuple[Outcome, float, float, float] | None
        if self._ahead is None:
            try:
                seen = self._advance(x_BD, token_index_B)
            except Diverged as error:
                error.concerns(x_BD)
                raise
            self._commit(*seen)
        else:
            self._ahead.launch(x_BD, token_index_B)
            seen = self._see(self._ahead, 0 if log else self._ahead.LATE)
        if not log:
            return None
        assert seen is not None, "this batch's step was taken in"
        return self._report(*seen)

    def settle(self) -> None:
        """Wait until every batch given is trained on. Raises as `step` does."""
        if self._ahead is not None:
            self._see(self._ahead, 0)

    def _see(self, ahead: Steps, leave: int) -> tuple[Outcome, float, float, float] | None:
        """Take in the launched steps but the last `leave`; what `_advance` would have returned, of the last one taken
        in.
        """
        seen = None
        while ahead.in_flight > leave:
            seen = ahead.see()
            self._commit(*seen)
        return seen

    def _advance(self, x_BD: Tensor, token_index_B: Tensor | None) -> tuple[Outcome, float, float, float]:
        """Gradient and update: the outcome, the two parts of the loss over the global batch, the gradient's norm."""
        guess = GUESS * min(self._bounds, default=0.0) or None
        if self.model is None:
            _, gradient, outcome = self.loss.compute(x_BD, self.silent_F, token_index_B, guess, step=self.steps_done)
        else:
            loss, outcome = self.model(x_BD, self.silent_F, token_index_B, guess, self.steps_done)
        parts = torch.stack([outcome.loss_rec.double(), outcome.loss_aux.double()])
        loss_rec, loss_aux = (self.loss.rows.all_reduce_sum(parts) / self.loss.rows.world).tolist()
        self.check(self.loss_of(loss_rec, loss_aux))
        if self.model is not None:
            self.loss.flat.grad = None
            loss.backward()  # reduces the gradient over ranks
            gradient = self.loss.flat.grad
        grad_norm = self.adam.update(gradient, self.settings.learning_rate(self.steps_done))
        self.check_norm(grad_norm)
        return outcome, loss_rec, loss_aux, grad_norm

    @torch.no_grad()
    def _start(self, x_BD: Tensor, token_index_B: Tensor | None) -> None:
        """Set b_dec from the whole first batch, in the batch's own order, so that every rank gets the same bits."""
        x_TD = all_rows(self.comm, x_BD, order_of(self.comm, token_index_B, x_BD.device))
        if not torch.isfinite(x_TD).all():
            error = Diverged("the first batch holds values that are not finite")
            error.concerns(x_BD)
            raise error
        self.sae.b_dec.copy_(geometric_median(x_TD))

    def limit(self) -> float:
        """A loss beyond this has exploded."""
        return math.inf if self.first_loss is None else EXPLODED * max(self.first_loss, 1 / len(self.sae.group_ends))

    def check_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise Diverged(f"the gradient of step {self.steps_done} has norm {norm}")

    def check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"the loss of step {self.steps_done} is {loss}")
        if loss > self.limit():
            raise Diverged(f"the loss of step {self.steps_done} is {loss:.3g}, the first was {self.first_loss:.3g}")

    def loss_of(self, loss_rec: float, loss_aux: float) -> float:
        """The whole loss, of its parts over the global batch."""
        return loss_rec + self.settings.auxk_alpha * loss_aux

    def _commit(self, outcome: Outcome, loss_rec: float, loss_aux: float, grad_norm: float) -> None:
        """Take in what the batch showed, once its step has succeeded."""
        if self.first_loss is None:
            self.first_loss = self.loss_of(loss_rec, loss_aux)
        self.silent_F = outcome.silent_F
        if self.steps_done > self.settings.threshold_start_step:
            beta = self.settings.threshold_beta
            self.threshold_sum = beta * self.threshold_sum + (1 - beta) * outcome.smallest
            self.threshold_steps += 1
            self.sae.theta.fill_(self.threshold)
        self._bounds.append(outcome.bound)
        self.steps_done += 1

    @torch.no_grad()
    def _report(self, outcome: Outcome, loss_rec: float, loss_aux: float, grad_norm: float) -> StepReport:
        n_tokens, x_BD, rows, latents = self.settings.batch, outcome.x_BD, self.loss.rows, self.loss.latents
        mean_D = rows.all_reduce_sum(x_BD.sum(dim=0)) / n_tokens
        squares = torch.stack([outcome.residual_BD.square().sum(), (x_BD - mean_D).square().sum()])
        error, variance = rows.all_reduce_sum(squares.double()).tolist()
        is_core_N = outcome.latent_N < self.sae.core_size
        n_core = is_core_N.sum()
        counts = torch.stack([n_core, len(is_core_N) - n_core, n_core.new_tensor(outcome.candidates)])
        core_pairs, free_pairs, candidates = latents.all_reduce_sum(rows.all_reduce_sum(counts)).tolist()
        dead = latents.all_reduce_sum(outcome.dead_F.sum()).item()
        return StepReport(
            step=self.steps_done - 1,
            lr=self.settings.learning_rate(self.steps_done - 1),
            loss=self.loss_of(loss_rec, loss_aux),
            loss_rec=loss_rec,
            loss_aux=loss_aux,
            fvu=error / variance if variance > 0 else math.nan,
            l0=(core_pairs + free_pairs) / n_tokens,
            core_l0=core_pairs / n_tokens,
            free_l0=free_pairs / n_tokens,
            dead_share=dead / (self.settings.width - self._core_size),
            threshold=self.threshold,
            grad_norm=grad_norm,
            tokens=self.steps_done * n_tokens,
            candidates=candidates / max(core_pairs + free_pairs, 1),
            retries=outcome.retries,
        )

    def whole(self) -> MatryoshkaSAE:
        """The SAE with all latents, on every rank: the one in training, or put together from all ranks' parts.

        All ranks call it together.
        """
        self.settle()
        if self._shard is None:
            return self.sae
        sae = MatryoshkaSAE(
            self.sae.d,
            self._shard.group_ends_of_all,
            self._core_size,
            self.sae.core_gate,
            self.sae.W_dec.dtype,
            self.sae.core_transfer,
        )
        sae.load_state_dict(self._whole_weights(self._shard))
        return sae.to(self.sae.b_dec.device)

    def _whole_weights(self, shard: Shard) -> dict[str, Tensor]:
        return {name: shard.whole(self.comm, name, tensor) for name, tensor in self.sae.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-identical continuation needs, of types that `torch.load(weights_only=True)` takes: the same
        for every mode and number of ranks, and on every rank. All ranks call it together.

        Like a module's, the tensors are the live ones (with parallel `latent` copies on the CPU): save or copy them
        before the next step.
        """
        self.settle()
        sae, adam, silent_F = self.sae.state_dict(), self.adam.state_dict(), self.silent_F
        if self._shard is not None:
            sae = self._whole_weights(self._shard)
            adam |= {name: self._shard.whole_flat(self.comm, self.sae, adam[name]) for name in ("mean", "square")}
            silent_F = self._shard.whole(self.comm, "silent", silent_F)
        return {
            "version": STATE_VERSION,
            "sae": sae,
            "adam": adam,
            "steps_done": self.steps_done,
            "silent": silent_F,
            "threshold_sum": self.threshold_sum,
            "threshold_steps": self.threshold_steps,
            "first_loss": self.first_loss,
        } | ({} if self._ahead is None else {"dead_places": self._ahead.dead_places()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer with the same settings, of any mode and number of ranks. Raises
        ValueError if it cannot be continued."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"training state has version {state.get('version')}, this program continues version {STATE_VERSION}: "
                "start this cycle anew"
            )
        sae, adam, silent_F = state["sae"], state["adam"], state["silent"]
        for name, (dtype, shape) in self._shapes.items():
            if sae[name].shape != shape or sae[name].dtype != dtype:
                raise ValueError(
                    f"training state's {name} is {sae[name].dtype} {tuple(sae[name].shape)}, this SAE's is {dtype} "
                    f"{tuple(shape)}: it belongs to another configuration"
                )
        if self._shard is not None:
            sae = {name: self._shard.part(name, tensor) for name, tensor in sae.items()}
            adam = adam | {name: self._shard.part_of_flat(adam[name]) for name in ("mean", "square")}
            silent_F = self._shard.part("silent", silent_F)
        self.sae.load_state_dict(sae)
        self.adam.load_state_dict(adam)
        self.steps_done = state["steps_done"]
        self.silent_F = silent_F.to(self.silent_F.device, copy=True)
        self.threshold_sum = state["threshold_sum"]
        self.threshold_steps = state["threshold_steps"]
        self.first_loss = state["first_loss"]
        self._bounds.clear()
        if self._ahead is not None:
            self._ahead.reset(state.get("dead_places"))
