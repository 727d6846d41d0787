"""Finished chains with planted cores, that the tests of comparison share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmsae_ray.compare.chain_result import ChainIdentity, ChainResult
from dmsae_ray.compare.comparer import Comparer
from dmsae_ray.compare.measured_latents import MeasuredLatents
from dmsae_ray.compare.pair import CompareSettings, PairResult
from dmsae_ray.compare.pairing import pairs_within
from dmsae_ray.core.core import Core

D, WIDTH, ROWS = 16, 60, 512
SETTINGS = CompareSettings(draws=100)


def rows(count=ROWS, seed=0, d=D) -> torch.Tensor:
    """Activations without structure: their covariance is near the identity."""
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed))


def comparer(settings=SETTINGS, **kwargs) -> Comparer:
    return Comparer(rows(**kwargs), settings)


def unit_rows(count, seed, d=D) -> torch.Tensor:
    drawn = torch.randn(count, d, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=1, keepdim=True)


def latents(W_enc_ND, W_dec_ND=None, *, bias=0.0, theta=0.5, density=0.1) -> MeasuredLatents:
    """An SAE of these rows, active on about a third of `rows`."""
    W_enc_ND = torch.as_tensor(W_enc_ND, dtype=torch.float32)
    W_dec_ND = W_enc_ND if W_dec_ND is None else torch.as_tensor(W_dec_ND, dtype=torch.float32)
    biases, thetas, densities = (torch.full((len(W_dec_ND),), value) for value in (bias, theta, density))
    return MeasuredLatents(W_enc_ND, biases, W_dec_ND, torch.zeros(W_dec_ND.shape[1]), thetas, densities, 1.0)


def core_of(sae: MeasuredLatents, ids, *, seed=0, k=16, cycle=2, scores=None, **changes) -> Core:
    ids = torch.as_tensor(ids, dtype=torch.int64)
    size = len(ids)
    fields = dict(
        W_enc_CD=sae.W_enc_ND[ids],
        W_dec_CD=sae.W_dec_ND[ids],
        b_enc_C=sae.b_enc_N[ids],
        b_dec_D=sae.b_dec_D,
        scores_C=torch.arange(size, dtype=torch.float64) if scores is None else torch.as_tensor(scores),
        density_C=sae.density_N[ids],
        latent_ids_C=ids,
        theta=0.5,
        scale=sae.scale,
        hook="h",
        model="m",
        cycle=cycle,
        seed=seed,
        k=k,
        entered_C=torch.full((size,), cycle),
        selected=((cycle,),) * size,
    )
    return Core(**fields | changes)


def named(seed=0, k=16, arm="base", **changes) -> ChainIdentity:
    usual = {
        "label": f"{arm}-seed{seed}-k{k}",
        "arm": arm,
        "seed": seed,
        "data_seed": seed,
        "part": None,
        "k": k,
        "rest": "all else",
    }
    return ChainIdentity(**usual | changes)


def make_chain(seed, k=16, size=10, common=0, cycle=2, **changes) -> ChainResult:
    """A chain whose core's first `common` members are the same in all chains, in an order of the chain's own."""
    W_enc_FD, W_dec_FD = unit_rows(WIDTH, 1000 * seed + k), unit_rows(WIDTH, 1000 * seed + k + 1)
    core_ids = torch.arange(size) * 2
    order = torch.randperm(common, generator=torch.Generator().manual_seed(seed))
    W_enc_FD[core_ids[:common]], W_dec_FD[core_ids[:common]] = unit_rows(common, 7)[order], unit_rows(common, 8)[order]
    sae = latents(W_enc_FD, W_dec_FD)
    return ChainResult(
        chain=named(seed, k, **changes),
        core=core_of(sae, core_ids, seed=seed, k=k, cycle=cycle),
        sae=sae,
        core_ids_C=core_ids,
        start=latents(unit_rows(WIDTH, seed + 50), unit_rows(WIDTH, seed + 70)),
        start_ids_N=torch.arange(20).flip(0),
    )


def compare_all(chains: Sequence[ChainResult], comparer: Comparer) -> list[PairResult]:
    """Every pair that `pairing.pairs_within` names. With fewer than two chains there is none, and the list is empty."""
    by_label = {chain.label: comparer.side(chain) for chain in chains}
    pairs = pairs_within([chain.chain for chain in chains])
    return [comparer.pair(by_label[pair.a.label], by_label[pair.b.label]) for pair in pairs]
