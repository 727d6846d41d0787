"""A list of facts: names, and values as they are read, each with its whole value beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dmsae_ray.show.page.numerals import whole
from dmsae_ray.show.page.view import Raw


@dataclass(frozen=True)
class Fact:
    """One name and what stands beside it."""

    name: str
    value: Any
    """the whole value"""
    seen: str
    """as a reader sees it, with its unit"""


def facts(id: str, heading: str, found: Sequence[Fact]) -> Raw:
    """A heading and the facts below it."""
    items = "".join(
        f'<div><dt>{escape(fact.name)}</dt><dd data-value="{escape(whole(fact.value))}" '
        f'title="{escape(whole(fact.value))}">'
        f"{escape(fact.seen)}</dd></div>"
        for fact in found
    )
    return Raw(f'<h3>{escape(heading)}</h3><dl class="facts" id="{id}">{items}</dl>')
