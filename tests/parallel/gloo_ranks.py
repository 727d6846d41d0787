"""What each process of test_sae_ranks.py does; a module of its own, so that starting one imports little."""

from __future__ import annotations

import datetime
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dmsae_ray.sae import loss as loss_module
from dmsae_ray.sae.collective import Alone, TorchCollective
from dmsae_ray.sae.gate import Kept, gate, select
from dmsae_ray.sae.loss import LossModule
from dmsae_ray.sae.pairs import NativePairs, Pairs, TorchPairs
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.step import Diverged, Trainer

BATCH = 24
STEPS = {"batchtopk": 50, "counted": 10, "exempt": 12, "init": 10}
CASES = {
    "batchtopk": {"dead_window_tokens": 72},
    "counted": {"core_gate": "relu", "k": 3, "kernels": "torch"},
    "exempt": {"core_gate": "relu", "core_budget": "exempt", "dead_window_tokens": 24, "auxk_k": 1},
    "init": {"core_transfer": "init", "dead_window_tokens": 24},
}


def settings_of(case):
    fields = {"d": 5, "width": 18, "k": 2, "batch": BATCH, "lr": 1e-2, "warmup_steps": 2, "threshold_start_step": 1}
    return SAESettings(**{**fields, **CASES[case]})


def tied_values():
    """[24, 9] pre-activations of few distinct values, so that cuts fall into ties that span ranks."""
    return torch.randint(-2, 4, (BATCH, 9), generator=torch.Generator().manual_seed(0)).float()


def rows_of(rank, world):
    """Ranks hold interleaved rows, as lanes are dealt."""
    return torch.arange(BATCH)[rank::world]


def mask_of_ties(k, core_gate, comm, rows):
    p_BF = tied_values()[rows]
    settings = SAESettings(d=1, width=9, k=k, batch=BATCH, core_gate=core_gate)
    row_N, latent_N = (index.int() for index in torch.ones_like(p_BF).nonzero(as_tuple=True))
    pairs, _ = select(
        row_N, latent_N, p_BF.flatten(), len(rows), 2 if core_gate == "relu" else 0, settings,
        NativePairs() if k % 2 else TorchPairs(), comm, rows,
    )  # fmt: skip
    return mask_of(pairs, len(rows), 9)


def mask_of(pairs, rows, width):
    mask_BF = torch.zeros(rows, width, dtype=torch.bool)
    mask_BF[pairs.row_N.long(), pairs.latent_N.long()] = True
    return mask_BF


class Recorder:
    """The gate, which keeps the masks that it gave out; or, with masks to feed, keeps those pairs instead."""

    def __init__(self, feed=None):
        self.masks = []
        self.feed = feed

    def __call__(self, centred_BD, rows, screen, settings, comm, token_index_B, guess):
        if self.feed is None:
            kept = gate(centred_BD, rows, screen, settings, comm, token_index_B, guess)
            self.masks.append(mask_of(kept.pairs, len(centred_BD), screen.sae.width))
            return kept
        row_N, latent_N = (index.int() for index in self.feed[len(self.masks)].nonzero(as_tuple=True))
        self.masks.append(self.feed[len(self.masks)])
        sae = screen.sae
        value_N = screen.ops.values(centred_BD, sae.encoder_rows(), sae.b_enc.detach(), row_N, latent_N)
        starts = torch.searchsorted(row_N, torch.arange(len(centred_BD) + 1, dtype=torch.int32))
        return Kept(Pairs(starts, row_N, latent_N, value_N), 0.0, 0.0, 0, 0)


def train(case, comm, rows, dtype, feed=None):
    """A trainer after STEPS steps, its reports and the masks of kept pairs."""
    settings = settings_of(case)
    core = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sae = MatryoshkaSAE.init(settings, core.to(dtype), seed=2, dtype=dtype)
    model = LossModule(sae, settings, comm)
    if comm.world > 1:
        model = DistributedDataParallel(model, forward_sync_buffers=case == "counted")
    trainer = Trainer(sae, settings, comm, model)
    generator, reports, recorder = torch.Generator().manual_seed(3), [], Recorder(feed)
    with mock.patch.object(loss_module, "gate", recorder):
        for step in range(STEPS[case]):
            x_BD = torch.randn(BATCH, 5, dtype=torch.float64, generator=generator).to(dtype)
            report = trainer.step(x_BD[rows], rows, log=step % 3 == 2)
            reports += [vars(report)] if report else []
    return trainer, reports, recorder.masks, x_BD


def run(comm, masks=None):
    """Everything that one process and several must agree on. masks: of one process in float32, to be fed to several."""
    found = {}
    rows = rows_of(comm.rank, comm.world)
    for k in (1, 2, 3, 9):
        for core_gate in ("batchtopk", "relu"):
            found[f"mask.ties.{core_gate}.{k}"] = mask_of_ties(k, core_gate, comm, rows)
    for case in CASES if comm.world <= 2 else ["batchtopk"]:
        trainer, reports, kept, x_BD = train(case, comm, rows, torch.float64)
        for step, mask in enumerate(kept):
            found[f"mask.{case}.{step}"] = mask
        try:  # only the last row is bad, so only one rank sees it
            x_BD[-1, 0] = torch.nan
            trainer.step(x_BD[rows], rows)
            stopped = False
        except Diverged:
            stopped = True
        found[case] = {"state": trainer.state_dict(), "reports": reports, "stopped": stopped}
    fed = None if masks is None else [mask[rows] for mask in masks]
    trainer, _, kept, _ = train("batchtopk", comm, rows, torch.float32, fed)
    found["float32"] = {"state": trainer.state_dict(), "masks": kept}
    return found


def rank_main(rank, folder):
    """Two of the processes are a group of two first, then all are one of four."""
    torch.set_num_threads(1)
    masks = torch.load(f"{folder}/masks.pt", weights_only=True)
    for world in (2, 4):
        if rank >= world:
            continue
        meeting = f"file://{folder}/meeting{world}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=90))
        torch.save(run(TorchCollective(), masks), f"{folder}/rank{rank}of{world}.pt")
        dist.destroy_process_group()


def run_alone():
    return run(Alone())
