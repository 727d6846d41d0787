"""What a rank holds in training, in bytes, before anything of that size is made.

What lasts is taken from a trainer made of tensors without memory (PyTorch's meta device), so it is what the code
allocates. What a step needs beside it is written down here, for kernels that have no intermediates of their own (the
compiled ones, C and Triton; plain torch makes copies as large as a gradient).

Shapes: B tokens of this rank, T of the global batch, D = d, F latents of this rank, G groups.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from dmsae_ray.sae.auxk import CHUNK as AUX_CHUNK
from dmsae_ray.sae.gate_on_device import PLACES
from dmsae_ray.sae.loss import LossModule
from dmsae_ray.sae.ranks.collective import Alone
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.screen import CHUNK
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.steps_on_device import Steps
from dmsae_ray.sae.trainer import Trainer

PAIR = 5 * 4
"""Bytes of a kept pair: row, latent, value, gradient, place in the order by latent."""

CANDIDATE = 2 * 5 * 4
"""Bytes of a candidate: row, latent, approximation, margin, value; twice, where they are put together."""

PLACE = 3 * 4 * 4 + 40
"""Bytes of a place for a candidate on a CUDA device: row, latent, approximation, margin of both scans and of the one
chosen; and where kept pairs move to, and how they are sorted, in 64-bit integers."""


def footprint(
    settings: SAESettings,
    core_size: int,
    world: int,
    low_screen: bool = True,
    candidates: float = 1.6,
    dead: int = 0,
    fused: bool = False,
) -> dict[str, int]:
    """Bytes of fp32 training on the rank that holds most, by what they are for. Their sum bounds the peak.

    low_screen: the screen is bf16. candidates: per kept pair; 1.1 to 1.6 in practice (StepReport.candidates says).
    dead: dead latents of this rank. fused: Triton kernels, whose screen writes no product.
    """
    trainer = _without_memory(settings, core_size, world, low_screen)
    lasting = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in lasting_tensors(trainer).items()}
    sae, n_groups = trainer.sae, len(trainer.sae.group_ends)
    parallel = trainer.loss.parallel
    trained, size = sae.flat.nbytes, sae.flat.element_size()
    own = settings.batch // world
    computed = own if parallel == "ddp" else settings.batch
    screened = settings.batch if parallel == "latent" else own
    piece = min(settings.micro_batch or computed, computed)
    row = settings.d * size
    pairs = settings.k * computed // (world if parallel == "latent" else 1)
    copies = 1 if trainer.model is None else 2  # one is DistributedDataParallel's bucket
    chunk = min(computed, max(1, AUX_CHUNK // max(dead, 1)))
    found = int(CANDIDATE * candidates * settings.k * screened / (world if parallel == "latent" else 1))
    if fused and world == 1:
        found = PLACE * min(PLACES * settings.k * screened, sae.width * screened)
    late = Steps.LATE * own * row if fused and world == 1 and settings.micro_batch is None else 0
    product = 0 if fused else min(screened, max(1, CHUNK // sae.width)) * sae.width * (2 if low_screen else size)
    return lasting | {
        "gradient": copies * trained,
        "screened product": product,
        "prefix errors": piece * n_groups * row,
        "rows": late
        + own * row
        + screened * (row + settings.d * 2 * low_screen)
        + (0 if parallel == "ddp" else settings.batch * row)
        + (settings.batch * row if parallel == "gather" else 0)
        + (computed * row if piece < computed else 0),
        "pairs": PAIR * pairs + found,
        # Rows of both matrices and of their gradients; pre-activations and their gradient; residuals less their mean,
        # and rebuilt.
        "AuxK": (4 * dead * row + 2 * chunk * dead * size + computed * row + chunk * row) * (dead > 0),
    }


def lasting_tensors(trainer: Trainer) -> dict[str, list[Tensor]]:
    """The tensors that a trainer keeps from step to step, but for its buffers."""
    latents = trainer.loss.screen.latents()
    rounded = [tensor for tensor in (latents.low_ND, latents.norm_N, latents.error_N) if tensor is not None]
    return {
        "weights": [trainer.sae.W_enc_core, trainer.sae.flat],
        "Adam": [trainer.adam.mean, trainer.adam.square],
        "screen's copy": rounded,
        "counters": [trainer.silent_F] + ([] if trainer.loss.latent_ids_F is None else [trainer.loss.latent_ids_F]),
    }


class _Rank(Alone):
    """The last of so many ranks, to which no part is smaller than to another; says nothing to them."""

    def __init__(self, world: int) -> None:
        self.world, self.rank = world, world - 1


class _Averaging(nn.Module):
    """Stands where DistributedDataParallel would."""

    def __init__(self, module: LossModule) -> None:
        super().__init__()
        self.module = module


def _without_memory(settings: SAESettings, core_size: int, world: int, low_screen: bool) -> Trainer:
    settings = dataclasses.replace(settings, kernels="torch", screen="bf16" if low_screen else "fp32")
    comm = _Rank(world)
    with torch.device("meta"):
        sae = MatryoshkaSAE.zeros(settings, core_size)
        averages = settings.parallel == "ddp" and world > 1
        return Trainer(sae, settings, comm, _Averaging(LossModule(sae, settings, comm)) if averages else None)
