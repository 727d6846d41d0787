"""A chain's folder: what lies where, and who may write there.

    chain.json                     which chain this is (written once)
    failed.json                    why it ended before its time
    cycle_00/ checkpoint.pt        the middle of training; gone when the cycle is done
              curve.jsonl          one line per logged step
              sae.safetensors      the trained SAE with its threshold and densities
              attribution/         one partial sum per shard; gone when the cycle is done
              scores.safetensors   attribution of every candidate; what it was selected by, where that is something else
              core.safetensors     the core this cycle chose
              record.json          completion record, written last: the cycle is done if and only if it exists
              evaluation-N.json    measured later on N held-out tokens (`python -m dmsae_ray.evaluate`); none by default

Every commit carries the generation of the sweep driver it was started by. A driver that takes the folder over raises the
generation, so a worker that outlived its driver cannot write over its successor.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from dmsae_ray.files import remove_leftovers, write_json
from dmsae_ray.ownership import remove

RECORD_VERSION = 3
PATIENCE_S = 10.0
"""How long a generation that cannot be read is asked for again."""


class Superseded(RuntimeError):
    """Another driver has taken the output folder over; this worker must stop without writing."""


class OutputUnseen(OSError):
    """The output folder cannot be read from here, now: no word on who owns it, so worth another try."""

    def __init__(self, path: Path | str, error: Exception | str):
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        seen = (
            f"{path}: {why} on node {socket.gethostname()}: this node does not see the output folder. All nodes must share it: mount it "
            "here, or give --output a folder that they share"
        )
        super().__init__(error if isinstance(error, str) else seen)
        self.path = path

    def __reduce__(self):
        return OutputUnseen, (self.path, str(self))


@dataclass(frozen=True)
class Lease:
    """The right to write below an output folder, as long as its generation is the newest."""

    path: Path
    generation: int

    def check(self) -> None:
        """Raises Superseded if a later driver has started: its number is larger, and nothing else counts as one.

        A file that cannot be read (a server that stutters, a handle that went stale) is tried again for PATIENCE_S seconds; then
        OutputUnseen is raised.
        """
        newest = self._newest()
        if newest > self.generation:
            raise Superseded(f"{self.path}: generation {newest} has taken over from {self.generation}; nothing was written")

    def _newest(self) -> int:
        end, wait = time.monotonic() + PATIENCE_S, 0.05
        while True:
            try:
                return int(self.path.read_text())
            except (OSError, ValueError) as error:
                why = error
            if time.monotonic() + wait > end:
                raise OutputUnseen(self.path, why)  # not from it: a ValueError among its causes would look like one to give up on
            time.sleep(wait)
            wait = min(2 * wait, 2.0)


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
        self.checkpoint.unlink(missing_ok=True)
        if self.attribution.exists():
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

    def records(self) -> list[dict]:
        """Completion records of the finished cycles, in order, up to the first gap.

        Raises ValueError naming the file if one is damaged.
        """
        records = []
        while (path := self.cycle(len(records)).record).exists():
            try:
                record = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path}: damaged ({error}); delete this cycle's folder to have it computed again") from error
            if record.get("format_version") != RECORD_VERSION:
                raise ValueError(f"{path}: format version {record.get('format_version')!r}, this program reads {RECORD_VERSION}")
            records.append(record)
        return records

    def tidy(self) -> None:
        """Drop what killed writers left: a checkpoint is as large as several SAEs. Only for who holds the lease."""
        for cycle in range(len(self.records())):
            self.cycle(cycle).release()  # a record may have been its writer's last act
        remove_leftovers(self.path)

    def failure(self) -> dict | None:
        return json.loads(self.failed.read_text()) if self.failed.exists() else None

    def describe(self, key: str, label: str, fields: dict) -> None:
        """Write chain.json, once. The label is left out of the key: it only names the chain on screen."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "chain.json").exists():
            write_json(
                self.path / "chain.json",
                {
                    "format_version": RECORD_VERSION, "key": key, "label": label, "seed": fields["seed"],
                    "data_seed": fields["data_seed"], "k": fields["k"], "fields": fields,
                },
            )  # fmt: skip


def failure_text(failure: dict) -> str:
    """Where and why a chain failed, from failed.json: as far as it is known where."""
    cycle, step, reason = failure.get("cycle"), failure.get("step"), failure["reason"]
    where = "" if cycle is None else f"cycle {cycle}" if step is None else f"cycle {cycle}, step {step}"
    # What diverged says itself where.
    return reason if not where or reason.startswith(f"{where}:") else f"{where}: {reason}"
