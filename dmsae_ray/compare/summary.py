"""Agreement in a few numbers: pairs summed up by arm and by what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmsae_ray.compare.interval import Spread, spread
from dmsae_ray.compare.pair import MATCHED_COMPUTE, NULLS, PairResult

SCORES = ("pw_mcc", "overlap", "mmcs", "activation", "pw_mcc_dictionary")
"""What is measured of a pair."""
NULL_NUMBERS = ("mean", "p99", "overlap_mean", "overlap_p99", "mmcs_mean", "activation_mean", "activation_p99", "draws")
"""What is drawn of a null of cores, and how often."""


@dataclass(frozen=True)
class NullSummary:
    """One null over the pairs of a group, those for which it is available."""

    available: int
    """pairs for which it is"""
    above: float | None
    """share of these pairs whose PW-MCC exceeds the null's 99th percentile"""
    excess: dict[str, Spread | None]
    """the cores' `pw_mcc`, `overlap` and `activation` less the null's mean, pair by pair; against cycle 0 and
    matched compute at the same size
    """
    numbers: dict[str, Spread | None]
    """the null's own NULL_NUMBERS"""


@dataclass(frozen=True)
class GroupSummary:
    """Pairs of the same arms that differ in the same thing."""

    pairs: int
    """pairs compared"""
    of: int
    """pairs there were to compare; more than `pairs` if they were sampled"""
    scored: int
    """pairs whose cores could be compared"""
    seeds: int
    """different seeds among the scored pairs"""
    scores: dict[str, Spread | None]
    """by name, SCORES; None if no pair has it"""
    nulls: dict[str, NullSummary]
    """of the cores, by name"""
    dictionary_nulls: dict[str, Spread | None]
    """mean PW-MCC of whole dictionaries under each null, where available"""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; scores stand beside the counts."""
        return {
            "pairs": self.pairs,
            "of": self.of,
            "scored": self.scored,
            "seeds": self.seeds,
            **_plain(self.scores),
            "nulls": {
                name: {
                    "available": null.available,
                    "above": null.above,
                    "excess": _plain(null.excess),
                    **_plain(null.numbers),
                }
                for name, null in self.nulls.items()
            },
            "dictionary_nulls": _plain(self.dictionary_nulls),
        }


@dataclass(frozen=True)
class Summary:
    """A study's agreement."""

    available: bool
    """whether any pair was scored"""
    reason: str | None
    """why not"""
    groups: dict[str, GroupSummary]
    """by PairResult.group, in the order in which they occur"""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        groups = {name: group.to_dict() for name, group in self.groups.items()}
        return {"available": self.available, "reason": self.reason, "groups": groups}


def summarise(pairs: Sequence[PairResult], of: Mapping[str, int] | None = None, seed: int = 0) -> Summary:
    """Agreement by group. of: how many pairs each group had before sampling; None: all were compared. seed: of the
    resampling.

    One chain alone has no agreement: not available, never 1.
    """
    names = list(dict.fromkeys(pair.group for pair in pairs))
    groups = {}
    for name in names:
        members = [pair for pair in pairs if pair.group == name]
        groups[name] = _group(members, len(members) if of is None else of[name], seed)
    reason = None
    if not pairs:
        reason = "fewer than two chains finished: agreement needs two"
    elif not any(group.scored for group in groups.values()):
        reason = "no pair could be scored: " + "; ".join(sorted({pair.reason for pair in pairs if pair.reason}))
    return Summary(available=reason is None, reason=reason, groups=groups)


def _group(members: list[PairResult], of: int, seed: int) -> GroupSummary:
    scored = [pair for pair in members if pair.pw_mcc is not None]

    def over(value: Callable[[PairResult, str], float | None], what: str, among: list[PairResult]) -> Spread | None:
        return spread(
            [value(pair, what) for pair in among],
            [pair.seed_a for pair in among],
            [pair.seed_b for pair in among],
            seed,
        )

    def null_summary(name: str) -> NullSummary:
        judged = [pair for pair in scored if name in pair.nulls and pair.nulls[name].available]
        return NullSummary(
            available=len(judged),
            above=sum(_is_above(pair, name) for pair in judged) / len(judged) if judged else None,
            excess={
                score: over(lambda pair, score: _excess(pair, name, score), score, judged)
                for score in ("pw_mcc", "overlap", "activation")
            },
            numbers={
                number: over(lambda pair, number: getattr(pair.nulls[name], number), number, judged)
                for number in NULL_NUMBERS
            },
        )

    def dictionary(pair: PairResult, name: str) -> float | None:
        null = pair.dictionary_nulls.get(name)
        return null.mean if null is not None and null.available else None

    return GroupSummary(
        pairs=len(members),
        of=of,
        scored=len(scored),
        seeds=len({seed for pair in scored for seed in (pair.seed_a, pair.seed_b)}),
        scores={name: over(getattr, name, members) for name in SCORES},
        nulls={name: null_summary(name) for name in NULLS},
        dictionary_nulls={name: over(dictionary, name, members) for name in NULLS},
    )


def _at_null_size(pair: PairResult, name: str, score: str) -> float | None:
    """The cores' score at the null's sizes: a plain SAE may have fewer candidates than a core has members."""
    cut = name in ("cycle0", MATCHED_COMPUTE)
    return getattr(pair.nulls[name], f"core_{score}_same_size") if cut else getattr(pair, score)


def _is_above(pair: PairResult, name: str) -> bool:
    """Whether the cores' PW-MCC exceeds the null's 99th percentile."""
    own, p99 = _at_null_size(pair, name, "pw_mcc"), pair.nulls[name].p99
    assert own is not None and p99 is not None, "cores that were scored have an available null's numbers"
    return own > p99


def _excess(pair: PairResult, name: str, score: str) -> float | None:
    own = _at_null_size(pair, name, score)
    null = getattr(pair.nulls[name], "mean" if score == "pw_mcc" else f"{score}_mean")
    return None if own is None or null is None else own - null


def _plain(spreads: Mapping[str, Spread | None]) -> dict[str, Any]:
    return {name: None if one is None else one.to_dict() for name, one in spreads.items()}
