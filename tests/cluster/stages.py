"""How far a sweep of conftest.SMALL is, as its files say, wherever its nodes keep them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

CHAINS, CYCLES = ("seed0-k8", "seed1-k8"), 2
"""Of the sweep, in the order in which they run one after the other."""
STEPS, SHARDS, SHARDS_SCORED = 32, 3, 4
"""Steps of a cycle's training; shards of the harvest; shards of an attribution."""
DEPTHS = {"harvest": SHARDS - 1, "train": STEPS - 4, "attribute": SHARDS_SCORED - 1}
"""Up to how far in a phase it is struck: shards, steps; elsewhere, anywhere."""


@dataclass(frozen=True)
class Stage:
    """A place in the sweep's work."""

    phase: str
    chain: str = ""
    cycle: int = 0

    def __str__(self) -> str:
        return f"{self.phase} of {self.chain}, cycle {self.cycle}" if self.chain else self.phase


STAGES = (
    Stage("harvest"),
    *(
        Stage(phase, chain, cycle)
        for chain in CHAINS
        for cycle in range(CYCLES)
        for phase in ("train", "attribute", "select")
    ),
    Stage("compare"),
    Stage("results"),
)
"""In the order of time, chains one after the other."""


@dataclass(frozen=True)
class Standing:
    """Where a cycle of a chain stands."""

    steps: int = 0
    """on the training curve"""
    trained: bool = False
    """and evaluated: its SAE is there"""
    scored: int = 0
    """shards of its attribution that are back"""
    done: bool = False


class Work:
    """The files of one sweep."""

    def __init__(self, roots: Callable[[], Iterable[Path]], stored: Callable[[], Iterable[str]] | None = None):
        """roots: the output folder; for an output at a URL, what stands for it on each node. stored: the names at the
        URL, where shards of activations are and nowhere else.
        """
        self._roots, self._stored = roots, stored

    def files(self, pattern: str) -> Iterator[Path]:
        for root in self._roots():
            yield from root.glob(pattern)

    def there(self, pattern: str) -> bool:
        return bool(self.names(pattern))

    def names(self, pattern: str) -> set[str]:
        """Within their folder."""
        if self._stored is not None and pattern.startswith("data/"):
            return {name.rpartition("/")[2] for name in self._stored() if PurePath(name).match(pattern)}
        return {path.name for path in self.files(pattern)}

    def key_of(self, chain: str) -> str | None:
        for path in self.files("chains/*/chain.json"):
            try:
                if json.loads(path.read_text())["label"] == chain:
                    return path.parent.name
            except (OSError, ValueError):  # taken away, or being fetched
                continue
        return None

    def standing(self, chain: str, cycle: int) -> Standing:
        if (key := self.key_of(chain)) is None:
            return Standing()
        place = f"chains/{key}/cycle_{cycle:02d}"
        return Standing(
            max((_lines(path) for path in self.files(f"{place}/curve.jsonl")), default=0),
            self.there(f"{place}/sae.safetensors"),
            len(self.names(f"{place}/attribution/*.safetensors")),
            self.there(f"{place}/record.json"),
        )

    def at(self, stage: Stage, depth: int = 1) -> bool:
        """Whether the sweep is in this stage now, so far in it."""
        if stage.chain:
            now = self.standing(stage.chain, stage.cycle)
            if now.done:
                return False
            return {
                "train": not now.trained and now.steps >= depth,
                "attribute": now.trained and depth <= now.scored < SHARDS_SCORED,
                "select": now.trained and now.scored == SHARDS_SCORED,
            }[stage.phase]
        if stage.phase == "harvest":
            made = len(self.names("data/*/shards/*.parquet"))
            return depth <= made and not self.there("data/*/manifest.json")
        compared, shown = self.there("sweeps/*/comparison.json"), self.there("sweeps/*/report.html")
        if stage.phase == "compare":
            return self.there("sweeps/*/data.json") and not compared
        return compared and not shown

    def near(self, stage: Stage) -> bool:
        """Whether it is in the stage before, or further."""
        place = STAGES.index(stage)
        return not place or self.at(STAGES[place - 1]) or self.past(STAGES[place - 1])

    def past(self, stage: Stage) -> bool:
        """Whether it will not be there any more."""
        if stage.chain:
            now = self.standing(stage.chain, stage.cycle)
            return (
                now.done
                or {
                    "train": now.trained,
                    "attribute": now.scored == SHARDS_SCORED,
                    "select": now.done,
                }[stage.phase]
            )
        pattern = {"harvest": "data/*/manifest.json", "compare": "sweeps/*/comparison.json"}
        return self.there(pattern.get(stage.phase, "sweeps/*/report.html"))


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def resumes(records: Iterable[Path]) -> list[int]:
    """Steps from which training went on, of all these records."""
    return [resume["step"] for path in records for resume in json.loads(path.read_text())["resumes"]]
