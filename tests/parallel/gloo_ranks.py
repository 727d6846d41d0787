"""What each process of test_sae_ranks.py does; a module of its own, so that starting one imports little."""

from __future__ import annotations

import dataclasses
import datetime
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from dmsae_ray.sae import gate as gate_module
from dmsae_ray.sae import loss as loss_module
from dmsae_ray.sae.cost.traffic import Counting, StepFacts, bytes_per_step, reduced
from dmsae_ray.sae.gate import gate, select
from dmsae_ray.sae.kept import Kept
from dmsae_ray.sae.loss import LossModule
from dmsae_ray.sae.ops.cpu_ops import NativePairs
from dmsae_ray.sae.ops.pairs import Pairs
from dmsae_ray.sae.ops.torch_ops import TorchPairs
from dmsae_ray.sae.ranks.collective import Alone, TorchCollective
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.step_report import Diverged
from dmsae_ray.sae.trainer import Trainer

BATCH, WIDTH = 24, 18
MODES = ("ddp", "gather", "latent")
CASES = {
    "batchtopk": {"dead_window_tokens": 24},
    "micro": {"dead_window_tokens": 24, "micro_batch": 5, "k": 1},
    "counted": {"core_gate": "relu", "k": 3, "kernels": "torch"},
    "exempt": {"core_gate": "relu", "core_budget": "exempt", "dead_window_tokens": 24, "auxk_k": 1},
    "init": {"core_transfer": "init", "dead_window_tokens": 24},
    "sampled": {"prefixes": "sampled", "prefix_seed": 6, "dead_window_tokens": 24, "l2": 1e-3},
}
STEPS = {"batchtopk": 20, "micro": 12, "counted": 6, "exempt": 12, "init": 10, "sampled": 6}
FLOAT32_STEPS = 50
HANDOVERS = (("ddp", "latent", "gather"), ("latent", "gather", "ddp"), ("gather", "ddp", "latent"))
"""Runs that begin with two ranks in one mode, go on with four in another and end with one in a third; each does as many
steps.
"""
LEG = 10


def cases_of(world):
    """Four processes do only what differs with their number most: two cores are slow at it."""
    return ("batchtopk", "exempt") if world == 4 else tuple(CASES)


def settings_of(case, parallel="ddp"):
    fields = {"d": 5, "width": WIDTH, "k": 2, "batch": BATCH, "lr": 1e-2, "warmup_steps": 2, "threshold_start_step": 1}
    return SAESettings(**{**fields, **CASES[case]}, parallel=parallel)


def tied_values():
    """[24, 9] pre-activations of few distinct values, so that cuts fall into ties that span ranks."""
    return torch.randint(-2, 4, (BATCH, 9), generator=torch.Generator().manual_seed(0)).float()


def rows_of(rank, world):
    """Ranks hold interleaved rows, as lanes are dealt."""
    return torch.arange(BATCH)[rank::world]


def mask_of_ties(k, core_gate, comm, rows, ids):
    """The kept ones of the tied values [BATCH, 9], where this rank holds these rows and latents."""
    p_BF = tied_values()[rows][:, ids]
    settings = SAESettings(d=1, width=9, k=k, batch=BATCH, core_gate=core_gate)
    row_N, latent_N = (index.int() for index in torch.ones_like(p_BF).nonzero(as_tuple=True))
    n_exempt = int((ids < 2).sum()) if core_gate == "relu" else 0
    spread = {"token_index_B": rows} if len(ids) == 9 else {"token_index_B": None, "latent_ids_F": ids}
    pairs, _ = select(
        row_N,
        latent_N,
        p_BF.flatten(),
        len(rows),
        n_exempt,
        settings,
        NativePairs() if k % 2 else TorchPairs(),
        comm,
        **spread,
    )
    return mask_of(pairs, rows, ids, 9)


def mask_of(pairs, rows, ids, width):
    """Which pairs of the whole batch and width these are, which a rank that holds these rows and latents kept."""
    mask_BF = torch.zeros(BATCH, width, dtype=torch.int8)
    mask_BF[rows[pairs.row_N.long()], ids[pairs.latent_N.long()]] = 1
    return mask_BF


class Recorder:
    """The gate, which keeps the masks that it gave out; or, with masks to feed, keeps those pairs instead."""

    def __init__(self, feed=None):
        self.masks = []
        self.feed = feed

    def __call__(self, centred_BD, rows, screen, settings, comm, token_index_B, guess, latent_ids_F):
        all_rows = torch.arange(BATCH) if token_index_B is None else token_index_B
        ids = torch.arange(WIDTH) if latent_ids_F is None else latent_ids_F
        if self.feed is None:
            kept = gate(centred_BD, rows, screen, settings, comm, token_index_B, guess, latent_ids_F)
            self.masks.append(mask_of(kept.pairs, all_rows, ids, WIDTH))
            return kept
        mask_BF = self.feed[len(self.masks)]
        self.masks.append(mask_BF)
        row_N, latent_N = (index.int() for index in mask_BF[all_rows][:, ids].nonzero(as_tuple=True))
        sae = screen.sae
        value_N = screen.ops.values(centred_BD, sae.encoder_rows(), sae.b_enc.detach(), row_N, latent_N)
        starts = torch.searchsorted(row_N, torch.arange(len(centred_BD) + 1, dtype=torch.int32))
        return Kept(Pairs(starts, row_N, latent_N, value_N), 0.0, 0.0, 0, 0)


def new_trainer(settings, comm, dtype, seed=2):
    core = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sae = MatryoshkaSAE.init(settings, core.to(dtype), seed, dtype=dtype)
    model = None
    if comm.world > 1 and settings.parallel == "ddp":
        model = DistributedDataParallel(
            LossModule(sae, settings, comm),
            forward_sync_buffers=settings.kernels == "torch",
            gradient_as_bucket_view=True,
        )
    return Trainer(sae, settings, comm, model)


def batches(steps, dtype):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(BATCH, 5, dtype=torch.float64, generator=generator).to(dtype) for _ in range(steps)]


def train(case, parallel, comm, dtype, feed=None):
    """A trainer after its steps, its reports and the masks of kept pairs."""
    settings, rows = settings_of(case, parallel), rows_of(comm.rank, comm.world)
    if comm.world == 1:
        settings = dataclasses.replace(settings, micro_batch=None)
    trainer, reports, recorder = new_trainer(settings, comm, dtype), [], Recorder(feed)
    with mock.patch.object(loss_module, "gate", recorder):
        for step, x_BD in enumerate(batches(STEPS[case] if dtype == torch.float64 else FLOAT32_STEPS, dtype)):
            report = trainer.step(x_BD[rows], rows, log=step % 3 == 2)
            reports += [vars(report)] if report else []
    return trainer, reports, recorder.masks, x_BD


def run(comm, masks=None):
    """Everything that one process and several must agree on. masks: of one process in float32, to be fed to several."""
    found, rows = {}, rows_of(comm.rank, comm.world)
    all_rows, all_ids, ids = torch.arange(BATCH), torch.arange(9), torch.arange(9)[comm.rank :: comm.world]
    for k in (1, 2, 3, 9):
        for core_gate in ("batchtopk", "relu"):
            found[f"ties.{core_gate}.{k}"] = {
                "rows": mask_of_ties(k, core_gate, comm, rows, all_ids),
                "latents": mask_of_ties(k, core_gate, comm, all_rows, ids),
            }
    for case in cases_of(comm.world):
        for parallel in MODES if comm.world > 1 else MODES[:1]:
            trainer, reports, kept, x_BD = train(case, parallel, comm, torch.float64)
            try:  # only the last row is bad, so only one rank sees it
                x_BD[-1, 0] = torch.nan
                trainer.step(x_BD[rows], rows)
                stopped = False
            except Diverged:
                stopped = True
            found[case, parallel] = {
                "state": trainer.state_dict(),
                "reports": reports,
                "stopped": stopped,
                "masks": kept,
                "whole": trainer.whole().state_dict(),
            }
    for parallel in MODES:
        trainer, _, kept, _ = train("batchtopk", parallel, comm, torch.float32, None if parallel == "gather" else masks)
        found["float32", parallel] = {"state": trainer.state_dict(), "masks": kept}
    return found


def traffic(comm):
    """Of every step of every mode: bytes sent, bytes by the formula, dead latents, and whether the screen left pairs to
    spare.
    """
    found, rows = {}, rows_of(comm.rank, comm.world)
    for parallel in MODES:
        # A screen that is not exact, so that it leaves pairs that are not kept.
        counting, settings = Counting(comm), dataclasses.replace(settings_of("batchtopk", parallel), screen="bf16")
        trainer = new_trainer(settings, counting, torch.float32)
        if parallel == "ddp":  # the one thing that is not sent through the collective

            def hook(state, bucket):
                counting.sent += reduced(bucket.buffer().nbytes, comm.world)
                return allreduce_hook(None, bucket)

            trainer.model.register_comm_hook(None, hook)
        recorder, steps = Recorder(), []
        with (
            mock.patch.object(loss_module, "gate", recorder),
            mock.patch.object(gate_module, "kth_largest", wraps=gate_module.kth_largest) as searches,
            mock.patch.object(trainer, "_commit", wraps=trainer._commit) as commit,
        ):
            for x_BD in batches(14, torch.float32):
                before = counting.sent
                searches.reset_mock()
                trainer.step(x_BD[rows], rows)
                outcome = commit.call_args.args[0]
                here = torch.tensor([int(recorder.masks[-1].sum()), int(outcome.dead_F.sum())])
                pairs, dead = torch.stack(comm.all_gather(here)).unbind(dim=1)
                together = int(dead.sum()) if parallel == "latent" else int(dead[0])
                sent, spare = counting.sent - before, searches.call_count == 2
                facts = StepFacts(int(pairs.max()), together, int(dead.max()), outcome.retries, spare)
                n_trained, n_groups = sum(p.numel() for p in trainer.whole().parameters()), len(trainer.sae.group_ends)
                formula = sum(bytes_per_step(settings, comm.world, n_trained, n_groups, facts).values())
                steps.append((sent, formula, together, spare))
        found[parallel] = steps
    return found


def hand_over(comm, folder):
    """This number of ranks' leg of every handover: from where the last leg ended, LEG steps on."""
    leg = {2: 0, 4: 1, 1: 2}[comm.world]
    rows, states = rows_of(comm.rank, comm.world), {}
    for modes in HANDOVERS:
        trainer = new_trainer(
            settings_of("batchtopk", modes[leg]), comm, torch.float64, seed=2 if leg == 0 else 7 + leg
        )
        file = f"{folder}/handover-{modes[0]}.pt"
        if leg:
            trainer.load_state_dict(torch.load(file, weights_only=True))
        for x_BD in batches(3 * LEG, torch.float64)[leg * LEG : (leg + 1) * LEG]:
            trainer.step(x_BD[rows], rows)
        states[modes] = trainer.state_dict()
        if comm.rank == 0:
            torch.save(states[modes], file)
    return states


def undisturbed():
    trainer = new_trainer(settings_of("batchtopk"), Alone(), torch.float64)
    for x_BD in batches(3 * LEG, torch.float64):
        trainer.step(x_BD)
    return trainer.state_dict()


def rank_main(rank, folder):
    """Two of the processes are a group of two first, then all are one of four."""
    torch.set_num_threads(1)
    masks = torch.load(f"{folder}/masks.pt", weights_only=True)
    for world in (2, 4):
        if rank >= world:
            continue
        meeting = f"file://{folder}/meeting{world}"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=600)
        )
        comm = TorchCollective()
        found = run(comm, masks) | {"traffic": traffic(comm)}
        hand_over(comm, folder)
        torch.save(found, f"{folder}/rank{rank}of{world}.pt")
        dist.destroy_process_group()


def run_alone():
    return run(Alone())
