"""Agreement in a few numbers: pairs summed up by arm and by what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmsae_ray.compare.functional_summary import (
    course_samples,
    course_summary,
    functional_samples,
    functional_summary,
)
from dmsae_ray.compare.interval import COSINE, SHARE, Spread
from dmsae_ray.compare.pair import MATCHED_COMPUTE, NULLS, PairResult
from dmsae_ray.compare.samples import Sample, of_pairs

RANGES = {"pw_mcc": COSINE, "overlap": SHARE, "mmcs": COSINE, "activation": COSINE, "pw_mcc_dictionary": COSINE}
SCORES = tuple(RANGES)
"""What is measured of a pair."""
EXCESSES = ("pw_mcc", "overlap", "activation")
"""Which of them are also given less a null's mean."""
NULL_NUMBERS = ("mean", "p99", "overlap_mean", "overlap_p99", "mmcs_mean", "activation_mean", "activation_p95", "draws")
"""What is drawn of a null of cores, and how often."""


@dataclass(frozen=True)
class NullSummary:
    """One null over the pairs of a group, those for which it is available."""

    available: int
    """pairs for which it is"""
    above: float | None
    """share of these pairs, as far as the null has one, whose PW-MCC exceeds its 99th percentile"""
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
    functional: dict[str, Any]
    """what latents are used for, see `functional_summary`"""
    course: dict[str, Any]
    """agreement after each cycle, see `course_summary`"""

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
            "functional": self.functional,
            "course": self.course,
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


def summarise(pairs: Sequence[PairResult], of: Mapping[str, int] | None = None) -> Summary:
    """Agreement by group. of: how many pairs each group had before sampling; None: all were compared.

    One chain alone has no agreement: not available, never 1.
    """
    names = list(dict.fromkeys(pair.group for pair in pairs))
    groups = {}
    for name in names:
        members = [pair for pair in pairs if pair.group == name]
        groups[name] = _group(members, len(members) if of is None else of[name])
    reason = None
    if not pairs:
        reason = "fewer than two chains finished: agreement needs two"
    elif not any(group.scored for group in groups.values()):
        reason = "no pair could be scored: " + "; ".join(sorted({pair.reason for pair in pairs if pair.reason}))
    return Summary(available=reason is None, reason=reason, groups=groups)


def samples_of(members: Sequence[PairResult]) -> dict[str, Sample]:
    """All that is measured of the pairs of a group, by name: `pw_mcc`, `nulls.covariance.p99`,
    `nulls.cycle0.excess.pw_mcc`, `dictionary_nulls.covariance`, `functional.firing`, `course.0.pw_mcc`. A null's
    numbers are those of scored pairs for which it is available.
    """
    found = {name: of_pairs(members, [getattr(pair, name) for pair in members], RANGES[name]) for name in SCORES}
    for null in NULLS:
        judged = _judged(members, null)
        for score in EXCESSES:
            found[f"nulls.{null}.excess.{score}"] = of_pairs(judged, [_excess(pair, null, score) for pair in judged])
        for number in NULL_NUMBERS:
            found[f"nulls.{null}.{number}"] = of_pairs(
                judged,
                [getattr(pair.nulls[null], number) for pair in judged],
                _range_of(number),
            )
        found[f"dictionary_nulls.{null}"] = of_pairs(
            members, [_dictionary_null(pair, null) for pair in members], COSINE
        )
    return found | functional_samples(members) | course_samples(members)


def _judged(members: Sequence[PairResult], null: str) -> list[PairResult]:
    """The scored pairs for which a null is available."""
    return [pair for pair in members if pair.pw_mcc is not None and null in pair.nulls and pair.nulls[null].available]


def _range_of(number: str) -> tuple[float, float] | None:
    if number == "draws":
        return None
    return SHARE if number.startswith("overlap") else COSINE


def _group(members: list[PairResult], of: int) -> GroupSummary:
    scored = [pair for pair in members if pair.pw_mcc is not None]
    spreads = {name: sample.spread() for name, sample in samples_of(members).items()}

    def null_summary(name: str) -> NullSummary:
        judged = _judged(members, name)
        above = [verdict for pair in judged if (verdict := _is_above(pair, name)) is not None]
        return NullSummary(
            available=len(judged),
            above=sum(above) / len(above) if above else None,
            excess={score: spreads[f"nulls.{name}.excess.{score}"] for score in EXCESSES},
            numbers={number: spreads[f"nulls.{name}.{number}"] for number in NULL_NUMBERS},
        )

    return GroupSummary(
        pairs=len(members),
        of=of,
        scored=len(scored),
        seeds=len({seed for pair in scored for seed in (pair.seed_a, pair.seed_b)}),
        scores={name: spreads[name] for name in SCORES},
        nulls={name: null_summary(name) for name in NULLS},
        dictionary_nulls={name: spreads[f"dictionary_nulls.{name}"] for name in NULLS},
        functional=functional_summary(members),
        course=course_summary(members),
    )


def _dictionary_null(pair: PairResult, name: str) -> float | None:
    null = pair.dictionary_nulls.get(name)
    return null.mean if null is not None and null.available else None


def _at_null_size(pair: PairResult, name: str, score: str) -> float | None:
    """The cores' score at the null's sizes: a plain SAE may have fewer candidates than a core has members."""
    cut = name in ("cycle0", MATCHED_COMPUTE)
    return getattr(pair.nulls[name], f"core_{score}_same_size") if cut else getattr(pair, score)


def _is_above(pair: PairResult, name: str) -> bool | None:
    """Whether the cores' PW-MCC exceeds the null's 99th percentile; None where its draws are too few to carry one."""
    own, p99 = _at_null_size(pair, name, "pw_mcc"), pair.nulls[name].p99
    assert own is not None, "cores that were scored have an available null's numbers"
    return None if p99 is None else own > p99


def _excess(pair: PairResult, name: str, score: str) -> float | None:
    own = _at_null_size(pair, name, score)
    null = getattr(pair.nulls[name], "mean" if score == "pw_mcc" else f"{score}_mean")
    return None if own is None or null is None else own - null


def _plain(spreads: Mapping[str, Spread | None]) -> dict[str, Any]:
    return {name: None if one is None else one.to_dict() for name, one in spreads.items()}
