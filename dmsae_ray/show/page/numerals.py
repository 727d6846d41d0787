"""How a number is written: with sensible digits here, whole in the attribute that sorting and titles use."""

from __future__ import annotations

import math
from typing import Any

MISSING = "n/a"
NOTHING = "–"


def share(value: float) -> str:
    """A share, a cosine, a correlation: three decimals."""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """A difference of two shares."""
    return f"{value:+.3f}"


def count(value: float) -> str:
    """A number of things."""
    return f"{round(value):,}"


def tenths(value: float) -> str:
    """A mean number of things."""
    return f"{value:,.1f}"


def percent(value: float) -> str:
    """A small share, to two digits: densities span decades."""
    return f"{digits(100 * value, 2).removesuffix('.0')} %"


def nats(value: float) -> str:
    """Nats per token, to three digits."""
    return digits(value, 3)


def digits(value: float, significant: int) -> str:
    """Plain notation with so many significant digits; below 0.0001 in powers of ten."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{significant - 1}e}"
    decimals = max(0, significant - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def text(value: Any) -> str:
    """Anything else, as it is."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


FORMATS = {
    "share": share,
    "signed": signed,
    "count": count,
    "tenths": tenths,
    "percent": percent,
    "nats": nats,
    "text": text,
    "prose": text,
    "yes_no": yes_no,
}
WRITTEN = ("text", "prose")
"""Formats of words: short ones, which do not wrap, and sentences."""


def shown(value: Any, kind: str) -> str:
    """The value as a reader sees it; `n/a` for a number that is None or not finite, a dash for a text that is not
    there.
    """
    if value is None and kind in WRITTEN:
        return NOTHING
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    return FORMATS[kind](value)


def whole(value: Any) -> str:
    """The value with all its digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return yes_no(value)
    return repr(value) if isinstance(value, float) else text(value)
