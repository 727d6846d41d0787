"""Who scores which shard of the attribution tokens, and what came back. Knows no Ray.

Shards are dealt to whoever asks; a partial sum is kept per shard, on disk, so that a shard sent twice counts once, a
lost worker's shards are dealt again, and a ledger that died goes on from its folder. Where fewer shards may do, they
are dealt in stages of 2, 4, 8, ...: how many count is decided by what is in them, never by who was fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dmsae_ray.attribution.partial import Partial
from dmsae_ray.files import present_below, replacing

ALL_DONE, WAIT = -1, -2
FIRST_STAGE = 2
"""Shards of the first stage: one in each half."""


class Ledger:
    """Attribution of one trained SAE.

    shards: how many there are; stamp: identifies the SAE (settings are in the chain's key), so that partial sums of
    another one are not reused;
    patience_s: a shard dealt and not returned for so long is dealt to another worker too; enough: whether the partial
    sums of the first shards, in shard order, suffice, asked at the end of each stage but the last (None: all shards in
    one stage).
    """

    def __init__(
        self,
        folder: Path,
        shards: int,
        stamp: str,
        patience_s: float = 60.0,
        enough: Callable[[list[Partial]], bool] | None = None,
    ):
        self.folder, self.shards, self.stamp, self.patience_s, self.enough = (
            Path(folder),
            shards,
            stamp,
            patience_s,
            enough,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stage = shards if enough is None else min(FIRST_STAGE, shards)
        """shards that count so far, the first ones; the others are not dealt"""
        self.dealt: dict[int, float] = {}
        self.resent = 0
        present_below(self.folder)
        self.done = {shard for shard in range(shards) if self._path(shard).exists()}
        self._complete = False

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.stamp}-{shard:05d}.safetensors"

    def complete(self) -> bool:
        """Whether all partial sums that count are back. Opens the next stage where the last one does not suffice."""
        while not self._complete and self.done.issuperset(range(self.stage)):
            if self.enough is None or self.stage == self.shards or self.enough(self._partials()):
                self._complete = True
            else:
                self.stage = min(2 * self.stage, self.shards)
        return self._complete

    def take(self, worker: int) -> int:
        """A shard to score next, WAIT if all are dealt but not all are back, ALL_DONE if all that count are back."""
        if self.complete():
            return ALL_DONE
        now = time.monotonic()
        for shard in range(self.stage):
            late = now - self.dealt.get(shard, -float("inf")) > self.patience_s
            if shard not in self.done and late:
                self.dealt[shard] = now
                return shard
        return WAIT

    def give(self, worker: int, shard: int, partial: Partial) -> None:
        """Keep a partial sum; the first one to come counts."""
        if shard in self.done:
            self.resent += 1
            return
        with replacing(self._path(shard)) as temporary:
            save_file(partial.tensors() | {"worker": torch.tensor(worker)}, temporary)
        self.done.add(shard)

    def partials(self) -> list[Partial]:
        """The partial sums that count, in shard order. All of them must be back."""
        assert self.complete(), "asked for partial sums before all shards were back"
        return self._partials()

    def workers(self) -> set[int]:
        """Workers whose partial sums count."""
        return {int(entry["worker"]) for entry in self._entries()}

    def _partials(self) -> list[Partial]:
        return [Partial.of_tensors(entry) for entry in self._entries()]

    def _entries(self) -> list[dict[str, torch.Tensor]]:
        return [load_file(self._path(shard)) for shard in range(self.stage)]

    def redeal(self) -> None:
        """Forget what was dealt: the workers that had it are gone."""
        self.dealt.clear()
