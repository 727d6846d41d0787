"""Nulls: what the agreement of two cores would be without a common core. Each is drawn at the cores' own sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MMCS_ROWS = 1000
"""Rows that stand for all draws in a mean of largest cosines: its error is then under 0.01, and whole dictionaries are
wide.
"""


@dataclass(frozen=True)
class NullResult:
    """One null of one pair. A number is None where it could not be made; `reason` then says why."""

    available: bool
    """whether the pair may be read against this null; where not, numbers that exist are given all the same"""
    reason: str | None
    """why it is not available"""
    mean: float | None
    """mean PW-MCC over draws"""
    p99: float | None
    """99th percentile of PW-MCC over draws (`percentile`); the value itself where there is one draw"""
    overlap_mean: float | None
    """mean overlap over draws"""
    overlap_p99: float | None
    """99th percentile of the overlap over draws; the value itself where there is one draw"""
    mmcs_mean: float | None
    """mean, over both directions, of the largest cosine to any latent of the other run's whole SAE"""
    activation_mean: float | None
    """mean activation agreement over `activation_draws`; None for directions of the covariance, which have no
    activations
    """
    activation_p95: float | None
    """its 95th percentile: twenty draws carry no higher one; the value itself where there is one draw"""
    activation_draws: int
    """draws whose activations were compared"""
    draws: int
    """number of draws; of matched compute, pairs of plain SAEs"""
    size: tuple[int, int]
    """latents on both sides in a draw"""
    density_gap: float | None = None
    """matched density only: typical ratio of a drawn latent's density to its core latent's, on the worse side"""
    core_pw_mcc_same_size: float | None = None
    """cycle 0 and matched compute only: PW-MCC of the cores cut to `size` by score"""
    core_overlap_same_size: float | None = None
    """these two only: overlap of the cores cut to `size` by score"""
    core_activation_same_size: float | None = None
    """these two only: activation agreement of the cores cut to `size` by score"""


@dataclass(frozen=True)
class DictionaryNull:
    """One null of the PW-MCC of two whole dictionaries."""

    available: bool
    """whether the number may be read against it"""
    reason: str | None
    """why not"""
    mean: float | None
    """PW-MCC, mean over draws"""
    draws: int
    """number of draws; thousands of matched pairs make one draw exact to 0.01"""
    size: tuple[int, int]
    """latents on both sides"""


def unavailable(reason: str, size: tuple[int, int]) -> NullResult:
    """A null without numbers."""
    return NullResult(False, reason, None, None, None, None, None, None, None, 0, 0, size)


def drawn(value: float | None) -> float:
    """A number of one draw. There is one: cores without members, which have none, are compared with no draw."""
    assert value is not None
    return value


def percentile(draws: Sequence[float], percent: int) -> float | None:
    """The value that a further draw exceeds in at most 100 - `percent` of 100 times, whatever the draws' distribution:
    between the (n + 1) p-th smallest of n and the next (Weibull, 1939). None where n draws are too few to say so; the
    value itself of one, which is no draw but the one set that there is.
    """
    if len(draws) == 1:
        return float(draws[0])
    if (len(draws) + 1) * (100 - percent) < 100:
        return None
    return float(np.quantile(draws, percent / 100, method="weibull"))


def over_draws(
    scores: Sequence[float],
    overlaps: Sequence[float],
    activations: Sequence[float | None],
    mmcs_mean: float | None,
    size: tuple[int, int],
    reason: str | None = None,
    **also: float | None,
) -> NullResult:
    """A null from its draws. activations: None for a draw in which no matched pair had two active latents; also:
    further fields.
    """
    known = [value for value in activations if value is not None]
    return NullResult(
        available=reason is None,
        reason=reason,
        mean=float(np.mean(scores)),
        p99=percentile(scores, 99),
        overlap_mean=float(np.mean(overlaps)),
        overlap_p99=percentile(overlaps, 99),
        mmcs_mean=mmcs_mean,
        activation_mean=float(np.mean(known)) if known else None,
        activation_p95=percentile(known, 95),
        activation_draws=len(known),
        draws=len(scores),
        size=size,
        **also,
    )
