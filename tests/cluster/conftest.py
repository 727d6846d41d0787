"""Boxes for the tests of a real cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.box import Box, missing


@pytest.fixture
def box() -> Iterator[Box]:
    """Without nodes."""
    if lacking := missing():
        pytest.skip(f"NOT RUN: {lacking}")
    with Box() as made:
        yield made
