"""One chain, planned: plain values that travel to workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dmsae_ray.activations.dataset import ActivationDataset, Manifest
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.rowgroup import Unit
from dmsae_ray.activations.stream import StreamLimits
from dmsae_ray.config import Config, fields_key
from dmsae_ray.distill.attribution import AttributionSettings
from dmsae_ray.distill.folder import ChainFolder, Lease
from dmsae_ray.distill.scores import ScoreSettings
from dmsae_ray.distill.select import count_of
from dmsae_ray.sae.settings import SAESettings, schedule

INIT, SELECTION = 301, 302
"""Purposes of random draws, apart from those of activations/order.py and activations/harvest.py."""


@dataclass(frozen=True)
class ChainPlan:
    """All cycles for one (seed, k)."""

    config: Config
    seed: int
    k: int
    dataset: str
    """folder or URL of the activations"""
    dataset_key: str
    lease: Lease
    arm: str = "base"
    """group of chains of a study; decides no number"""

    @property
    def label(self) -> str:
        return self.config.chain_label(self.seed, self.k)

    @property
    def fields(self) -> dict:
        return self.config.chain_fields(self.seed, self.k, self.dataset_key)

    @property
    def key(self) -> str:
        return fields_key(self.fields)

    @property
    def folder(self) -> ChainFolder:
        return ChainFolder(self.config.home / "chains" / self.key)

    @property
    def references(self) -> Path:
        """Folder of the reference losses; in the output folder, since a dataset may be elsewhere and not ours to write to."""
        return self.config.home / "data" / self.dataset_key

    @property
    def cycles(self) -> int:
        return self.config.sweep.cycles

    @property
    def data_seed(self) -> int:
        return self.config.data_seed_of(self.seed)

    def init_seed(self, cycle: int) -> int:
        """Seed of a cycle's initialisation: every draw comes from (seed, cycle, purpose)."""
        return self._draw(cycle, INIT)

    def selection_seed(self, cycle: int) -> int:
        """Seed of the order in which `selection.by: random` takes the candidates."""
        return self._draw(cycle, SELECTION)

    def _draw(self, cycle: int, purpose: int) -> int:
        return int(np.random.SeedSequence([self.seed, cycle, purpose]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def core_size(self, cycle: int, candidates: int) -> int:
        """Members of the core that this cycle selects, where `selection.size` is not tau.

        Raises ValueError if the chain that the sizes are taken from has not done this cycle.
        """
        size = self.config.selection.size
        if size != "match":
            return count_of(size, candidates)
        twin = replace(self, config=self.config.by_attribution())
        check_twins({self.label: twin.folder}, cycle + 1)
        return twin.folder.records()[cycle]["core_out"]

    @property
    def steps(self) -> int:
        """Training steps of a cycle; rows beyond the last whole batch are dropped."""
        return self.config.train.tokens // self.config.train.batch

    def units(self, dataset: ActivationDataset) -> list[Unit]:
        """The row groups this chain trains on: all, or those of its part's shards.

        Parts are whole shards, so that no sequence is in two, and full ones, so that all parts are of one size.
        """
        parts = self.config.sweep.n_parts
        if parts == 1:
            return dataset.units()
        size = dataset.manifest.rows // self.config.harvest.rows_per_shard // parts
        part = self.seed % parts
        return dataset.units(range(part * size, (part + 1) * size))

    @property
    def stream_limits(self) -> StreamLimits:
        cluster = self.config.cluster
        return StreamLimits(cluster.object_store_mb, cluster.read_tasks, cluster.fetch_ahead)

    def order(self, dataset: ActivationDataset, cycle: int) -> Order:
        train = self.config.train
        return Order(
            n_units=len(self.units(dataset)), unit_rows=dataset.manifest.rows_per_group, batch=train.batch, lanes=train.lanes,
            data_seed=self.data_seed, cycle=cycle,
        )  # fmt: skip

    def sae_settings(self, d: int) -> SAESettings:
        sae, train = self.config.sae, self.config.train
        lengths = schedule(
            self.steps, train.batch, warmup_steps=train.warmup_steps, warmup_share=train.warmup_share,
            dead_window_tokens=train.dead_window_tokens, dead_window_share=train.dead_window_share, decay_share=train.decay_share,
        )  # fmt: skip
        return SAESettings(
            d=d, width=sae.width, k=self.k, batch=train.batch, prefix_fractions=sae.prefix_fractions, core_gate=sae.core_gate,
            core_budget=sae.core_budget, core_transfer=sae.core_transfer, core_decoder_init=sae.core_decoder_init,
            auxk_alpha=sae.auxk_alpha, auxk_k=sae.auxk_k, lr=train.lr, beta1=train.betas[0], beta2=train.betas[1],
            eps=train.eps, clip=train.clip, threshold_beta=train.threshold_beta, screen=train.screen, kernels=train.kernels, **lengths,
        )  # fmt: skip

    def attribution_settings(self, manifest: Manifest) -> AttributionSettings:
        """How rows of this dataset are attributed: the outlier bound is a multiple of its median norm."""
        attribution = self.config.attribution
        multiple = attribution.outlier_norm
        return AttributionSettings(
            splice=attribution.splice, candidates=attribution.candidates,
            max_norm=None if multiple is None else multiple * manifest.norm_quantiles["0.5"],
        )  # fmt: skip

    @property
    def score_settings(self) -> ScoreSettings:
        attribution = self.config.attribution
        return ScoreSettings(attribution.aggregator, attribution.quantile, attribution.tau, attribution.until_jaccard)

    def finished(self) -> bool:
        return len(self.folder.records()) >= self.cycles


def check_twins(twins: dict[str, ChainFolder], cycles: int) -> None:
    """The chains that `selection.size: match` takes core sizes from have done so many cycles. twins: by the label of their placebo.

    Raises ValueError with the command that makes them.
    """
    done = {label: len(twin.records()) for label, twin in twins.items()}
    short = [f"{label} from {twins[label].path} ({n} of {cycles} cycles done)" for label, n in done.items() if n < cycles]
    if short:
        raise ValueError(
            "selection.size match: core sizes are taken from the chain that selects by attribution and has all else in common, "
            f"{', '.join(short)}. Finish it first: the same command with --selection.by attribution --selection.size tau"
        )


def plan_chains(config: Config, dataset: ActivationDataset, lease: Lease) -> list[ChainPlan]:
    """The grid seeds x k."""
    return [
        ChainPlan(config, seed, k, dataset.store.url, dataset.manifest.key, lease)
        for k in config.sweep.k
        for seed in config.sweep.seeds
    ]
