"""Facts on the activations that the SAEs were trained on: how long they are, and what a few of the longest hold."""

from __future__ import annotations

from typing import Any

from dmsae_ray.show.page.artifacts import Artifacts
from dmsae_ray.show.page.facts import Fact, facts
from dmsae_ray.show.page.numerals import digits, percent
from dmsae_ray.show.page.view import Note, Raw


def rows_facts(artifacts: Artifacts) -> Raw | Note:
    """The figures of data.json; those that it does not have are left out."""
    data = artifacts.data
    if not data:
        return Note(f"How the rows are distributed is not known: {artifacts.reasons['data.json']}.")
    outliers = data.get("outliers") or {}
    quantiles = data.get("norm_quantiles") or {}
    found = [
        _fact("Rows", data.get("rows"), lambda rows: f"{rows:,}"),
        *(
            _fact(f"Norm, {_quantile(name)}", value, lambda norm: digits(norm, 3))
            for name, value in sorted(quantiles.items(), key=lambda one: float(one[0]))
        ),
        _fact(
            "Rows count as outliers from",
            outliers.get("multiple"),
            lambda multiple: f"{multiple:g} times the median norm",
        ),
        _fact("Outliers", outliers.get("rows"), lambda rows: f"{rows:,}{_of(outliers.get('of_rows'))}"),
        _fact("Their share of the variance", outliers.get("share_of_variance"), percent),
        _fact("Largest norm", outliers.get("largest"), lambda norm: digits(norm, 3)),
        _fact("Median norm", None if "0.5" in quantiles else outliers.get("median"), lambda norm: digits(norm, 3)),
        Fact("Dropped beyond (outlier_norm)", "", _limit(data.get("outlier_norm"))) if "outlier_norm" in data else None,
        _fact("Dropped rows", data.get("dropped"), lambda rows: f"{rows:,}"),
    ]
    return facts("rows", "The rows", [fact for fact in found if fact is not None])


def _fact(name: str, value: Any, seen: Any) -> Fact | None:
    return None if value is None else Fact(name, value, seen(value))


def _quantile(name: str) -> str:
    return "median" if float(name) == 0.5 else f"{100 * float(name):g} % quantile"


def _of(rows: int | None) -> str:
    return "" if rows is None else f" of {rows:,} looked at"


def _limit(multiple: float | None) -> str:
    return "no row is dropped" if multiple is None else f"{multiple:g} times the median norm"
