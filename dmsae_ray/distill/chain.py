"""The Ray Train loop of a chain: every cycle trains, evaluates, attributes, selects.

All cycles run inside one worker group: the workers that trained an SAE also attribute it, and nothing is released and
acquired again in between. Chains that share the order of data may advance in lockstep, on one stream and one language
model: each batch is read once and every chain takes its step on it. What a cycle needs to go on after a crash is in its
folder (see folder.py); each step below looks there first.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import ray
import ray.train
import ray.train.torch
import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.shard import ShardError
from dmsae_ray.activations.store import StoreError
from dmsae_ray.attribution.worker import score_shards
from dmsae_ray.core.core import Core
from dmsae_ray.core.drift import decoder_drift
from dmsae_ray.core.next_core import next_core
from dmsae_ray.core.score_file import save_scores
from dmsae_ray.core.select import carried, jaccard
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.distill.failure import write_failure
from dmsae_ray.distill.folder import RECORD_VERSION, CycleFolder
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.selection import choose
from dmsae_ray.distill.training import Training
from dmsae_ray.evaluation.measure import Tally, scores_of, tally_batch
from dmsae_ray.evaluation.references import read_references
from dmsae_ray.files import write_json
from dmsae_ray.sae.report import Diverged
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.threshold import calibrate

if TYPE_CHECKING:
    from dmsae_ray.distill.worker import Worker

OPEN_AT = 0.5
"""Share of the last attribution of a cycle after which reading for the next one starts: late, since a stream that waits
costs some CPU.
"""


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
            raise ValueError(
                f"{folder.path}: the core was made at scale {self.core.scale!r}, the activations have {self.scale!r}"
            )
        self.training = Training(self.plan, self.cycle, self.core, self.dataset, self.comm, self.device)

    def step(self, step: int, x_BD: torch.Tensor, token_index_B: torch.Tensor, waited: float) -> None:
        """One training step, logged where it is to be. Raises Diverged."""
        training, steps, self.at_step = self.training, self.plan.steps, step
        if (report := training.step(step, x_BD, token_index_B, waited)) is not None:
            training.log(report)
            rate = training.tokens_per_s
            self.say(phase="train", step=step + 1, steps=steps, tokens_per_s=rate, within=0.85 * (step + 1) / steps)

    def finish(self, together: int, opens_next: bool) -> None:
        """Set the threshold, evaluate, attribute, and choose the next core. opens_next: reading for the next cycle
        starts here.
        """
        self.at_step = None
        folder, sae = self.plan.folder.cycle(self.cycle), self.training.trainer.whole()
        self.calibrate(sae)
        after_training = time.monotonic()
        metrics, density_F, removal_P = self.evaluate(folder, sae)
        after_evaluation = time.monotonic()
        selected = self.attribute(folder, sae, opens_next)
        now = time.monotonic()
        seconds = {
            "train": after_training - self.began,
            "evaluate": after_evaluation - after_training,
            "attribute": now - after_evaluation,
            "total": now - self.began,
        }
        if self.rank == 0:
            self.commit(
                folder, self.core, sae, density_F, removal_P, selected, metrics, self.training.record(together), seconds
            )
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
        """Held-out metrics, each latent's density [F] and, if cores are selected by it, what each candidate's removal
        costs.

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
            tally_batch(
                tally,
                sae,
                self.lm,
                ids_NT.to(self.device),
                lengths_N.to(self.device),
                self.scale,
                removal,
                self.dataset.manifest.max_norm,
            )
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
                {
                    "density": density_F.float(),
                    "scale": self.scale,
                    "hook": manifest.hook,
                    "model": manifest.model_fingerprint,
                    "cycle": self.cycle,
                    "seed": self.plan.seed,
                    "k": self.plan.k,
                    "chain": self.plan.key,
                },
            )
        return metrics, density_F, tally.sums.get("removal")

    def _sequences(self, split: str, tokens: int) -> TokenSequences:
        return self.dataset.held_out(split).first_tokens(tokens)

    # -- attribute and select ------------------------------------------------------------------------------------------

    def attribute(self, folder: CycleFolder, sae: MatryoshkaSAE, opens_next: bool) -> dict:
        """Score shards until the aggregator has all it asks for, then ask it for the core."""
        config = self.plan.config.attribution
        batches = list(self._sequences("attribution", config.tokens).batches(config.sequences_per_shard))
        # Partial sums belong to these weights: every rank holds the same.
        stamp = hashlib.sha256(
            sae.W_dec.detach().cpu().numpy().tobytes() + sae.theta.cpu().numpy().tobytes()
        ).hexdigest()[:16]
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
            core,
            sae,
            ids_C,
            selected["scores"],
            density_F,
            cycle=plan.number(self.cycle),
            seed=plan.seed,
            k=plan.k,
            scale=self.scale,
            hook=manifest.hook,
            model=manifest.model_fingerprint,
            by=selection.by,
        )
        plan.lease.check()
        new.save(folder.core)
        save_scores(folder.scores, selected["scores"], selection.by, values_P)
        core_in = sae.core_size
        kept = int((new.latent_ids_C < core_in).sum())
        origins = {str(cycle): int((new.entered_C == cycle).sum()) for cycle in sorted(set(new.entered_C.tolist()))}
        total_score = float(selected["scores"].sum())
        record = {
            "format_version": RECORD_VERSION,
            "chain": plan.key,
            "label": plan.label,
            "cycle": self.cycle,
            "generation": plan.lease.generation,
            "seed": plan.seed,
            "k": plan.k,
            "core_in": core_in,
            "core_out": new.size,
            "kept": kept,
            "entered": new.size - kept,
            "left": core_in - kept,
            "decoder_drift": None if core is None else decoder_drift(core.W_dec_CD, sae.W_dec[:core_in]),
            "jaccard": jaccard(kept, core_in, new.size) if core is not None else None,
            "origins": origins,
            **trained,
            "theta": float(sae.theta),
            **metrics,
            "core_share": float(selected["scores"][:core_in].sum()) / total_score,
            "coverage": carried(selected["scores"], ids_C),
            "selection": selection.model_dump() | {"candidates": len(selected["scores"])},
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "attribution": {name: value for name, value in selected.items() if name not in ("ids", "scores")},
            "finished_at": time.time(),
        }
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
            self.plan.label,
            phase=phase,
            cycle=self.cycle,
            cycles=self.plan.cycles,
            fraction=fraction,
            eta_s=eta,
            **values,
        )

    def fail(self, error: Exception) -> None:
        """Mark the chain failed. Divergence is final for this chain's fields; anything else is tried again by the next
        sweep.
        """
        if self.rank and isinstance(error, Diverged):
            return  # all ranks diverge together, rank 0 writes
        kind = (
            "diverged"
            if isinstance(error, Diverged)
            else "data"
            if isinstance(error, ShardError | StoreError)
            else "error"
        )
        reason = str(error) if kind != "error" else f"{type(error).__name__}: {error}"
        write_failure(self.plan, kind, reason, self.cycle, self.at_step)
        self.board.update.remote(self.plan.label, phase="failed", message=reason)
