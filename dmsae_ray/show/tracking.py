"""What a sweep asks of whoever keeps its runs: `mlflow/tracker.py` is one, another would have these members."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from dmsae_ray.secret_url import SecretUrl


class TrackingError(ValueError):
    """The store cannot be used; the message names it and says what to do."""


class Tracker(Protocol):
    """The runs of one sweep. It reads what the chains left on disk; its methods may be called from any thread."""

    uri: SecretUrl
    """where the runs are"""
    why_not: str | None
    """why nothing is logged; None if it is"""
    page: str | None
    """where the chains are compared, behind the address of the store's server; None: not known"""

    def sync(self) -> bool:
        """Log what is new on disk, and say whether all of it is logged. Never raises on account of the store."""

    def log_results(
        self,
        comparison: dict[str, Any] | None,
        tables: dict[str, dict[str, list[Any]]],
        numbers: dict[str, float],
        files: Iterable[Path] = (),
    ) -> bool:
        """The sweep's results, now or with a later sync."""

    def close(self, status: str = "FINISHED") -> None:
        """Last sync. Raises TrackingError if the store cannot be reached."""


class NotTracked:
    """In a tracker's place where the store cannot be used: nothing is logged, and it is said why."""

    def __init__(self, uri: SecretUrl | None, why: str):
        self.uri = uri or SecretUrl("")
        self.why_not: str | None = why
        self.page: str | None = None

    def sync(self) -> bool:
        return False

    def log_results(
        self,
        comparison: dict[str, Any] | None,
        tables: dict[str, dict[str, list[Any]]],
        numbers: dict[str, float],
        files: Iterable[Path] = (),
    ) -> bool:
        return False

    def close(self, status: str = "FINISHED") -> None:
        """Nothing was opened."""
