"""One cycle of a chain on one rank: train an SAE on the core so far, evaluate, attribute, select the next core.

All cycles of a chain run inside one worker group: the workers that trained an SAE also attribute it, and nothing is
released and acquired again in between. Each step looks in the cycle's folder for what a crash has left.
Letters: B tokens of a batch, D model dimension, F width, P candidates.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ray
import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.attribution.aggregator import Account, Attribution
from dmsae_ray.attribution.shards import score_shards
from dmsae_ray.core.core import Core
from dmsae_ray.core.drift import decoder_drift
from dmsae_ray.core.next_core import next_core
from dmsae_ray.core.random_rows import random_rows
from dmsae_ray.core.score_file import save_scores
from dmsae_ray.core.select import carried, jaccard
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.distill.chain import Chain
from dmsae_ray.distill.mapping import attribution_settings, sae_settings, score_settings
from dmsae_ray.distill.record import CycleRecord
from dmsae_ray.distill.selection import choose
from dmsae_ray.distill.training import Training
from dmsae_ray.evaluation.measure import Tally, scores_of, tally_batch
from dmsae_ray.evaluation.references import read_references
from dmsae_ray.files import elsewhere, write_json
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.threshold import calibrate

if TYPE_CHECKING:
    from dmsae_ray.lm.model import LanguageModel

OPEN_AT = 0.5
"""Share of a cycle's last attribution (that of the last of the chains in lockstep) after which reading for the next
cycle starts: late, since a stream that waits costs some CPU.
"""

PHASES = {"train": (0.0, 0.85), "calibrate": (0.86, 0.86), "evaluate": (0.87, 0.9), "attribute": (0.9, 1.0)}
"""Where each phase begins and ends within a cycle, as far as progress is shown."""


class Cycle:
    """A cycle that has begun; it is over when `finish` returns."""

    def __init__(self, chain: Chain, dataset: ActivationDataset, lm: LanguageModel):
        """Sets an SAE up on the last cycle's core, or on the one that the chain starts from.

        Raises ValueError if the core was made for other activations, or if a checkpoint cannot be read.
        """
        self.chain, self.plan, self.rank, self.dataset, self.lm = chain, chain.plan, chain.rank, dataset, lm
        self.began = time.monotonic()
        self.number, self.scale = chain.cycle, dataset.manifest.scale
        self.folder = self.plan.folder.cycle(self.number)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.core = self._incoming_core()
        """that the SAE is trained on, or whose place random rows take; None: it is empty"""
        if self.core is not None and abs(self.core.scale - self.scale) > 1e-12 * self.scale:
            raise ValueError(
                f"{self.folder.path}: the core was made at scale {self.core.scale!r}, the activations have "
                f"{self.scale!r}"
            )
        if self.core is not None and self.plan.config.sae.core_transfer == "random":
            self.core = random_rows(self.core, dataset.calibration_rows(), self.plan.slot_seed(self.number))
        self.training = Training(self.plan, self.number, self.core, dataset, self.rank)
        if self.rank.writes:
            chain.metrics.resumes(len(self.training.so_far.resumes))

    def _incoming_core(self) -> Core | None:
        """What the last cycle selected; for the first one, what the chain starts from."""
        if self.number:
            if not self.rank.writes:
                self.plan.folder.refresh()
            return Core.load(self.plan.folder.cycle(self.number - 1).core)
        return Core.load(self.plan.start.path) if self.plan.start else None

    def step(self, step: int, x_BD: torch.Tensor, token_index_B: torch.Tensor, waited: float) -> None:
        """One training step, logged where it is to be. Raises Diverged."""
        training, steps, self.chain.at_step = self.training, self.plan.steps, step
        if (report := training.step(step, x_BD, token_index_B, waited)) is not None:
            training.log(report)
            self._say("train", (step + 1) / steps, training.tokens_per_s, step=step + 1, steps=steps)

    def _say(self, phase: str, done: float = 0.0, rate: float | None = None, **values: int) -> None:
        """Tell how far the cycle is. done: share of the phase; rate: its tokens/s."""
        begin, end = PHASES[phase]
        self.chain.say(phase=phase, within=begin + (end - begin) * done, tokens_per_s=rate, **values)

    def finish(self, together: int, open_next: Callable[[], None] | None) -> None:
        """Set the threshold, evaluate, attribute, and choose the next core.

        together: chains that shared the stream. open_next: starts reading for the next cycle, called during
        attribution, more than once; None: another chain's cycle does that.
        """
        self.chain.at_step = None
        self.training.metrics.end()
        sae = self.training.trainer.whole()
        self._calibrate(sae)
        after_training = time.monotonic()
        metrics, density_F, removal_P = self._evaluate(sae)
        after_evaluation = time.monotonic()
        attributed = self._attribute(sae, open_next)
        now = time.monotonic()
        if self.rank.writes:
            seconds = {
                "train": after_training - self.began,
                "evaluate": after_evaluation - after_training,
                "attribute": now - after_evaluation,
                "total": now - self.began,
            }
            self._commit(sae, density_F, removal_P, attributed, metrics, self.training.record(together), seconds)
        self.chain.cycle += 1

    def _calibrate(self, sae: MatryoshkaSAE) -> None:
        """Set the SAE's threshold on the rows held back."""
        self._say("calibrate")
        rows_ND = self.dataset.calibration_rows()
        settings = sae_settings(self.plan.config, self.plan.k, self.dataset.manifest.d)

        def chunks() -> Iterator[torch.Tensor]:
            for chunk_BD in rows_ND.split(settings.batch):
                yield (chunk_BD.float() / self.scale).to(self.rank.device)

        sae.theta.fill_(calibrate(sae, chunks, self.plan.k, settings))

    # -- evaluate ------------------------------------------------------------------------------------------------------

    def _evaluate(self, sae: MatryoshkaSAE) -> tuple[dict, torch.Tensor, torch.Tensor | None]:
        """Held-out metrics, each latent's density [F] and, with selection.by reconstruction, what each candidate's
        removal costs (else None).

        Saves the SAE with its densities.
        """
        self._say("evaluate", rate=self.chain.rates.get("evaluate"))
        plan, evaluate, manifest = self.plan, self.plan.config.evaluate, self.dataset.manifest
        removal = plan.config.selection.by == "reconstruction"
        sequences = self._sequences("evaluation", evaluate.tokens)
        tally = Tally(len(sequences), torch.tensor(manifest.mean))
        batches = list(enumerate(sequences.batches(evaluate.sequences_per_batch)))
        # A rank without a batch tallies one of length 1, BOS alone, in which no row counts: all ranks must add up the
        # same sums.
        ids_NT, lengths_N = batches[0][1]
        mine = batches[self.rank.number :: self.rank.world] or [(0, (ids_NT, torch.ones_like(lengths_N)))]
        began = time.monotonic()
        for done, (place, (ids_NT, lengths_N)) in enumerate(mine, 1):
            tally_batch(
                tally,
                sae,
                self.lm,
                ids_NT.to(self.rank.device),
                lengths_N.to(self.rank.device),
                self.scale,
                removal,
                manifest.max_norm,
                place * evaluate.sequences_per_batch,
            )
            read = done * self.rank.world * evaluate.sequences_per_batch * plan.config.model.context
            self.chain.rates["evaluate"] = read / (time.monotonic() - began)
            self._say("evaluate", done / len(mine), self.chain.rates["evaluate"])
        self.rank.comm.wait_for_all()
        tally.reduce(self.rank.comm)
        metrics, density_F = scores_of(tally, sae, read_references(plan.references, evaluate))
        if self.rank.writes:
            self.rank.lease.check()
            sae.save(
                self.folder.sae,
                {
                    "density": density_F.float(),
                    "scale": self.scale,
                    "hook": manifest.hook,
                    "model": manifest.model_fingerprint,
                    "cycle": self.number,
                    "seed": self.plan.seed,
                    "k": self.plan.k,
                    "chain": self.plan.key,
                },
            )
        return metrics, density_F, tally.sums.get("removal")

    def _sequences(self, split: str, tokens: int) -> TokenSequences:
        return self.dataset.held_out(split).first_tokens(tokens)

    # -- attribute and select ------------------------------------------------------------------------------------------

    def _attribute(self, sae: MatryoshkaSAE, open_next: Callable[[], None] | None) -> Attribution:
        """Score shards until the aggregator has all it asks for, then ask it for the scores."""
        config = self.plan.config.attribution
        batches = list(self._sequences(self.plan.attribution_split, config.tokens).batches(config.sequences_per_shard))
        # Partial sums belong to these weights: every rank holds the same.
        stamp = hashlib.sha256(
            sae.W_dec.detach().cpu().numpy().tobytes() + sae.theta.cpu().numpy().tobytes()
        ).hexdigest()[:16]
        folder = self.folder.attribution
        account = Account(str(folder), len(batches), stamp, score_settings(self.plan.config), elsewhere(folder))
        aggregator = self.rank.aggregator
        if self.rank.writes:
            ray.get(aggregator.begin.remote(account))
        self.rank.comm.wait_for_all()  # rank 0 had an SAE to save
        began, tokens = time.monotonic(), config.sequences_per_shard * self.plan.config.model.context
        self._say("attribute", rate=self.chain.rates.get("attribute"))

        def on_shard(done: int) -> None:
            self.chain.rates["attribute"] = done * self.rank.world * tokens / (time.monotonic() - began)
            self._say("attribute", min(1.0, done * self.rank.world / len(batches)), self.chain.rates["attribute"])
            if open_next is not None and done * self.rank.world >= OPEN_AT * len(batches):
                open_next()

        settings = attribution_settings(self.plan.config, self.dataset.manifest)
        score_shards(sae, self.lm, batches, self.scale, settings, aggregator, account, self.rank.number, on_shard)
        if open_next is not None:
            open_next()  # where other ranks were faster, this one may have had no shard that late
        return ray.get(aggregator.total.remote(account))

    def _commit(
        self,
        sae: MatryoshkaSAE,
        density_F: torch.Tensor,
        removal_P: torch.Tensor | None,
        attributed: Attribution,
        metrics: dict[str, Any],
        trained: dict[str, Any],
        seconds: dict[str, float],
    ) -> None:
        """Save the core and, last, the completion record; then drop what only an unfinished cycle needs."""
        plan, manifest, selection = self.plan, self.dataset.manifest, self.plan.config.selection
        scores_P = attributed.scores_P
        ids_C, values_P = choose(plan, self.number, sae, scores_P, density_F, removal_P)
        new = next_core(
            self.core,
            sae,
            ids_C,
            scores_P,
            density_F,
            cycle=plan.number(self.number),
            seed=plan.seed,
            k=plan.k,
            scale=self.scale,
            hook=manifest.hook,
            model=manifest.model_fingerprint,
            by=selection.by,
        )
        self.rank.lease.check()
        new.save(self.folder.core)
        save_scores(self.folder.scores, scores_P, selection.by, values_P)
        core_in = sae.core_size
        kept = int((new.latent_ids_C < core_in).sum())
        origins = {str(cycle): int((new.entered_C == cycle).sum()) for cycle in sorted(set(new.entered_C.tolist()))}
        record = CycleRecord(
            chain=plan.key,
            label=plan.label,
            cycle=self.number,
            generation=self.rank.lease.generation,
            seed=plan.seed,
            k=plan.k,
            core_in=core_in,
            core_out=new.size,
            kept=kept,
            entered=new.size - kept,
            left=core_in - kept,
            decoder_drift=None
            if self.core is None or sae.core_transfer == "random"  # no member's row was there to come back
            else decoder_drift(self.core.W_dec_CD, self.training.began_CD, sae.W_dec[:core_in]),
            jaccard=jaccard(kept, core_in, new.size) if self.core is not None else None,
            origins=origins,
            **trained,
            theta=float(sae.theta),
            **metrics,
            core_share=float(scores_P[:core_in].sum()) / float(scores_P.sum()),
            coverage=carried(scores_P, ids_C),
            selection=selection.model_dump() | {"candidates": len(scores_P)},
            seconds={name: round(value, 2) for name, value in seconds.items()},
            attribution=attributed.facts(),
            finished_at=time.time(),
        )
        self.rank.lease.check()
        write_json(self.folder.record, record.to_json())
        self.folder.release()
