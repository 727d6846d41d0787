"""What an SAE is worth on held-out text: L0, FVU, dead share, and the language model's loss when spliced in.

Letters: N sequences, T context, R rows (tokens without BOS and padding), D model dimension, F width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dmsae_ray.distill.criterion import removal_cost
from dmsae_ray.sae.collective import Collective
from dmsae_ray.sae.sae import MatryoshkaSAE


@dataclass
class Tally:
    """Sums over rows, fp64, that add across batches and workers."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, **values) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64).cpu()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def reduce(self, comm: Collective) -> None:
        for name in sorted(self.sums):
            self.sums[name] = comm.all_reduce_sum(self.sums[name])


@torch.no_grad()
def tally_batch(
    tally: Tally, sae: MatryoshkaSAE, lm, ids_NT: torch.Tensor, lengths_N: torch.Tensor, scale: float, removal: bool = False
) -> None:
    """Add one batch of sequences, on the SAE's device: the whole SAE (all prefixes) in place of what stands at the hook.

    removal: also add what the removal of each candidate costs (`criterion.removal_cost`).
    """
    rows_NT = lm.rows(ids_NT, lengths_N)
    cut = lm.cut(ids_NT)
    x_RD = cut.value_BTD[rows_NT] / scale
    z_RF = sae.encode(x_RD)
    x_hat_RD = sae.decode(z_RF)
    spliced_NTD = cut.value_BTD.clone()
    spliced_NTD[rows_NT] = x_hat_RD * scale
    active_RF = z_RF > 0
    tally.add(
        rows=len(x_RD), error=(x_RD - x_hat_RD).double().square().sum(),
        x=x_RD.double().sum(dim=0), x2=x_RD.double().square().sum(), active=active_RF.sum(dim=0),
        loss=lm.loss(cut, spliced_NTD, ids_NT, lengths_N),
    )  # fmt: skip
    if removal:
        tally.add(removal=removal_cost(sae, x_RD, z_RF))


def scores_of(tally: Tally, core_size: int, references: dict[str, float]) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics of the method's "Evaluation terms", and each latent's density [F]."""
    sums = tally.sums
    rows = float(sums["rows"])  # which are the loss's targets, too
    variance = float(sums["x2"] - sums["x"].square().sum() / rows)
    density_F = sums["active"] / rows
    spliced, clean = float(sums["loss"]) / rows, references["clean"]
    metrics = {
        "l0": float(density_F.sum()),
        "core_l0": float(density_F[:core_size].sum()),
        "free_l0": float(density_F[core_size:].sum()),
        "fvu": float(sums["error"]) / variance,
        "dead_share": float((sums["active"] == 0).double().mean()),
        "loss_clean": clean,
        "loss_zero": references["zero"],
        "loss_mean": references["mean"],
        "loss_spliced": spliced,
        "loss_recovered_zero": (references["zero"] - spliced) / (references["zero"] - clean),
        "loss_recovered_mean": (references["mean"] - spliced) / (references["mean"] - clean),
        "evaluation_tokens": int(rows),
    }
    return metrics, density_F


@torch.no_grad()
def reference_losses(lm, batches, mean_D: torch.Tensor) -> dict[str, float]:
    """Loss per token that needs no SAE: clean, and with what stands at the hook set to zero or to its mean (BOS kept)."""
    sums, tokens = {"clean": 0.0, "zero": 0.0, "mean": 0.0}, 0
    for ids_NT, lengths_N in batches:
        rows_NT = lm.rows(ids_NT, lengths_N)
        cut = lm.cut(ids_NT)
        tokens += int(rows_NT.sum())
        sums["clean"] += float(lm.loss(cut, cut.value_BTD, ids_NT, lengths_N))
        for kind, value_D in (("zero", torch.zeros_like(mean_D)), ("mean", mean_D)):
            ablated_NTD = torch.where(rows_NT[:, :, None], value_D.to(cut.value_BTD), cut.value_BTD)
            sums[kind] += float(lm.loss(cut, ablated_NTD, ids_NT, lengths_N))
    return {kind: value / tokens for kind, value in sums.items()} | {"tokens": tokens}


def references_path(dataset_folder: Path, evaluate) -> Path:
    """Where the reference losses of these evaluation settings lie."""
    return dataset_folder / f"references-{evaluate.tokens}-{evaluate.sequences_per_batch}.json"


def read_references(dataset_folder: Path, evaluate) -> dict[str, float]:
    return json.loads(references_path(dataset_folder, evaluate).read_text())
