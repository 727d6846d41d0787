"""The table of agreement by group of pairs: each measure, and what is left of PW-MCC above each null."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dmsae_ray.show.page.spread import ends, ends_columns
from dmsae_ray.show.page.table import Column, Table

MEASURES = {
    "pw_mcc": "PW-MCC",
    "overlap": "overlap",
    "activation": "activation",
    "mmcs": "MMCS",
    "pw_mcc_dictionary": "PW-MCC, whole SAEs",
}


def groups_table(comparison: dict[str, Any], nulls: Mapping[str, str]) -> Table | None:
    """None without a score. nulls: names of the nulls, and their words."""
    groups = comparison.get("summary", {}).get("groups", {})
    rows = [row for key, group in groups.items() for row in _rows(key, group, nulls)]
    columns = [
        Column("Group", lambda row: row["group"], help="arm / what the two chains of a pair do not have in common"),
        Column("Measure", lambda row: row["score"]),
        *ends_columns(),
        Column("Pairs", lambda row: row["pairs"], "count"),
        Column("Of", lambda row: row["of"], "count", help="pairs there were; more if a sample was compared"),
        Column("Scored", lambda row: row["scored"], "count", help="pairs whose cores could be compared"),
        Column("Seeds", lambda row: row["seeds"], "count"),
    ]
    caption = (
        "Agreement by group. Intervals are over seeds, not over pairs, which share them; below four seeds smallest and "
        "largest pair stand in their place."
    )
    return Table("table-groups", caption, columns, rows) if rows else None


def _rows(key: str, group: dict[str, Any], nulls: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    about = {"group": key} | {field: group.get(field) for field in ("pairs", "of", "scored", "seeds")}
    for name, words in MEASURES.items():
        if group.get(name):
            yield about | {"score": words} | ends(group[name], group["scored"])
    for null, words in nulls.items():
        excess = ((group.get("nulls", {}).get(null) or {}).get("excess") or {}).get("pw_mcc")
        if excess:
            score = {"score": f"PW-MCC above the mean of {words}", "scored": excess["n"]}
            yield about | score | ends(excess, excess["n"])
