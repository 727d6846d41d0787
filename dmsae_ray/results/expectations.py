"""Outcomes stated before a run, held against its numbers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from dmsae_ray.config import ExpectConfig

FORMAT_VERSION = 1
HIT, MISS, NOT_AVAILABLE = "hit", "miss", "not available"


def judge(expectations: Sequence[ExpectConfig], numbers: dict[str, float]) -> dict[str, Any]:
    """Every expectation with its numbers and outcome, as expectations.json has them.

    A claim with a bound on both sides gives two entries. Where a number does not exist the outcome is `not available`,
    never a hit.
    """
    entries = []
    for expected in expectations:
        for relation, bound in (("above", expected.above), ("below", expected.below)):
            if bound is not None:
                entries.append(_judge(expected, relation, bound, numbers))
    return {"format_version": FORMAT_VERSION, "expectations": entries}


def _judge(expected: ExpectConfig, relation: str, bound: float | str, numbers: dict[str, float]) -> dict[str, Any]:
    bound_name = bound if isinstance(bound, str) else None
    value = numbers.get(expected.value)
    limit = numbers.get(bound) if isinstance(bound, str) else float(bound)
    why: str | None = None
    if value is None or limit is None:
        sides = ((expected.value, value), (bound_name, limit))
        missing = [name for name, number in sides if name is not None and number is None]
        outcome, why = NOT_AVAILABLE, "; ".join(_unknown(name, numbers) for name in missing)
    else:
        outcome = HIT if (value > limit if relation == "above" else value < limit) else MISS
    return {
        "claim": expected.claim,
        "value_name": expected.value,
        "value": value,
        "relation": relation,
        "bound_name": bound_name,
        "bound": limit,
        "outcome": outcome,
        "why": why,
    }


def _unknown(name: str, numbers: dict[str, float]) -> str:
    near = difflib.get_close_matches(name, numbers, n=1)
    return f"no number {name} in these results" + (f" (there is {near[0]})" if near else "")
