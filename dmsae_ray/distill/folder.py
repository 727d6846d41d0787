"""A chain's folder: what lies where, and who may write there.

    chain.json                     which chain this is (written once)
    failed.json                    why it ended before its time
    writer                         which worker group may write here
    cycle_00/ checkpoint.pt        the middle of training; gone when the cycle is done
              curve.jsonl          one line per logged step
              sae.safetensors      the trained SAE with its threshold and densities
              attribution/         one partial sum per shard; gone when the cycle is done
              scores.safetensors   attribution of every candidate; what it was selected by, where that is something else
              core.safetensors     the core this cycle chose
              record.json          completion record, written last: the cycle is done if and only if it exists
              evaluation-N.json    measured later on N held-out tokens (`python -m dmsae_ray.evaluate`); none by default

Every commit carries the generation of the sweep driver it was started by. A driver that takes the folder over raises
the generation, so a worker that outlived its driver cannot write over its successor; nor can one that was thought lost
and comes back: every worker group puts a word of its own in `writer`, and asks before each commit whether it is still
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmsae_ray.distill.record import RECORD_VERSION, CycleRecord, Failure
from dmsae_ray.files import discard, elsewhere, refresh, remove_leftovers, write_json
from dmsae_ray.ownership import remove


@dataclass(frozen=True)
class CycleFolder:
    """Paths of one cycle."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def curve(self) -> Path:
        return self.path / "curve.jsonl"

    @property
    def sae(self) -> Path:
        return self.path / "sae.safetensors"

    @property
    def attribution(self) -> Path:
        return self.path / "attribution"

    @property
    def scores(self) -> Path:
        return self.path / "scores.safetensors"

    @property
    def core(self) -> Path:
        return self.path / "core.safetensors"

    @property
    def record(self) -> Path:
        return self.path / "record.json"

    def evaluation(self, tokens: int) -> Path:
        return self.path / f"evaluation-{tokens}.json"

    def release(self) -> None:
        """Drop what only an unfinished cycle needs."""
        discard(self.checkpoint)
        if self.attribution.exists() or elsewhere(self.attribution) is not None:
            remove(self.attribution, "chains", within=self.path.parent)


@dataclass(frozen=True)
class ChainFolder:
    """Paths and state of one chain."""

    path: Path

    def cycle(self, number: int) -> CycleFolder:
        return CycleFolder(self.path / f"cycle_{number:02d}")

    @property
    def failed(self) -> Path:
        return self.path / "failed.json"

    def refresh(self) -> None:
        """See what other machines have written."""
        refresh(self.path)

    def records(self) -> list[CycleRecord]:
        """Those of the finished cycles, in order, up to the first gap. Raises ValueError naming the file if one is
        damaged.
        """
        records: list[CycleRecord] = []
        while (path := self.cycle(len(records)).record).exists():
            records.append(CycleRecord.read(path))
        return records

    def tidy(self) -> None:
        """Drop what killed writers left: a checkpoint is as large as several SAEs. Only for who holds the lease."""
        for cycle in range(len(self.records())):
            self.cycle(cycle).release()  # a record may have been its writer's last act
        remove_leftovers(self.path)

    def failure(self) -> Failure | None:
        """Raises ValueError naming the file if it is damaged."""
        return Failure.read(self.failed) if self.failed.exists() else None

    def describe(self, key: str, label: str, fields: dict) -> None:
        """Write chain.json, once. The label is left out of the key: it only names the chain on screen."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "chain.json").exists():
            write_json(
                self.path / "chain.json",
                {
                    "format_version": RECORD_VERSION,
                    "key": key,
                    "label": label,
                    "seed": fields["seed"],
                    "data_seed": fields["data_seed"],
                    "k": fields["k"],
                    "fields": fields,
                },
            )
