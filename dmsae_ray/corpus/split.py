"""The split, and the part, that a document belongs to, decided by the document's text alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dmsae_ray.config import Config

SPLITS = ("train", "attribution", "evaluation")
CALIBRATION_MARGIN = 1.5
"""Documents kept for calibration, beyond its share of the rows: few documents rarely have just the tokens expected."""


@dataclass(frozen=True)
class Deal:
    """Which splits there are, and what goes into each: where documents are dealt to parts, every part has training and
    attribution text of its own, and the rows held back come from documents that no part trains on.

    One part: nothing is dealt, and the rows held back are some of the training split's sequences.
    """

    parts: int = 1
    calibration_share: float = 0.0
    """share of the documents not held out that are kept for calibration"""

    @staticmethod
    def of(config: Config) -> Deal:
        parts, wanted = config.sweep.n_parts, config.harvest.calibration_tokens
        if parts == 1:
            return UNDEALT
        return Deal(parts, min(0.5, CALIBRATION_MARGIN * wanted / (wanted + config.harvest.tokens)))

    @property
    def training(self) -> tuple[str, ...]:
        """Splits that training rows come from, part by part."""
        return ("train",) if self.parts == 1 else tuple(of_part("train", part) for part in range(self.parts))

    @property
    def held_out(self) -> tuple[str, ...]:
        """Splits that a finished dataset carries as token sequences."""
        parts = range(self.parts if self.parts > 1 else 0)
        return ("attribution", "evaluation", *(of_part("attribution", part) for part in parts))

    @property
    def splits(self) -> tuple[str, ...]:
        return (*self.training, *(("calibration",) if self.parts > 1 else ()), *self.held_out)

    def splits_of(self, document_text: str, attribution: float, evaluation: float) -> tuple[str, ...]:
        """The splits whose text this document is: one, and of attribution text that of all parts together as well.

        attribution, evaluation: shares, see `split_of`. Part and calibration are decided by other bytes of the same
        sha256, so they too are the same wherever the text stands.
        """
        split = split_of(document_text, attribution, evaluation)
        if self.parts == 1 or split == "evaluation":
            return (split,)
        part = of_part(split, _number(document_text, 1) % self.parts)
        if split == "attribution":
            return split, part
        return ("calibration",) if _number(document_text, 2) / 2**64 < self.calibration_share else (part,)


UNDEALT = Deal()


def of_part(split: str, part: int) -> str:
    """Name of a part's own text of a split."""
    return f"{split}-{part}"


def split_of(document_text: str, attribution: float, evaluation: float) -> str:
    """Return "train", "attribution" or "evaluation" for one document.

    The sha256 of the text is read as a number u, uniform in [0, 1): u < attribution is the attribution split,
    u < attribution + evaluation the evaluation split, the rest trains. The same text therefore lands in the same
    split in every corpus, order and machine, and a duplicated document cannot be in two splits.

    Raises ValueError if the two shares are not in [0, 1) or leave nothing to train on.
    """
    if not 0 <= attribution < 1 or not 0 <= evaluation < 1 or attribution + evaluation >= 1:
        raise ValueError(
            f"split shares must be in [0, 1) and sum to less than 1, got attribution={attribution}, "
            f"evaluation={evaluation}: lower one of them"
        )
    u = _number(document_text, 0) / 2**64
    if u < attribution:
        return "attribution"
    if u < attribution + evaluation:
        return "evaluation"
    return "train"


def _number(document_text: str, place: int) -> int:
    """One of the four numbers of 64 bits that the sha256 of a text is."""
    digest = hashlib.sha256(document_text.encode("utf-8")).digest()
    return int.from_bytes(digest[8 * place : 8 * place + 8], "big")
