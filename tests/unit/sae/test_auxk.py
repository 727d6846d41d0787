import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from thread_ranks import on_ranks

from dmsae_ray.sae.auxk import find_dead, keep_top_of_ranks
from dmsae_ray.sae.ops.torch_ops import TorchPairs
from dmsae_ray.sae.ranks.partition import Shard
from dmsae_ray.sae.sae import MatryoshkaSAE


@st.composite
def cases(draw):
    """Pre-activations of few distinct values, which latents are dead, and an SAE's shape for so many ranks."""
    world, core_size = draw(st.sampled_from([2, 3, 4])), draw(st.integers(0, 3))
    sizes = draw(st.lists(st.integers(0, 5), min_size=0, max_size=3)) + [draw(st.integers(world, 8))]
    ends = torch.tensor(sizes).cumsum(0).add(core_size).tolist()
    width, rows = ends[-1], draw(st.integers(1, 4))
    values = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.0, 2.0, torch.nan, torch.inf])
    p_RF = torch.tensor(draw(st.lists(st.lists(values, min_size=width, max_size=width), min_size=rows, max_size=rows)))
    dead_F = torch.tensor(draw(st.lists(st.booleans(), min_size=width, max_size=width)))
    dead_F[:core_size] = False
    return world, MatryoshkaSAE(1, ends, core_size, "batchtopk"), p_RF, dead_F, draw(st.integers(1, 8))


@hypothesis_settings(max_examples=200, deadline=None)
@given(cases())
def test_the_top_of_all_ranks_latents_is_that_of_one_rank_that_has_them_all(case):
    world, sae, p_RF, dead_F, most = case
    dead_K = dead_F.nonzero().squeeze(1)
    expected_RF = torch.zeros_like(p_RF)
    z_RK = p_RF[:, dead_K]
    TorchPairs().keep_top(z_RK, most)
    expected_RF[:, dead_K] = z_RK
    found_RF = torch.zeros_like(p_RF)

    def work(comm):
        shard = Shard(sae, world, comm.rank)
        dead = find_dead(dead_F[shard.ids_N], shard.group_ends, comm)
        z_RK = p_RF[:, shard.ids_N[dead.latent_K]]
        keep_top_of_ranks(z_RK, most, dead)
        return shard.ids_N[dead.latent_K], z_RK, dead.count

    for ids_K, z_RK, count in on_ranks(world, work):
        found_RF[:, ids_K] = z_RK
        assert count == len(dead_K)
    assert torch.equal(found_RF, expected_RF)
