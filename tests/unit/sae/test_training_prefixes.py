import math
from collections import Counter

import pytest
import torch

from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.training_prefixes import Prefixes

CORE, WIDTH = 7, 207


def prefixes(how="sampled", width=WIDTH, core=CORE, seed=3, ids=None, groups=5):
    settings = SAESettings(d=4, width=width, k=2, batch=8, prefixes=how, prefix_seed=seed)
    return Prefixes(settings, core, range(width - groups + 1, width + 1), ids)


def test_fixed_prefixes_are_the_groups_in_every_step():
    fixed = prefixes("fixed")
    assert fixed.ends(0) == fixed.ends(9) == [203, 204, 205, 206, 207]


def test_sampled_ones_are_nested_different_and_decided_by_seed_and_step():
    ends = [prefixes().ends(step) for step in range(50)]
    assert ends == [prefixes().ends(step) for step in range(50)]
    assert ends != [prefixes(seed=4).ends(step) for step in range(50)] and len({tuple(one) for one in ends}) > 45
    for one in ends:
        assert len(one) == 5 and one[-1] == WIDTH and one[0] > CORE
        assert sorted(set(one)) == one


def test_every_octave_of_sizes_is_cut_as_often_and_every_latent_is_once_the_last():
    one_cut = prefixes(groups=2)
    sizes = Counter(one_cut.ends(step)[0] - CORE for step in range(20_000))
    assert set(sizes) == set(range(1, 200))
    octave = math.log(2) / math.log(200)
    for low in (4, 16, 64):
        share = sum(sizes[size] for size in range(low, 2 * low)) / 20_000
        assert share == pytest.approx(octave, rel=0.1)


def test_a_rank_s_ends_count_its_own_latents():
    ids_F = torch.arange(1, WIDTH, 3)
    mine, whole = prefixes(ids=ids_F), prefixes()
    for step in range(20):
        assert mine.ends(step) == [int((ids_F < end).sum()) for end in whole.ends(step)]


def test_too_few_latents_are_named():
    assert prefixes(width=12, core=7).ends(0) == [8, 9, 10, 11, 12]
    with pytest.raises(ValueError, match="5 prefixes cannot be drawn from 4 free latents"):
        prefixes(width=11, core=7)
