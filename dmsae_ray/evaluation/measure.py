"""What an SAE is worth on held-out text: L0, FVU, dead share, and what becomes of the language model's predictions when
it is spliced in; for the whole SAE, for every prefix, and for the core alone.

Letters: N sequences, T context, R rows (tokens without BOS and padding), M rows that count (all, or those within the
dataset's bound on norms), D model dimension, F width, Q prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dmsae_ray.activations.outliers import counted
from dmsae_ray.core.criterion import removal_cost
from dmsae_ray.evaluation.prefixes import Prefix, prefixes_of, reconstructions
from dmsae_ray.evaluation.standard_error import OF_A_SEQUENCE, standard_errors
from dmsae_ray.lm.divergence import divergence
from dmsae_ray.sae.ranks.collective import Collective
from dmsae_ray.sae.sae import MatryoshkaSAE


@dataclass
class Tally:
    """Sums over rows, fp64, that add across batches and workers; of `sequences` sequences also one by one, which
    standard errors need.
    """

    sequences: int = 0
    mean_D: torch.Tensor | None = None
    """of the dataset's rows, raw units: what FVU's variance is around when it is taken of one sequence"""
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sequences:
            self.sums["by_sequence"] = torch.zeros(len(OF_A_SEQUENCE), self.sequences, dtype=torch.float64)

    def add_sequences(self, first: int, **values: torch.Tensor) -> None:
        """What belongs to the sequences from `first` on, [N] each; those beyond the last one only fill a batch."""
        table = self.sums["by_sequence"][:, first:]
        for row, name in zip(table, OF_A_SEQUENCE, strict=True):
            row[: len(values[name])] += values[name][: len(row)].double().cpu()

    def add(self, **values) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64).cpu()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def reduce(self, comm: Collective) -> None:
        for name in sorted(self.sums):
            self.sums[name] = comm.all_reduce_sum(self.sums[name])


@torch.no_grad()
def tally_batch(
    tally: Tally,
    sae: MatryoshkaSAE,
    lm,
    ids_NT: torch.Tensor,
    lengths_N: torch.Tensor,
    scale: float,
    removal: bool = False,
    max_norm: float | None = None,
    first: int = 0,
) -> None:
    """Add one batch of sequences, on the SAE's device: every prefix's reconstruction in place of what stands at the
    hook.

    removal: also add what the removal of each candidate costs (`criterion.removal_cost`). max_norm: the dataset's
    bound, raw units.
    Rows beyond it were not trained on: they keep what stands there, and count in nothing but the loss, whose targets
    all rows are, and the sums `..._left_out`, which FVU over all rows needs. first: place of the batch's first sequence
    among the tally's.
    """
    rows_NT = lm.rows(ids_NT, lengths_N)
    cut = lm.cut(ids_NT)
    counts_NT = counted(rows_NT, cut.value_BTD, max_norm)
    x_MD = cut.value_BTD[counts_NT] / scale
    z_MF = sae.encode(x_MD)
    left_out_RD = cut.value_BTD[rows_NT & ~counts_NT] / scale
    errors, errors_left_out, errors_M = [], [], x_MD.new_zeros(len(x_MD))

    def spliced() -> Iterator[torch.Tensor]:
        nonlocal errors_M
        outside = reconstructions(sae, sae.encode(left_out_RD)) if len(left_out_RD) else None
        for x_hat_MD in reconstructions(sae, z_MF):
            squares_MD = (x_MD - x_hat_MD).double().square()
            errors.append(squares_MD.sum())
            errors_M = squares_MD.sum(dim=1)  # in the end, of the whole SAE
            del squares_MD  # not held while the model runs
            errors_left_out.append(
                (left_out_RD - next(outside)).double().square().sum() if outside else torch.zeros_like(errors[-1])
            )
            spliced_NTD = cut.value_BTD.clone()
            spliced_NTD[counts_NT] = x_hat_MD * scale
            yield spliced_NTD

    loss_QN, kl_QN = divergence(lm, cut, spliced(), ids_NT, lengths_N)
    tally.add(
        rows=len(x_MD),
        x=x_MD.double().sum(dim=0),
        x2=x_MD.double().square().sum(),
        active=(z_MF > 0).sum(dim=0),
        error=torch.stack(errors),
        loss=loss_QN.sum(dim=1),
        kl=kl_QN.sum(dim=1),
        rows_left_out=len(left_out_RD),
        x_left_out=left_out_RD.double().sum(dim=0),
        x2_left_out=left_out_RD.double().square().sum(),
        error_left_out=torch.stack(errors_left_out),
    )
    if removal:
        tally.add(removal=removal_cost(sae, x_MD, z_MF))
    if tally.sequences and tally.mean_D is not None:
        centred_MD = x_MD - tally.mean_D.to(x_MD) / scale
        sequence_M = counts_NT.nonzero()[:, 0]
        zeros_N = torch.zeros(len(ids_NT), dtype=torch.float64, device=x_MD.device)
        tally.add_sequences(
            first,
            tokens=rows_NT.sum(dim=1),
            error=zeros_N.index_add(0, sequence_M, errors_M),
            variance=zeros_N.index_add(0, sequence_M, centred_MD.double().square().sum(dim=1)),
            loss=loss_QN[-1],
            kl=kl_QN[-1],
        )


def scores_of(tally: Tally, sae: MatryoshkaSAE, references: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Metrics of the method's "Evaluation terms" as plain JSON types, and each latent's density [F].

    Densities, L0, dead share and `fvu` are over the rows that count; `rows_left_out` is how many evaluation rows do
    not, and `fvu_all_rows` the FVU over all of them, with the SAE applied to rows it was not trained for. `kl` is the
    mean over the loss's targets, which are all rows, of KL(clean || spliced), in nats. `prefixes` has an entry for each
    of `prefixes_of`: name, latents, l0, fvu, fvu_all_rows, loss, loss_recovered_zero, loss_recovered_mean, kl; the last
    one is the whole SAE, whose numbers also stand beside it.

        core_explained = (1 - FVU(core alone)) / (1 - FVU(whole))

    is the share of the variance that the SAE explains which `b_dec` plus the core's latents explain without the others;
    None without a core, or where the whole explains nothing. Read it as a comparison of two reconstructions, not as a
    part of a sum: decoder and bias were trained for prefixes of which the smallest is core + group 0, never for the
    core alone, so a decoder fitted to the core would explain more; latents overlap, so the free ones alone do not
    explain the rest; and it is negative where bias and core fit worse than the mean row does, above 1 where the free
    latents do harm.

    `standard_errors` are the whole SAE's, see there; None where the tally or the references know no sequences.
    """
    sums, prefixes = tally.sums, prefixes_of(sae)
    rows, left_out = float(sums["rows"]), float(sums["rows_left_out"])
    if rows == 0:
        raise ValueError("no evaluation row is within the bound of harvest.outlier_norm: raise it or evaluate.tokens")
    targets = rows + left_out
    variance = float(sums["x2"] - sums["x"].square().sum() / rows)
    x2, x_D = sums["x2"] + sums["x2_left_out"], sums["x"] + sums["x_left_out"]
    variance_of_all = float(x2 - x_D.square().sum() / targets)
    density_F = sums["active"] / rows
    clean, zero, mean = (references[kind] for kind in ("clean", "zero", "mean"))

    def entry(q: int, prefix: Prefix) -> dict[str, Any]:
        loss = float(sums["loss"][q]) / targets
        return {
            "name": prefix.name,
            "latents": prefix.latents,
            "l0": float(density_F[: prefix.latents].sum()),
            "fvu": float(sums["error"][q]) / variance,
            "fvu_all_rows": float(sums["error"][q] + sums["error_left_out"][q]) / variance_of_all,
            "loss": loss,
            "loss_recovered_zero": (zero - loss) / (zero - clean),
            "loss_recovered_mean": (mean - loss) / (mean - clean),
            "kl": float(sums["kl"][q]) / targets,
        }

    entries = [entry(q, prefix) for q, prefix in enumerate(prefixes)]
    core, whole = entries[0] if sae.core_size else None, entries[-1]
    explained = 1 - whole["fvu"]
    metrics = {
        "l0": whole["l0"],
        "core_l0": core["l0"] if core else 0.0,
        "free_l0": float(density_F[sae.core_size :].sum()),
        "fvu": whole["fvu"],
        "fvu_all_rows": whole["fvu_all_rows"],
        "dead_share": float((sums["active"] == 0).double().mean()),
        "loss_clean": clean,
        "loss_zero": zero,
        "loss_mean": mean,
        "loss_spliced": whole["loss"],
        "loss_recovered_zero": whole["loss_recovered_zero"],
        "loss_recovered_mean": whole["loss_recovered_mean"],
        "kl": whole["kl"],
        "core_explained": (1 - core["fvu"]) / explained if core and explained > 0 else None,
        "prefixes": entries,
        "evaluation_tokens": int(targets),
        "rows_left_out": int(left_out),
        "standard_errors": standard_errors(sums.get("by_sequence"), references.get("by_sequence")),
    }
    return metrics, density_F
