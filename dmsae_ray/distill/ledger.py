"""Who scores which shard of the attribution tokens, and what came back. Knows no Ray.

Shards are dealt to whoever asks; a partial sum is kept per shard, on disk, so that a shard sent twice counts once, a lost
worker's shards are dealt again, and a ledger that died goes on from its folder.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dmsae_ray.files import replacing

ALL_DONE, WAIT = -1, -2


class Ledger:
    """Attribution of one trained SAE.

    shards: how many there are; stamp: identifies the SAE and settings, so that partial sums of another run are not reused;
    patience_s: a shard dealt and not returned for so long is dealt to another worker too.
    """

    def __init__(self, folder: Path, shards: int, stamp: str, patience_s: float = 60.0):
        self.folder, self.shards, self.stamp, self.patience_s = Path(folder), shards, stamp, patience_s
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dealt: dict[int, float] = {}
        self.resent = 0
        self.done = {shard for shard in range(shards) if self._path(shard).exists()}

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.stamp}-{shard:05d}.safetensors"

    def take(self, worker: int) -> int:
        """A shard to score next, WAIT if all are dealt but not all are back, ALL_DONE if all are back."""
        if len(self.done) == self.shards:
            return ALL_DONE
        now = time.monotonic()
        for shard in range(self.shards):
            late = now - self.dealt.get(shard, -float("inf")) > self.patience_s
            if shard not in self.done and late:
                self.dealt[shard] = now
                return shard
        return WAIT

    def give(self, worker: int, shard: int, sums_P: torch.Tensor, tokens: int) -> None:
        """Keep a partial sum, [P] fp64; the first one to come counts."""
        if shard in self.done:
            self.resent += 1
            return
        with replacing(self._path(shard)) as temporary:
            save_file({"sums": sums_P.contiguous(), "tokens": torch.tensor(tokens), "worker": torch.tensor(worker)}, temporary)
        self.done.add(shard)

    def partials(self) -> list[tuple[torch.Tensor, int]]:
        """Partial sums in shard order. All shards must be back."""
        assert len(self.done) == self.shards, "asked for scores before all shards were back"
        return [(entry["sums"], int(entry["tokens"])) for entry in self._entries()]

    def workers(self) -> set[int]:
        """Workers whose partial sums count."""
        return {int(entry["worker"]) for entry in self._entries()}

    def _entries(self) -> list[dict[str, torch.Tensor]]:
        return [load_file(self._path(shard)) for shard in range(self.shards)]

    def redeal(self) -> None:
        """Forget what was dealt: the workers that had it are gone."""
        self.dealt.clear()
