"""The Ray Train loop of a chain: every cycle trains, evaluates, attributes, selects.

All cycles run inside one worker group: the workers that trained an SAE also attribute it, and nothing is released and
acquired again in between. Chains that share the order of data may advance in lockstep, on one stream and one language model:
each batch is read once and every chain takes its step on it. What a cycle needs to go on after a crash is in its folder (see
folder.py); each step below looks there first.
"""

from __future__ import annotations

import hashlib
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.train
import ray.train.torch
import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.shard import ShardError
from dmsae_ray.activations.store import StoreError
from dmsae_ray.activations.stream import MASK, Batches, Stream
from dmsae_ray.attribution import gradients as attribution_
from dmsae_ray.attribution.ledger import ALL_DONE, WAIT
from dmsae_ray.causes import causes
from dmsae_ray.core.core import Core
from dmsae_ray.core.drift import decoder_drift
from dmsae_ray.core.next_core import next_core
from dmsae_ray.core.score_file import save_scores
from dmsae_ray.core.select import carried, jaccard
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.distill.folder import RECORD_VERSION, CycleFolder
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.selection import choose
from dmsae_ray.distill.training import Training, first_step
from dmsae_ray.evaluation.measure import Tally, scores_of, tally_batch
from dmsae_ray.evaluation.references import read_references
from dmsae_ray.files import write_json
from dmsae_ray.lock import Superseded
from dmsae_ray.sae.ranks.collective import Alone, TorchCollective, gather_objects
from dmsae_ray.sae.report import Diverged
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.threshold import calibrate
from dmsae_ray.secret_url import scrub

OPEN_AT = 0.5
"""Share of the last attribution of a cycle after which reading for the next one starts: late, since a stream that waits costs some CPU."""
FINAL = (Diverged, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What trying again cannot mend. Anything else (a lost worker, a lost node, its peers' broken connections) Ray retries."""


def train_chains(loop: dict) -> None:
    """What every Ray Train worker runs. loop: plans (ChainPlans of one order of data), aggregator and board (actor handles)."""
    # Failed ones are left out: a worker group may have been started again after the failure was written.
    plans = [plan for plan in loop["plans"] if not _failed(plan)]
    if not plans:
        return
    try:
        Worker(plans, loop["aggregator"], loop["board"]).run()
    except Superseded:
        return  # another driver has the folders: trying again cannot help, and nothing may be written


def _failed(plan: ChainPlan) -> bool:
    failure = plan.folder.failure()
    return failure is not None and (failure["kind"] == "diverged" or failure["generation"] == plan.lease.generation)


class Worker:
    """One rank of the worker group: the stream, the language model, and the chains that share them."""

    def __init__(self, plans: list[ChainPlan], aggregator, board):
        from dmsae_ray.lm.model import LanguageModel

        context, plan = ray.train.get_context(), plans[0]
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device, self.aggregator = ray.train.torch.get_device(), aggregator
        self.comm = Alone() if self.world == 1 else TorchCollective(self.device)
        torch.set_num_threads(plan.config.train.threads)
        self.chains = [Chain(plan, self, board) for plan in plans]
        """those that have not failed"""
        self._opened: Batches | None = None
        with self.failing(*self.chains):
            self.dataset = ActivationDataset(plan.dataset)
            self.stream = Stream(self.dataset, plan.units(self.dataset), self.rank, self.world, plan.stream_limits, self.device)
            self.open(min(chain.cycle for chain in self.chains))  # reading starts beside loading the model
            self.lm = LanguageModel.of(plan.config.model, str(self.device))

    def run(self) -> None:
        try:
            for chain in self.chains:
                chain.tidy()
            for cycle in range(max(chain.plan.cycles for chain in self.chains) if self.chains else 0):
                members = [chain for chain in self.chains if chain.cycle == cycle < chain.plan.cycles]
                if members:
                    self.run_cycle(members)
        finally:
            if self._opened is not None:
                self._opened.close()
        for chain in self.chains:
            chain.say(phase="done", fraction=1.0)

    def run_cycle(self, members: list[Chain]) -> None:
        """Train all members' SAEs, then finish the cycle of one after the other."""
        for chain in members:
            with self.failing(chain):
                chain.begin()
        self.comm.wait_for_all()  # models load at different speeds
        with self.failing(*members):
            self.train([chain for chain in members if chain in self.chains])
        left = [chain for chain in members if chain in self.chains]
        for chain in left:
            with self.failing(chain):
                chain.finish(len(left), opens_next=chain is left[-1])
        self.comm.wait_for_all()  # rank 0 had a cycle to commit

    def train(self, members: list[Chain]) -> None:
        """Every batch of the cycle, read once: each member that does not have it yet takes its step on it."""
        if not members:
            return
        start, steps = min(chain.training.first for chain in members), members[0].plan.steps
        batches = self._batches(members[0].training.order, start, steps)
        token_index_B = torch.from_numpy(batches.order.token_index(self.rank, self.world)).to(self.device)
        since = time.monotonic()
        for step, x_BD in enumerate(batches, start):
            waited = time.monotonic() - since
            for chain in [chain for chain in members if chain.training.first <= step]:
                with self.failing(chain):
                    try:
                        chain.step(step, x_BD, token_index_B, waited)
                    except Diverged as error:  # all ranks come here together
                        chain.at_step = step - error.behind
                        raise self._diverged(error, chain, batches, step - error.behind) from error
            members = [chain for chain in members if chain in self.chains]
            if not members:
                return
            taking = [chain for chain in members if chain.training.first <= step]
            due = members[0].training.checkpoint_due(step)
            # Rows are counted for those that trained on them, so before another member takes its first batch.
            if due or any(chain.training.first == step + 1 for chain in members):
                self.count_rows(batches, taking)
            if due:
                for chain in taking:
                    chain.training.checkpoint(step + 1)
            since = time.monotonic()

    def count_rows(self, batches: Batches, members: list[Chain]) -> None:
        """Add the digest of the rows given since the last call to the members that trained on them. All ranks call it together."""
        # Two halves, since a sum of signed 64-bit integers over ranks must not overflow.
        halves = torch.tensor([batches.digest >> 32, batches.digest & 0xFFFFFFFF], device=self.device)
        high, low = self.comm.all_reduce_sum(halves).tolist()
        for chain in members:
            chain.training.count(((high << 32) + low) & MASK)
        batches.digest = 0

    def open(self, cycle: int) -> None:
        """Start reading for a cycle, where its training stands: its first batch is then there when it begins."""
        starts = {}
        for chain in [chain for chain in self.chains if chain.cycle <= cycle < chain.plan.cycles]:
            with self.failing(chain):
                starts[chain] = first_step(chain.plan, cycle, self.dataset)
        if starts:
            plan = next(iter(starts)).plan
            self._opened = self.stream.open(plan.order(self.dataset, cycle), min(starts.values()), plan.steps)

    def _batches(self, order: Order, start: int, stop: int) -> Batches:
        """Those opened ahead; opened anew where a chain that failed since would have begun earlier."""
        if self._opened is None or (self._opened.order, self._opened.start) != (order, start):
            if self._opened is not None:
                self._opened.close()
            self._opened = self.stream.open(order, start, stop)
        return self._opened

    def open_next(self, cycle: int) -> None:
        """The same for the cycle after this one, once."""
        number = self.chains[0].plan.number(cycle)
        if self._opened is None or self._opened.order.cycle == number:
            self.open(cycle + 1)

    def _diverged(self, error: Diverged, chain: Chain, batches: Batches, step: int) -> Exception:
        """Tell bad data from a bad run."""
        everyone = gather_objects(self.comm, [batches.shard_of(row, error.behind) for row in error.rows])
        shards = sorted({shard for some in everyone for shard in some})
        if shards:
            return ShardError(
                f"activation shard {' or '.join(shards)}: holds NaN or infinity (seen at step {step}), under a valid checksum. "
                "Delete it and run `python -m dmsae_ray.harvest`: only it is made again; no checkpoint was written from it"
            )
        return Diverged(f"cycle {chain.cycle}, step {step}: {error}. Lower train.lr or raise train.warmup_share")

    @contextmanager
    def failing(self, *chains: Chain) -> Iterator[None]:
        """What trying again cannot mend ends these chains, marked failed; the others go on."""
        try:
            yield
        except Superseded:
            raise
        except Exception as error:
            known = _cause(error, FINAL)
            if known is None:
                raise
            for chain in chains:
                if chain in self.chains:
                    chain.fail(known)
                    self.chains.remove(chain)
            if self.world > 1 and not isinstance(known, Diverged):
                raise  # the other ranks do not know: let Ray end the group


class Chain:
    """One chain on one rank."""

    def __init__(self, plan: ChainPlan, worker: Worker, board):
        self.plan, self.worker, self.board = plan, worker, board
        self.rank, self.world, self.comm, self.device = worker.rank, worker.world, worker.comm, worker.device
        self.cycle, self.started, self.fraction_at_start = len(plan.folder.records()), time.monotonic(), None
        self.training: Training | None = None
        self.at_step: int | None = None
        """the training step under way; None outside of training"""
        self.rates: dict[str, float] = {}
        """tokens/s of the phases beside training, as last measured: what is said of one before it has done anything"""
        self.say(phase="starting")

    @property
    def lm(self):
        return self.worker.lm

    @property
    def dataset(self) -> ActivationDataset:
        return self.worker.dataset

    @property
    def scale(self) -> float:
        return self.dataset.manifest.scale

    def tidy(self) -> None:
        """Before the first cycle: drop what killed writers left."""
        if self.rank == 0:
            self.plan.lease.check()
            self.plan.folder.tidy()

    def begin(self) -> None:
        """Set a cycle up: an SAE on the last cycle's core, or on the one that the chain starts from."""
        self.began = time.monotonic()
        folder = self.plan.folder.cycle(self.cycle)
        folder.path.mkdir(parents=True, exist_ok=True)
        self.core = self._incoming_core()
        if self.core is not None and abs(self.core.scale - self.scale) > 1e-12 * self.scale:
            raise ValueError(f"{folder.path}: the core was made at scale {self.core.scale!r}, the activations have {self.scale!r}")
        self.training = Training(self.plan, self.cycle, self.core, self.dataset, self.comm, self.device)

    def step(self, step: int, x_BD: torch.Tensor, token_index_B: torch.Tensor, waited: float) -> None:
        """One training step, logged where it is to be. Raises Diverged."""
        training, steps, self.at_step = self.training, self.plan.steps, step
        if (report := training.step(step, x_BD, token_index_B, waited)) is not None:
            training.log(report)
            rate = training.tokens_per_s
            self.say(phase="train", step=step + 1, steps=steps, tokens_per_s=rate, within=0.85 * (step + 1) / steps)

    def finish(self, together: int, opens_next: bool) -> None:
        """Set the threshold, evaluate, attribute, and choose the next core. opens_next: reading for the next cycle starts here."""
        self.at_step = None
        folder, sae = self.plan.folder.cycle(self.cycle), self.training.trainer.whole()
        self.calibrate(sae)
        after_training = time.monotonic()
        metrics, density_F, removal_P = self.evaluate(folder, sae)
        after_evaluation = time.monotonic()
        selected = self.attribute(folder, sae, opens_next)
        now = time.monotonic()
        seconds = {
            "train": after_training - self.began, "evaluate": after_evaluation - after_training,
            "attribute": now - after_evaluation, "total": now - self.began,
        }  # fmt: skip
        if self.rank == 0:
            self.commit(folder, self.core, sae, density_F, removal_P, selected, metrics, self.training.record(together), seconds)
        self.training, self.core = None, None
        self.cycle += 1

    def _incoming_core(self) -> Core | None:
        """What the last cycle selected; for the first one, what the chain starts from."""
        if self.cycle:
            return Core.load(self.plan.folder.cycle(self.cycle - 1).core)
        return Core.load(self.plan.start.path) if self.plan.start else None

    def calibrate(self, sae: MatryoshkaSAE) -> None:
        """Set the SAE's threshold on the rows held back."""
        self.say(phase="calibrate", within=0.86)
        rows_ND, settings = self.dataset.calibration_rows(), self.plan.sae_settings(self.dataset.manifest.d)

        def chunks():
            for chunk_BD in rows_ND.split(settings.batch):
                yield (chunk_BD.float() / self.scale).to(self.device)

        sae.theta.fill_(calibrate(sae, chunks, self.plan.k, settings))

    # -- evaluate ------------------------------------------------------------------------------------------------------

    def evaluate(self, folder: CycleFolder, sae: MatryoshkaSAE) -> tuple[dict, torch.Tensor, torch.Tensor | None]:
        """Held-out metrics, each latent's density [F] and, if cores are selected by it, what each candidate's removal costs.

        Saves the SAE with its densities.
        """
        self.say(phase="evaluate", within=0.87, tokens_per_s=self.rates.get("evaluate"))
        plan, evaluate, tally = self.plan, self.plan.config.evaluate, Tally()
        removal = plan.config.selection.by == "reconstruction"
        batches = list(self._sequences("evaluation", evaluate.tokens).batches(evaluate.sequences_per_batch))
        # A rank without a batch tallies one in which nothing counts: all ranks must add up the same sums.
        mine = batches[self.rank :: self.world] or [(batches[0][0], torch.ones_like(batches[0][1]))]
        began = time.monotonic()
        for done, (ids_NT, lengths_N) in enumerate(mine, 1):
            tally_batch(tally, sae, self.lm, ids_NT.to(self.device), lengths_N.to(self.device), self.scale, removal, self.dataset.manifest.max_norm)
            read = done * self.world * evaluate.sequences_per_batch * plan.config.model.context
            self.rates["evaluate"] = read / (time.monotonic() - began)
            self.say(phase="evaluate", within=0.87 + 0.03 * done / len(mine), tokens_per_s=self.rates["evaluate"])
        self.comm.wait_for_all()
        tally.reduce(self.comm)
        metrics, density_F = scores_of(tally, sae, read_references(plan.references, evaluate))
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

    def attribute(self, folder: CycleFolder, sae: MatryoshkaSAE, opens_next: bool) -> dict:
        """Score shards until the aggregator has all it asks for, then ask it for the core."""
        config = self.plan.config.attribution
        batches = list(self._sequences("attribution", config.tokens).batches(config.sequences_per_shard))
        # Partial sums belong to these weights: every rank holds the same.
        stamp = hashlib.sha256(sae.W_dec.detach().cpu().numpy().tobytes() + sae.theta.cpu().numpy().tobytes()).hexdigest()[:16]
        ledger = (str(folder.attribution), len(batches), stamp)
        aggregator = self.worker.aggregator
        if self.rank == 0:
            ray.get(aggregator.begin.remote(ledger))
        self.comm.wait_for_all()  # rank 0 had an SAE to save
        began, tokens = time.monotonic(), config.sequences_per_shard * self.plan.config.model.context
        self.say(phase="attribute", within=0.9, tokens_per_s=self.rates.get("attribute"))

        def on_shard(done: int) -> None:
            within = min(1.0, 0.9 + 0.1 * done * self.world / len(batches))
            self.rates["attribute"] = done * self.world * tokens / (time.monotonic() - began)
            self.say(phase="attribute", within=within, tokens_per_s=self.rates["attribute"])
            if opens_next and done * self.world >= OPEN_AT * len(batches):
                self.worker.open_next(self.cycle)

        settings = self.plan.attribution_settings(self.dataset.manifest)
        score_shards(sae, self.lm, batches, self.scale, settings, aggregator, ledger, self.rank, on_shard)
        if opens_next:
            self.worker.open_next(self.cycle)  # where other ranks were faster, this one may have had no shard that late
        return ray.get(aggregator.select.remote(ledger))

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
            "decoder_drift": None if core is None else decoder_drift(core.W_dec_CD, sae.W_dec[:core_in]),
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
        write_failure(self.plan, kind, reason, self.cycle, self.at_step)
        self.board.update.remote(self.plan.label, phase="failed", message=reason)


def write_failure(plan: ChainPlan, kind: str, reason: str, cycle: int | None = None, step: int | None = None) -> None:
    """failed.json: kind `diverged` (final), `data` or `error` (tried again by the next sweep); cycle, step: where, as far as that is known.

    Raises Superseded.
    """
    plan.lease.check()
    write_json(
        plan.folder.failed,
        {
            "kind": kind, "reason": scrub(reason), "cycle": cycle, "step": step, "generation": plan.lease.generation, "at": time.time(),
            "traceback": scrub(traceback.format_exc()),
        },  # fmt: skip
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
    links = causes(error, contexts=True)
    for link in links:
        # A read task's error reaches us only as the text of its traceback.
        if found := re.search(r"^[\w.]*(ShardError|StoreError|Missing): (.+)$", str(link), re.MULTILINE):
            return (ShardError if found[1] == "ShardError" else StoreError)(found[2])
    return next((link for link in links if isinstance(link, kinds)), None)
