"""One chain, planned: plain values that travel to workers.

`sweep --status` plans all chains only to name them: numpy and torch come with the methods that need them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dmsae_ray.config import Config
from dmsae_ray.corpus.split import of_part
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.draws import INIT, PREFIXES, SELECTION, SLOT
from dmsae_ray.identity import chain_fields, fields_key
from dmsae_ray.secret_url import SecretUrl

if TYPE_CHECKING:
    from dmsae_ray.activations.dataset import ActivationDataset
    from dmsae_ray.activations.order import Order
    from dmsae_ray.activations.rowgroup import Unit

BASE = "base"
"""Arm of the chains of the plain grid."""


@dataclass(frozen=True)
class Start:
    """The core that a chain's first cycle is trained on, where it is not empty."""

    path: Path
    """core file; of another chain, there once that chain is finished"""
    number: int
    """number of the chain's first cycle: counting goes on from the chain that the core comes from, so that no draw is
    made twice
    """
    fields: dict
    """what decides the core, part of the chain's own fields"""
    chain: ChainPlan | None = None
    """the chain whose last core it is; None for a core file given by sae.core"""


@dataclass(frozen=True)
class ChainPlan:
    """All cycles for one (seed, k)."""

    config: Config
    seed: int
    k: int
    dataset: SecretUrl | str
    """folder or URL of the activations"""
    dataset_key: str
    arm: str = BASE
    """group of chains that have all but seed and k in common"""
    start: Start | None = None
    """None: the core is empty, the first cycle trains a plain Matryoshka SAE"""

    @property
    def label(self) -> str:
        """Name on screen and in MLflow. In the plain grid, too, it says what makes a chain a control."""
        if self.arm == BASE:
            return self.config.chain_label(self.seed, self.k)
        source = self.start.chain if self.start else None
        return f"seed{self.seed}-k{self.k}-{self.arm}" + (f"-from-k{source.k}" if source else "")

    @property
    def stage(self) -> str:
        """What the chain is for: `distill` cores over cycles, `transfer` a core to a new SAE, or train a `plain` SAE to
        compare with.
        """
        if self.start is not None and self.start.chain is not None:
            return "transfer"
        return "plain" if self.cycles == 1 and self.start is None else "distill"

    @property
    def fields(self) -> dict:
        fields = chain_fields(self.config, self.seed, self.k, self.dataset_key)
        return fields if self.start is None else fields | {"start": self.start.fields}

    @property
    def key(self) -> str:
        return fields_key(self.fields)

    @property
    def folder(self) -> ChainFolder:
        return ChainFolder(self.config.home / "chains" / self.key)

    @property
    def references(self) -> Path:
        """Folder of the reference losses; in the output folder, since a dataset may be elsewhere and not ours to write
        to.
        """
        return self.config.home / "data" / self.dataset_key

    @property
    def cycles(self) -> int:
        return self.config.sweep.cycles

    @property
    def data_seed(self) -> int:
        return self.config.data_seed_of(self.seed)

    @property
    def lockstep_key(self) -> tuple:
        """Equal for chains that read the same batches and can be served by one worker group; their arms, and all that
        is not named here, may differ."""
        from dmsae_ray.distill.mapping import score_settings

        train, part = self.config.train, self.fields["part"]
        return (
            self.data_seed,
            part and (part["part"], part["parts"]),
            self.number(0),
            train.batch,
            train.lanes,
            self.steps,
            train.threads,
            train.checkpoint_steps,
            score_settings(self.config),
        )

    def number(self, cycle: int) -> int:
        """Number of the chain's cycle in the life of its core, which may have begun in another chain."""
        return cycle + (self.start.number if self.start else 0)

    def init_seed(self, cycle: int) -> int:
        """Seed of a cycle's initialisation: every draw comes from (seed, number of the cycle, purpose)."""
        return self._draw(cycle, INIT)

    def selection_seed(self, cycle: int) -> int:
        """Seed of the order in which `selection.by: random` takes the candidates."""
        return self._draw(cycle, SELECTION)

    def slot_seed(self, cycle: int) -> int:
        """Seed of the random rows that stand in the core's place with `sae.core_transfer: random`."""
        return self._draw(cycle, SLOT)

    def prefix_seed(self, cycle: int) -> int:
        """Seed of the prefixes that `sae.prefixes: sampled` draws in every step of a cycle."""
        return self._draw(cycle, PREFIXES)

    def _draw(self, cycle: int, purpose: int) -> int:
        import numpy as np

        return int(
            np.random.SeedSequence([self.seed, self.number(cycle), purpose]).generate_state(1, np.uint64)[0]
            >> np.uint64(1)
        )

    def core_size(self, cycle: int, candidates: int) -> int:
        """Members of the core that this cycle selects, where `selection.size` is not tau.

        Raises ValueError if the chain that the sizes are taken from has not done this cycle.
        """
        if (twin := self.twin()) is not None:
            check_twins({self.label: (twin.folder, cycle + 1)})
            return twin.folder.records()[cycle].core_out
        from dmsae_ray.core.select import count_of

        size = self.config.selection.size
        assert not isinstance(size, str), "size tau is selected by share, not by number"
        return count_of(size, candidates)

    def twin(self) -> ChainPlan | None:
        """The chain that `selection.size: match` takes the core sizes from."""
        if self.config.selection.size != "match":
            return None
        return replace(self, config=self.config.distilled(), arm=BASE)

    def needs(self) -> list[ChainPlan]:
        """Chains that must be finished before this one begins."""
        return [chain for chain in (self.twin(), self.start.chain if self.start else None) if chain is not None]

    @property
    def steps(self) -> int:
        """Training steps of a cycle; rows beyond the last whole batch are dropped."""
        from dmsae_ray.distill.mapping import steps_of

        return steps_of(self.config)

    @property
    def part(self) -> int | None:
        """The part of the documents that this chain trains on; None: all of them."""
        return self.fields["part"] and self.fields["part"]["part"]

    @property
    def attribution_split(self) -> str:
        """The split whose text decides the chain's cores."""
        return "attribution" if self.part is None else of_part("attribution", self.part)

    def units(self, dataset: ActivationDataset) -> list[Unit]:
        """The row groups this chain trains on: all, or those of its part's shards."""
        return dataset.units(None if self.part is None else dataset.manifest.shards_of(self.part))

    def order(self, dataset: ActivationDataset, cycle: int) -> Order:
        from dmsae_ray.activations.order import Order

        train = self.config.train
        return Order(
            n_units=len(self.units(dataset)),
            unit_rows=dataset.manifest.rows_per_group,
            batch=train.batch,
            lanes=train.lanes,
            data_seed=self.data_seed,
            cycle=self.number(cycle),
        )

    def finished(self) -> bool:
        return len(self.folder.records()) >= self.cycles


def check_twins(twins: dict[str, tuple[ChainFolder, int]]) -> None:
    """The chains that `selection.size: match` takes core sizes from have done what is needed.

    twins: by the label of their placebo, folder and cycles needed. Raises ValueError with the command that makes them.
    """
    done = {label: len(folder.records()) for label, (folder, _) in twins.items()}
    short = [
        f"{label} from {folder.path} ({done[label]} of {cycles} cycles done)"
        for label, (folder, cycles) in twins.items()
        if done[label] < cycles
    ]
    if short:
        raise ValueError(
            "selection.size match: core sizes are taken from the chain that selects by attribution and has all else "
            f"in common, {', '.join(short)}. Finish it first: the same command with --selection.by attribution "
            "--selection.size tau, and --sae.core_transfer frozen in place of random"
        )
