"""A worker's part of the attribution: its shards, each scored once whatever happens."""

from __future__ import annotations

import time

import ray
import ray.train
import ray.train.torch

from dmsae_ray.attribution import gradients as attribution_
from dmsae_ray.attribution.ledger import ALL_DONE, WAIT


def score_shards(sae, lm, batches, scale, settings, aggregator, account, rank: int, on_shard=lambda done: None) -> int:
    """Take shards from the aggregator, score them, give the partial sums back, until all are back. Returns how many
    were ours.
    """
    ours, device = 0, sae.b_dec.device
    while (shard := ray.get(aggregator.take.remote(account, rank))) != ALL_DONE:
        if shard == WAIT:
            time.sleep(0.05)
            continue
        ids_NT, lengths_N = batches[shard]
        partial = attribution_.attribute(sae, lm, ids_NT.to(device), lengths_N.to(device), scale, settings)
        ray.get(aggregator.give.remote(account, rank, shard, partial))
        ours += 1
        on_shard(ours)
    return ours
