"""Decoder drift on rows that were turned by known angles."""

import math

import pytest
import torch

from dmsae_ray.core.drift import decoder_drift


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
    found = decoder_drift(*turned(degrees))
    cosines = sorted(math.cos(math.radians(angle)) for angle in degrees)
    assert found["mean"] == pytest.approx(sum(cosines) / 5, abs=1e-6) and found["min"] == pytest.approx(-1, abs=1e-6)
    assert found["median"] == pytest.approx(0.5, abs=1e-6) and found["share_near"] == pytest.approx(2 / 5)
    assert found["q10"] == pytest.approx(cosines[0] + 0.4 * (cosines[1] - cosines[0]), abs=1e-6)


def test_length_does_not_count_and_one_row_is_enough():
    before, after = turned([30])
    found = decoder_drift(before, 7 * after)
    assert all(
        found[name] == pytest.approx(math.cos(math.radians(30)), abs=1e-6) for name in ("mean", "min", "median", "q10")
    )


def test_an_empty_core_has_no_drift():
    assert decoder_drift(torch.zeros(0, 4), torch.zeros(0, 4)) is None
