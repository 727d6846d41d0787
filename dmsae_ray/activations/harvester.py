"""Making datasets: documents -> token sequences on disk -> residual stream -> shards -> manifest, one dataset per hook.

A shard is a unit of work whose bytes depend only on the configuration (see shard_maker.py), so any number of actors
gives the same files, and a finished one is kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from dmsae_ray.activations.catalogue import Identity, _store_held_out
from dmsae_ray.activations.dataset import ActivationDataset, DatasetError, Manifest, statistics_of
from dmsae_ray.activations.outliers import outliers_of
from dmsae_ray.activations.shard import ShardEntry, ShardError, inspect_shard, read_rows
from dmsae_ray.activations.shard_maker import MAX_NORM, ShardMaker, Target
from dmsae_ray.activations.shard_plan import ShardPlan, plan_shards, rows_for_plan
from dmsae_ray.causes import causes
from dmsae_ray.cluster.present import placed
from dmsae_ray.config import Config
from dmsae_ray.corpus.mixture import hub_commits, ignored
from dmsae_ray.corpus.prepare import check_held_out, held_out_tokens, prepare_tokens
from dmsae_ray.corpus.split import Deal
from dmsae_ray.files import remove_leftovers
from dmsae_ray.lm.source import local_folder, tokenizer_of
from dmsae_ray.ownership import ours_in
from dmsae_ray.store import StoreError

SAY_SECONDS = 3.0
"""Shortest time between two lines of progress: thousands of shards would fill the screen."""
PLANS_PER_TASK = 8
"""Shards an actor is given at a time: within these, one is written while the next is computed."""
ROUNDS = 4
"""Tasks of an actor, at least, where there are so many shards: few large ones would leave actors idle at the end."""


class Harvest:
    """Making what is missing of the datasets. Planning needs no Ray and raises ValueError if the corpus cannot give
    it.
    """

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.config, self.say, self.identity = config, say, Identity(config)
        h = config.harvest
        if h.store is None:
            for folder in ours_in(config.home, "data"):
                remove_leftovers(folder)  # nobody else writes there: this driver holds the folder
        self.tokens = self.identity.tokens
        for line in ignored(config.corpus):
            say(line)
        reserve = h.outlier_reserve if h.outlier_norm else 0.0
        self.deal = Deal.of(config)
        rows = rows_for_plan(h, self.deal, config.model.context, reserve)
        wanted = rows | held_out_tokens(config)
        sequences = prepare_tokens(
            config.corpus, tokenizer_of(config.model), config.model.context, self.tokens, wanted, say, self.deal
        )
        check_held_out(config, sequences)
        # Not of longer sequences that another configuration left here: the same configuration is the same shards.
        self.plans = plan_shards(
            {split: sequences[split].first_tokens(tokens).rows for split, tokens in rows.items()},
            h,
            self.deal,
            reserve,
        )
        self.targets = [Target(hook, self.identity.store(hook), self._about(hook)) for hook in config.hooks]
        self.entries = {target.hook: self._finished(target) for target in self.targets}

    def _finished(self, target: Target) -> dict[str, ShardEntry]:
        """Shards that are there from before, by their plan's name."""
        there = target.store.sizes("shards")
        plans = [plan for plan in self.plans if plan.file in there]
        with ThreadPoolExecutor(16) as pool:  # a remote store answers many at once
            found = zip(plans, pool.map(target.finished, plans), strict=True)
            return {plan.name: entry for plan, entry in found if entry is not None}

    def _about(self, hook: str) -> dict:
        harvest, model = self.config.harvest, self.config.model
        return {
            "dataset": self.identity.key(hook),
            "model": model.name,
            "model_fingerprint": self.identity.info.fingerprint,
            "hook": hook,
            "d": self.identity.info.d,
            "dtype": harvest.dtype,
            "seed": harvest.seed,
            "corpus_fingerprint": self.identity.corpus,
        }

    def run(self, actors: int) -> dict[str, ActivationDataset]:
        """Make the missing shards with so many actors on the connected Ray cluster, and open the datasets by hook.

        Raises ValueError, ShardError or StoreError as the actors do.
        """
        missing = [
            plan for plan in self.plans if any(plan.name not in self.entries[target.hook] for target in self.targets)
        ]
        kept, total = len(self.plans) - len(missing), sum(plan.rows for plan in missing)
        self.say(
            f"harvest: {sum(p.rows for p in self.plans):,} tokens of {self.config.model.name} at "
            f"{', '.join(self.config.hooks)} into "
            f"{len(self.plans)} shards"
            + (f", documents dealt to {self.deal.parts} parts" if self.deal.parts > 1 else "")
            + (f", {kept} kept from before" if kept else "")
        )
        if missing and actors < (self.config.harvest.actors or 0):
            self.say(
                f"harvest: {actors} actors, since no more of harvest.actors {self.config.harvest.actors} fit on this "
                "cluster"
            )
        start, first, done, size, said = time.monotonic(), None, 0, 0, 0.0
        for name, entries in self._make(missing, actors) if missing else ():
            for hook, entry in entries.items():
                self.entries[hook][name] = entry
                size += entry.bytes
            done += next(iter(entries.values())).rows
            now = time.monotonic()
            if first is None:
                first = now, done  # actors start and load the model before this: no rate can be told yet
            rate = (done - first[1]) / (now - first[0]) if now - first[0] > 1 else None
            pace = f", {rate:,.0f} tokens/s, {(total - done) / rate:.0f} s left" if rate else ""
            if now - said >= SAY_SECONDS or done == total:
                said = now
                self.say(f"harvest: {done:,} of {total:,} tokens, {size / 1e6:,.1f} MB{pace}")
        self.say(f"harvest: done in {time.monotonic() - start:.0f} s")
        return {target.hook: self._finish(target) for target in self.targets}

    def _make(self, missing: list[ShardPlan], actors: int) -> Iterator[tuple[str, dict[str, ShardEntry]]]:
        """(plan, hook -> entry) of shards as they are finished, in any order."""
        import ray.data

        harvest = self.config.harvest
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # every shard is told of when it is finished, not with all others of its task
        per_task = max(1, min(PLANS_PER_TASK, len(missing) // (ROUNDS * actors)))
        tasks = [
            json.dumps([plan.to_dict() for plan in missing[i : i + per_task]]) for i in range(0, len(missing), per_task)
        ]
        shards = ray.data.from_items([{"plans": task} for task in tasks], override_num_blocks=len(tasks)).map_batches(
            ShardMaker,
            fn_constructor_kwargs={
                "config": self.config,
                "targets": self.targets,
                "tokens": self.tokens.name,
                "calibration": self.plans[0],
            },
            batch_size=1,
            batch_format="numpy",
            # No task waits behind another at its actor: of the last ones the next free actor takes each.
            compute=ray.data.ActorPoolStrategy(size=max(1, min(actors, len(tasks))), max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=harvest.gpus_per_actor,
            **placed(self.config),
        )
        try:
            for row in shards.iter_rows():
                yield row["plan"], {hook: ShardEntry(**entry) for hook, entry in json.loads(row["entries"]).items()}
        except ray.exceptions.RayError as error:
            raise _own(error) from error

    def _commits(self) -> dict[str, str]:
        """What the hub's repositories were read at, for people: names are after their content."""
        model = self.config.model
        return ({} if local_folder(model.name) else {model.name: model.revision or "main"}) | hub_commits(
            self.config.corpus
        )

    def _finish(self, target: Target) -> ActivationDataset:
        """Held-out tokens, statistics of the calibration rows and, last, the manifest."""
        entries, store, config = self.entries[target.hook], target.store, self.config
        training = [entries[plan.name] for plan in self.plans if plan.name != "calibration"]
        calibration = entries["calibration"]
        _store_held_out(self.tokens, store, self.deal.held_out)
        if store.size("manifest.json") is not None:
            known = ActivationDataset(store)
            if known.manifest.shards != training or known.manifest.calibration != calibration:
                raise DatasetError(
                    f"{store}: a shard made again is not the one the manifest knows (another CPU model or library set "
                    "gives other last bits, or the manifest was altered). Chains trained on the old shards stay as "
                    "they are; for new ones change harvest.seed, or delete manifest.json to have it made again from "
                    "the shards"
                )
            return known
        d = self.identity.info.d
        rows_ND = read_rows(store, calibration, config.harvest.rows_per_group, d, config.harvest.dtype)
        reasons = {
            reason: sum(entry.positions[reason] for entry in entries.values()) for reason in calibration.positions
        }
        manifest = Manifest(
            key=target.about["dataset"],
            model=config.model.name,
            model_fingerprint=self.identity.info.fingerprint,
            corpus_fingerprint=self.identity.corpus,
            hook=target.hook,
            d=d,
            dtype=config.harvest.dtype,
            context=config.model.context,
            seed=config.harvest.seed,
            rows_per_group=config.harvest.rows_per_group,
            positions=reasons,
            hub=self._commits(),
            shards=training,
            calibration=calibration,
            fields=self.identity.fields(target.hook),
            max_norm=inspect_shard(store, calibration.file)[1].get(MAX_NORM),
            **statistics_of(rows_ND),
        )
        parts = ActivationDataset.of(manifest, store).some_rows()
        replace(manifest, outliers=outliers_of(parts, manifest.norm_quantiles["0.5"]).to_dict()).save(store)
        return ActivationDataset(store)


def _own(error: BaseException) -> BaseException:
    """What an actor of ours raised, without Ray's wrapping; the error itself if it was none of ours."""
    for link in causes(error):
        if isinstance(link, StoreError | ShardError | ValueError) and type(link).__module__.split(".")[0] != "ray":
            # Ray Data adds its own advice below what was said.
            said = str(link.cause if hasattr(link, "cause") else link).partition("\nFailed to apply UDF")[0]
            return ValueError(said) if hasattr(link, "cause") else type(link)(said)
    return error
