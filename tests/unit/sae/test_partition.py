import pytest
import torch
from thread_ranks import on_ranks

from dmsae_ray.sae.ranks.partition import Shard
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings


def new_sae(core_transfer="frozen", core_size=5):
    settings = SAESettings(d=3, width=71, k=2, batch=8, core_transfer=core_transfer)
    core = torch.randn(core_size, 3, generator=torch.Generator().manual_seed(1))
    return MatryoshkaSAE.init(settings, core, seed=0)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_latent_is_dealt_once_and_every_group_evenly(world):
    sae = new_sae()
    shards = [Shard(sae, world, rank) for rank in range(world)]
    assert torch.cat([shard.ids_N for shard in shards]).sort().values.tolist() == list(range(71))
    blocks = list(zip([0, 5, *sae.group_ends[:-1]], [5, *sae.group_ends], strict=True))
    for shard in shards:
        assert (shard.ids_N.diff() > 0).all()
        sizes = torch.tensor([0, shard.core_size, *shard.group_ends]).diff().tolist()
        for (start, stop), size in zip(blocks, sizes, strict=True):
            assert ((shard.ids_N >= start) & (shard.ids_N < stop)).sum() == size
            assert (stop - start) // world <= size <= -(-(stop - start) // world)


@pytest.mark.parametrize("core_transfer", ["frozen", "init"])
def test_parts_put_together_are_the_whole(core_transfer):
    sae = new_sae(core_transfer)
    flat = torch.randn(sae.flat.shape)

    def work(comm):
        shard = Shard(sae, comm.world, comm.rank)
        part = shard.part_of(sae)
        assert torch.equal(part.encoder_rows(), sae.encoder_rows()[shard.ids_N])
        assert (part.n_frozen > 0) == (core_transfer == "frozen")
        whole = {name: shard.whole(comm, name, tensor) for name, tensor in part.state_dict().items()}
        return whole, shard.whole_flat(comm, part, shard.part_of_flat(flat))

    for whole, whole_flat in on_ranks(3, work):
        assert whole.keys() == sae.state_dict().keys()
        assert all(torch.equal(whole[name], tensor) for name, tensor in sae.state_dict().items())
        assert torch.equal(whole_flat, flat)


def test_more_ranks_than_latents_to_deal_are_refused():
    sae = MatryoshkaSAE(2, [3, 6], 0, "batchtopk")
    assert len(Shard(sae, 3, 2).ids_N) == 2
    with pytest.raises(ValueError, match="train.parallel latent"):
        Shard(sae, 4, 0)
