"""One SAE in training, fed with batches: its trainer, how far it is, its curve and its checkpoint.

Letters: B tokens of this rank's batch, C core size, D model dimension.
"""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import asdict, dataclass, field, replace

import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.stream import MASK
from dmsae_ray.cluster.metrics import StepMetrics
from dmsae_ray.core.core import Core
from dmsae_ray.distill.folder import CycleFolder
from dmsae_ray.distill.mapping import sae_settings
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.rank import Rank
from dmsae_ray.files import elsewhere, present, replacing
from dmsae_ray.sae.loss import LossModule
from dmsae_ray.sae.ranks.collective import Collective
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.step_report import StepReport
from dmsae_ray.sae.trainer import Trainer

CURVE_S = 10.0
"""How often the curve is written anew where a file cannot be added to."""


@dataclass
class Progress:
    """Where a cycle's training stands; what the checkpoint holds beside the trainer's state."""

    position: tuple[int, int] = (0, 0)
    """(round, row) of the next batch in the cycle's order: the weights contain every batch before it, once"""
    digest: int = 0
    """of all rows trained on, see stream.Batches"""
    curve: list[dict] = field(default_factory=list)
    resumes: list[dict] = field(default_factory=list)
    """times that training went on from a checkpoint and came to write another: step, generation of the driver, number
    of workers and what they share"""


class Training:
    """One chain's cycle in training; goes on from the checkpoint if there is one. Every rank has one."""

    def __init__(
        self,
        plan: ChainPlan,
        cycle: int,
        core: Core | None,
        dataset: ActivationDataset,
        rank: Rank,
    ):
        """core: that the SAE begins with. Raises ValueError if a checkpoint cannot be read."""
        self.plan, self.comm, self.lease, self.folder = plan, rank.comm, rank.lease, plan.folder.cycle(cycle)
        settings = replace(sae_settings(plan.config, plan.k, dataset.manifest.d), prefix_seed=plan.prefix_seed(cycle))
        rows = (None, None) if core is None else (core.W_enc_CD, core.W_dec_CD)
        sae = MatryoshkaSAE.init(settings, rows[0], plan.init_seed(cycle), core_W_dec_CD=rows[1])
        self.began_CD = sae.W_dec[: sae.core_size].detach().clone()
        """the core's decoder rows as training began with them, also where it goes on from a checkpoint"""
        sae = sae.to(rank.device)
        self.trainer = Trainer(
            sae, settings, rank.comm, _averaging(sae, settings, rank.comm)
        )  # which may hold only a part of it
        self.order = plan.order(dataset, cycle)
        self.so_far = Progress()
        if present(self.folder.checkpoint):
            state = load_checkpoint(self.folder)
            self.trainer.load_state_dict(state["trainer"])
            self.so_far = Progress(**json.loads(state["progress"]))
        self.first = self.order.step_at(*self.so_far.position)
        """the first step still to be done"""
        if self.first:
            self.so_far.resumes.append(
                {
                    "step": self.first,
                    "generation": rank.lease.generation,
                    "workers": rank.world,
                    "parallel": plan.config.train.parallel,
                }
            )
        if rank.writes:
            self.lease.check()
            self._write_curve()
        self.metrics = StepMetrics(plan.config.name, plan.label, rank.number)
        self.urgent: int | None = None
        """a step after which a checkpoint is due out of turn"""
        self.began: float | None = None
        """when the first step of this run did; None before it"""
        self.ended = self.waited = self.first_batch_s = 0.0
        """when the last step ended; seconds waited for batches since `began`, and for the first of them"""

    def step(self, step: int, x_BD: torch.Tensor, token_index_B: torch.Tensor, waited: float) -> StepReport | None:
        """Train on the global batch of this number; its figures where they are logged, on rank 0. Raises Diverged.

        waited: seconds that the batch was waited for.
        """
        train = self.plan.config.train
        if self.began is None:
            self.began, self.first_batch_s = time.monotonic() - waited, waited
            self.metrics.begin(step, self.began)
        self.waited += waited
        logged = step % train.log_steps == 0 or step == self.plan.steps - 1
        report = self.trainer.step(x_BD, token_index_B, log=logged)
        if self.checkpoint_due(step):
            self.trainer.settle()  # where it is known what to do if it raises
        self.ended = time.monotonic()
        if logged:
            self.metrics.log(step + 1, self.ended, self.waited)
        return report if self.comm.rank == 0 else None

    def checkpoint_due(self, step: int) -> bool:
        """Whether one follows this step."""
        every = self.plan.config.train.checkpoint_steps
        return (step + 1) % every == 0 or step + 1 == self.plan.steps or step == self.urgent

    @property
    def tokens_per_s(self) -> float:
        """Of this run of the cycle, waiting included."""
        done = self.trainer.steps_done - self.first
        return done * self.plan.config.train.batch / self.seconds if done else 0.0

    @property
    def seconds(self) -> float:
        """From the first step of this run to the last one."""
        return 0.0 if self.began is None else self.ended - self.began

    def log(self, report: StepReport) -> None:
        """A point of the curve. Only on rank 0."""
        point = asdict(report) | {"tokens_per_s": round(self.tokens_per_s, 1)}
        self.so_far.curve.append(point)
        # A worker that was cut off for a while must not add points to its successor's curve.
        if elsewhere(self.folder.curve) is None:
            self.lease.check()
            with open(self.folder.curve, "a") as file:
                file.write(json.dumps(point) + "\n")
        elif time.monotonic() - self._curve_at > CURVE_S or self.checkpoint_due(self.trainer.steps_done - 1):
            self.lease.check()
            self._write_curve()  # nothing can be added to what lies at a URL

    def _write_curve(self) -> None:
        with replacing(self.folder.curve) as temporary:
            temporary.write_text("".join(json.dumps(point) + "\n" for point in self.so_far.curve))
        self._curve_at = time.monotonic()

    def count(self, digest: int) -> None:
        """Take in the digest, over all ranks, of rows trained on since it was last asked for."""
        self.so_far.digest = (self.so_far.digest + digest) & MASK

    def checkpoint(self, step: int) -> None:
        """Everything a bit-identical continuation needs, on any number of workers. All ranks call it together, digests
        counted.
        """
        self.so_far.position = self.order.position(step)
        state = self.trainer.state_dict()
        if self.comm.rank == 0:
            self.lease.check()
            # To an open file: given a name, torch says nothing of the disk that was full.
            with replacing(self.folder.checkpoint) as temporary, open(temporary, "wb") as file:
                torch.save({"trainer": state, "progress": json.dumps(asdict(self.so_far))}, file)
        self.comm.wait_for_all()

    def record(self, together: int) -> dict:
        """What the completion record says of training. together: chains that shared the stream."""
        plan, done = self.plan, self.trainer.steps_done - self.first
        return {
            "steps": plan.steps,
            "tokens": plan.steps * plan.config.train.batch,
            "resumes": self.so_far.resumes,
            "workers": self.comm.world,
            "parallel": plan.config.train.parallel,
            "micro_batch": plan.config.train.micro_batch,
            "lockstep": together,
            "data_digest": f"{self.so_far.digest:016x}",
            "rows_dropped": plan.config.train.tokens - plan.steps * plan.config.train.batch,
            "tokens_per_s": round(self.tokens_per_s, 1) if done else None,
            "data_wait_share": round(self.waited / self.seconds, 4) if done else None,
            "first_batch_s": round(self.first_batch_s, 3) if done else None,
            "theta_training": float(self.trainer.threshold),
        }


def first_step(plan: ChainPlan, cycle: int, dataset: ActivationDataset) -> int:
    """Where a cycle's training will go on."""
    folder = plan.folder.cycle(cycle)
    if not present(folder.checkpoint):
        return 0
    return plan.order(dataset, cycle).step_at(*json.loads(load_checkpoint(folder)["progress"])["position"])


def load_checkpoint(folder: CycleFolder) -> dict:
    """Raises ValueError naming the file if it is damaged."""
    try:
        return torch.load(folder.checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{folder.checkpoint}: damaged ({error}); delete it, and this cycle's training starts anew"
        ) from error


def _averaging(sae: MatryoshkaSAE, settings: SAESettings, comm: Collective) -> torch.nn.Module | None:
    """The loss wrapped in DistributedDataParallel, where several workers average their gradients."""
    if comm.world == 1 or settings.parallel != "ddp":
        return None
    import ray.train.torch

    # Buffers (the frozen core rows) are equal on all ranks by construction. The gradient lies in the bucket, not in a
    # copy of it.
    return ray.train.torch.prepare_model(
        LossModule(sae, settings, comm),
        parallel_strategy_kwargs={"forward_sync_buffers": False, "gradient_as_bucket_view": True},
    )
