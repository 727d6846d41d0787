"""The order of training rows: a pure function of (data seed, cycle, pass), whatever the number of workers.

The unit is the row group. A pass over the dataset permutes the units and deals them to `lanes`; a *round* is one unit
per lane, and batch t of a round takes the next B / lanes rows of every lane, each unit's rows permuted anew. Rank r of
W serves lanes r, r + W, ...: so the global batch is the same for every W that divides the lanes, and nothing is read
twice.
The position is two integers: the round, and the row inside each lane's unit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from dmsae_ray.draws import ROWS, UNITS


@functools.lru_cache(maxsize=4)
def _deal(data_seed: int, cycle: int, pass_: int, n_units: int) -> np.ndarray:
    """Order of the units in a pass, [n_units]; kept, since every round of a pass asks for it."""
    deal = np.random.default_rng([data_seed, cycle, UNITS, pass_]).permutation(n_units)
    deal.flags.writeable = False
    return deal


@dataclass(frozen=True)
class Order:
    """Rows of one cycle.

    n_units row groups of unit_rows rows each; batch is the global batch in tokens.
    """

    n_units: int
    unit_rows: int
    batch: int
    lanes: int
    data_seed: int
    cycle: int

    def __post_init__(self):
        assert self.batch % self.lanes == 0 and self.unit_rows % self.lane_rows == 0, "checked by the configuration"
        assert self.n_units >= self.lanes, "checked when the dataset is opened"

    @property
    def lane_rows(self) -> int:
        """Rows of a batch that come from one lane."""
        return self.batch // self.lanes

    @property
    def rounds_per_pass(self) -> int:
        """The units left over below one per lane are dropped; another pass drops others."""
        return self.n_units // self.lanes

    @property
    def batches_per_round(self) -> int:
        return self.unit_rows // self.lane_rows

    def units(self, round_: int) -> np.ndarray:
        """Unit served by each lane in this round, [lanes]."""
        pass_, within = divmod(round_, self.rounds_per_pass)
        deal = _deal(self.data_seed, self.cycle, pass_, self.n_units)
        return deal[within * self.lanes : (within + 1) * self.lanes]

    def rows(self, round_: int, unit: int) -> np.ndarray:
        """Order in which a unit's rows are taken, [unit_rows]."""
        pass_ = round_ // self.rounds_per_pass
        return np.random.default_rng([self.data_seed, self.cycle, ROWS, pass_, int(unit)]).permutation(self.unit_rows)

    def position(self, step: int) -> tuple[int, int]:
        """(round, row) at which global batch `step` starts."""
        round_, batch = divmod(step, self.batches_per_round)
        return round_, batch * self.lane_rows

    def step_at(self, round_: int, row: int) -> int:
        """The global batch that starts at this position. Raises ValueError if none does."""
        if row % self.lane_rows or not 0 <= row < self.unit_rows:
            raise ValueError(f"no batch starts at row {row} of a round: a lane gives {self.lane_rows} rows to each")
        return round_ * self.batches_per_round + row // self.lane_rows

    def lanes_of(self, rank: int, world: int) -> list[int]:
        assert self.lanes % world == 0, "checked by the configuration"
        return list(range(rank, self.lanes, world))

    def token_index(self, rank: int, world: int) -> np.ndarray:
        """Place in the global batch of each of this rank's rows, [B / W]: lane-major, as one worker sees it."""
        return np.concatenate(
            [np.arange(lane * self.lane_rows, (lane + 1) * self.lane_rows) for lane in self.lanes_of(rank, world)]
        )
