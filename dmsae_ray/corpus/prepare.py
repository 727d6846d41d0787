"""Preparing a corpus: its documents become three files of token sequences, one for each split, in bounded memory."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from dmsae_ray.config import Config, CorpusConfig
from dmsae_ray.corpus.encode import encode
from dmsae_ray.corpus.mixture import interleave, load_parts, whole_weights
from dmsae_ray.corpus.packing import PACKINGS
from dmsae_ray.corpus.split import HELD_OUT, SPLITS, split_of
from dmsae_ray.corpus.token_file import MANY, TokenFileWriter, read_metadata
from dmsae_ray.corpus.tokens import TokenSequences, pad_id_of
from dmsae_ray.files import remove_leftovers, temporary_name

SEQUENCES = 201
"""Purpose of a random draw: the order of sequences."""
SAY_SECONDS = 10.0
COPIED = 1024
"""Sequences in memory while a split is put in order."""


def prepare_tokens(
    corpus: CorpusConfig, tokenizer, context: int, seed: int, folder: Path, say: Callable[[str], None] = lambda line: None
) -> dict[str, TokenSequences]:
    """The three splits as token sequences, mapped from disk; made there if any of them is missing or damaged.

    folder: named by its caller after all that decides the tokens; whatever sound files lie there are taken for them.
    tokenizer: a transformers tokenizer with a BOS token. Training sequences are in the corpus's order. Attribution and
    evaluation sequences are in a seeded order, so that any first part of them is a sample. A file's metadata say how many
    documents and tokens each part of the corpus gave to that split. `say` gets a line of progress every SAY_SECONDS.

    Raises ValueError if the corpus cannot be read, a split is empty, the tokenizer has no BOS or the disk is full.
    """
    paths = {split: folder / f"{split}.safetensors" for split in SPLITS}
    if not _sound(paths, say):
        if tokenizer.bos_token_id is None:
            raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no BOS token, which starts every sequence; use another model")
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        # Named like leftovers, which they are as soon as the shuffled files exist.
        in_order = {split: path if split == "train" else temporary_name(path) for split, path in paths.items()}
        try:
            _write(corpus, tokenizer, context, in_order, say)
            for split in HELD_OUT:
                _shuffle(in_order[split], paths[split], seed)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(f"{folder}: {error.strerror}; free space there, or give --output a larger disk, and run the same command again") from error
    return {split: TokenSequences.load(path) for split, path in paths.items()}


def check_held_out(config: Config, sequences: dict[str, TokenSequences]) -> None:
    """Raises ValueError if attribution or evaluation asks for more tokens than its split has."""
    for split, field, wanted in (
        ("attribution", "attribution.tokens", config.attribution.tokens),
        ("evaluation", "evaluate.tokens", config.evaluate.tokens),
    ):
        if (have := sequences[split].tokens) < wanted:
            raise ValueError(f"{field} {wanted}: the corpus's {split} split has only {have}; ask for fewer or raise corpus.{split}_share")


def _sound(paths: dict[str, Path], say: Callable[[str], None]) -> bool:
    """Whether all splits are there, complete and in the present format."""
    if not all(path.exists() for path in paths.values()):
        return False
    try:
        for path in paths.values():
            TokenSequences.load(path)
    except ValueError as error:
        say(f"tokens: {error}; making it again")
        return False
    return True


def _write(corpus: CorpusConfig, tokenizer, context: int, paths: dict[str, Path], say: Callable[[str], None]) -> None:
    """All splits in the corpus's order."""
    packers = {split: PACKINGS[corpus.packing](context, tokenizer.bos_token_id, pad_id_of(tokenizer)) for split in SPLITS}
    kept, shortest = packers["train"].kept, packers["train"].shortest
    streams = [encode(documents, tokenizer) for documents in load_parts(corpus)]
    weights = whole_weights([part.weight for part in corpus.parts])
    documents = islice(interleave(streams, weights, lambda document: kept(len(document.ids))), corpus.documents)
    given = {split: np.zeros((len(weights), 2), dtype=np.int64) for split in SPLITS}  # documents and tokens of each part
    largest = _metadata(corpus, "attribution", np.full_like(given["train"], MANY))
    with ExitStack() as stack:
        files = {split: stack.enter_context(TokenFileWriter(path, context, largest)) for split, path in paths.items()}
        start = said = time.monotonic()
        for part, document in documents:
            split = split_of(document.text, corpus.attribution_share, corpus.evaluation_share)
            packers[split].add(document.ids).append_to(files[split])
            given[split][part] += 1, kept(len(document.ids))
            if (now := time.monotonic()) - said >= SAY_SECONDS:
                said = now
                count, tokens = sum(given.values()).sum(axis=0).tolist()
                say(f"tokens: {count:,} documents, {tokens:,} tokens, {tokens / (now - start):,.0f} tokens/s")
        for split, file in files.items():
            packers[split].rest().append_to(file)
            if not file.count:
                raise ValueError(
                    f"the corpus's {split} split is empty: no document has {shortest} tokens or more, so there is no sequence; give "
                    "more or longer documents, or other corpus.attribution_share and corpus.evaluation_share"
                )
        for split, file in files.items():
            file.finish(_metadata(corpus, split, given[split]))


def _metadata(corpus: CorpusConfig, split: str, given: np.ndarray) -> dict[str, str]:
    """What is written beside the sequences of a split. given: int64 [parts, 2], documents and tokens."""
    parts = [
        {"source": str(part.source), "weight": part.weight, "documents": documents, "tokens": tokens}
        for part, (documents, tokens) in zip(corpus.parts, given.tolist())
    ]
    return {"split": split, "packing": corpus.packing, "parts": json.dumps(parts)}


def _shuffle(in_order: Path, path: Path, seed: int) -> None:
    """Write the sequences again in a seeded order, and delete the file they come from."""
    sequences, metadata = TokenSequences.load(in_order), read_metadata(in_order)
    order = np.random.default_rng([seed, SEQUENCES]).permutation(len(sequences))
    with TokenFileWriter(path, sequences.ids.shape[1], metadata) as file:
        for first in range(0, len(order), COPIED):
            sequences.take(order[first : first + COPIED]).append_to(file)
        file.finish(metadata)
    in_order.unlink()
