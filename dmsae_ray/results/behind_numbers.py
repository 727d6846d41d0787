"""The samples behind named numbers: what each of them is the mean of, with the seeds and k of every value. A number
that is no mean over chains or pairs, such as a count, has none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from dmsae_ray.compare.functional import MEASURES
from dmsae_ray.compare.interval import COSINE, SHARE
from dmsae_ray.compare.pair import PairResult
from dmsae_ray.compare.rediscovery import COMPARED
from dmsae_ray.compare.samples import Origin, Sample
from dmsae_ray.compare.summary import samples_of
from dmsae_ray.results.numbers import OF_ONE_K, evaluation_values


def samples_by_name(
    evaluation: list[dict[str, Any]], comparison: dict[str, Any] | None, consensus: dict[str, Any] | None
) -> dict[str, Sample]:
    """By the names of `numbers.numbers_of`, those with a value."""
    found = dict(_of_chains(evaluation))
    if comparison is not None:
        found |= dict(_of_pairs([PairResult.from_dict(pair) for pair in comparison.get("pairs", ())]))
    if consensus is not None:
        found |= dict(_of_plain(consensus.get("rediscovery") or []))
    return {name: sample for name, sample in found.items() if sample.values}


def _of_chains(rows: list[dict[str, Any]]) -> Iterator[tuple[str, Sample]]:
    origins: dict[str, list[Origin]] = defaultdict(list)
    values: dict[str, list[float]] = defaultdict(list)
    for row, name, value in evaluation_values(rows):
        origins[name].append(Origin.of(row["seed"], row["seed"], row["k"], row["k"]))
        values[name].append(value)
    yield from ((name, Sample(tuple(values[name]), tuple(origins[name]))) for name in values)


def _of_pairs(pairs: list[PairResult]) -> Iterator[tuple[str, Sample]]:
    groups: dict[str, list[PairResult]] = defaultdict(list)
    for pair in pairs:
        groups[f"consistency.{pair.group.replace('/', '.')}"].append(pair)
    for group, members in groups.items():
        for name, sample in samples_of(members).items():
            yield f"{group}.{name}", sample
            if name in (*OF_ONE_K, *(f"functional.{measure}" for measure in MEASURES)):
                for k in {k for origin in sample.origins for k in origin.ks}:
                    yield f"{group}.k{k}.{name}", sample.at_k(k)


def _of_plain(rows: list[dict[str, Any]]) -> Iterator[tuple[str, Sample]]:
    """Re-discovery, by arm, and by arm and k: values of plain SAEs in which the comparison is available."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        for place in (row["arm"], f"{row['arm']}.k{row['k']}"):
            groups[f"rediscovery.{place}"].append(row)
    for group, members in groups.items():
        names = [name for name, found in members[0].items() if isinstance(found, dict)]
        for number, within in (("found", SHARE), ("mmcs", COSINE)):
            of_set = {name: _measured(members, name, number) for name in names}
            yield from ((f"{group}.{name}.{number}", _sample(values, within)) for name, values in of_set.items())
            for name, null in COMPARED:
                excess = [
                    (origin, own - other)
                    for (origin, own), (_, other) in zip(of_set[name], of_set[null], strict=True)
                    if own is not None and other is not None
                ]
                yield f"{group}.excess.{name}.{null}.{number}", _sample(excess, None)


def _measured(rows: list[dict[str, Any]], name: str, number: str) -> list[tuple[Origin, float | None]]:
    return [
        (
            Origin.of(row["seed"], row["seed"], row["k"], row["k"]),
            row[name][number] if row[name].get("available", True) else None,
        )
        for row in rows
    ]


def _sample(values: Sequence[tuple[Origin, float | None]], within: tuple[float, float] | None) -> Sample:
    known = [(origin, value) for origin, value in values if value is not None]
    return Sample(tuple(value for _, value in known), tuple(origin for origin, _ in known), within)
