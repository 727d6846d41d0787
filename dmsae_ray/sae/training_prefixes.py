"""The nested prefixes that must reconstruct in a training step.

`fixed`: core and the first groups, group by group. `sampled`: as many prefixes, whose sizes are drawn anew in every
step, as arXiv 2503.17547 draws them, so that over many steps the latents are ordered one by one: each is at some time
the last of a prefix. Group sizes then decide only how many prefixes there are, who is a candidate for the core, and
what is measured.

Shapes: F latents of this rank, N free latents of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from dmsae_ray.sae.settings import SAESettings


class Prefixes:
    """Of an SAE, or of one rank's part of it."""

    def __init__(
        self, settings: SAESettings, core_size: int, group_ends: Sequence[int], latent_ids_F: Tensor | None = None
    ) -> None:
        """core_size: of the whole SAE. group_ends: of this rank's latents. latent_ids_F: those among all ranks',
        ascending; None: it has all.

        Raises ValueError if there are too few free latents to sample prefixes of.
        """
        self.settings, self.core_size, self.group_ends = settings, core_size, list(group_ends)
        # Fixed prefixes need none: the cost of training is told on tensors without memory.
        self._ids_F = None
        if latent_ids_F is not None and settings.prefixes == "sampled":
            self._ids_F = latent_ids_F.cpu().numpy()
        n_free = settings.width - core_size
        if settings.prefixes == "sampled" and n_free < len(self.group_ends):
            raise ValueError(
                f"sae.prefixes sampled: {len(self.group_ends)} prefixes cannot be drawn from {n_free} free latents: "
                "widen the SAE, or lower attribution.tau or selection.size"
            )

    def ends(self, step: int) -> list[int]:
        """Cumulative ends of a step's prefixes in latents of this rank, ascending; the last one is all of them.

        Sampled: the number of free latents in a prefix is drawn log-uniformly, without replacement, by seed and step
        alone.
        """
        if self.settings.prefixes == "fixed":
            return self.group_ends
        n_free = self.settings.width - self.core_size
        chances_N = _log_uniform(n_free)
        rng = np.random.default_rng([self.settings.prefix_seed, step])
        sizes: set[int] = set()
        while len(sizes) < len(self.group_ends) - 1:
            sizes.add(int(np.searchsorted(chances_N, rng.random() * chances_N[-1], side="right")) + 1)
        ends = [*(self.core_size + size for size in sorted(sizes)), self.settings.width]
        return ends if self._ids_F is None else np.searchsorted(self._ids_F, ends).tolist()


@lru_cache(maxsize=4)
def _log_uniform(n_free: int) -> np.ndarray:
    """Cumulative weights 1/n of the sizes n = 1 .. n_free - 1: single divisions and sums in order, the same on any
    machine.
    """
    return np.cumsum(1 / np.arange(1, n_free))
