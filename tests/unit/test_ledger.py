"""The attribution ledger: sums that do not depend on who sent them, how often, or who died."""

import itertools
import random

import torch

from dmsae_ray.distill.attribution import AttributionSettings, total
from dmsae_ray.distill.ledger import ALL_DONE, WAIT, Ledger

SHARDS = 6


def partial(shard):
    return torch.rand(10, generator=torch.Generator().manual_seed(shard), dtype=torch.float64), 100 + shard


def drain(ledger, worker=0):
    while (shard := ledger.take(worker)) != ALL_DONE:
        assert shard != WAIT
        ledger.give(worker, shard, *partial(shard))


def test_scores_do_not_depend_on_order_or_repetition(tmp_path):
    scores = []
    for attempt in range(4):
        ledger = Ledger(tmp_path / str(attempt), SHARDS, "s")
        order = list(range(SHARDS))
        random.Random(attempt).shuffle(order)
        for shard in order + order[:attempt]:
            ledger.give(attempt, shard, *partial(shard))
        assert ledger.resent == attempt
        scores.append(total(ledger.partials(), AttributionSettings()))
    for a, b in itertools.combinations(scores, 2):
        assert torch.equal(a, b)


def test_every_shard_is_dealt_once_then_waited_for(tmp_path):
    ledger = Ledger(tmp_path, SHARDS, "s")
    assert sorted(ledger.take(i % 2) for i in range(SHARDS)) == list(range(SHARDS))
    assert ledger.take(0) == WAIT
    for shard in range(SHARDS):
        ledger.give(0, shard, *partial(shard))
    assert ledger.take(1) == ALL_DONE


def test_a_late_shard_is_dealt_again(tmp_path):
    ledger = Ledger(tmp_path, 2, "s", patience_s=0.0)
    assert ledger.take(0) == 0 and ledger.take(1) == 0


def test_a_lost_group_s_shards_are_dealt_anew_and_finished_ones_kept(tmp_path):
    ledger = Ledger(tmp_path, SHARDS, "s")
    ledger.give(0, ledger.take(0), *partial(0))
    ledger.take(0)
    ledger.redeal()
    assert ledger.take(0) == 1


def test_a_dead_ledger_goes_on_from_its_files(tmp_path):
    first = Ledger(tmp_path / "a", SHARDS, "s")
    for _ in range(3):
        shard = first.take(0)
        first.give(0, shard, *partial(shard))
    second = Ledger(tmp_path / "a", SHARDS, "s")
    assert second.done == first.done
    drain(second)
    whole = Ledger(tmp_path / "b", SHARDS, "s")
    drain(whole)
    assert torch.equal(total(second.partials(), AttributionSettings()), total(whole.partials(), AttributionSettings()))


def test_sums_of_another_sae_are_not_reused(tmp_path):
    drain(Ledger(tmp_path, SHARDS, "one"))
    assert Ledger(tmp_path, SHARDS, "two").done == set()


def test_mean_signed_takes_the_absolute_value_last():
    partials = [(torch.tensor([1.0, -3.0], dtype=torch.float64), 2), (torch.tensor([-1.0, -1.0], dtype=torch.float64), 2)]
    assert total(partials, AttributionSettings(aggregator="mean_signed")).tolist() == [0.0, 1.0]
    assert total(partials, AttributionSettings()).tolist() == [0.0, -1.0]
