"""Preparing a corpus: its documents become files of token sequences, one for each split, in bounded memory."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from dmsae_ray.config import Config, CorpusConfig
from dmsae_ray.corpus.documents import Document
from dmsae_ray.corpus.encode import EncodedDocument, encode
from dmsae_ray.corpus.mixture import interleave, load_parts, whole_weights
from dmsae_ray.corpus.packing import PACKINGS
from dmsae_ray.corpus.split import UNDEALT, Deal, of_part
from dmsae_ray.corpus.token_file import MANY, TokenFileWriter
from dmsae_ray.corpus.tokens import TokenSequences, pad_id_of
from dmsae_ray.files import present, remove_leftovers

SAY_SECONDS = 10.0


def prepare_tokens(
    corpus: CorpusConfig,
    tokenizer,
    context: int,
    folder: Path,
    wanted: Mapping[str, int] | None = None,
    say: Callable[[str], None] = lambda line: None,
    deal: Deal = UNDEALT,
) -> dict[str, TokenSequences]:
    """The splits as token sequences in the corpus's order, mapped from disk; made there if missing, damaged or too
    short.

    folder: named by its caller after all that decides the tokens but `wanted`; whatever sound files lie there are taken
    for them.
    wanted: split -> tokens: only these splits are made, each of the first documents that give it so many, and no
    document is read after the last that is needed; None: all splits, of the whole corpus. A longer split begins with a
    shorter one, so that what was computed on the first tokens stays what it was.
    deal: which splits there are.
    tokenizer: a transformers tokenizer with a BOS token. A file's metadata say how many documents and tokens each part
    of the corpus gave to that split, and whether the corpus has no more. `say` gets a line of progress every
    SAY_SECONDS.

    Raises ValueError if the corpus cannot be read, a split is empty, the tokenizer has no BOS or the disk is full.
    """
    wanted = dict.fromkeys(deal.splits, MANY) if wanted is None else wanted
    paths = {split: folder / f"{split}.safetensors" for split in wanted}
    lacking = {split: wanted[split] for split, path in paths.items() if not _enough(path, wanted[split], say)}
    if lacking:
        if tokenizer.bos_token_id is None:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no BOS token, which starts every sequence; set "
                "model.bos_token"
            )
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        try:
            _write(corpus, tokenizer, context, {split: paths[split] for split in lacking}, lacking, say, deal)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"{folder}: {error.strerror}; free space there, or give --output a larger disk, and run the same "
                "command again"
            ) from error
    return {split: TokenSequences.load(path) for split, path in paths.items()}


def held_out_tokens(config: Config) -> dict[str, int]:
    """Tokens of each held-out split that something in a configuration looks at."""
    return {
        split: max(config.evaluate.tokens, config.features.tokens)
        if split == "evaluation"
        else config.attribution.tokens
        for split in Deal.of(config).held_out
    }


def check_held_out(config: Config, sequences: dict[str, TokenSequences]) -> None:
    """Raises ValueError if attribution or evaluation asks for more tokens than its split has."""
    deal = Deal.of(config)
    asked = [
        ("attribution", "attribution", "", config.attribution.tokens),
        ("evaluation", "evaluate", "", config.evaluate.tokens),
        *(
            (
                of_part("attribution", part),
                "attribution",
                f" of part {part} of sweep.parts {deal.parts}",
                config.attribution.tokens,
            )
            for part in range(deal.parts if deal.parts > 1 else 0)
        ),
    ]
    for split, section, part, wanted in asked:
        if (have := sequences[split].tokens) < wanted:
            whole = split.partition("-")[0]
            raise ValueError(
                f"{section}.tokens {wanted}: the corpus's {whole} split{part} has only {have}; ask for fewer or raise "
                f"corpus.{whole}_share"
            )


def _enough(path: Path, wanted: int, say: Callable[[str], None]) -> bool:
    """Whether a split is there, complete, in the present format, and as long as it has to be or can be."""
    if not present(path):
        return False
    try:
        sequences = TokenSequences.load(path)
    except ValueError as error:
        say(f"tokens: {error}; making it again")
        return False
    return sequences.tokens >= wanted or sequences.ends


class _Tally:
    """What documents gave, and which splits have yet to be filled."""

    def __init__(self, corpus: CorpusConfig, wanted: Mapping[str, int], deal: Deal):
        self.corpus, self.lacking, self.deal = corpus, dict(wanted), deal
        self.given = {split: np.zeros((len(corpus.parts), 2), dtype=np.int64) for split in deal.splits}
        """documents and tokens of each source of the mixture, int64 [sources, 2]"""
        self.documents = self.replaced = 0
        self.taken = np.zeros(2, dtype=np.int64)
        """documents and tokens, each document counted once"""

    def splits(self, document: Document) -> list[str]:
        """Those that it belongs to and that are not yet full."""
        whole = document.text if document.whole is None else document.whole
        splits = self.deal.splits_of(whole, self.corpus.attribution_share, self.corpus.evaluation_share)
        return [split for split in splits if split in self.lacking]

    def needed(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Documents of splits that are not yet full: others are not worth a tokenizer's time."""
        for document in documents:
            self.documents += 1
            if self.splits(document):
                yield document
            elif not self.lacking:
                return


def _write(
    corpus: CorpusConfig,
    tokenizer,
    context: int,
    paths: dict[str, Path],
    wanted: Mapping[str, int],
    say: Callable[[str], None],
    deal: Deal,
) -> None:
    """These splits, each of as many documents as it needs."""
    packers = {
        split: PACKINGS[corpus.packing](context, tokenizer.bos_token_id, pad_id_of(tokenizer)) for split in paths
    }
    kept, shortest = next(iter(packers.values())).kept, next(iter(packers.values())).shortest
    tally, rows = _Tally(corpus, wanted, deal), dict.fromkeys(paths, 0)
    # The order of a mixture counts every document's tokens, so there nothing can be passed over.
    parts = [documents if corpus.mixture else tally.needed(documents) for documents in load_parts(corpus)]
    weights = whole_weights([part.weight for part in corpus.parts])
    documents = islice(
        interleave([encode(part, tokenizer) for part in parts], weights, lambda document: kept(len(document.ids))),
        corpus.documents,
    )
    longest = max(deal.splits, key=len)
    largest = _metadata(corpus, longest, np.full_like(tally.given[longest], MANY), ends=False)
    with ExitStack() as stack:
        files = {split: stack.enter_context(TokenFileWriter(path, context, largest)) for split, path in paths.items()}
        start = said = time.monotonic()
        for part, document in documents:
            splits = tally.splits(document.document)
            tally.documents += bool(corpus.mixture)  # else counted where they are passed over
            if not splits:
                continue
            for split in splits:
                sequences = packers[split].add(document.ids)
                sequences.append_to(files[split])
                rows[split] += sequences.tokens
                tally.given[split][part] += 1, kept(len(document.ids))
                if rows[split] >= wanted[split]:
                    del tally.lacking[split]
            tally.taken += 1, kept(len(document.ids))
            tally.replaced += _note(document, tally.replaced, say)
            if (now := time.monotonic()) - said >= SAY_SECONDS:
                said, (count, tokens) = now, tally.taken.tolist()
                say(f"tokens: {count:,} documents, {tokens:,} tokens, {tokens / (now - start):,.0f} tokens/s")
            if not tally.lacking:
                break
        for split in tally.lacking:  # the corpus ended: what is left of its last document
            packers[split].rest().append_to(files[split])
        for split, file in files.items():
            if not file.count:
                here = int(tally.given[split].sum(axis=0)[0])
                raise ValueError(
                    f"the corpus's {split} split is empty: "
                    + (
                        f"none of its {here:,} documents has {shortest} tokens"
                        if here
                        else f"none of {tally.documents:,} documents fell to it"
                    )
                    + ", so there is no sequence; give more or longer documents, cut long ones by "
                    "corpus.piece_characters, or set other corpus.attribution_share and corpus.evaluation_share"
                    + (", or lower sweep.parts" if deal.parts > 1 else "")
                )
        for split, file in files.items():
            file.finish(_metadata(corpus, split, tally.given[split], ends=split in tally.lacking))
        if tally.replaced:
            say(f"corpus: {tally.replaced:,} characters in all that are no text were replaced by U+FFFD")


def _note(document: EncodedDocument, before: int, say: Callable[[str], None]) -> int:
    """How many characters of a document were replaced; says so for the first document."""
    replaced = document.document.replaced
    if replaced and not before:
        say(
            f"corpus: {document.document.name}: {replaced:,} characters are halves of surrogate pairs, no text: "
            "replaced by U+FFFD"
        )
    return replaced


def _metadata(corpus: CorpusConfig, split: str, given: np.ndarray, ends: bool) -> dict[str, str]:
    """What is written beside the sequences of a split. given: int64 [parts, 2], documents and tokens. ends: whether the
    corpus has no more.
    """
    parts = [
        {"source": str(part.source), "weight": part.weight, "documents": documents, "tokens": tokens}
        for part, (documents, tokens) in zip(corpus.parts, given.tolist(), strict=True)
    ]
    return {"split": split, "packing": corpus.packing, "ends": str(ends).lower(), "parts": json.dumps(parts)}
