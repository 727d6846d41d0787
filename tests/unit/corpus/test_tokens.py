"""Token sequences: how documents are packed into them, and their file."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dmsae_ray.corpus.documents import Document, load_documents
from dmsae_ray.corpus.encode import ENCODE_DOCUMENTS, encode
from dmsae_ray.corpus.packing import MIN_PIECE, PACKINGS
from dmsae_ray.corpus.token_file import TokenFileWriter, read_metadata
from dmsae_ray.corpus.tokens import TokenSequences, pad_id_of
from dmsae_ray.lm.source import load_tokenizer

T, BOS, PAD = 32, 1, 0


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def packed(
    documents: list[list[int]], packing: str, context: int = T, bos: int = BOS, pad: int = PAD
) -> TokenSequences:
    packer = PACKINGS[packing](context, bos, pad)
    made = [packer.add(np.array(ids, dtype=np.int32)) for ids in documents] + [packer.rest()]
    return TokenSequences(*(np.concatenate([getattr(m, name) for m in made]) for name in ("ids", "lengths", "rows")))


def some_sequences(n=7):
    rng = np.random.default_rng(0)
    lengths = rng.integers(17, T + 1, n).astype(np.int32)
    return TokenSequences(
        rng.integers(3, 99, (n, T)).astype(np.int32), lengths, lengths - rng.integers(1, 4, n).astype(np.int32)
    )


# -- packing
# -------------------------------------------------------------------------------------------------------------


def plain_separate(documents, context):
    body, sequences = context - 1, []
    for ids in documents:
        pieces = [ids[start : start + body] for start in range(0, len(ids), body)]
        sequences += [[BOS, *piece] for piece in pieces if len(piece) >= min(MIN_PIECE, body)]
    return sequences


def plain_concatenate(documents, context):
    """One token at a time."""
    sequences, current = [], []
    for token in [token for ids in documents if ids for token in [BOS, *ids]]:
        if not current and token != BOS:
            current = [BOS]  # the document goes on in a new sequence
        current.append(token)
        if len(current) == context:
            sequences.append(current)
            current = []
    return sequences + [current] * (len(current) - 1 >= min(MIN_PIECE, context - 1))


some_documents = st.lists(st.lists(st.integers(3, 9), max_size=70), max_size=12)


@settings(deadline=None, max_examples=200)
@given(some_documents, st.integers(8, 24), st.sampled_from(["separate", "concatenate"]))
def test_packing_is_the_plain_one(documents, context, packing):
    expected = {"separate": plain_separate, "concatenate": plain_concatenate}[packing](documents, context)
    sequences = packed(documents, packing, context)
    assert sequences.lengths.tolist() == [len(sequence) for sequence in expected]
    assert sequences.ids.tolist() == [sequence + [PAD] * (context - len(sequence)) for sequence in expected]
    assert sequences.rows.tolist() == [sum(token != BOS for token in sequence) for sequence in expected]


@settings(deadline=None, max_examples=200)
@given(some_documents, st.integers(8, 24))
def test_concatenated_sequences_are_full_and_give_back_every_token(documents, context):
    sequences = packed(documents, "concatenate", context)
    assert (sequences.ids[:, 0] == BOS).all() and (sequences.lengths[:-1] == context).all()
    real = np.arange(context)[None] < sequences.lengths[:, None]
    rows = real & (sequences.ids != BOS)
    assert sequences.rows.tolist() == rows.sum(axis=1).tolist() and sequences.tokens == rows.sum()
    joined = [token for ids in documents for token in ids]
    have = sequences.ids[rows].tolist()
    assert have == joined[: len(have)] and len(joined) - len(have) < min(MIN_PIECE, context - 1)


def test_concatenation_by_hand():
    sequences = packed([[11, 12, 13], [21, 22], [31, 32, 33, 34, 35, 36, 37, 38], [41]], "concatenate", context=8)
    # The third document's BOS falls on the end of the first sequence; the end, 3 of 7 tokens, is dropped.
    assert sequences.ids.tolist() == [[1, 11, 12, 13, 1, 21, 22, 1], [1, 31, 32, 33, 34, 35, 36, 37]]
    assert sequences.rows.tolist() == [5, 7] and sequences.lengths.tolist() == [8, 8]


def test_separate_sequences_start_with_bos_and_give_back_the_documents(tokenizer):
    documents = [d for d in load_documents("embedded") if len(d.text) < 4000][: 2 * ENCODE_DOCUMENTS + 20]
    encoded = list(encode(documents, tokenizer))
    assert [e.text for e in encoded] == [d.text for d in documents]
    sequences = packed([e.ids for e in encoded], "separate", T, tokenizer.bos_token_id, pad_id_of(tokenizer))
    assert (sequences.ids[:, 0] == tokenizer.bos_token_id).all() and (
        sequences.ids[:, 1:] != tokenizer.bos_token_id
    ).all()
    padding = np.arange(T)[None] >= sequences.lengths[:, None]
    assert (sequences.ids[padding] == pad_id_of(tokenizer)).all() and (
        sequences.ids[~padding] != pad_id_of(tokenizer)
    ).all()
    # Going through the documents in order uses up the sequences in order: none holds tokens of two documents.
    row = 0
    for document in documents:
        expected = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(expected) % (T - 1) < MIN_PIECE:
            expected = expected[: len(expected) // (T - 1) * (T - 1)]
        joined = []
        while len(joined) < len(expected):
            joined += sequences.ids[row, 1 : sequences.lengths[row]].tolist()
            row += 1
        assert joined == expected
    assert row == len(sequences)


def test_a_special_token_in_a_text_is_text(tokenizer):
    (encoded,) = encode([Document("x", "a <bos> b <pad> c <eos> " * 10)], tokenizer)
    assert len(encoded.ids) > 60 and (encoded.ids > 2).all()


# -- the file
# ------------------------------------------------------------------------------------------------------------


def same(a: TokenSequences, b: TokenSequences) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "lengths", "rows"))


def test_save_and_load(tmp_path):
    sequences, path = some_sequences(), tmp_path / "tokens" / "train.safetensors"
    sequences.save(path, {"split": "train", "note": "é" * 50})
    again = TokenSequences.load(path)
    assert same(again, sequences) and again.ids.dtype == np.int32
    assert read_metadata(path)["split"] == "train" and read_metadata(path)["note"] == "é" * 50
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary is left
    with safe_open(path, framework="numpy") as file:
        assert (file.get_tensor("ids") == sequences.ids).all() and (file.get_tensor("rows") == sequences.rows).all()


def test_what_is_written_in_pieces_is_what_is_read(tmp_path):
    sequences, path = some_sequences(40), tmp_path / "train.safetensors"
    with TokenFileWriter(path, T, {"documents": "999999"}) as file:
        for piece in (slice(0, 1), slice(1, 1), slice(1, 38), slice(38, 40)):
            sequences.take(piece).append_to(file)
        assert not path.exists()
        file.finish({"documents": "7"})
    assert same(TokenSequences.load(path), sequences) and read_metadata(path)["documents"] == "7"


def test_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "train.safetensors"
    with pytest.raises(RuntimeError), TokenFileWriter(path, T, {}) as file:
        some_sequences().append_to(file)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_loading_maps_the_file_and_reads_next_to_nothing(tmp_path):
    path = tmp_path / "train.safetensors"
    some_sequences(20_000).save(path)
    tracemalloc.start()
    sequences = TokenSequences.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 2_500_000 and peak < 100_000
    assert not sequences.ids.flags.writeable and not sequences.rows.flags.writeable
    assert same(sequences.first_tokens(10**9), some_sequences(20_000))


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "train.safetensors"
    with pytest.raises(ValueError, match="no such file of token sequences"):
        TokenSequences.load(path)
    some_sequences().save(path, {"format_version": "1"})
    with pytest.raises(
        ValueError, match=r"train\.safetensors: token sequences of format 1, this version reads 2; delete it"
    ):
        TokenSequences.load(path)
    some_sequences().save(path)
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) - 300, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"train\.safetensors: damaged.*delete it"):
            TokenSequences.load(path)


# -- parts of it
# ---------------------------------------------------------------------------------------------------------


def test_take_first_tokens_and_batches():
    sequences = some_sequences(7)
    order = np.array([3, 1, 5])
    assert (sequences.take(order).ids == sequences.ids[order]).all() and (
        sequences.take(order).rows == sequences.rows[order]
    ).all()
    assert sequences.tokens == sum(sequences.rows.tolist()) < int((sequences.lengths - 1).sum())
    two = int(sequences.rows[:2].sum())
    assert len(sequences.first_tokens(two)) == 2 and len(sequences.first_tokens(two + 1)) == 3
    assert len(sequences.first_tokens(10**9)) == 7 and len(sequences.first_tokens(1)) == 1
    batches = list(sequences.batches(3))
    assert all(
        ids.shape == (3, T) and lengths.shape == (3,) and ids.dtype == lengths.dtype == torch.int64
        for ids, lengths in batches
    )
    assert batches[-1][1].tolist() == [int(sequences.lengths[-1]), 1, 1]  # filled with rows that count nothing
    assert torch.cat([lengths for _, lengths in batches])[:7].tolist() == sequences.lengths.tolist()
