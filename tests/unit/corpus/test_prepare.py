"""A corpus becomes token files: mixtures, bounded memory, and what a killed attempt leaves."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmsae_ray.config import CorpusConfig, CorpusPart
from dmsae_ray.corpus import encode as encode_module
from dmsae_ray.corpus import prepare
from dmsae_ray.corpus.documents import Document, corpus_fingerprint, embedded_sample, load_documents
from dmsae_ray.corpus.encode import ENCODE_DOCUMENTS, encode
from dmsae_ray.corpus.mixture import check_mixture, interleave, load_parts, mixture_fingerprint, whole_weights
from dmsae_ray.corpus.prepare import prepare_tokens
from dmsae_ray.corpus.split import SPLITS, split_of
from dmsae_ray.corpus.token_file import read_metadata
from dmsae_ray.lm.source import load_tokenizer

T = 32


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def write_texts(path, documents: int, words: int, seed: int, field: str = "text"):
    """A .jsonl file of documents of up to so many words, none like another."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(documents):
            file.write(
                json.dumps({field: " ".join(map(str, rng.integers(0, 10**5, rng.integers(words // 2, words))))}) + "\n"
            )
    return str(path)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    long, short = (
        write_texts(folder / "long.jsonl", 200, 150, 0),
        write_texts(folder / "short.jsonl", 400, 40, 1, "body"),
    )
    return CorpusConfig(
        mixture=(CorpusPart(source=long, weight=3), CorpusPart(source=short, weight=1, text_field="body")),
        attribution_share=0.1,
        evaluation_share=0.1,
    )


def file_hashes(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def parts_of(folder, split: str) -> list[dict]:
    return json.loads(read_metadata(folder / f"{split}.safetensors")["parts"])


# -- mixtures
# ------------------------------------------------------------------------------------------------------------


def test_order_of_a_mixture_by_hand():
    def order(weights, *parts):
        return list(interleave([iter(part) for part in parts], weights, lambda tokens: tokens))

    assert [part for part, _ in order([2, 1], [1] * 6, [1] * 9)] == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    # 11 tokens against 12: the first part is next, and has no document left.
    assert order([1, 1], [10, 1], [4, 4, 4, 4]) == [(0, 10), (1, 4), (1, 4), (1, 4), (0, 1)]
    assert order([1], [5, 0, 7]) == [(0, 5), (0, 0), (0, 7)]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(0, 50), min_size=1, max_size=40)), min_size=1, max_size=4
    )
)
def test_no_part_leads_by_more_than_a_document_and_the_mixture_ends_when_the_next_part_does(parts):
    weights, documents = [weight for weight, _ in parts], [sizes for _, sizes in parts]
    tokens, counts, whole = [0] * len(parts), [0] * len(parts), sum(weights)
    for part, size in interleave([iter(sizes) for sizes in documents], weights, lambda tokens: tokens):
        assert size == documents[part][counts[part]]  # each part in its own order
        tokens[part] += size
        counts[part] += 1
        for weight, have, sizes in zip(weights, tokens, documents, strict=True):
            assert have - weight / whole * sum(tokens) <= max(sizes) + 1e-9
            if len(parts) == 2:
                assert weight / whole * sum(tokens) - have <= max(map(max, documents)) + 1e-9
    lags = [weight * sum(tokens) - whole * have for weight, have in zip(weights, tokens, strict=True)]
    behind = lags.index(max(lags))
    assert counts[behind] == len(documents[behind])


def test_weights_count_by_their_ratios():
    assert whole_weights([0.1, 0.2, 0.7]) == [1, 2, 7] and whole_weights([2.0, 1.0]) == whole_weights([1, 0.5]) == [
        2,
        1,
    ]
    assert whole_weights([3]) == [1]


def test_fingerprint_of_a_mixture_and_of_a_single_source(mixture):
    assert mixture_fingerprint(CorpusConfig()) == corpus_fingerprint("embedded")
    first, second = mixture.mixture
    single = CorpusConfig(source=second.source, text_field="body")
    assert mixture_fingerprint(single) == corpus_fingerprint(second.source.reveal(), "body")

    def of(*parts):
        return mixture_fingerprint(CorpusConfig(mixture=parts))

    same = of(first, second)
    assert of(first.model_copy(update={"weight": 6}), second.model_copy(update={"weight": 2})) == same
    others = {of(second, first), of(first, second.model_copy(update={"weight": 2})), of(first), of(first, first)}
    assert len(others) == 4 and same not in others


def test_a_part_that_cannot_be_read_is_named(mixture, tmp_path):
    check_mixture(mixture)
    missing = CorpusPart(source=str(tmp_path / "none.txt"), weight=1)
    with pytest.raises(ValueError, match=r"corpus\.mixture\.1: corpus\.source .*none\.txt: no such file"):
        check_mixture(CorpusConfig(mixture=(mixture.mixture[0], missing)))
    with pytest.raises(ValueError, match=r"^corpus\.source .*none\.txt: no such file"):
        check_mixture(CorpusConfig(source=missing.source))


@pytest.mark.parametrize("packing", ["separate", "concatenate"])
def test_a_mixture_holds_its_shares_to_a_document_and_says_what_each_part_gave(mixture, packing, tokenizer, tmp_path):
    corpus = mixture.model_copy(update={"packing": packing})
    made = prepare_tokens(corpus, tokenizer, T, tmp_path)
    given = np.array([[[part["documents"], part["tokens"]] for part in parts_of(tmp_path, split)] for split in SPLITS])
    documents, tokens = given.sum(axis=0).T
    longest = max(
        len(e.ids)
        for part in corpus.parts
        for e in encode(load_documents(part.source.reveal(), part.text_field), tokenizer)
    )
    assert (np.abs(tokens - np.array([0.75, 0.25]) * tokens.sum()) <= longest).all()
    assert documents[0] == 200 or documents[1] == 400  # one part is used up
    for split, (_, (first, second)) in zip(SPLITS, given.transpose(0, 2, 1), strict=True):
        dropped = first + second - made[split].tokens
        assert dropped == 0 if packing == "separate" else 0 <= dropped < 16
    bounded = prepare_tokens(corpus.model_copy(update={"documents": 101}), tokenizer, T, tmp_path / "bounded")
    assert sum(part["documents"] for split in SPLITS for part in parts_of(tmp_path / "bounded", split)) == 101
    assert (bounded["train"].ids[:50] == made["train"].ids[:50]).all()


def test_shares_are_of_tokens_that_get_into_sequences(tokenizer, tmp_path):
    def text_of(tokens: int, start: int) -> str:
        """A text of so many tokens."""

        def length(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        text = f"{start}" + " x" * (tokens - length(f"{start}"))
        assert length(text) == tokens
        return text

    for name, tokens in (("whole", 2 * (T - 1)), ("cut", T - 1 + 10)):  # of the second's, 10 are dropped
        lines = [json.dumps({"text": text_of(tokens, number)}) for number in range(100, 300)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    parts = tuple(CorpusPart(source=str(tmp_path / f"{name}.jsonl"), weight=1) for name in ("whole", "cut"))
    prepare_tokens(CorpusConfig(mixture=parts), tokenizer, T, tmp_path)
    given = [[(part["documents"], part["tokens"]) for part in parts_of(tmp_path, split)] for split in SPLITS]
    # At 6200 tokens each it is the turn of the first listed; then the second is next, and has no document left.
    assert np.sum(given, axis=0).tolist() == [[101, 6200 + 62], [200, 6200]]


def test_joined_documents_come_in_the_order_of_the_mixture(mixture, tokenizer, tmp_path):
    corpus = mixture.model_copy(update={"packing": "concatenate"})
    streams = [encode(documents, tokenizer) for documents in load_parts(corpus)]
    order = [document for _, document in interleave(streams, [3, 1], lambda document: len(document.ids))]
    expected = np.concatenate([d.ids for d in order if split_of(d.text, 0.1, 0.1) == "train"])
    train = prepare_tokens(corpus, tokenizer, T, tmp_path)["train"]
    have = train.ids[(train.ids != tokenizer.bos_token_id) & (np.arange(T)[None] < train.lengths[:, None])]
    assert len(expected) - len(have) < 16 and (have == expected[: len(have)]).all()


def test_bytes_do_not_depend_on_how_many_documents_are_encoded_at_a_time(mixture, tokenizer, tmp_path, monkeypatch):
    prepare_tokens(mixture, tokenizer, T, tmp_path / "64")
    monkeypatch.setattr(encode_module, "ENCODE_DOCUMENTS", 3)
    prepare_tokens(mixture, tokenizer, T, tmp_path / "3")
    assert file_hashes(tmp_path / "64") == file_hashes(tmp_path / "3")


# -- files
# ---------------------------------------------------------------------------------------------------------------


def test_documents_give_the_ids_and_lengths_they_always_gave(tokenizer, tmp_path):
    # Frozen from the version that made the first datasets; it put held-out sequences in a seeded order.
    with (tmp_path / "a.jsonl").open("w") as file:
        for document in islice(load_documents("embedded"), 60):
            file.write(json.dumps({"text": document.text}) + "\n")
    made = prepare_tokens(CorpusConfig(source=str(tmp_path / "a.jsonl")), tokenizer, T, tmp_path)
    for split in SPLITS[1:]:
        made[split] = made[split].take(np.random.default_rng([3, 201]).permutation(len(made[split])))
    assert {
        split: hashlib.sha256(s.ids.tobytes() + s.lengths.tobytes()).hexdigest()[:16] for split, s in made.items()
    } == {"train": "f499a9f5cad2dd68", "attribution": "07c8c00d6f52ff7c", "evaluation": "76c0c828fa984e5b"}
    assert all((s.rows == s.lengths - 1).all() for s in made.values())


def test_no_more_is_tokenised_than_is_wanted_and_more_begins_with_the_same(tokenizer, tmp_path, monkeypatch):
    """What was computed on the first tokens of a split stays what it was when somebody wants more of them."""
    path, seen = tmp_path / "a.jsonl", []
    write_texts(path, 1500, 60, 0)
    corpus = CorpusConfig(source=str(path), attribution_share=0.1, evaluation_share=0.1)
    monkeypatch.setattr(
        prepare,
        "encode",
        lambda documents, tokenizer: (seen.append(len(e.ids)) or e for e in encode(documents, tokenizer)),
    )
    all_of_it = prepare_tokens(corpus, tokenizer, T, tmp_path / "all")
    whole = sum(seen)
    before = None
    for more in (1, 3):
        seen.clear()
        wanted = {"train": 2000 * more, "attribution": 1000 * more, "evaluation": 500 * more}
        made = prepare_tokens(corpus, tokenizer, T, tmp_path / "some", wanted)
        have = {split: sequences.tokens for split, sequences in made.items()}
        assert all(wanted[split] <= have[split] < wanted[split] + 400 for split in SPLITS) and not any(
            s.ends for s in made.values()
        )
        assert sum(seen) < sum(wanted.values()) + 64 * 300 < whole / 3  # 64 documents are encoded at a time
        for split in SPLITS:
            assert (made[split].ids == all_of_it[split].ids[: len(made[split])]).all()
        before = made
    seen.clear()
    more = {"evaluation": 2 * before["evaluation"].tokens, "train": 1}
    again = prepare_tokens(corpus, tokenizer, T, tmp_path / "some", more)
    assert (again["train"].ids == before["train"].ids).all()  # longer than wanted, and left as it was
    assert 0 < sum(seen) < 3 * more["evaluation"] + 64 * 300  # of training documents nothing is tokenised again
    assert all(
        prepare_tokens(corpus, tokenizer, T, tmp_path / "all", {"train": 10**9})["train"].ids[0]
        == all_of_it["train"].ids[0]
    )


def test_the_embedded_corpus_is_sampled_and_its_documents_keep_their_splits():
    sample, split = list(embedded_sample()), {}
    for document in load_documents("embedded"):
        split[document.text] = split_of(document.text, 0.05, 0.05)
    assert len({piece.name for piece in sample}) == len(sample) > 5000
    assert all(piece.whole in split and piece.text in piece.whole for piece in sample[:200])
    assert (
        len({piece.name.rpartition(" piece")[0] for piece in sample[:400]}) > 200
    )  # few pieces of each of many documents
    made = {split_of(piece.whole, 0.05, 0.05) for piece in sample[:400]}
    assert made == set(SPLITS)


def test_what_is_there_is_kept_and_what_is_damaged_or_missing_is_made_again(mixture, tokenizer, tmp_path):
    prepare_tokens(mixture, tokenizer, T, tmp_path)
    before, path = file_hashes(tmp_path), tmp_path / "evaluation.safetensors"
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    lines = []
    prepare_tokens(mixture, tokenizer, T, tmp_path, None, lines.append)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == stamps and lines == []
    path.write_bytes(path.read_bytes()[:-7])
    prepare_tokens(mixture, tokenizer, T, tmp_path, None, lines.append)
    assert file_hashes(tmp_path) == before
    assert len(lines) == 1 and "evaluation.safetensors: damaged" in lines[0]
    path.unlink()
    prepare_tokens(mixture, tokenizer, T, tmp_path)
    assert file_hashes(tmp_path) == before


def test_a_killed_attempt_leaves_no_split_and_its_leftovers_go(mixture, tokenizer, tmp_path, monkeypatch):
    killed, calm, said = tmp_path / "killed", tmp_path / "calm", []

    def say(line):
        said.append(line)
        if len(said) == 100:
            os.kill(os.getpid(), signal.SIGKILL)

    # A fork of this process, which has imported all that it needs.
    monkeypatch.setattr(prepare, "SAY_SECONDS", 0.0)
    attempt = multiprocessing.get_context("fork").Process(
        target=prepare_tokens, args=(mixture, tokenizer, T, killed, None, say)
    )
    attempt.start()
    attempt.join(600)
    monkeypatch.undo()
    assert attempt.exitcode == -signal.SIGKILL
    left = {path.name for path in killed.iterdir()}
    assert len(left) == 3 and all(".tmp-" in name for name in left)
    prepare_tokens(mixture, tokenizer, T, killed)
    prepare_tokens(mixture, tokenizer, T, calm)
    assert file_hashes(killed) == file_hashes(calm) and len(file_hashes(calm)) == 3


def test_an_empty_split_is_named_and_nothing_is_left(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n')
    corpus = CorpusConfig(source=str(tmp_path / "a.jsonl"))
    with pytest.raises(
        ValueError, match="train split is empty: none of its 1 documents has 16 tokens.*corpus.attribution_share"
    ):
        prepare_tokens(corpus, tokenizer, T, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_progress_is_said(mixture, tokenizer, tmp_path, monkeypatch):
    lines = []
    prepare_tokens(mixture, tokenizer, T, tmp_path / "quick", None, lines.append)
    assert lines == []  # done before the first line was due
    monkeypatch.setattr(prepare, "SAY_SECONDS", 0.0)
    prepare_tokens(mixture, tokenizer, T, tmp_path / "slow", None, lines.append)
    given = [part for split in SPLITS for part in parts_of(tmp_path / "slow", split)]
    documents, tokens = (sum(part[name] for part in given) for name in ("documents", "tokens"))
    assert len(lines) == documents
    assert re.fullmatch(rf"tokens: {documents:,} documents, {tokens:,} tokens, [\d,]+ tokens/s", lines[-1])


# -- bounded memory
# ------------------------------------------------------------------------------------------------------


def test_documents_bound_what_is_read(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    write_texts(path, 100, 60, 0)
    with path.open("a") as file:
        file.write("no JSON\n")
    corpus = CorpusConfig(source=str(path), documents=100, attribution_share=0.2, evaluation_share=0.2)
    assert prepare_tokens(corpus, tokenizer, T, tmp_path / "tokens")["train"].tokens > 1000
    with pytest.raises(ValueError, match="a.jsonl line 101: not JSON"):
        prepare_tokens(corpus.model_copy(update={"documents": 101}), tokenizer, T, tmp_path / "more")


def test_reading_is_never_far_ahead(tokenizer):
    read, most = 0, 0

    def endless(name):
        nonlocal read
        while True:
            read += 1
            yield Document(name, f"{name} {read} " * 20)

    streams = [encode(endless(name), tokenizer) for name in ("a", "b")]
    for taken, _ in enumerate(islice(interleave(streams, [1, 1], lambda document: len(document.ids)), 1000), 1):
        most = max(most, read - taken)
    assert taken == 1000 and 0 < most < 2 * ENCODE_DOCUMENTS


def test_memory_does_not_grow_with_the_corpus(tokenizer, tmp_path):
    def peak(documents):
        corpus = CorpusConfig(source=write_texts(tmp_path / f"{documents}.jsonl", documents, 200, 0))
        tracemalloc.start()
        prepare_tokens(corpus, tokenizer, T, tmp_path / f"tokens-{documents}")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, (tmp_path / f"tokens-{documents}" / "train.safetensors").stat().st_size

    (small, _), (large, size) = peak(200), peak(1600)
    assert large < 1.3 * small and 1.3 * small < size, (
        small,
        large,
        size,
    )  # the second: holding it all would be noticed
