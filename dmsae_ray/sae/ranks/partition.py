"""Latents dealt to ranks: of the core and of every prefix group each rank has an equal, contiguous part.

So every rank holds a small Matryoshka SAE with a core of its own, and all that is done to an SAE (screen, pairs,
gradients, Adam) is done to that one. Dealing groups and not one long range of latents keeps the work even: latents of
the first groups, and of the core, are active far more often. The core is dealt as well: what a rank needs of the
others' latents, the core's included, are their sums over kept pairs, so a copy of the core on every rank would save no
exchange and would have to be kept alike.

Shapes: F latents of the whole SAE, N of one rank, D = d.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from dmsae_ray.sae.ranks.collective import Collective, gather_ragged
from dmsae_ray.sae.sae import TRAINED, MatryoshkaSAE


class Shard:
    """Which latents of an SAE are one rank's. Raises ValueError if there are more ranks than latents in the last
    group.
    """

    def __init__(self, sae: MatryoshkaSAE, world: int, rank: int) -> None:
        """sae: the whole SAE, of which only the shape is taken."""
        blocks = list(zip([0, sae.core_size, *sae.group_ends[:-1]], [sae.core_size, *sae.group_ends], strict=True))
        if blocks[-1][1] - blocks[-1][0] < world:
            raise ValueError(
                f"sae.width {sae.width}: its last prefix group has {blocks[-1][1] - blocks[-1][0]} latents, too few "
                f"for {world} workers to share with train.parallel latent: use fewer workers, or gather or ddp"
            )
        parts = [_part(start, stop, world, rank) for start, stop in blocks]
        self.rank = rank
        self.ids_of_ranks = [
            torch.cat([torch.arange(*_part(*block, world, other), device="cpu") for block in blocks])
            for other in range(world)
        ]
        """latents of every rank, ascending"""
        ends = list(accumulate(stop - start for start, stop in parts))
        self.core_size, self.group_ends = ends[0], ends[1:]
        self.n_frozen_of_all, self.group_ends_of_all = sae.n_frozen, sae.group_ends
        self.shapes = {name: tensor.shape for name, tensor in sae.state_dict().items()}
        """of the whole SAE's tensors"""

    @property
    def ids_N(self) -> Tensor:
        """This rank's latents, ascending."""
        return self.ids_of_ranks[self.rank]

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor of the whole SAE: a parameter or buffer by its name, or `silent`, one number per
        latent.
        """
        rows = self._rows(name, self.rank)
        return whole if rows is None else whole[rows.to(whole.device)]

    def part_of(self, sae: MatryoshkaSAE) -> MatryoshkaSAE:
        """This rank's SAE, a copy, with the weights of the whole one."""
        mine = MatryoshkaSAE(sae.d, self.group_ends, self.core_size, sae.core_gate, sae.W_dec.dtype, sae.core_transfer)
        mine = mine.to(sae.W_dec.device)
        mine.load_state_dict({name: self.part(name, tensor) for name, tensor in sae.state_dict().items()})
        return mine

    def whole(self, comm: Collective, name: str, mine: Tensor) -> Tensor:
        """The whole SAE's tensor from all ranks' parts, on the CPU. All ranks call it together."""
        if self._rows(name, self.rank) is None:
            return mine.detach().cpu().clone()
        parts = [part.view(-1, *mine.shape[1:]) for part in gather_ragged(comm, mine.detach().reshape(-1))]
        whole = torch.empty(sum(len(part) for part in parts), *mine.shape[1:], dtype=mine.dtype)
        for rank, part in enumerate(parts):
            whole[self._rows(name, rank)] = part.cpu()
        return whole

    def whole_flat(self, comm: Collective, sae: MatryoshkaSAE, flat: Tensor) -> Tensor:
        """The same for a vector laid out like `sae.flat` of this rank's SAE."""
        return torch.cat(
            [self.whole(comm, name, view).flatten() for name, view in zip(TRAINED, sae.views(flat), strict=True)]
        )

    def part_of_flat(self, flat: Tensor) -> Tensor:
        """This rank's part of a vector laid out like `flat` of the whole SAE."""
        pieces = flat.split([self.shapes[name].numel() for name in TRAINED])
        return torch.cat(
            [
                self.part(name, piece.view(self.shapes[name])).flatten()
                for name, piece in zip(TRAINED, pieces, strict=True)
            ]
        )

    def _rows(self, name: str, rank: int) -> Tensor | None:
        """Which rows of the whole tensor are a rank's; None: every rank holds all of it."""
        ids_N = self.ids_of_ranks[rank]
        if name in ("b_enc", "W_dec", "silent"):
            return ids_N
        if name == "W_enc":
            return ids_N[ids_N >= self.n_frozen_of_all] - self.n_frozen_of_all
        if name == "W_enc_core":
            return ids_N[ids_N < self.n_frozen_of_all]
        assert name in ("b_dec", "theta"), name
        return None


def _part(start: int, stop: int, world: int, rank: int) -> tuple[int, int]:
    size = stop - start
    return start + size * rank // world, start + size * (rank + 1) // world
