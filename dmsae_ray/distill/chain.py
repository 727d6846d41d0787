"""The Ray Train loop of one chain: every cycle trains, evaluates, attributes, selects.

All cycles run inside one worker group: the workers that trained an SAE also attribute it, and nothing is released and
acquired again in between. What a cycle needs to go on after a crash is in its folder (see folder.py); each step below looks
there first.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import time
import traceback
from dataclasses import asdict, dataclass, field

import ray
import ray.train
import ray.train.torch
import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.shard import ShardError
from dmsae_ray.activations.store import StoreError
from dmsae_ray.activations.stream import MASK, Batches, Stream
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.distill import attribution as attribution_
from dmsae_ray.distill.core import Core
from dmsae_ray.distill.criterion import choose
from dmsae_ray.distill.evaluate import Tally, read_references, scores_of, tally_batch
from dmsae_ray.distill.folder import RECORD_VERSION, CycleFolder, Superseded
from dmsae_ray.distill.ledger import ALL_DONE, WAIT
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.select import carried, jaccard, next_core, save_scores
from dmsae_ray.files import replacing, write_json
from dmsae_ray.sae.collective import Alone, TorchCollective
from dmsae_ray.sae.loss import LossModule
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.step import Diverged, Trainer
from dmsae_ray.sae.threshold import calibrate

OPEN_AT = 0.5
"""Share of the attribution after which reading for the next cycle starts: late, since a stream that waits costs some CPU."""
FINAL = (Diverged, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What trying again cannot mend. Anything else (a lost worker, a lost node, its peers' broken connections) Ray retries."""


def train_chain(loop: dict) -> None:
    """What every Ray Train worker runs. loop: plan (ChainPlan), aggregator and board (actor handles)."""
    plan: ChainPlan = loop["plan"]
    failure = plan.folder.failure()
    if failure and (failure["kind"] == "diverged" or failure["generation"] == plan.lease.generation):
        return  # a worker group that was started again after the failure was written
    worker = ChainWorker(plan, loop["aggregator"], loop["board"])
    try:
        worker.run()
    except Superseded:
        return  # another driver has the folder: trying again cannot help, and nothing may be written
    except Exception as error:
        known = _cause(error, FINAL)
        if known is None:
            raise
        worker.fail(known)
        if worker.world > 1 and not isinstance(known, Diverged):
            raise  # the other ranks do not know: let Ray end the group


@dataclass
class Progress:
    """Where a cycle's training stands; what the checkpoint holds beside the trainer's state."""

    position: tuple[int, int] = (0, 0)
    """(round, row) of the next batch in the cycle's order: the weights contain every batch before it, once"""
    digest: int = 0
    """of all rows trained on, see stream.Batches"""
    curve: list[dict] = field(default_factory=list)
    resumes: list[dict] = field(default_factory=list)
    """times that training went on from a checkpoint and came to write another: step, generation of the driver, number of workers and
    what they share"""


class ChainWorker:
    """One rank of one chain."""

    def __init__(self, plan: ChainPlan, aggregator, board):
        from dmsae_ray.lm.model import LanguageModel

        context = ray.train.get_context()
        self.plan, self.aggregator, self.board = plan, aggregator, board
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.comm = Alone() if self.world == 1 else TorchCollective()
        self.device = ray.train.torch.get_device()
        torch.set_num_threads(plan.config.train.threads)
        self.cycle, self.started, self.fraction_at_start = len(plan.folder.records()), time.monotonic(), None
        self.say(phase="starting")
        self.dataset = ActivationDataset(plan.dataset)
        self.scale = self.dataset.manifest.scale
        self.settings = plan.sae_settings(self.dataset.manifest.d)
        units = plan.units(self.dataset)
        self.stream = Stream(self.dataset, units, self.rank, self.world, plan.stream_limits, self.device)
        self._opened: Batches | None = None
        self._open(self.cycle)  # reading starts beside loading the model
        self.lm = LanguageModel.of(plan.config.model, str(self.device))

    def run(self) -> None:
        try:
            if self.rank == 0:
                self.plan.lease.check()
                self.plan.folder.tidy()
            for cycle in range(len(self.plan.folder.records()), self.plan.cycles):
                self.cycle = cycle
                self.run_cycle(self.plan.folder.cycle(cycle))
        finally:
            if self._opened is not None:
                self._opened.close()
        self.say(phase="done", fraction=1.0)

    def run_cycle(self, folder: CycleFolder) -> None:
        """Train an SAE on the last cycle's core, then choose the next core from it."""
        began = time.monotonic()
        folder.path.mkdir(parents=True, exist_ok=True)
        core = self._incoming_core()
        if core is not None and abs(core.scale - self.scale) > 1e-12 * self.scale:
            raise ValueError(f"{folder.path}: the core was made at scale {core.scale!r}, the activations have {self.scale!r}")
        sae, trained = self.train(folder, core)
        after_training = time.monotonic()
        metrics, density_F, removal_P = self.evaluate(folder, sae)
        after_evaluation = time.monotonic()
        selected = self.attribute(folder, sae)
        now = time.monotonic()
        seconds = {
            "train": after_training - began, "evaluate": after_evaluation - after_training,
            "attribute": now - after_evaluation, "total": now - began,
        }  # fmt: skip
        if self.rank == 0:
            self.commit(folder, core, sae, density_F, removal_P, selected, metrics, trained, seconds)
        self._barrier()

    def _incoming_core(self) -> Core | None:
        """What the last cycle selected; for the first one, what the chain starts from."""
        if self.cycle:
            return Core.load(self.plan.folder.cycle(self.cycle - 1).core)
        return Core.load(self.plan.start.path) if self.plan.start else None

    def _barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    # -- train ---------------------------------------------------------------------------------------------------------

    def train(self, folder: CycleFolder, core: Core | None) -> tuple[MatryoshkaSAE, dict]:
        """The cycle's SAE with its threshold set; goes on from the checkpoint if there is one."""
        plan, train = self.plan, self.plan.config.train
        sae = MatryoshkaSAE.init(self.settings, None if core is None else core.W_enc_CD, plan.init_seed(self.cycle)).to(self.device)
        trainer = Trainer(sae, self.settings, self.comm, self._averaging(sae))
        del sae  # the trainer may hold only a part of it
        order = plan.order(self.dataset, self.cycle)
        so_far = Progress()
        if folder.checkpoint.exists():
            state = self._load_checkpoint(folder)
            trainer.load_state_dict(state["trainer"])
            so_far = Progress(**json.loads(state["progress"]))
        first = order.step_at(*so_far.position)
        if first:
            so_far.resumes.append(
                {"step": first, "generation": plan.lease.generation, "workers": self.world, "parallel": train.parallel}
            )
        if self.rank == 0:
            plan.lease.check()
            folder.curve.write_text("".join(json.dumps(point) + "\n" for point in so_far.curve))
        batches = self._batches(order, first)
        token_index_B = torch.from_numpy(order.token_index(self.rank, self.world)).to(self.device)
        began, waited, wait_from, first_batch_s = time.monotonic(), 0.0, time.monotonic(), None
        for step, x_BD in enumerate(batches, first):
            waited += time.monotonic() - wait_from
            first_batch_s = waited if first_batch_s is None else first_batch_s
            log = step % train.log_steps == 0 or step == plan.steps - 1
            try:
                report = trainer.step(x_BD, token_index_B, log=log)
            except Diverged as error:
                raise self._diverged(error, x_BD, batches, step) from error
            if report is not None and self.rank == 0:
                rate = (step + 1 - first) * train.batch / (time.monotonic() - began)
                point = asdict(report) | {"tokens_per_s": round(rate, 1)}
                so_far.curve.append(point)
                plan.lease.check()  # else a worker that was cut off for a while would add points to its successor's curve
                with open(folder.curve, "a") as file:
                    file.write(json.dumps(point) + "\n")
                self.say(phase="train", step=step + 1, steps=plan.steps, tokens_per_s=rate, within=0.85 * (step + 1) / plan.steps)
            if (step + 1) % train.checkpoint_steps == 0 or step + 1 == plan.steps:
                self.checkpoint(folder, trainer, step + 1, order, batches, so_far)
            wait_from = time.monotonic()
        elapsed = time.monotonic() - began
        self.say(phase="calibrate", within=0.86)
        sae = trainer.whole()
        rows_ND = self.dataset.calibration_rows()
        sae.theta.fill_(calibrate(sae, lambda: self._calibration_chunks(rows_ND), self.plan.k, self.settings))
        done = (plan.steps - first) * train.batch
        return sae, {
            "steps": plan.steps, "tokens": plan.steps * train.batch, "resumes": so_far.resumes, "workers": self.world,
            "parallel": train.parallel, "micro_batch": train.micro_batch,
            "data_digest": f"{so_far.digest:016x}", "rows_dropped": train.tokens - plan.steps * train.batch,
            "tokens_per_s": round(done / elapsed, 1) if done else None,
            "data_wait_share": round(waited / elapsed, 4) if done else None,
            "first_batch_s": round(first_batch_s, 3) if done else None,
            "theta_training": float(trainer.threshold),
        }  # fmt: skip

    def _averaging(self, sae: MatryoshkaSAE) -> torch.nn.Module | None:
        """The loss wrapped in DistributedDataParallel, where several workers average their gradients."""
        if self.world == 1 or self.settings.parallel != "ddp":
            return None
        # Buffers (the frozen core rows) are equal on all ranks by construction. The gradient lies in the bucket, not in a copy of it.
        return ray.train.torch.prepare_model(
            LossModule(sae, self.settings, self.comm),
            parallel_strategy_kwargs={"forward_sync_buffers": False, "gradient_as_bucket_view": True},
        )

    def _calibration_chunks(self, rows_ND: torch.Tensor):
        for chunk_BD in rows_ND.split(self.settings.batch):
            yield (chunk_BD.float() / self.scale).to(self.device)

    def _diverged(self, error: Diverged, x_BD: torch.Tensor, batches: Batches, step: int) -> Exception:
        """Tell bad data from a bad run: all ranks come here together."""
        bad_B = (~torch.isfinite(x_BD).all(dim=1)).nonzero().flatten()
        mine = [batches.shard_of(int(row)) for row in bad_B]
        everyone: list = [None] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(everyone, mine)
        else:
            everyone = [mine]
        shards = sorted({shard for some in everyone for shard in some})
        if shards:
            return ShardError(
                f"activation shard {' or '.join(shards)}: holds NaN or infinity (seen at step {step}), under a valid checksum. "
                "Delete it and run `python -m dmsae_ray.harvest`: only it is made again; no checkpoint was written from it"
            )
        return Diverged(f"cycle {self.cycle}, step {step}: {error}. Lower train.lr or raise train.warmup_share")

    def checkpoint(self, folder: CycleFolder, trainer: Trainer, step: int, order: Order, batches: Batches, so_far: Progress) -> None:
        """Everything a bit-identical continuation needs, on any number of workers. All ranks call it together."""
        # Two halves, since a sum of signed 64-bit integers over ranks must not overflow.
        halves = torch.tensor([batches.digest >> 32, batches.digest & 0xFFFFFFFF], device=self.device)
        high, low = self.comm.all_reduce_sum(halves).tolist()
        so_far.digest = (so_far.digest + (high << 32) + low) & MASK
        batches.digest = 0
        so_far.position = order.position(step)
        state = trainer.state_dict()
        if self.rank == 0:
            self.plan.lease.check()
            with replacing(folder.checkpoint) as temporary:
                torch.save({"trainer": state, "progress": json.dumps(asdict(so_far))}, temporary)

    def _load_checkpoint(self, folder: CycleFolder) -> dict:
        try:
            return torch.load(folder.checkpoint, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{folder.checkpoint}: damaged ({error}); delete it, and this cycle's training starts anew") from error

    def _open(self, cycle: int) -> None:
        """Start reading for a cycle, where its training stands: its first batch is then there when it begins."""
        if cycle < self.plan.cycles:
            order, folder = self.plan.order(self.dataset, cycle), self.plan.folder.cycle(cycle)
            position = json.loads(self._load_checkpoint(folder)["progress"])["position"] if folder.checkpoint.exists() else (0, 0)
            self._opened = self.stream.open(order, order.step_at(*position), self.plan.steps)

    def _open_next(self) -> None:
        if self._opened is None or self._opened.order.cycle == self.plan.number(self.cycle):
            self._open(self.cycle + 1)

    def _batches(self, order: Order, first: int) -> Batches:
        """The cycle's batches from this step on: those opened ahead."""
        assert self._opened is not None and (self._opened.order, self._opened.start) == (order, first), "opened for another place"
        return self._opened

    # -- evaluate ------------------------------------------------------------------------------------------------------

    def evaluate(self, folder: CycleFolder, sae: MatryoshkaSAE) -> tuple[dict, torch.Tensor, torch.Tensor | None]:
        """Held-out metrics, each latent's density [F] and, if cores are selected by it, what each candidate's removal costs.

        Saves the SAE with its densities.
        """
        self.say(phase="evaluate", within=0.87)
        plan, evaluate, tally = self.plan, self.plan.config.evaluate, Tally()
        removal = plan.config.selection.by == "reconstruction"
        batches = list(self._sequences("evaluation", evaluate.tokens).batches(evaluate.sequences_per_batch))
        # A rank without a batch tallies one in which nothing counts: all ranks must add up the same sums.
        mine = batches[self.rank :: self.world] or [(batches[0][0], torch.ones_like(batches[0][1]))]
        for ids_NT, lengths_N in mine:
            tally_batch(tally, sae, self.lm, ids_NT.to(self.device), lengths_N.to(self.device), self.scale, removal)
        tally.reduce(self.comm)
        metrics, density_F = scores_of(tally, sae.core_size, read_references(plan.references, evaluate))
        if self.rank == 0:
            self.plan.lease.check()
            manifest = self.dataset.manifest
            sae.save(
                folder.sae,
                {"density": density_F.float(), "scale": self.scale, "hook": manifest.hook, "model": manifest.model_fingerprint,
                 "cycle": self.cycle, "seed": self.plan.seed, "k": self.plan.k, "chain": self.plan.key},
            )  # fmt: skip
        return metrics, density_F, tally.sums.get("removal")

    def _sequences(self, split: str, tokens: int) -> TokenSequences:
        return self.dataset.held_out(split).first_tokens(tokens)

    # -- attribute and select ------------------------------------------------------------------------------------------

    def attribute(self, folder: CycleFolder, sae: MatryoshkaSAE) -> dict:
        """Score shards until the aggregator has all it asks for, then ask it for the core."""
        config = self.plan.config.attribution
        batches = list(self._sequences("attribution", config.tokens).batches(config.sequences_per_shard))
        # Partial sums belong to these weights: every rank holds the same.
        stamp = hashlib.sha256(sae.W_dec.detach().cpu().numpy().tobytes() + sae.theta.cpu().numpy().tobytes()).hexdigest()[:16]
        ledger = (str(folder.attribution), len(batches), stamp)
        if self.rank == 0:
            ray.get(self.aggregator.begin.remote(ledger))
        self._barrier()
        began, tokens = time.monotonic(), config.sequences_per_shard * self.plan.config.model.context

        def on_shard(done: int) -> None:
            within = 0.9 + 0.1 * done * self.world / len(batches)
            self.say(phase="attribute", within=within, tokens_per_s=done * self.world * tokens / (time.monotonic() - began))
            if done * self.world >= OPEN_AT * len(batches):
                self._open_next()

        settings = self.plan.attribution_settings(self.dataset.manifest)
        score_shards(sae, self.lm, batches, self.scale, settings, self.aggregator, ledger, self.rank, on_shard)
        self._open_next()  # where other ranks were faster, this one may have had no shard that late
        return ray.get(self.aggregator.select.remote(ledger))

    def commit(self, folder, core, sae, density_F, removal_P, selected, metrics, trained, seconds) -> None:
        """Save the core and, last, the completion record; then drop what only an unfinished cycle needs."""
        plan, manifest, selection = self.plan, self.dataset.manifest, self.plan.config.selection
        ids_C, values_P = choose(plan, self.cycle, sae, selected, density_F, removal_P)
        new = next_core(
            core, sae, ids_C, selected["scores"], density_F, cycle=plan.number(self.cycle), seed=plan.seed, k=plan.k,
            scale=self.scale, hook=manifest.hook, model=manifest.model_fingerprint, by=selection.by,
        )  # fmt: skip
        plan.lease.check()
        new.save(folder.core)
        save_scores(folder.scores, selected["scores"], selection.by, values_P)
        core_in = sae.core_size
        kept = int((new.latent_ids_C < core_in).sum())
        origins = {str(cycle): int((new.entered_C == cycle).sum()) for cycle in sorted(set(new.entered_C.tolist()))}
        total_score = float(selected["scores"].sum())
        record = {
            "format_version": RECORD_VERSION, "chain": plan.key, "label": plan.label, "cycle": self.cycle,
            "generation": plan.lease.generation, "seed": plan.seed, "k": plan.k,
            "core_in": core_in, "core_out": new.size, "kept": kept, "entered": new.size - kept, "left": core_in - kept,
            "jaccard": jaccard(kept, core_in, new.size) if core is not None else None, "origins": origins,
            **trained, "theta": float(sae.theta), **metrics,
            "core_share": float(selected["scores"][:core_in].sum()) / total_score, "coverage": carried(selected["scores"], ids_C),
            "selection": selection.model_dump() | {"candidates": len(selected["scores"])},
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "attribution": {name: value for name, value in selected.items() if name not in ("ids", "scores")},
            "finished_at": time.time(),
        }  # fmt: skip
        plan.lease.check()
        write_json(folder.record, record)
        folder.release()

    # -- say -----------------------------------------------------------------------------------------------------------

    def say(self, phase: str, within: float = 0.0, fraction: float | None = None, **values) -> None:
        """Tell the board where this chain is. within: done share of this cycle. Never waits for an answer."""
        if self.rank:
            return
        if fraction is None:
            fraction = (self.cycle + within) / self.plan.cycles
        eta = None
        if phase != "starting":
            if self.fraction_at_start is None:
                self.fraction_at_start, self.started = fraction, time.monotonic()
            gained = fraction - self.fraction_at_start
            eta = (time.monotonic() - self.started) / gained * (1 - fraction) if gained > 0 else None
        values = {"step": None, "steps": None, "tokens_per_s": None} | values
        self.board.update.remote(
            self.plan.label, phase=phase, cycle=self.cycle, cycles=self.plan.cycles, fraction=fraction, eta_s=eta, **values
        )

    def fail(self, error: Exception) -> None:
        """Mark the chain failed. Divergence is final for this chain's fields; anything else is tried again by the next sweep."""
        if self.rank and isinstance(error, Diverged):
            return  # all ranks diverge together, rank 0 writes
        kind = "diverged" if isinstance(error, Diverged) else "data" if isinstance(error, ShardError | StoreError) else "error"
        reason = str(error) if kind != "error" else f"{type(error).__name__}: {error}"
        write_failure(self.plan, kind, reason, self.cycle)
        self.board.update.remote(self.plan.label, phase="failed", message=reason)


def write_failure(plan: ChainPlan, kind: str, reason: str, cycle: int | None = None) -> None:
    """failed.json: kind `diverged` (final), `data` or `error` (tried again by the next sweep). Raises Superseded."""
    plan.lease.check()
    write_json(
        plan.folder.failed,
        {"kind": kind, "reason": reason, "cycle": cycle, "generation": plan.lease.generation, "at": time.time(), "traceback": traceback.format_exc()},
    )


def score_shards(sae, lm, batches, scale, settings, aggregator, ledger, rank: int, on_shard=lambda done: None) -> int:
    """Take shards from the aggregator, score them, give the partial sums back, until all are back. Returns how many were ours."""
    ours, device = 0, sae.b_dec.device
    while (shard := ray.get(aggregator.take.remote(ledger, rank))) != ALL_DONE:
        if shard == WAIT:
            time.sleep(0.05)
            continue
        ids_NT, lengths_N = batches[shard]
        partial = attribution_.attribute(sae, lm, ids_NT.to(device), lengths_N.to(device), scale, settings)
        ray.get(aggregator.give.remote(ledger, rank, shard, partial))
        ours += 1
        on_shard(ours)
    return ours


def _cause(error: BaseException, kinds: tuple[type, ...]) -> Exception | None:
    """The first of these kinds in a chain of causes, also where Ray wrapped what a task of its own raised."""
    chain, next_ = [], error
    while next_ is not None and next_ not in chain:
        chain.append(next_)
        next_ = getattr(next_, "cause", None) or next_.__cause__ or next_.__context__
    for link in chain:
        # A read task's error reaches us only as the text of its traceback.
        if found := re.search(r"^[\w.]*(ShardError|StoreError|Missing): (.+)$", str(link), re.MULTILINE):
            return (ShardError if found[1] == "ShardError" else StoreError)(found[2])
    return next((link for link in chain if isinstance(link, kinds)), None)
