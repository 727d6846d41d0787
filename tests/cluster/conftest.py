"""Boxes for the tests of a real cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.box import Box, missing
from cluster.ray_box import RayBox


@pytest.fixture(scope="session", autouse=True)
def a_box_can_be_made() -> None:
    if lacking := missing():
        pytest.skip(f"NOT RUN: {lacking}")


@pytest.fixture
def box() -> Iterator[Box]:
    """Without nodes."""
    with Box() as made:
        yield made


@pytest.fixture(scope="module")
def ray_box(tmp_path_factory) -> Iterator[RayBox]:
    """A head and three workers with a CPU each, which share a folder, and a client."""
    with Box() as made:
        yield RayBox(made, workers=3, cpus=1, share=tmp_path_factory.mktemp("share"))
