"""One run of the harvest: find what is there, make what is missing; or read it all again, and delete what is bad."""

from __future__ import annotations

import time

from dmsae_ray.activations.catalogue import Identity, find_datasets
from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.harvester import Harvest
from dmsae_ray.activations.outliers import notes
from dmsae_ray.activations.rowgroup import REPAIR
from dmsae_ray.cluster.held import HeldCluster
from dmsae_ray.config import Config
from dmsae_ray.corpus.split import Deal
from dmsae_ray.driver.options import HarvestCommand
from dmsae_ray.driver.preflight import preflight
from dmsae_ray.driver.session import session
from dmsae_ray.driver.transcript import Screen
from dmsae_ray.store import Missing, StoreError


def run(command: HarvestCommand) -> int:
    """Exit status: 1 if something is bad. Raises ValueError on bad input before anything is made."""
    config = preflight(Config(**command.sections()), print)
    with session(config, "harvest", command.verbose) as (_, say):
        bad = 0
        if command.verify or command.repair:
            bad = verify(config, say, repair=command.repair)
            if command.verify or not bad:
                return 1 if bad else 0
        # A dataset given by harvest.dataset lacks what was just deleted, which otherwise is an error there.
        found = {} if bad else find_datasets(config, config.hooks, say)
        datasets = [dataset for dataset in found.values() if dataset is not None]
        if bad or len(datasets) < len(found):
            datasets = list(make(config, say, command.verbose).values())
        for dataset in datasets:
            say(summary(dataset))
            for line in notes(dataset):
                say(line)
    return 0


def make(config: Config, say: Screen, verbose: bool) -> dict[str, ActivationDataset]:
    """The datasets of all hooks, made on the cluster that is to be joined, or on one of our own."""
    with HeldCluster(config, lambda: 0, verbose, say, say.path.with_suffix(".ray")) as cluster:
        cluster.reach()  # before hours of tokenising
        work = Harvest(config, say)
        return work.run(cluster.connect().harvest_actors)


def summary(dataset: ActivationDataset) -> str:
    m = dataset.manifest
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in m.positions.items() if count)
    return (
        f"{dataset}: {m.rows:,} training rows in {len(m.shards)} shards, {m.calibration.rows:,} held back, {m.hook}, d "
        f"= {m.d}, {m.dtype}, scale {m.scale:.6g}; positions that are no rows: {dropped}"
    )


def verify(config: Config, say: Screen, repair: bool) -> int:
    """Read everything again and say what is bad; with repair, delete the bad files too. Returns how many are bad.

    Raises DatasetError if a dataset is not what the configuration makes: nothing else may be deleted.
    """
    bad, identity = 0, Identity(config)
    for hook in config.hooks:
        store = identity.store(hook)
        dataset, start, size = ActivationDataset(store), time.monotonic(), 0
        dataset.expect(identity.fields(hook))
        for entry, error in dataset.problems(read=True):
            size += entry.bytes
            if error is not None:
                bad += 1
                say(f"bad: {error}")
                if repair:
                    store.delete(entry.file)
        for split in Deal.of(config).held_out:
            try:
                dataset.held_out(split)
            except ValueError as error:
                if isinstance(error, StoreError) and not isinstance(error, Missing):
                    raise  # a server that cannot be asked says nothing about its files
                bad += 1
                say(f"bad: {error}")
                if repair:
                    store.delete(f"tokens/{split}.safetensors")
        if not bad:
            dataset.check_scale()
        seconds = time.monotonic() - start
        say(
            f"verified {dataset}: {len(dataset.entries())} shards, {size / 1e6:,.1f} MB in {seconds:.1f} s "
            f"({size / 1e9 / seconds:.2f} GB/s)"
        )
    if bad and not repair:
        say(f"{bad} bad. To make only these again: {REPAIR} with the same configuration")
    elif not bad:
        say("nothing is bad")
    return bad
