"""The image, built once; says NOT RUN where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import box
from cluster.box import Box

from image import built
from image.built import Image
from image.container import Container


@pytest.fixture(scope="session", autouse=True)
def it_can_be_built() -> None:
    if lacking := built.missing() or box.missing():
        pytest.skip(f"NOT RUN: {lacking}")


@pytest.fixture(scope="session")
def image() -> Image:
    return built.build()


@pytest.fixture(scope="session")
def container(image: Image) -> Iterator[Container]:
    """One that runs nothing yet."""
    with Box() as made:
        yield Container(made, "one", image)
