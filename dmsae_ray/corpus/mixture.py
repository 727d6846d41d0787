"""A mixture of sources: whether it can be read, what identifies it, and the order its documents come in.

A single source is a mixture of one, so everything that takes a whole CorpusConfig is here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import TypeVar

from dmsae_ray.config import CorpusConfig
from dmsae_ray.corpus.documents import (
    Document,
    check_source,
    corpus_fingerprint,
    embedded_sample,
    load_documents,
)
from dmsae_ray.corpus.hub_text import hub_commit
from dmsae_ray.corpus.local_files import ignored_files, is_hub

T = TypeVar("T")


NAMED = 20
"""Ignored files that are named; of more, the number is given."""


def check_mixture(corpus: CorpusConfig) -> bool:
    """`check_source` for every part. Returns whether any holds chat messages. Raises ValueError, which for a mixture
    names the part.
    """
    chat = False
    for number, part in enumerate(corpus.parts):
        try:
            chat |= check_source(part.source.reveal(), part.text_field, part.revision)
        except ValueError as error:
            if not corpus.mixture:
                raise
            raise ValueError(f"corpus.mixture.{number}: {error}") from error
    return chat


def ignored(corpus: CorpusConfig) -> list[str]:
    """A line for each part in whose folder files lie that are not read; names them."""
    lines = []
    for part in corpus.parts:
        source = part.source.reveal()
        if source == "embedded" or is_hub(source) or not (files := ignored_files(source)):
            continue
        names = ", ".join(str(path) for path in files[:NAMED]) + (
            f" and {len(files) - NAMED:,} more" if len(files) > NAMED else ""
        )
        lines.append(
            f"corpus: {len(files):,} not read, no texts by their names (README, LICENSE and hidden files are left "
            f"out): {names}"
        )
    return lines


def hub_commits(corpus: CorpusConfig) -> dict[str, str]:
    """The commits of the hub data sets among the parts, by source."""
    hubs = {
        part.source.reveal(): part
        for part in corpus.parts
        if part.source != "embedded" and is_hub(part.source.reveal())
    }
    return {source: hub_commit(source, part.revision) for source, part in hubs.items()}


def mixture_fingerprint(corpus: CorpusConfig) -> str:
    """A hash of what decides the documents and their order; that of a single source is `corpus_fingerprint`'s own.

    Weights count by their ratios: 2 to 1 is the same mixture as 1 to 0.5. Raises ValueError like `corpus_fingerprint`.
    """
    parts = [corpus_fingerprint(part.source.reveal(), part.text_field, part.revision) for part in corpus.parts]
    if not corpus.mixture:
        return parts[0]
    weights = whole_weights([part.weight for part in corpus.parts])
    lines = [f"{weight} {part}\n" for weight, part in zip(weights, parts, strict=True)]
    return hashlib.sha256(("mixture\n" + "".join(lines)).encode()).hexdigest()


def load_parts(corpus: CorpusConfig) -> list[Iterator[Document]]:
    """One stream of documents for each part, none longer than `corpus.documents`. They raise like `load_documents`."""
    return [
        islice(
            embedded_sample()
            if part.source == "embedded"
            else load_documents(part.source.reveal(), part.text_field, part.revision, corpus.piece_characters),
            corpus.documents,
        )
        for part in corpus.parts
    ]


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratios of these weights, read as the decimals they were written as.

    With whole numbers the order of documents is exact: no rounding decides which part is next.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    whole = [int(weight * math.lcm(*(e.denominator for e in exact))) for weight in exact]
    return [weight // math.gcd(*whole) for weight in whole]


def interleave(
    parts: Sequence[Iterator[T]], weights: Sequence[int], tokens_of: Callable[[T], int]
) -> Iterator[tuple[int, T]]:
    """Yield (part, document), always the next document of the part whose tokens lag furthest behind its weight.

    Part i lags by share_i * (all tokens so far) - (its tokens so far); the first listed wins a tie. A part is only
    taken while it does not lead, so none is ever ahead of its share by more than one of its own documents. It ends
    where the part that is next has no document left: going on without it would break the shares.
    """
    tokens, whole = [0] * len(parts), sum(weights)
    while True:
        lags = [weight * sum(tokens) - whole * have for weight, have in zip(weights, tokens, strict=True)]
        part = lags.index(max(lags))
        document = next(parts[part], None)
        if document is None:
            return
        tokens[part] += tokens_of(document)
        yield part, document
