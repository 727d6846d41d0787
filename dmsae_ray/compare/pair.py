"""A pair of chains, compared: how far their last cores agree, beside what chance would give."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dmsae_ray.compare.course import CoursePoint
from dmsae_ray.compare.functional import Functional, FunctionalNull
from dmsae_ray.compare.nulls import DictionaryNull, NullResult
from dmsae_ray.compare.pairing import Differs, Pairing

SMALLEST_CORE = 2
"""With one latent on a side a mean over matched pairs is a single cosine, a maximum over the other core: it says
nothing.
"""
OWN_NULLS = ("covariance", "matched_density", "cycle0")
"""Names of the nulls, of cores and of whole dictionaries, that are made of the two chains alone."""
MATCHED_COMPUTE = "matched_compute"
"""The null that other chains make: plain SAEs on as many tokens."""
NULLS = (*OWN_NULLS, MATCHED_COMPUTE)
"""All of them."""


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


@dataclass(frozen=True)
class PairResult:
    """Agreement of two chains. A number is None where it could not be made; `reason` then says why."""

    a: str
    """label of the first chain"""
    b: str
    """label of the second chain"""
    arm_a: str
    """arm of the first chain"""
    arm_b: str
    """arm of the second chain"""
    group: str
    """pairs that are summed up together, such as `base/seed` or `base~random/arm`"""
    differs: Differs
    """what the two chains do not have in common, see pairing.py"""
    differences: tuple[str, ...]
    """all that differs, of seed, data_seed, part, k, rest"""
    seed_a: int
    """seed of the first chain"""
    seed_b: int
    """seed of the second chain"""
    k_a: int
    """k of the first chain"""
    k_b: int
    """k of the second chain"""
    size_a: int
    """members of the first core"""
    size_b: int
    """members of the second core"""
    overlap: float | None
    """2 * shared / (size_a + size_b)"""
    shared: int | None
    """latents on which both matchings agree with both cosines at the bar"""
    pw_mcc: float | None
    """mean cosine of the Hungarian-matched decoder rows, over the smaller core"""
    mmcs_ab: float | None
    """mean over the first core of the largest decoder cosine to any latent of the second chain's whole SAE"""
    mmcs_ba: float | None
    """the same from the second core to the first chain's whole SAE"""
    activation: float | None
    """mean Pearson correlation of the activations of latents matched by decoder rows; None if all pairs were left out
    """
    activation_pairs: int | None
    """matched pairs in that mean"""
    activation_left_out: int | None
    """matched pairs of which one latent is silent on all rows"""
    activation_rows: int
    """held-out rows that activations are compared on"""
    pw_mcc_dictionary: float | None
    """PW-MCC of the whole SAEs, or of their first `dictionary_size` latents"""
    dictionary_size: int
    """latents of the larger side in pw_mcc_dictionary"""
    reason: str | None
    """why the cores' scores are missing"""
    nulls: dict[str, NullResult]
    """of the cores: OWN_NULLS and, once the study's plain SAEs are known, MATCHED_COMPUTE"""
    dictionary_nulls: dict[str, DictionaryNull]
    """of pw_mcc_dictionary, by the same names"""
    functional: Functional | None
    """what the cores' latents are used for; None where the cores have no scores"""
    course: tuple[CoursePoint, ...]
    """the cores after each cycle; empty where the chains' cycles were not trained on the same numbers of tokens"""

    @property
    def mmcs(self) -> float | None:
        """Mean of both directions."""
        return None if self.mmcs_ab is None or self.mmcs_ba is None else (self.mmcs_ab + self.mmcs_ba) / 2

    def of(self, pairing: Pairing) -> PairResult:
        """The same result for the chains as they are called now: labels and arms decide no number."""
        return dataclasses.replace(self, **about(pairing))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; tuples become lists."""
        plain = dataclasses.asdict(self)
        plain |= {"differences": list(self.differences), "course": list(plain["course"])}
        for null in (*plain["nulls"].values(), *plain["dictionary_nulls"].values()):
            null["size"] = list(null["size"])
        return plain

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> PairResult:
        """The inverse of to_dict. Raises ValueError on missing or unknown fields."""
        _check_fields(PairResult, plain)
        read: dict[str, Any] = {
            field: {name: _null(kind, null) for name, null in plain[field].items()}
            for field, kind in (("nulls", NullResult), ("dictionary_nulls", DictionaryNull))
        }
        read |= {"differences": tuple(plain["differences"]), "functional": _functional(plain["functional"])}
        for point in plain["course"]:
            _check_fields(CoursePoint, point)
        read["course"] = tuple(CoursePoint(**point) for point in plain["course"])
        return PairResult(**plain | read)


def about(pairing: Pairing) -> dict[str, Any]:
    """Which chains they are and what differs, as fields of a PairResult."""
    a, b = pairing.a, pairing.b
    return {
        "a": a.label,
        "b": b.label,
        "arm_a": a.arm,
        "arm_b": b.arm,
        "group": pairing.group,
        "differs": pairing.differs,
        "differences": pairing.differences,
        "seed_a": a.seed,
        "seed_b": b.seed,
        "k_a": a.k,
        "k_b": b.k,
    }


def _null(kind: type, plain: dict[str, Any]) -> Any:
    _check_fields(kind, plain)
    return kind(**plain | {"size": tuple(plain["size"])})


def _functional(plain: dict[str, Any] | None) -> Functional | None:
    if plain is None:
        return None
    _check_fields(Functional, plain)
    for null in plain["nulls"].values():
        _check_fields(FunctionalNull, null)
    return Functional.from_dict(plain)


def _check_fields(kind: type, plain: dict[str, Any]) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    if names != plain.keys():
        raise ValueError(
            f"{kind.__name__}: missing fields {sorted(names - plain.keys())}, unknown fields "
            f"{sorted(plain.keys() - names)}"
        )
