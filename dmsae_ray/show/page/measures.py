"""The numbers of an SAE that the page shows, and how to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One number of a row."""

    field: str
    name: str
    kind: str
    """a format of numerals.py"""
    unit: str
    read: str
    """what it is, which way is better: a sentence"""

    def of(self, row: dict[str, Any]) -> float | None:
        """A row's number; None if it has none."""
        return row.get(self.field)


MAIN = (
    Measure("l0", "L0", "tenths", "latents per token", "Mean number of active latents, core included: it should be k."),
    Measure("fvu", "FVU", "share", "share of variance", "Share of the variance not explained. Lower is better."),
    Measure(
        "loss_recovered_mean",
        "Loss recovered, mean ablation",
        "share",
        "share",
        "1: the model's own loss; 0: its loss with the stream set to its mean.",
    ),
    Measure(
        "loss_recovered_zero",
        "Loss recovered, zero ablation",
        "share",
        "share",
        "1: the model's own loss; 0: its loss with the stream set to zero.",
    ),
    Measure(
        "kl", "KL", "nats", "nats per token", "From the model's own predictions to the spliced ones. Lower is better."
    ),
    Measure(
        "dead_share", "Dead", "share", "share of latents", "Latents silent on all evaluation tokens. Lower is better."
    ),
)
FURTHER = (
    Measure(
        "fvu_all_rows",
        "FVU, all rows",
        "share",
        "share of variance",
        "FVU with the rows beyond harvest.outlier_norm, which training left out.",
    ),
    Measure("core_l0", "Core L0", "tenths", "latents per token", "Active latents of the core."),
    Measure("free_l0", "Free L0", "tenths", "latents per token", "Active latents outside the core."),
    Measure(
        "core_density",
        "Density of the core",
        "share",
        "share of tokens",
        "On how many tokens a latent of the core is active.",
    ),
    Measure(
        "core_explained",
        "Explained by the core",
        "share",
        "share",
        "Share of the explained variance carried by the core alone.",
    ),
    Measure(
        "core_share",
        "Attribution of the core",
        "share",
        "share",
        "Share of the attribution carried by the incoming core.",
    ),
    Measure("loss_spliced", "Loss, spliced", "nats", "nats per token", "The model's loss on the reconstruction."),
)
L0, *OTHERS = MAIN
ARMS = (*OTHERS, L0, *FURTHER)
PREFIX = tuple(
    measure
    for measure in ARMS
    if measure.field in ("fvu", "fvu_all_rows", "loss_recovered_mean", "loss_recovered_zero", "kl", "l0")
)
