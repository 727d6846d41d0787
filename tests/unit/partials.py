"""Partial sums of attribution, as shards bring them."""

import torch

from dmsae_ray.attribution.histogram import Histogram
from dmsae_ray.attribution.partial import Partial

SHARDS, CANDIDATES = 6, 10


def partial(shard: int) -> Partial:
    """What this shard adds: another for each."""
    generator = torch.Generator().manual_seed(shard)
    a_RP = (torch.randn(100 + shard, CANDIDATES, generator=generator).exp() - 1) * torch.arange(1, CANDIDATES + 1)
    a_RP[torch.rand(a_RP.shape, generator=generator) < 0.7] = 0
    row, latent = a_RP.nonzero(as_tuple=True)
    a_RP = a_RP.double()
    return Partial(len(a_RP), a_RP.sum(0), a_RP.abs().sum(0), Histogram.of(latent, a_RP[row, latent].abs().float()))
