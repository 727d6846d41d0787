"""Which sequences go into which shard: decided before anyone computes. Letters: N sequences."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np

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
        return ShardPlan(str(tree["name"]), int(tree["number"]), sequences, int(tree["rows"]), spare)


def plan_shards(
    rows_N: np.ndarray, tokens: int, calibration: int, per_shard: int, per_group: int, seed: int, reserve: float = 0.0
) -> list[ShardPlan]:
    """Deal a seeded permutation of all sequences to the calibration shard and to the training shards.

    rows_N: rows that each sequence gives. reserve: rows in a shard's spare sequences, as a share of its own; they come
    after those of all shards, so that without a dropped row the shards are the same whatever the reserve; of a corpus
    that ends before, less. No sequence is in two shards, so the calibration rows are held back from training. Raises
    ValueError if the corpus is too small without any reserve.
    """
    order = np.random.default_rng([seed, SEQUENCES]).permutation(len(rows_N))
    ends = np.cumsum(rows_N[order], dtype=np.int64)
    sizes = _sizes(tokens, calibration, per_shard, per_group)
    plans, first = [], 0
    for number, rows in enumerate(sizes):
        before = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, before + rows))
        if last >= len(order):
            raise ValueError(
                f"harvest.tokens {tokens} + harvest.calibration_tokens {calibration}: the corpus's training split "
                f"gives only {int(ends[-1]) if len(ends) else 0} rows; ask for fewer, or give corpus.source more text"
            )
        name = "calibration" if number == 0 else f"train-{number - 1:05d}"
        plans.append(ShardPlan(name, number, tuple(int(i) for i in order[first : last + 1]), int(rows)))
        first = last + 1
    for place, plan in enumerate(plans if reserve else ()):
        before = ends[first - 1] if first else 0
        last = min(int(np.searchsorted(ends, before + int(np.ceil(plan.rows * reserve)))), len(order) - 1)
        plans[place] = replace(plan, spare=tuple(int(i) for i in order[first : last + 1]))
        first = last + 1
    return plans


def rows_for_plan(
    tokens: int, calibration: int, per_shard: int, per_group: int, context: int, reserve: float = 0.0
) -> int:
    """Rows of sequences with which `plan_shards` surely succeeds: a shard takes whole sequences, so it leaves part of
    one over.
    """
    return (
        sum(int(np.ceil(rows * (1 + reserve))) + context for rows in _sizes(tokens, calibration, per_shard, per_group))
        + context
    )


def _sizes(tokens: int, calibration: int, per_shard: int, per_group: int) -> list[int]:
    """Rows of the calibration shard and of each training shard."""
    whole = tokens - tokens % per_group
    return [calibration] + [min(per_shard, whole - done) for done in range(0, whole, per_shard)]
