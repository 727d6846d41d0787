"""The split a document belongs to, decided by the document's text alone."""

from __future__ import annotations

import hashlib

SPLITS = ("train", "attribution", "evaluation")
HELD_OUT = SPLITS[1:]
"""What a finished dataset carries as token sequences."""


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
    digest = hashlib.sha256(document_text.encode("utf-8")).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    if u < attribution:
        return "attribution"
    if u < attribution + evaluation:
        return "evaluation"
    return "train"
