"""Which sequences go into which shard."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmsae_ray.activations.shard_plan import ShardPlan, plan_shards, rows_for_plan
from dmsae_ray.config import HarvestConfig
from dmsae_ray.corpus.split import UNDEALT, Deal

ROWS_N = np.random.default_rng(0).integers(4, 29, size=400).astype(np.int32)


def plans_of(rows_N=ROWS_N, tokens=2048, calibration=256, per_shard=512, per_group=64, seed=1, reserve=0.0):
    harvest = harvest_of(tokens, calibration, per_shard, per_group, seed)
    return plan_shards({"train": rows_N}, harvest, UNDEALT, reserve)


def harvest_of(tokens=2048, calibration=256, per_shard=512, per_group=64, seed=1):
    return HarvestConfig(
        tokens=tokens, calibration_tokens=calibration, rows_per_shard=per_shard, rows_per_group=per_group, seed=seed
    )


@settings(deadline=None)
@given(st.integers(64, 2100), st.sampled_from([128, 256, 512]), st.integers(0, 5), st.sampled_from([0.0, 0.05, 0.5]))
def test_no_sequence_is_in_two_shards_and_each_has_just_enough(tokens, per_shard, seed, reserve):
    plans = plans_of(tokens=tokens, per_shard=per_shard, seed=seed, reserve=reserve)
    taken = [sequence for plan in plans for sequence in plan.sequences + plan.spare]
    assert len(taken) == len(set(taken)) and set(taken) <= set(range(len(ROWS_N)))
    for plan in plans:
        for sequences, wanted in ((plan.sequences, plan.rows), (plan.spare, int(np.ceil(plan.rows * reserve)))):
            rows = ROWS_N[list(sequences)]
            assert rows.sum() >= wanted > rows[:-1].sum() or not wanted, "enough, and not without the last sequence"
    assert [plan.sequences for plan in plans] == [
        plan.sequences for plan in plans_of(tokens=tokens, per_shard=per_shard, seed=seed)
    ]
    whole = tokens - tokens % 64
    assert [plan.rows for plan in plans] == [
        256,
        *[per_shard] * (whole // per_shard),
        *[whole % per_shard] * (whole % per_shard > 0),
    ]
    assert [plan.name for plan in plans] == ["calibration", *(f"train-{i:05d}" for i in range(len(plans) - 1))]
    assert [plan.number for plan in plans] == list(range(len(plans))) and plans[1].file == "shards/train-00000.parquet"


def test_a_plan_is_its_seed_s():
    assert plans_of() == plans_of() and plans_of(seed=2)[1].sequences != plans_of()[1].sequences
    first, second = plans_of()[1:3]
    assert sorted(first.permutation(7)) == list(range(first.rows))
    assert (first.permutation(7) == first.permutation(7)).all()
    assert (first.permutation(7) != first.permutation(8)).any() and (
        first.permutation(7) != second.permutation(7)
    ).any()


def test_more_shards_leave_those_that_were_there_as_they_are():
    assert plans_of(tokens=2048)[:3] == plans_of(tokens=1024)


def test_a_plan_travels_as_json():
    for plan in plans_of():
        assert ShardPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_last_sequences_are_used_to_the_last_row():
    rows_N = np.full(100, 8)
    assert sum(len(plan.sequences) for plan in plans_of(rows_N, tokens=544, calibration=256, per_group=32)) == 100
    with pytest.raises(ValueError, match="gives only 800 rows"):
        plans_of(rows_N, tokens=576, calibration=256, per_group=32)
    with pytest.raises(ValueError, match="gives only 800 rows"):
        plans_of(rows_N, tokens=544, calibration=257, per_group=32)


def test_a_corpus_that_is_too_small_says_how_much_it_has():
    with pytest.raises(
        ValueError, match=r"harvest\.tokens 2048 \+ harvest\.calibration_tokens 256.*gives only 900 rows; ask for fewer"
    ):
        plans_of(np.full(100, 9))
    with pytest.raises(ValueError, match="training split gives only 0 rows"):
        plans_of(np.zeros(0, dtype=np.int32))
    enough = np.full(100, 24)
    plans_of(enough)
    # What is left is the reserve, shard by shard.
    plans = plans_of(enough, reserve=0.05)
    assert [plan.sequences for plan in plans] == [plan.sequences for plan in plans_of(enough)]
    assert (
        len(plans[0].spare) == 1
        and sum(len(plan.spare) for plan in plans) + sum(len(plan.sequences) for plan in plans) == 100
    )


# -- parts
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts, tokens, reserve", [(2, 2048, 0.0), (3, 2000, 0.05), (4, 1100, 0.5)])
def test_every_part_has_as_many_shards_and_rows_of_its_own_split(parts, tokens, reserve):
    deal = Deal(parts, 0.2)
    rows = {split: np.random.default_rng(place).integers(4, 29, 400) for place, split in enumerate(deal.splits)}
    plans = plan_shards(rows, harvest_of(tokens), deal, reserve)
    assert plans[0].split == plans[0].name == "calibration" and plans[0].rows == 256
    each = (len(plans) - 1) // parts
    assert [plan.name for plan in plans[1:]] == [f"train-{i:05d}" for i in range(parts * each)]
    assert [plan.number for plan in plans] == list(range(len(plans))), "no two permute their rows alike"
    assert [plan.split for plan in plans[1:]] == [f"train-{part}" for part in range(parts) for _ in range(each)]
    sizes = [plan.rows for plan in plans[1:]]
    assert sizes == sizes[:each] * parts and sum(sizes[:each]) == tokens // parts // 64 * 64
    for split in ("calibration", *deal.training):
        taken = [s for plan in plans if plan.split == split for s in plan.sequences + plan.spare]
        assert len(taken) == len(set(taken))


def test_a_part_that_is_too_small_is_named_with_what_it_lacks():
    deal, rows = Deal(2, 0.2), {"calibration": np.full(40, 10), "train-0": np.full(200, 10), "train-1": np.full(99, 10)}
    with pytest.raises(
        ValueError,
        match=r"dealt to sweep\.parts 2: the corpus's train-1 text gives only 990 rows, for 2 shard.* with 1024 in all",
    ):
        plan_shards(rows, harvest_of(), deal)
    assert plan_shards(rows | {"train-1": np.full(104, 10)}, harvest_of(), deal)


@pytest.mark.parametrize("deal", [UNDEALT, Deal(3, 0.2)])
def test_rows_asked_for_suffice_whatever_the_sequences(deal):
    """As many rows of every split as are asked for, in sequences of at most the context's, always make the shards."""
    context = 40
    for seed in range(20):
        wanted, rng = rows_for_plan(harvest_of(), deal, context, 0.1), np.random.default_rng(seed)
        rows = {}
        for split, tokens in wanted.items():
            drawn = rng.integers(1, context, tokens)
            rows[split] = drawn[: int(np.searchsorted(np.cumsum(drawn), tokens)) + 1]
        plans = plan_shards(rows, harvest_of(), deal, 0.1)
        for plan in plans:
            assert rows[plan.split][list(plan.spare)].sum() >= plan.rows * 0.1
