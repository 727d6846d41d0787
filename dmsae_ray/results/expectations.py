"""Outcomes stated before a run, held against its numbers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from dmsae_ray.compare.samples import Sample, difference
from dmsae_ray.config import ExpectConfig

FORMAT_VERSION = 2
HIT, MISS, OPEN, NOT_AVAILABLE = "hit", "miss", "open", "not available"
BY_INTERVAL, BY_MEANS = "interval", "means"


def judge(
    expectations: Sequence[ExpectConfig], numbers: Mapping[str, float], samples: Mapping[str, Sample]
) -> dict[str, Any]:
    """Every expectation with its numbers and outcome, as expectations.json has them.

    A claim with a bound on both sides gives two entries. A 95 % interval decides where there is one: `hit` if it lies
    beyond the bound, `miss` if on the other side, else `open`. It is that of the value, or, where the bound is measured
    too, of value - bound over the seeds and k that both have in common (`over`; `compare/samples.py`), as are then the
    two numbers. `by` says whether an interval decided or only means could be compared. Where a number does not exist
    the outcome is `not available`, never a hit. samples: behind those numbers that are means over chains or pairs.
    """
    entries = []
    for expected in expectations:
        for relation, bound in (("above", expected.above), ("below", expected.below)):
            if bound is not None:
                entries.append(_judge(expected, relation, bound, numbers, samples))
    return {"format_version": FORMAT_VERSION, "expectations": entries}


def _judge(
    expected: ExpectConfig,
    relation: str,
    bound: float | str,
    numbers: Mapping[str, float],
    samples: Mapping[str, Sample],
) -> dict[str, Any]:
    names = [expected.value, *([bound] if isinstance(bound, str) else [])]
    value, limit = numbers.get(expected.value), numbers.get(bound) if isinstance(bound, str) else float(bound)
    outcome, by, over, ends, why = NOT_AVAILABLE, None, None, None, None
    ours, theirs = samples.get(expected.value), samples.get(bound) if isinstance(bound, str) else None
    if value is None or limit is None:
        why = "; ".join(_unknown(name, numbers) for name in names if name not in numbers)
    else:
        if ours is not None and theirs is not None:
            found = difference(ours, theirs)
            value, limit, ends, over = found.first, found.second, found.interval, found.over
            outcome = _outcome(relation, value - limit, ends)
        elif ours is not None and not isinstance(bound, str):
            ends = ours.interval()
            outcome = _outcome(relation, value - limit, None if ends is None else (ends[0] - limit, ends[1] - limit))
        else:
            outcome = _outcome(relation, value - limit, None)
        by = BY_MEANS if ends is None else BY_INTERVAL
        why = _means_only(names, samples) if ends is None else None
    return {
        "claim": expected.claim,
        "value_name": expected.value,
        "value": value,
        "relation": relation,
        "bound_name": bound if isinstance(bound, str) else None,
        "bound": limit,
        "outcome": outcome,
        "by": by,
        "interval": None if ends is None else list(ends),
        "over": over,
        "why": why,
    }


def _outcome(relation: str, margin: float, ends: tuple[float, float] | None) -> str:
    """margin: value - bound; ends: its interval."""
    if relation == "below":
        margin, ends = -margin, None if ends is None else (-ends[1], -ends[0])
    if ends is None:
        return HIT if margin > 0 else MISS
    return HIT if ends[0] > 0 else MISS if ends[1] < 0 else OPEN


def _means_only(names: Sequence[str], samples: Mapping[str, Sample]) -> str:
    """Why there is no interval."""
    single = [name for name in names if name not in samples]
    if single:
        return f"means only: {' and '.join(single)} is no mean over seeds"
    return "means only: no interval below four seeds in common, or where all are equal"


def _unknown(name: str, numbers: Mapping[str, float]) -> str:
    near = difflib.get_close_matches(name, numbers, n=1)
    return f"no number {name} in these results" + (f" (there is {near[0]})" if near else "")
