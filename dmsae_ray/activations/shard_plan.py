"""Which sequences go into which shard: decided before anyone computes. Letters: N sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from dmsae_ray.config import HarvestConfig
from dmsae_ray.corpus.split import Deal
from dmsae_ray.draws import SEQUENCES, SHARD_ROWS


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be made: these sequences' rows, cut to `rows`, permuted."""

    name: str
    number: int
    sequences: tuple[int, ...]
    rows: int
    spare: tuple[int, ...] = ()
    """further sequences, in the order in which they fill the places of dropped rows; not looked at where nothing is
    dropped
    """
    split: str = "train"
    """the split that the sequences are of"""

    @property
    def file(self) -> str:
        return f"shards/{self.name}.parquet"

    def permutation(self, seed: int) -> np.ndarray:
        """Order of the rows in the file, [rows]."""
        return np.random.default_rng([seed, SHARD_ROWS, self.number]).permutation(self.rows)

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(tree: dict) -> ShardPlan:
        sequences, spare = (tuple(int(s) for s in tree[name]) for name in ("sequences", "spare"))
        return ShardPlan(
            str(tree["name"]), int(tree["number"]), sequences, int(tree["rows"]), spare, str(tree["split"])
        )


def plan_shards(
    rows: Mapping[str, np.ndarray], harvest: HarvestConfig, deal: Deal, reserve: float = 0.0
) -> list[ShardPlan]:
    """Deal a seeded permutation of each split's sequences to its shards: to the calibration shard, the first one, and
    to the training shards, part by part.

    rows: by split, the rows that each of its sequences gives [N]. reserve: rows in a shard's spare sequences, as a
    share of its own; they come after those of all shards, so that without a dropped row the shards are the same
    whatever the reserve; of a split that ends before, less. No sequence is in two shards, so the calibration rows are
    held back from training. Raises ValueError if a split is too small without any reserve.
    """
    plans: list[ShardPlan] = []
    for split, sizes in _sizes(harvest, deal).items():
        plans += _fill(split, rows[split], sizes, len(plans), harvest, deal, reserve)
    return plans


def _fill(
    split: str,
    rows_N: np.ndarray,
    sizes: list[int],
    before_it: int,
    harvest: HarvestConfig,
    deal: Deal,
    reserve: float,
) -> list[ShardPlan]:
    """The shards of one split, after so many of other splits."""
    order = np.random.default_rng([harvest.seed, SEQUENCES]).permutation(len(rows_N))
    ends = np.cumsum(rows_N[order], dtype=np.int64)
    plans, first = [], 0
    for number, size in enumerate(sizes, before_it):
        before = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, before + size))
        if last >= len(order):
            raise ValueError(_too_small(split, int(ends[-1]) if len(ends) else 0, sizes, harvest, deal))
        name = "calibration" if number == 0 else f"train-{number - 1:05d}"
        plans.append(ShardPlan(name, number, tuple(int(i) for i in order[first : last + 1]), size, split=split))
        first = last + 1
    for place, plan in enumerate(plans if reserve else ()):
        before = ends[first - 1] if first else 0
        last = min(int(np.searchsorted(ends, before + int(np.ceil(plan.rows * reserve)))), len(order) - 1)
        plans[place] = replace(plan, spare=tuple(int(i) for i in order[first : last + 1]))
        first = last + 1
    return plans


def _too_small(split: str, have: int, sizes: list[int], harvest: HarvestConfig, deal: Deal) -> str:
    asked = f"harvest.tokens {harvest.tokens} + harvest.calibration_tokens {harvest.calibration_tokens}"
    if deal.parts == 1:
        return (
            f"{asked}: the corpus's training split gives only {have} rows; ask for fewer, or give corpus.source more "
            "text"
        )
    return (
        f"{asked}, documents dealt to sweep.parts {deal.parts}: the corpus's {split} text gives only {have} rows, "
        f"for {len(sizes)} shard(s) with {sum(sizes)} in all, no sequence in two; ask for fewer, lower sweep.parts, or "
        "give corpus.source more text"
    )


def rows_for_plan(harvest: HarvestConfig, deal: Deal, context: int, reserve: float = 0.0) -> dict[str, int]:
    """By split, rows of sequences with which `plan_shards` surely succeeds: a shard takes whole sequences, so it leaves
    part of one over.
    """
    return {
        split: sum(int(np.ceil(rows * (1 + reserve))) + context for rows in sizes) + context
        for split, sizes in _sizes(harvest, deal).items()
    }


def _sizes(harvest: HarvestConfig, deal: Deal) -> dict[str, list[int]]:
    """By split, rows of its shards: calibration first, and every part's training shards alike."""
    whole = harvest.tokens // deal.parts
    whole -= whole % harvest.rows_per_group
    training = [min(harvest.rows_per_shard, whole - done) for done in range(0, whole, harvest.rows_per_shard)]
    if deal.parts == 1:
        return {"train": [harvest.calibration_tokens, *training]}
    return {"calibration": [harvest.calibration_tokens]} | dict.fromkeys(deal.training, training)
