"""A pair of chains: how far their last cores agree, beside what chance would give.

Shape letters: N candidates of cycle 0, C core size, D model dimension, F width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from dmsae_ray.compare.match import hungarian, mmcs, overlap, pw_mcc, shared_pairs
from dmsae_ray.compare.nulls import (
    Densities,
    Gaussian,
    Latents,
    NullResult,
    covariance_null,
    cycle0_null,
    matched_density_null,
    unavailable,
)

if TYPE_CHECKING:
    from dmsae_ray.distill.core import Core

SMALLEST_CORE = 2
"""With one latent on a side a mean over matched pairs is a single cosine, a maximum over the other core: it says nothing."""


@dataclass(frozen=True)
class CompareSettings:
    """How cores are compared."""

    draws: int = 200
    """draws of each null"""
    cosine: float = 0.7
    """a latent is shared if encoder and decoder cosine both reach this"""
    max_latents: int = 8192
    """largest prefix of whole dictionaries that is matched (assignment costs its cube)"""
    seed: int = 0
    """seed of the null draws"""


@dataclass(frozen=True, eq=False)
class ChainResult:
    """What a comparison reads of a finished chain.

    Raises ValueError if shapes contradict each other.
    """

    label: str
    """name of the chain"""
    seed: int
    """its seed"""
    k: int
    """its active latents per token"""
    core: Core
    """the core its last cycle selected"""
    W_dec_FD: torch.Tensor
    """decoder rows of the SAE in which the core was selected"""
    W_enc_FD: torch.Tensor
    """all encoder rows of that SAE, the frozen ones first"""
    density_F: torch.Tensor
    """share of evaluation tokens on which each of its latents is active"""
    core_ids: torch.Tensor
    """latent ids, int64 [C], of the selected core in that SAE"""
    cycle0_W_enc_ND: torch.Tensor
    """encoder rows of cycle 0's candidates, by score descending"""
    cycle0_W_dec_ND: torch.Tensor
    """their decoder rows"""
    cycle0_whole_FD: torch.Tensor | None = None
    """all decoder rows of cycle 0's SAE; without them cycle 0's null has no MMCS"""

    def __post_init__(self) -> None:
        if self.W_enc_FD.shape != self.W_dec_FD.shape or self.density_F.shape[0] != self.W_dec_FD.shape[0]:
            raise ValueError(
                f"{self.label}: encoder {tuple(self.W_enc_FD.shape)}, decoder {tuple(self.W_dec_FD.shape)} and densities "
                f"{tuple(self.density_F.shape)} are not of one SAE"
            )
        if len(self.core_ids) != self.core.size or self.core.W_enc_CD.shape[1] != self.W_dec_FD.shape[1]:
            raise ValueError(f"{self.label}: the core is not of this SAE")

    def cycle0(self) -> Latents:
        """Cycle 0's candidates by score descending."""
        return Latents(self.cycle0_W_enc_ND, self.cycle0_W_dec_ND)

    def core_by_score(self) -> Latents:
        """The core's members by score descending, ties by id."""
        order_C = torch.argsort(self.core.scores_C, descending=True, stable=True)
        return Latents(self.core.W_enc_CD[order_C], self.core.W_dec_CD[order_C])

    def whole(self) -> Latents:
        """All latents of the SAE."""
        return Latents(self.W_enc_FD, self.W_dec_FD)

    def densities(self) -> Densities:
        """The SAE's densities, core and free apart."""
        return Densities.split(self.density_F.cpu().numpy(), self.core_ids.cpu().numpy())


@dataclass(frozen=True)
class PairResult:
    """Agreement of two chains. A number is None where it could not be made; `reason` then says why."""

    a: str
    """label of the first chain"""
    b: str
    """label of the second chain"""
    size_a: int
    """members of the first core"""
    size_b: int
    """members of the second core"""
    differs: Literal["seed", "k", "both"]
    """what the two chains do not have in common"""
    seed_a: int
    """seed of the first chain"""
    seed_b: int
    """seed of the second chain"""
    k_a: int
    """active latents per token of the first chain"""
    k_b: int
    """active latents per token of the second chain"""
    overlap: float | None
    """2 * shared / (size_a + size_b)"""
    shared: int | None
    """latents that encoder and decoder matching pair alike, at both cosines"""
    pw_mcc: float | None
    """mean cosine of matched decoder rows, over the smaller core"""
    mmcs_ab: float | None
    """mean over the first core of the largest cosine to any latent of the second chain's whole SAE"""
    mmcs_ba: float | None
    """the same from the second core to the first chain's whole SAE"""
    pw_mcc_dictionary: float | None
    """PW-MCC of the whole SAEs, or of their first `dictionary_size` latents"""
    pw_mcc_dictionary_null: float | None
    """the same for one Gaussian draw with the activations' covariance (thousands of pairs: one draw is enough)"""
    dictionary_size: int
    """latents of the larger side in pw_mcc_dictionary"""
    reason: str | None
    """why the cores' scores are missing"""
    nulls: dict[str, NullResult]
    """`covariance`, `matched_density` and `cycle0`"""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; tuples become lists."""
        plain = dataclasses.asdict(self)
        for null in plain["nulls"].values():
            null["size"] = list(null["size"])
        return plain

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> PairResult:
        """The inverse of to_dict. Raises ValueError on missing or unknown fields."""
        nulls = {
            name: NullResult(**_fields(NullResult, null) | {"size": tuple(null["size"])})
            for name, null in plain.get("nulls", {}).items()
        }
        return PairResult(**_fields(PairResult, plain) | {"nulls": nulls})


def _fields(kind: type, plain: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    if names != plain.keys():
        raise ValueError(
            f"{kind.__name__}: missing fields {sorted(names - plain.keys())}, unknown fields {sorted(plain.keys() - names)}"
        )
    return plain


def differs(a: ChainResult, b: ChainResult) -> Literal["seed", "k", "both"]:
    """What two chains do not have in common. Raises ValueError if seed and k are the same."""
    if a.seed == b.seed and a.k == b.k:
        raise ValueError(f"chains {a.label} and {b.label} have the same seed and k: comparing them says nothing")
    if a.seed != b.seed and a.k != b.k:
        return "both"
    return "seed" if a.seed != b.seed else "k"


def compare_pair(
    a: ChainResult, b: ChainResult, cov_DD: torch.Tensor | np.ndarray | Gaussian, settings: CompareSettings
) -> PairResult:
    """Compare two chains. cov_DD: covariance of the activations (its scale does not matter), or what was made of it.

    Cores with fewer than SMALLEST_CORE members give a result without core scores. Raises ValueError if cov_DD is not the
    covariance of the SAEs' inputs, or the chains differ in nothing.
    """
    gaussian = cov_DD if isinstance(cov_DD, Gaussian) else Gaussian.of(cov_DD)
    for chain in (a, b):
        if chain.W_dec_FD.shape[1] != gaussian.d:
            raise ValueError(
                f"covariance is of {gaussian.d} dimensions, chain {chain.label} has {chain.W_dec_FD.shape[1]}: another dataset?"
            )
    size = (a.core.size, b.core.size)
    width = min(settings.max_latents, max(a.W_dec_FD.shape[0], b.W_dec_FD.shape[0]))
    common = {
        "a": a.label, "b": b.label, "size_a": size[0], "size_b": size[1], "differs": differs(a, b),
        "seed_a": a.seed, "seed_b": b.seed, "k_a": a.k, "k_b": b.k,
        "pw_mcc_dictionary": pw_mcc(hungarian(a.W_dec_FD[:width], b.W_dec_FD[:width])),
        "pw_mcc_dictionary_null": _dictionary_null(a, b, width, gaussian, settings.seed),
        "dictionary_size": width,
    }  # fmt: skip
    if min(size) < SMALLEST_CORE:
        reason = f"cores of {size[0]} and {size[1]} latents: a comparison needs at least {SMALLEST_CORE} on each side"
        nulls = {name: unavailable(reason, size) for name in ("covariance", "matched_density", "cycle0")}
        return PairResult(
            **common, overlap=None, shared=None, pw_mcc=None, mmcs_ab=None, mmcs_ba=None, reason=reason, nulls=nulls
        )
    encoder = hungarian(a.core.W_enc_CD, b.core.W_enc_CD)
    decoder = hungarian(a.core.W_dec_CD, b.core.W_dec_CD)
    return PairResult(
        **common,
        overlap=overlap(encoder, decoder, settings.cosine),
        shared=len(shared_pairs(encoder, decoder, settings.cosine)),
        pw_mcc=pw_mcc(decoder),
        mmcs_ab=mmcs(a.core.W_dec_CD, b.W_dec_FD),
        mmcs_ba=mmcs(b.core.W_dec_CD, a.W_dec_FD),
        reason=None,
        nulls=_nulls(a, b, gaussian, settings),
    )


def _nulls(a: ChainResult, b: ChainResult, gaussian: Gaussian, settings: CompareSettings) -> dict[str, NullResult]:
    draws, cosine, seed = settings.draws, settings.cosine, settings.seed
    cycle0 = cycle0_null(
        a.cycle0(), b.cycle0(), a.core_by_score(), b.core_by_score(), cosine, a.cycle0_whole_FD, b.cycle0_whole_FD
    )
    undistilled = [chain.label for chain in (a, b) if chain.core.cycle == 0]
    if undistilled:
        reason = f"the core of {' and '.join(undistilled)} is itself cycle 0's: nothing has been distilled yet"
        cycle0 = dataclasses.replace(cycle0, available=False, reason=reason)
    return {
        "covariance": covariance_null(
            gaussian, (a.core.size, b.core.size), a.W_dec_FD, b.W_dec_FD, draws, cosine, seed
        ),
        "matched_density": matched_density_null(
            a.whole(), b.whole(), a.densities(), b.densities(), draws, cosine, seed
        ),
        "cycle0": cycle0,
    }  # fmt: skip


def _dictionary_null(a: ChainResult, b: ChainResult, width: int, gaussian: Gaussian, seed: int) -> float | None:
    rng = np.random.default_rng([seed, 2])
    rows = [gaussian.rotated(rng, min(width, chain.W_dec_FD.shape[0])) for chain in (a, b)]
    return pw_mcc(hungarian(*rows))


def compare_all(
    chains: Sequence[ChainResult], cov_DD: torch.Tensor | np.ndarray, settings: CompareSettings,
    on_pair: Callable[[int, int], None] = lambda done, total: None,
) -> list[PairResult]:  # fmt: skip
    """Every pair of chains, in the order given. With fewer than two chains there is no pair, and the list is empty.

    on_pair(done, total) is called after each.
    """
    pairs = list(combinations(chains, 2))
    gaussian = Gaussian.of(cov_DD)
    results = []
    for a, b in pairs:
        results.append(compare_pair(a, b, gaussian, settings))
        on_pair(len(results), len(pairs))
    return results
