"""Agreement by cycle: cores that come to agree, and cores that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compared_chains import SETTINGS, D, compare_all, comparer, core_of, latents, make_chain, unit_rows

from dmsae_ray.compare.course import CycleCore
from dmsae_ray.compare.functional_summary import course_summary
from dmsae_ray.compare.summary import summarise
from dmsae_ray.results.numbers import consistency_numbers

SIZES = (12, 8, 10)


def with_course(seed, common, tokens=(100, 200, 300), **changes):
    """common: for each cycle how many members, those with the highest scores, are the same in all chains."""
    course = []
    for cycle, (size, same) in enumerate(zip(SIZES, common, strict=True)):
        W_ND = unit_rows(size, 1000 * seed + cycle + 500)
        W_ND[:same] = unit_rows(same, 9)
        scores = torch.arange(size, 0, -1).double()
        core = core_of(latents(W_ND), range(size), seed=seed, cycle=cycle, scores=scores)
        course.append(CycleCore.of(core, tokens[cycle], exempt=0))
    return replace(make_chain(seed, **changes), course=tuple(course))


def test_chains_that_come_to_agree_and_chains_that_do_not():
    (pair,) = compare_all([with_course(0, (0, 4, 8)), with_course(1, (0, 4, 8))], comparer(SETTINGS))
    first, middle, last = pair.course
    assert [(point.tokens, point.size_a, point.same_size) for point in pair.course] == [
        (100, 12, 8),
        (200, 8, 8),
        (300, 10, 8),
    ]
    assert first.pw_mcc_same_size < middle.pw_mcc_same_size < last.pw_mcc_same_size == pytest.approx(1)
    assert first.overlap_same_size < 0.2 and middle.overlap_same_size >= 0.5 and last.overlap_same_size == 1
    assert last.overlap == pytest.approx(0.8, abs=0.11), "at its own size the core has two members of its own"
    assert abs(first.pw_mcc - first.pw_mcc_chance) < 0.1 < last.pw_mcc - last.pw_mcc_chance
    # Chance is larger for larger cores, and the same throughout at one size.
    assert first.pw_mcc_chance > middle.pw_mcc_chance and len({p.pw_mcc_chance_same_size for p in pair.course}) == 1
    assert last.firing > last.firing_chance + 0.3 and first.firing < last.firing
    (flat,) = compare_all([with_course(0, (0, 0, 0)), with_course(1, (0, 0, 0))], comparer(SETTINGS))
    assert all(abs(p.pw_mcc_same_size - p.pw_mcc_chance_same_size) < 0.15 for p in flat.course)


def test_cycles_of_other_lengths_are_not_set_beside_each_other():
    (pair,) = compare_all([with_course(0, (1, 1, 1)), with_course(1, (1, 1, 1), (100, 200, 400))], comparer())
    assert pair.course == ()


def test_a_group_s_course_is_a_curve_with_named_numbers():
    pairs = compare_all([with_course(seed, (0, 4, 8)) for seed in range(4)], comparer(SETTINGS))
    curve = course_summary(pairs)
    assert list(curve) == ["0", "1", "2"] and [point["tokens"] for point in curve.values()] == [100, 200, 300]
    assert curve["2"]["pairs"] == 6 and curve["1"]["pw_mcc_same_size"]["interval"] is not None
    assert curve["0"]["pw_mcc_same_size"]["interval"][1] < curve["2"]["pw_mcc_same_size"]["mean"]
    numbers = consistency_numbers({"summary": summarise(pairs).to_dict(), "pairs": []})
    assert numbers["consistency.base.seed.course.2.pw_mcc_same_size"] == pytest.approx(1)
    assert numbers["consistency.base.seed.course.0.tokens"] == 100
    assert numbers["consistency.base.seed.functional.nulls.permuted.firing_bar"] < 0.5
    assert 0 <= numbers["consistency.base.seed.functional.beyond.firing"] <= 1
    short = [replace(pair, course=()) for pair in pairs]
    assert course_summary(short) == {} and course_summary([*short[:5], pairs[5]])["0"]["pairs"] == 1


def test_the_exempt_core_s_members_have_no_threshold():
    sae = latents(unit_rows(6, 1), theta=0.5)
    cycle = CycleCore.of(core_of(sae, [1, 3, 5]), tokens=10, exempt=2)
    assert cycle.latents.theta_N.tolist() == [0, 0.5, 0.5]
    rows = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cycle.fires(rows), (cycle.latents.activations(rows) > 0).T)
