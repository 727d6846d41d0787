"""Functional agreement and agreement by cycle over the pairs of a group, as plain JSON types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dmsae_ray.compare.course import NUMBERS
from dmsae_ray.compare.functional import MEASURES, NULLS, Functional
from dmsae_ray.compare.interval import spread
from dmsae_ray.compare.pair import PairResult


def functional_summary(members: Sequence[PairResult]) -> dict[str, Any]:
    """Spreads of the measures, of what chance gives for them, and, under `nulls`, of every null's numbers over the
    pairs for which it is available.

    `beyond`: by measure, the share of pairs beyond chance, of those that have such a null; None if none has. Empty
    where no pair was scored.
    """
    found = [pair.functional for pair in members]
    scored = [one for one in found if one is not None]
    if not scored:
        return {}

    def over(values: Sequence[float | None]) -> dict[str, Any] | None:
        return _spread(members, values)

    def of(name: str) -> list[float | None]:
        return [None if one is None else getattr(one, name) for one in found]

    def of_null(null: str, number: str) -> list[float | None]:
        return [
            None if one is None or not one.nulls[null].available else getattr(one.nulls[null], number) for one in found
        ]

    numbers = (*MEASURES, "firing_chance", "importance_pearson", "subspace_isotropic")
    return {name: over(of(name)) for name in numbers} | {
        "beyond": {measure: _beyond(scored, measure) for measure in MEASURES},
        "nulls": {
            null: {
                number: over(of_null(null, number)) for measure in measures for number in (measure, f"{measure}_bar")
            }
            for null, measures in NULLS.items()
        },
    }


def course_summary(members: Sequence[PairResult]) -> dict[str, Any]:
    """By cycle: `tokens` trained on until then, `pairs`, and a spread of each of `course.NUMBERS`.

    Over pairs whose cycles end at the same numbers of tokens, those that most pairs have.
    """
    ends = Counter(tuple(point.tokens for point in pair.course) for pair in members if pair.course)
    if not ends:
        return {}
    common = ends.most_common(1)[0][0]
    alike = [pair for pair in members if tuple(point.tokens for point in pair.course) == common]
    return {
        str(cycle): {"tokens": tokens, "pairs": len(alike)}
        | {name: _spread(alike, [getattr(pair.course[cycle], name) for pair in alike]) for name in NUMBERS}
        for cycle, tokens in enumerate(common)
    }


def _beyond(scored: Sequence[Functional], measure: str) -> float | None:
    known = [above for one in scored if (above := one.beyond(measure)) is not None]
    return sum(known) / len(known) if known else None


def _spread(members: Sequence[PairResult], values: Sequence[float | None]) -> dict[str, Any] | None:
    one = spread(values, [pair.seed_a for pair in members], [pair.seed_b for pair in members])
    return None if one is None else one.to_dict()
