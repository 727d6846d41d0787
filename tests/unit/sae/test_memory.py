import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
from allocator import allocations, peak
from thread_ranks import on_ranks

from dmsae_ray.sae.cost.memory import footprint, lasting_tensors
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.trainer import Trainer

SETTINGS = SAESettings(d=128, width=2048, k=16, batch=1024, kernels="compiled", screen="bf16", dead_window_tokens=10**9)
CORE = 40
SCREEN = "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
"""Without instructions for it a processor multiplies bf16 in an fp32 copy of its operands and of the product; `auto`
takes fp32 there.
"""


def batches(count, settings=SETTINGS):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, settings.batch, settings.d, generator=generator) / settings.d**0.5


def new_sae(settings=SETTINGS):
    core = torch.randn(CORE, settings.d, generator=torch.Generator().manual_seed(1))
    return MatryoshkaSAE.init(settings, core, seed=0)


@pytest.mark.parametrize("micro_batch", [None, 100])
def test_the_footprint_bounds_what_training_allocates_and_little_more(micro_batch):
    settings = dataclasses.replace(SETTINGS, micro_batch=micro_batch, screen=SCREEN)
    made = []

    def run():
        x = batches(1)[0]
        for _ in range(3):
            made[:] = made or [Trainer(new_sae(settings), settings)]
            made[0].step(x)

    expected = footprint(settings, CORE, world=1, low_screen=SCREEN == "bf16")
    measured = peak(allocations(run))
    assert 0.8 * sum(expected.values()) < measured < 1.1 * sum(expected.values()), (measured, expected)
    trainer = made[0]
    for name, tensors in lasting_tensors(trainer).items():
        assert sum(tensor.nbytes for tensor in tensors) == expected[name], name
    assert trainer.loss._gradient.nbytes == expected["gradient"]
    assert trainer.loss._S_RGD.nbytes == expected["prefix errors"]
    assert trainer.loss.screen._product.nbytes == expected["screened product"]


@pytest.mark.parametrize("world", [2, 3])
def test_what_a_rank_of_several_keeps_is_in_the_footprint(world):
    settings = dataclasses.replace(SETTINGS, parallel="latent", batch=1020)
    expected = footprint(settings, CORE, world)

    def work(comm):
        torch.set_num_threads(1)
        trainer = Trainer(new_sae(settings), settings, comm)
        trainer.step(batches(1, settings)[0][comm.rank :: world].contiguous())
        lasting = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in lasting_tensors(trainer).items()}
        return lasting | {
            "gradient": trainer.loss._gradient.nbytes,
            "screened product": trainer.loss.screen._product.nbytes,
        }

    ranks = on_ranks(world, work)
    assert ranks[-1] == {name: expected[name] for name in ranks[-1]}, "the last rank has most"
    assert all(ranks[0][name] <= expected[name] for name in ranks[0])


def test_a_micro_batch_makes_the_largest_allocation_smaller():
    largest, peaks = {}, {}
    for micro_batch in (None, 128):
        settings = dataclasses.replace(SETTINGS, width=256, micro_batch=micro_batch)
        trainer, x = Trainer(new_sae(settings), settings), batches(1)[0]
        changes = allocations(lambda trainer=trainer, x=x: trainer.step(x))
        largest[micro_batch], peaks[micro_batch] = max(changes), peak(changes)
    assert largest[None] == 1024 * 5 * 128 * 4, "all prefix errors of the batch"
    assert largest[128] <= largest[None] / 2 and peaks[128] < 0.7 * peaks[None], (largest, peaks)


def test_latents_of_more_ranks_take_less_memory_each():
    def held(parallel, world):
        return sum(footprint(dataclasses.replace(SETTINGS, width=65_536, parallel=parallel), CORE, world).values())

    assert held("latent", 8) < 0.2 * held("latent", 1)
    assert held("ddp", 8) > held("ddp", 1) == held("gather", 1) > 0.9 * held("gather", 8)


def test_the_paper_s_table_is_what_the_code_says_now():
    root = Path(__file__).parents[3]
    job = runpy.run_path(str(root / "jobs" / "bench" / "memory_table.py"))
    lines = job["table"](job["settings_of"](root / "configs" / "gemma2_2b_l12_65k.yaml"))
    assert len(lines) == 2 + 2 * (4 + 3 + 3)
    assert "\n".join(lines) in (root / "jobs" / "bench" / "memory_table.md").read_text(), (
        "run python jobs/bench/memory_table.py"
    )
