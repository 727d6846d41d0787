"""Rows of extreme norm: how much of a dataset's variance a few of them hold, and which positions count where they are
left out.

Many language models have positions (often the first tokens of a document, or delimiters) whose norm is a hundred times
the median. A handful of them can hold most of the variance, and then decide scale, covariance and FVU alone.
Letters: R rows, N sequences, T context, D model dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dmsae_ray.files import write_json

if TYPE_CHECKING:
    from dmsae_ray.activations.dataset import ActivationDataset

MULTIPLE = 10.0
"""A row is called an outlier where its norm exceeds so many times the median: ordinary rows stay below three or four.
"""
WARN_SHARE = 0.05
"""Share of the variance from which on outliers are warned of: they then move FVU by as much."""
PART = 16_384
"""Rows turned into fp64 at a time."""


@dataclass(frozen=True)
class Outliers:
    """What rows beyond so many times the median norm come to."""

    multiple: float
    rows: int
    """outliers among the rows looked at"""
    of_rows: int
    """rows looked at"""
    share_of_variance: float
    """of the sum of squared distances to the mean row, the outliers' part"""
    largest: float
    """largest norm, raw units"""
    median: float
    """median norm of the calibration rows, raw units"""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def counted(rows_NT: torch.Tensor, value_NTD: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """Which of the rows count, bool [N, T]: all, or those whose norm is at most max_norm (raw units), the dataset's
    bound.
    """
    return rows_NT if max_norm is None else rows_NT & (value_NTD.norm(dim=2) <= max_norm)


def outliers_of(parts: Iterable[torch.Tensor], median: float) -> Outliers:
    """parts: rows [R, D], raw units, in any number of pieces, gone through once. median: of the calibration rows'
    norms.
    """
    bound, n, n_out, largest = MULTIPLE * median, 0, 0, 0.0
    square = out_square = 0.0
    sum_D = out_D = torch.zeros((), dtype=torch.float64)  # as wide as the rows from the first ones on
    for rows_RD in (piece_RD for part_RD in parts for piece_RD in part_RD.split(PART)):
        rows_RD = rows_RD.double()
        norm2_R = rows_RD.square().sum(dim=1)
        out_R = norm2_R.sqrt() > bound
        n, sum_D, square = n + len(rows_RD), sum_D + rows_RD.sum(dim=0), square + float(norm2_R.sum())
        largest = max(largest, float(norm2_R.max().sqrt()))
        if bool(out_R.any()):
            n_out, out_D, out_square = (
                n_out + int(out_R.sum()),
                out_D + rows_RD[out_R].sum(dim=0),
                out_square + float(norm2_R[out_R].sum()),
            )
    if n == 0:
        raise ValueError("outliers were looked for among no rows")
    mean_D = sum_D / n
    variance = square - n * float(mean_D @ mean_D)
    held = 0.0 if n_out == 0 else out_square - 2 * float(out_D @ mean_D) + n_out * float(mean_D @ mean_D)
    return Outliers(MULTIPLE, n_out, n, held / variance if variance > 0 else 0.0, largest, median)


def dataset_outliers(dataset: ActivationDataset) -> Outliers:
    """Those of a finished dataset, as its manifest has them; of an older one, whose manifest has not, looked
    for now.
    """
    known = dataset.manifest.outliers
    return Outliers(**known) if known else outliers_of(dataset.some_rows(), dataset.manifest.norm_quantiles["0.5"])


def dataset_facts(dataset: ActivationDataset) -> dict[str, Any]:
    """What data.json holds of the rows: hook, rows, norm_quantiles, outlier_norm, max_norm, dropped, outliers, warning
    (None: none).
    """
    manifest, outliers = dataset.manifest, dataset_outliers(dataset)
    outlier_norm = (manifest.fields.get("harvest") or {}).get("outlier_norm")
    return {
        "hook": manifest.hook,
        "rows": manifest.rows,
        "norm_quantiles": manifest.norm_quantiles,
        "outlier_norm": outlier_norm,
        "max_norm": manifest.max_norm,
        "dropped": manifest.positions.get("outlier", 0),
        "outliers": outliers.to_dict(),
        "warning": warning(manifest.hook, outliers, outlier_norm),
    }


def warning(hook: str, outliers: Outliers, outlier_norm: float | None) -> str | None:
    """One sentence with the figures and the field to set, where outliers hold WARN_SHARE of the variance or more."""
    if outliers.share_of_variance < WARN_SHARE:
        return None
    now = "" if outlier_norm is None else f" (now {outlier_norm:g})"
    return (
        f"{outliers.rows:,} of {outliers.of_rows:,} rows at {hook} have more than {outliers.multiple:g} times the "
        f"median norm (up to {outliers.largest:,.0f}, median {outliers.median:,.0f}) and hold "
        f"{outliers.share_of_variance:.0%} of the variance: they set scale, covariance null and FVU. Set "
        f"harvest.outlier_norm to {outliers.multiple:g}{now} to leave them out of training and of every measurement"
    )


def notes(dataset: ActivationDataset) -> list[str]:
    """What a command says of a dataset's outliers: how many rows were left out, and what those that were not do;
    nothing where there is nothing to say."""
    facts = dataset_facts(dataset)
    lines = []
    if facts["dropped"]:
        lines.append(
            f"harvest: {facts['dropped']:,} rows of more than {facts['outlier_norm']:g} times the median norm are left "
            "out, here and in every measurement (harvest.outlier_norm)"
        )
    if facts["warning"]:
        lines.append(f"warning: {facts['warning']}")
    return lines


def write_data(dataset: ActivationDataset, path: Path) -> dict[str, Any]:
    """Write data.json; returns what stands in it."""
    facts = dataset_facts(dataset)
    write_json(path, facts)
    return facts
