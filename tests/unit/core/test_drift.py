"""Decoder drift on rows that were turned by known angles."""

import math

import pytest
import torch

from dmsae_ray.config import ExpectConfig
from dmsae_ray.core.drift import decoder_drift
from dmsae_ray.results.expectations import judge
from dmsae_ray.results.numbers import numbers_of


def turned(degrees, d=6):
    """Unit rows, and the same turned by so many degrees each, in a plane of its own choice."""
    torch.manual_seed(0)
    before = torch.nn.functional.normalize(torch.randn(len(degrees), d), dim=1)
    other = torch.randn(len(degrees), d)
    across = torch.nn.functional.normalize(other - (other * before).sum(1, keepdim=True) * before, dim=1)
    angle = torch.tensor(degrees, dtype=torch.float32).deg2rad()[:, None]
    return before, before * angle.cos() + across * angle.sin()


def test_cosines_are_those_of_the_angles():
    degrees = [0, 60, 90, 180, 20]
    before, after = turned(degrees)
    found = decoder_drift(before, before, after)
    cosines = sorted(math.cos(math.radians(angle)) for angle in degrees)
    assert found["mean"] == pytest.approx(sum(cosines) / 5, abs=1e-6) and found["min"] == pytest.approx(-1, abs=1e-6)
    assert found["median"] == pytest.approx(0.5, abs=1e-6) and found["share_near"] == pytest.approx(2 / 5)
    assert found["q10"] == pytest.approx(cosines[0] + 0.4 * (cosines[1] - cosines[0]), abs=1e-6)


def test_length_does_not_count_and_one_row_is_enough():
    before, after = turned([30])
    found = decoder_drift(before, 2 * before, 7 * after)
    assert all(
        found[name] == pytest.approx(math.cos(math.radians(30)), abs=1e-6) for name in ("mean", "min", "median", "q10")
    )


def test_an_empty_core_has_no_drift():
    assert decoder_drift(*[torch.zeros(0, 4)] * 3) is None


@pytest.mark.parametrize(
    "began, learned, closed, comes_back",
    [
        (20, 5, 0.937, True),  # as near as the study's rows begin, and trained on towards what they were
        (20, 20, 0.0, False),  # cosine 0.94 all the same: they never moved
        (20, 30, -1.221, False),
        (90, 20, 0.940, True),  # from a random start the cosine itself is the excess
        (90, 88, 0.035, False),
    ],
)
def test_a_row_comes_back_by_how_far_it_came_and_not_by_where_it_began(began, learned, closed, comes_back):
    """The study's claim, as it is printed: gap_closed above 0.5."""
    old, start = turned([began] * 8)
    _, after = turned([learned] * 8)
    drift = decoder_drift(old, start, after)
    assert drift["before"] == pytest.approx(math.cos(math.radians(began)), abs=1e-6)
    assert drift["gap_closed"] == pytest.approx(closed, abs=2e-3)
    row = {"arm": "base", "k": 16, "last": True, "decoder_drift": drift}
    claim = ExpectConfig(claim="come back", value="evaluation.base.k16.decoder_drift.gap_closed", above=0.5)
    (entry,) = judge([claim], numbers_of([row], None, None), {})["expectations"]
    assert entry["outcome"] == ("hit" if comes_back else "miss")


def test_rows_that_begin_as_what_they_were_have_no_gap_to_close():
    old, after = turned([10, 20])
    assert decoder_drift(old, old, after)["gap_closed"] is None
