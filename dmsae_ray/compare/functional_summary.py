"""Functional agreement and agreement by cycle over the pairs of a group, as plain JSON types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dmsae_ray.compare.course import NUMBERS
from dmsae_ray.compare.functional import MEASURES, NULLS, Functional
from dmsae_ray.compare.pair import PairResult
from dmsae_ray.compare.samples import Sample, of_pairs

NUMBERS_OF_PAIR = (*MEASURES, "firing_chance", "importance_pearson", "subspace_isotropic")
"""What is measured of a pair, and what chance gives for it without draws."""


def functional_samples(members: Sequence[PairResult]) -> dict[str, Sample]:
    """By name: `functional.firing`, `functional.nulls.permuted.firing_bar`; a null's numbers are those of the pairs for
    which it is available.
    """
    found = [pair.functional for pair in members]

    def of_null(null: str, number: str) -> list[float | None]:
        return [
            None if one is None or not one.nulls[null].available else getattr(one.nulls[null], number) for one in found
        ]

    samples = {
        f"functional.{name}": of_pairs(members, [None if one is None else getattr(one, name) for one in found])
        for name in NUMBERS_OF_PAIR
    }
    return samples | {
        f"functional.nulls.{null}.{number}": of_pairs(members, of_null(null, number))
        for null, measures in NULLS.items()
        for measure in measures
        for number in (measure, f"{measure}_bar")
    }


def functional_summary(members: Sequence[PairResult]) -> dict[str, Any]:
    """Spreads of the measures, of what chance gives for them, and, under `nulls`, of every null's numbers over the
    pairs for which it is available.

    `beyond`: by measure, the share of pairs beyond chance, of those that have such a null; None if none has. Empty
    where no pair was scored.
    """
    scored = [pair.functional for pair in members if pair.functional is not None]
    if not scored:
        return {}
    samples = functional_samples(members)

    def over(name: str) -> dict[str, Any] | None:
        return _spread(samples[f"functional.{name}"])

    return {name: over(name) for name in NUMBERS_OF_PAIR} | {
        "beyond": {measure: _beyond(scored, measure) for measure in MEASURES},
        "nulls": {
            null: {
                number: over(f"nulls.{null}.{number}") for measure in measures for number in (measure, f"{measure}_bar")
            }
            for null, measures in NULLS.items()
        },
    }


def course_samples(members: Sequence[PairResult]) -> dict[str, Sample]:
    """By name, `course.<cycle>.<number>`, over the pairs of `course_summary`."""
    alike, common = _alike(members)
    return {
        f"course.{cycle}.{name}": of_pairs(alike, [getattr(pair.course[cycle], name) for pair in alike])
        for cycle in range(len(common))
        for name in NUMBERS
    }


def course_summary(members: Sequence[PairResult]) -> dict[str, Any]:
    """By cycle: `tokens` trained on until then, `pairs`, and a spread of each of `course.NUMBERS`.

    Over pairs whose cycles end at the same numbers of tokens, those that most pairs have.
    """
    alike, common = _alike(members)
    samples = course_samples(members)
    return {
        str(cycle): {"tokens": tokens, "pairs": len(alike)}
        | {name: _spread(samples[f"course.{cycle}.{name}"]) for name in NUMBERS}
        for cycle, tokens in enumerate(common)
    }


def _alike(members: Sequence[PairResult]) -> tuple[list[PairResult], tuple[int, ...]]:
    """The pairs whose cycles end at the numbers of tokens that most pairs have, and these."""
    ends = Counter(tuple(point.tokens for point in pair.course) for pair in members if pair.course)
    if not ends:
        return [], ()
    common = ends.most_common(1)[0][0]
    return [pair for pair in members if tuple(point.tokens for point in pair.course) == common], common


def _beyond(scored: Sequence[Functional], measure: str) -> float | None:
    known = [above for one in scored if (above := one.beyond(measure)) is not None]
    return sum(known) / len(known) if known else None


def _spread(sample: Sample) -> dict[str, Any] | None:
    one = sample.spread()
    return None if one is None else one.to_dict()
