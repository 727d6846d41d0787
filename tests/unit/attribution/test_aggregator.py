"""The actor's class, as an object: many SAEs' attributions side by side. The actor itself: pipeline/test_workers.py."""

import torch
from partials import SHARDS, partial

from dmsae_ray.attribution.aggregator import Account, Aggregator
from dmsae_ray.attribution.ledger import ALL_DONE
from dmsae_ray.attribution.scores import ScoreSettings


def aggregator():
    return Aggregator.__ray_metadata__.modified_class()


def account(folder, name: str, **settings: str) -> Account:
    return Account(str(folder / name), SHARDS, name, ScoreSettings(**settings))


def test_saes_share_an_aggregator_and_keep_apart(tmp_path):
    """Each with its own shards and settings, though they come and go by turns."""
    one, other = account(tmp_path, "one"), account(tmp_path, "other", aggregator="mean_signed")
    shared, alone = aggregator(), {}
    for mine in (one, other):
        shared.begin(mine)
        by_itself = aggregator()
        copy = Account(mine.folder + "-alone", SHARDS, mine.stamp, mine.settings)
        for shard in range(SHARDS):
            by_itself.give(copy, 0, shard, partial(shard + (mine is other)))
        alone[mine] = by_itself.total(copy)
    for _ in range(SHARDS):
        for mine in (one, other):
            shard = shared.take(mine, 0)
            shared.give(mine, 0, shard, partial(shard + (mine is other)))
    for mine in (one, other):
        assert shared.take(mine, 0) == ALL_DONE
        assert torch.equal(shared.total(mine).scores_P, alone[mine].scores_P)
    assert not torch.equal(shared.total(one).scores_P, shared.total(other).scores_P)


def test_a_ledger_that_was_dropped_goes_on_from_its_files(tmp_path):
    shared, first = aggregator(), account(tmp_path, "first")
    shared.give(first, 0, 0, partial(0))
    for number in range(shared.OPEN + 1):
        shared.begin(account(tmp_path, f"later-{number}"))
    assert len(shared._ledgers) == shared.OPEN and first not in shared._ledgers
    assert shared.finished(first) == {0}
    for shard in range(1, SHARDS):
        shared.give(first, 0, shard, partial(shard))
    assert shared.total(first).shards == SHARDS
