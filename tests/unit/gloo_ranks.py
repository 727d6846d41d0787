"""What each process of test_sae_ranks.py does; a module of its own, so that starting one imports little."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dmsae_ray.sae.collective import Alone, TorchCollective
from dmsae_ray.sae.gate import gate
from dmsae_ray.sae.loss import LossModule
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.step import Diverged, Trainer

BATCH, STEPS = 12, 8
CASES = {
    "batchtopk": {"dead_window_tokens": 36},
    "counted": {"core_gate": "relu", "k": 3},
    "exempt": {"core_gate": "relu", "core_budget": "exempt", "dead_window_tokens": 24, "auxk_k": 1},
}


def settings_of(case):
    fields = {"d": 5, "width": 18, "k": 2, "batch": BATCH, "lr": 1e-2, "warmup_steps": 2, "threshold_start_step": 1}
    return SAESettings(**{**fields, **CASES[case]})


def tied_values():
    """[12, 9] pre-activations of few distinct values, so that cuts fall into ties that span ranks."""
    return torch.randint(-2, 4, (BATCH, 9), generator=torch.Generator().manual_seed(0)).float()


def rows_of(rank, world):
    """Ranks hold interleaved rows, as lanes are dealt."""
    return torch.arange(BATCH)[rank::world]


def run(comm):
    """Everything that one process and several must agree on."""
    found = {}
    rows = rows_of(comm.rank, comm.world)
    for k in (1, 2, 3, 9):
        for core_gate in ("batchtopk", "relu"):
            settings = SAESettings(d=1, width=9, k=k, batch=BATCH, core_gate=core_gate)
            found[f"mask.ties.{core_gate}.{k}"] = gate(tied_values()[rows], settings, 2, comm, rows)[0]
    for case in CASES:
        settings = settings_of(case)
        core = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        sae = MatryoshkaSAE.init(settings, core, seed=2, dtype=torch.float64)
        model = LossModule(sae, settings, comm)
        if comm.world > 1:
            model = DistributedDataParallel(model, forward_sync_buffers=case == "counted")
        trainer = Trainer(sae, settings, comm, model)
        generator = torch.Generator().manual_seed(3)
        reports, latents = [], []
        for _ in range(STEPS):
            x_BD = torch.randn(BATCH, 5, dtype=torch.float64, generator=generator)
            reports.append(vars(trainer.step(x_BD[rows], rows, log=True)))
            latents.append(gate(sae.pre(x_BD[rows]).detach(), settings, 3, comm, rows)[0])
        try:  # only the last row is bad, so only one rank sees it
            x_BD[-1, 0] = torch.nan
            trainer.step(x_BD[rows], rows)
            stopped = False
        except Diverged:
            stopped = True
        found[case] = {"state": trainer.state_dict(), "reports": reports, "stopped": stopped}
        for step, mask in enumerate(latents):
            found[f"mask.{case}.{step}"] = mask
    return found


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    torch.save(run(TorchCollective()), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def run_alone():
    return run(Alone())
