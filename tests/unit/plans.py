"""Chains planned from command lines, on a dataset that is there."""

from __future__ import annotations

from shards import PER_GROUP

from dmsae_ray.distill.grid import plan_chains
from dmsae_ray.driver.options import SweepCommand, load

SMALL = (
    "--harvest.rows_per_group",
    str(PER_GROUP),
    "--harvest.rows_per_shard",
    "32",
    "--train.lanes",
    "4",
    "--train.batch",
    "32",
    "--train.tokens",
    "640",
)


def configured(*argv, tokens):
    return load(
        SweepCommand,
        [*SMALL, "--harvest.tokens", str(tokens), *(() if "--sweep.k" in argv else ("--sweep.k", "4")), *argv],
    )


def plans_of(dataset, *argv):
    config = configured(*argv, tokens=dataset.manifest.rows)
    return plan_chains(config, dataset)
