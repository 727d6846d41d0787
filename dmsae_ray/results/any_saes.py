"""Which latents SAEs have in common, whoever trained them: pairs beside their nulls, features and their core.

Shape letters: N chosen latents, F width, D model dimension, R rows of activations, P matched pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

from dmsae_ray.compare.activation import Standardised, agreement, standardised_values
from dmsae_ray.compare.consensus import Consensus, NamedCore, find_consensus
from dmsae_ray.compare.covariance import CovarianceNull, Gaussian
from dmsae_ray.compare.match import Matching, hungarian, mmcs, overlap, pw_mcc, shared_pairs
from dmsae_ray.compare.nulls import NullResult
from dmsae_ray.core.core import Core
from dmsae_ray.draws import PERMUTED_NULL
from dmsae_ray.interop.plain import PlainSAE, Threshold, Unknown

FORMAT_VERSION = 1
PART = 1024
"""Rows encoded at a time: a whole SAE's activations on them exist at once."""
PERMUTATIONS = 20
"""Draws of what matched latents' activations have in common by chance."""


@dataclass(frozen=True)
class Settings:
    """How SAEs are compared."""

    cosine: float = 0.7
    """a latent is shared if encoder and decoder cosine both reach this"""
    latents: int = 8192
    """at most so many of each SAE are matched (assignment costs the cube)"""
    share: float = 0.5
    """of the SAEs that must have a feature for it to be in the consensus core"""
    seed: int = 0
    """of the nulls' draws"""


@dataclass(frozen=True, eq=False)
class Chosen:
    """One SAE, and the latents of it that are compared."""

    label: str
    sae: PlainSAE
    index_N: torch.Tensor
    """their ids"""
    density_F: torch.Tensor | None
    """share of the rows on which each latent is active; None: without rows, or its file does not tell"""
    z: Standardised | None
    """their activations on the rows"""
    quality: dict[str, float] | None
    """l0, fvu, dead_share on the rows"""

    @property
    def W_enc_ND(self) -> torch.Tensor:
        return self.sae.W_enc_FD[self.index_N]

    @property
    def W_dec_ND(self) -> torch.Tensor:
        return self.sae.W_dec_FD[self.index_N]

    def to_dict(self) -> dict[str, Any]:
        about = self.sae.about
        return {
            "label": self.label,
            "place": about.place,
            "format": about.format,
            "model": about.model,
            "hook": about.hook,
            "width": self.sae.width,
            "d": self.sae.d,
            "k": about.k,
            "prefixes": list(about.prefixes),
            "compared": len(self.index_N),
            "activations": self.sae.gate.reason if isinstance(self.sae.gate, Unknown) else None,
            "quality": self.quality,
        }


ALIASES = {"gpt2-small": "gpt2"}
"""Models that TransformerLens calls otherwise than the hub."""


def check_comparable(saes: Sequence[PlainSAE], same_model: bool = False) -> None:
    """Raises ValueError, naming both, where two read other activations: of another model, hook or dimension.

    same_model: it is one model, whatever it is called.
    """
    for a, b in combinations(saes, 2):
        for what, one, other in (
            ("dimension", a.d, b.d),
            ("hook", a.about.hook, b.about.hook),
            ("model", *(None if same_model else _plain_name(sae.about.model) for sae in (a, b))),
        ):
            if one is not None and other is not None and one != other:
                hint = "; if that is one model by two names, give --same-model" if what == "model" else ""
                raise ValueError(
                    f"{a.about.place} and {b.about.place}: cannot be compared, their {what} is {one} and {other}{hint}"
                )


def _plain_name(model: str | None) -> str | None:
    """TransformerLens drops the owner of a hub id."""
    name = None if model is None else model.rpartition("/")[2].lower()
    return None if name is None else ALIASES.get(name, name)


def choose(label: str, sae: PlainSAE, rows_RD: torch.Tensor | None, settings: Settings) -> Chosen:
    """The latents that are compared: those that are active on the rows, and where those are too many, the ones that add
    most to the reconstruction there; without rows the first ones. Raises ValueError if there is none.
    """
    if rows_RD is None or isinstance(sae.gate, Unknown):
        ids_N = torch.nonzero(sae.W_dec_FD.norm(dim=1)).flatten()[: settings.latents]  # one of zeros points nowhere
        if not len(ids_N):
            raise ValueError(f"{sae.about.place}: all its decoder rows are zeros")
        return Chosen(label, sae, ids_N, None, None, None)
    fires_F, energy_F = torch.zeros(sae.width, dtype=torch.int64), torch.zeros(sae.width, dtype=torch.float64)
    error, parts = 0.0, rows_RD.split(PART)
    for part_RD in parts:
        z_RF = sae.encode(part_RD)
        fires_F += (z_RF > 0).sum(dim=0)
        energy_F += z_RF.double().square().sum(dim=0)
        error += float((part_RD.float() - sae.decode(z_RF)).double().square().sum())
    alive_N = torch.nonzero((fires_F > 0) & (sae.W_dec_FD.norm(dim=1) > 0)).flatten()
    if not len(alive_N):
        raise ValueError(
            f"{sae.about.place}: none of its latents is active on these {len(rows_RD):,} rows; are they in the units "
            "that it reads? Without --data its weights alone are compared"
        )
    if len(alive_N) > settings.latents:
        alive_N = alive_N[energy_F[alive_N].argsort(descending=True, stable=True)[: settings.latents]].sort().values
    z_NR = torch.empty(len(alive_N), len(rows_RD))
    for part_RD, part_NR in zip(parts, z_NR.split(PART, dim=1), strict=True):
        part_NR.copy_(sae.encode(part_RD)[:, alive_N].T)
    density_F = fires_F.double() / len(rows_RD)
    quality = {
        "l0": float(density_F.sum()),
        "fvu": error / float((rows_RD.double() - rows_RD.double().mean(dim=0)).square().sum()),
        "dead_share": float((fires_F == 0).double().mean()),
    }
    return Chosen(label, sae, alive_N, density_F, standardised_values(z_NR), quality)


def compare(
    chosen: Sequence[Chosen], rows_RD: torch.Tensor | None, settings: Settings, say: Callable[[str], None]
) -> tuple[dict[str, Any], Consensus]:
    """The whole comparison as plain JSON, and its features."""
    d = chosen[0].sae.d
    gaussians = {"isotropic": Gaussian(np.ones(d), np.eye(d))}
    if rows_RD is not None:
        gaussians["covariance"] = Gaussian.of_rows(rows_RD)
    largest = max(len(one.index_N) for one in chosen)
    # A mean over thousands of matched pairs is exact to 0.01 in one draw, and one is what can be paid for.
    draws = 100 if largest <= 256 else 20 if largest <= 1024 else 1
    nulls = {name: CovarianceNull(one, draws, settings.cosine, settings.seed) for name, one in gaussians.items()}
    pairs = []
    for a, b in combinations(chosen, 2):
        say(f"comparing {a.label} ({len(a.index_N):,} latents) with {b.label} ({len(b.index_N):,})")
        pairs.append(_pair(a, b, nulls, settings))
    say("looking for features that several have")
    consensus = find_consensus(
        [NamedCore(one.label, place, core_of(one, place, chosen)) for place, one in enumerate(chosen)],
        settings.cosine,
        settings.share,
    )
    found = {
        "format_version": FORMAT_VERSION,
        "settings": {"cosine": settings.cosine, "latents": settings.latents, "share": settings.share},
        "rows": 0 if rows_RD is None else len(rows_RD),
        "saes": [one.to_dict() for one in chosen],
        "pairs": pairs,
        "reproducibility": _shares(consensus, chosen),
        "features": consensus.to_dict()["groups"],
        "core_size": 0 if consensus.core is None else consensus.core.size,
    }
    return found, consensus


def _pair(a: Chosen, b: Chosen, nulls: dict[str, CovarianceNull], settings: Settings) -> dict[str, Any]:
    decoder, encoder = hungarian(a.W_dec_ND, b.W_dec_ND), hungarian(a.W_enc_ND, b.W_enc_ND)
    size = len(a.index_N), len(b.index_N)
    tested: dict[str, NullResult] = {
        name: null.of(size, null.to_whole(a.W_dec_ND), null.to_whole(b.W_dec_ND)) for name, null in nulls.items()
    }
    activation = None
    if a.z is not None and b.z is not None:
        activation = _activation(a.z, b.z, decoder, settings.seed)
    return {
        "a": a.label,
        "b": b.label,
        "latents": list(size),
        "pw_mcc": pw_mcc(decoder),
        "shared": len(shared_pairs(encoder, decoder, settings.cosine)),
        "overlap": overlap(encoder, decoder, settings.cosine),
        "mmcs_ab": mmcs(a.W_dec_ND, b.W_dec_ND),
        "mmcs_ba": mmcs(b.W_dec_ND, a.W_dec_ND),
        "activation": activation,
        "nulls": {
            name: {
                "pw_mcc": null.mean,
                "pw_mcc_p99": null.p99,
                "overlap": null.overlap_mean,
                "mmcs": null.mmcs_mean,
                "draws": null.draws,
            }
            for name, null in tested.items()
        },
    }


def _activation(left: Standardised, right: Standardised, matching: Matching, seed: int) -> dict[str, Any]:
    """Correlation of matched latents on the rows, beside that of partners dealt out anew."""
    rng = np.random.default_rng([seed, PERMUTED_NULL])
    found = agreement(left, right, matching)
    dealt = [
        agreement(
            left,
            right,
            Matching(matching.left_P, rng.permutation(matching.right_P), matching.cosine_P, matching.sizes),
        ).mean
        for _ in range(PERMUTATIONS)
    ]
    known = [value for value in dealt if value is not None]
    return {
        "mean": found.mean,
        "pairs": found.counted,
        "left_out": found.left_out,
        "permuted": float(np.mean(known)) if known else None,
        "permuted_largest": max(known) if known else None,
        "draws": len(known),
    }


def _shares(consensus: Consensus, chosen: Sequence[Chosen]) -> list[dict[str, Any]]:
    """For each SAE, how many of its compared latents 0, 1, ... of the others have."""
    counts = np.zeros((len(chosen), len(chosen)), dtype=int)
    for feature in consensus.features:
        for member in feature.members:
            counts[member.chain, len(feature.members) - 1] += 1
    return [
        {
            "label": one.label,
            "in_others": row.tolist(),
            "mean": float((row * np.arange(len(row))).sum() / max(1, row.sum()) / max(1, len(chosen) - 1)),
        }
        for one, row in zip(chosen, counts, strict=True)
    ]


def core_of(one: Chosen, place: int, others: Sequence[Chosen]) -> Core:
    """The compared latents as a core, of raw units. No chain selected it: its scores are what is known of how much each
    latent does, its density. Model and hook are what any of the SAEs says of them.
    """
    abouts = [other.sae.about for other in others]
    sae, ids_N = one.sae, one.index_N
    density_N = torch.zeros(len(ids_N)) if one.density_F is None else one.density_F[ids_N]
    theta = float(sae.gate.theta_F[ids_N].mean()) if isinstance(sae.gate, Threshold) and len(ids_N) else 0.0
    return Core(
        W_enc_CD=sae.W_enc_FD[ids_N],
        W_dec_CD=sae.W_dec_FD[ids_N],
        b_enc_C=sae.b_enc_F[ids_N],
        b_dec_D=sae.b_dec_D,
        scores_C=density_N,
        density_C=density_N,
        latent_ids_C=ids_N,
        theta=max(0.0, theta),
        scale=1.0,
        hook=next((about.hook for about in abouts if about.hook), ""),
        model=next((name for about in abouts if (name := _plain_name(about.model))), ""),
        cycle=0,
        seed=place,
        k=int(sae.about.k or 0),
        entered_C=torch.zeros(len(ids_N), dtype=torch.int64),
        selected=((0,),) * len(ids_N),
        selected_by="density",
    )
