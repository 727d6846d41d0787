"""The attribution ledger: sums that do not depend on who sent them, how often, or who died."""

import itertools
import random
from functools import partial as bound

import pytest
import torch
from partials import SHARDS, partial

from dmsae_ray.attribution.ledger import ALL_DONE, WAIT, Ledger
from dmsae_ray.attribution.scores import ScoreSettings, enough, scores

AGGREGATORS = ["mean_abs", "mean_signed", "quantile"]


def drain(ledger, worker=0):
    while (shard := ledger.take(worker)) != ALL_DONE:
        assert shard != WAIT
        ledger.give(worker, shard, partial(shard))


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_scores_do_not_depend_on_order_or_repetition(tmp_path, aggregator):
    found = []
    for attempt in range(4):
        ledger = Ledger(tmp_path / str(attempt), SHARDS, "s")
        order = list(range(SHARDS))
        random.Random(attempt).shuffle(order)
        for shard in order + order[:attempt]:
            ledger.give(attempt, shard, partial(shard))
        assert ledger.resent == attempt
        found.append(scores(ledger.partials(), ScoreSettings(aggregator)))
    assert bool((found[0] > 0).all())
    for a, b in itertools.combinations(found, 2):
        assert torch.equal(a, b)


def test_every_shard_is_dealt_once_then_waited_for(tmp_path):
    ledger = Ledger(tmp_path, SHARDS, "s")
    assert sorted(ledger.take(i % 2) for i in range(SHARDS)) == list(range(SHARDS))
    assert ledger.take(0) == WAIT
    for shard in range(SHARDS):
        ledger.give(0, shard, partial(shard))
    assert ledger.take(1) == ALL_DONE


def test_a_late_shard_is_dealt_again(tmp_path):
    ledger = Ledger(tmp_path, 2, "s", patience_s=0.0)
    assert ledger.take(0) == 0 and ledger.take(1) == 0


def test_a_lost_group_s_shards_are_dealt_anew_and_finished_ones_kept(tmp_path):
    ledger = Ledger(tmp_path, SHARDS, "s")
    ledger.give(0, ledger.take(0), partial(0))
    ledger.take(0)
    ledger.redeal()
    assert ledger.take(0) == 1


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_a_dead_ledger_goes_on_from_its_files(tmp_path, aggregator):
    first = Ledger(tmp_path / "a", SHARDS, "s")
    for _ in range(3):
        shard = first.take(0)
        first.give(0, shard, partial(shard))
    second = Ledger(tmp_path / "a", SHARDS, "s")
    assert second.done == first.done
    drain(second)
    settings = ScoreSettings(aggregator)
    assert torch.equal(
        scores(second.partials(), settings), scores([partial(shard) for shard in range(SHARDS)], settings)
    )


def test_sums_of_another_sae_are_not_reused(tmp_path):
    drain(Ledger(tmp_path, SHARDS, "one"))
    assert Ledger(tmp_path, SHARDS, "two").done == set()


def test_stages_double_until_what_is_there_suffices(tmp_path):
    asked = []

    def suffices(partials):
        asked.append(len(partials))
        return len(partials) >= 8

    ledger = Ledger(tmp_path, 11, "s", enough=suffices)
    assert [ledger.take(0), ledger.take(1)] == [0, 1] and ledger.take(0) == WAIT, (
        "the third shard waits for the stage's end"
    )
    for shard in (1, 0):
        ledger.give(0, shard, partial(shard))
    drain(ledger)
    assert asked == [2, 4, 8] and len(ledger.partials()) == 8 and ledger.done == set(range(8))


def test_stages_end_with_the_budget(tmp_path):
    ledger = Ledger(tmp_path, 5, "s", enough=lambda partials: False)
    drain(ledger)
    assert len(ledger.partials()) == 5


@pytest.mark.parametrize(("target", "shards"), [(0.4, 2), (0.6, 4), (0.9, 16)])
def test_how_many_shards_count_does_not_depend_on_workers_or_a_death(tmp_path, target, shards):
    """The core's agreement decides: workers that answer out of order, and a ledger that dies after each shard, find the
    same.
    """
    stop = bound(enough, settings=ScoreSettings(tau=0.7, until_jaccard=target))
    alone = Ledger(tmp_path / "alone", 32, "s", enough=stop)
    drain(alone)
    assert len(alone.partials()) == shards
    several, held = Ledger(tmp_path / "several", 32, "s", enough=stop), []
    while (shard := several.take(len(held))) != ALL_DONE:
        if shard != WAIT:
            held.append(shard)
        if shard == WAIT or len(held) == 3:
            late = held.pop()
            several.give(len(held), late, partial(late))
            several = Ledger(tmp_path / "several", 32, "s", enough=stop)
            held = []
    restarted = Ledger(tmp_path / "several", 32, "s", enough=stop)
    assert len(restarted.partials()) == shards
    assert torch.equal(scores(restarted.partials(), ScoreSettings()), scores(alone.partials(), ScoreSettings()))
