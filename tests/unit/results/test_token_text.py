"""Tokens as a person reads them, in the tokenizers that models come with."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dmsae_ray.lm.source import load_tokenizer
from dmsae_ray.results.features.token_text import TokenText

TEXT = "def f(x):\n    return x  # naïve — 思 🙂\n\tThe end."


def sentencepiece(strip: bool) -> PreTrainedTokenizerFast:
    """Pieces with a marked space and bytes for what no piece covers, as Gemma's (no space is dropped) or Llama's (one
    is).
    """
    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *("▁", "▁the", "▁The", "▁▁▁▁", "end"),
    ]
    pieces += "abcdefghinrstuxT().:#ï"
    merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("▁", "T"),
        ("▁T", "he"),
        ("▁", "▁"),
        ("▁▁", "▁▁"),
        ("e", "n"),
        ("en", "d"),
    ]
    pieces += [left + right for left, right in merges if left + right not in pieces]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, fuse_unk=True)
    )
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if strip else space
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def t5_like() -> PreTrainedTokenizerFast:
    """Unigram pieces, of which a decoder drops the first one's space."""
    backend = Tokenizer(
        models.Unigram([("<bos>", 0.0), ("▁", -2.0), ("▁the", -1.0), ("a", -3.0), ("e", -3.0)], unk_id=0)
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


TOKENIZERS = {
    "tiny": lambda: load_tokenizer("tiny"),
    "gemma": lambda: sentencepiece(False),
    "llama": lambda: sentencepiece(True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_of_a_text_are_that_text_again(name):
    tokenizer = TOKENIZERS[name]()
    text = TokenText(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ahead = " " if name == "llama" else ""  # which that tokenizer puts before every text
    assert text.join(ids) == ahead + TEXT
    tokens = [text.token(token) for token in ids]
    plain = "".join(tokens)
    assert (
        "�" not in plain
        and plain.startswith(ahead + "def f(x):\n    return x  # na")
        and plain.endswith("\n\tThe end.")
    )
    # Bytes of the characters that are cut in pieces, in order, and nothing else, once they are put together again.
    whole = bytearray()
    for token in tokens:
        if token.startswith("<0x"):
            whole += bytes.fromhex(token.replace("<0x", "").replace(">", ""))
        else:
            whole += token.encode()
    assert whole.decode() == ahead + TEXT and any(token.startswith("<0x") for token in tokens)


@pytest.mark.parametrize(
    "tokenizer", [sentencepiece(False), sentencepiece(True), t5_like()], ids=["gemma", "llama", "t5"]
)
def test_a_space_before_a_word_stays(tokenizer):
    text = TokenText(tokenizer)
    assert (
        text.token(tokenizer.convert_tokens_to_ids("▁the"))
        == " the"
        == text.join([tokenizer.convert_tokens_to_ids("▁the")])
    )


def test_bytes_that_are_characters_are_those():
    text, convert = TokenText(sentencepiece(False)), sentencepiece(False).convert_tokens_to_ids
    assert [text.token(convert(piece)) for piece in ("<0x0A>", "<0x41>", "<0xE2>", "▁▁▁▁")] == [
        "\n",
        "A",
        "<0xE2>",
        "    ",
    ]


def test_every_token_of_the_tiny_model_has_a_text():
    tokenizer = load_tokenizer("tiny")
    text = TokenText(tokenizer)
    texts = [text.token(token) for token in range(len(tokenizer))]
    assert all(texts) and texts[2] == "<bos>" and "�" not in "".join(texts)
    assert (
        texts[tokenizer.convert_tokens_to_ids("ĠĠĠĠ")] == "    "
        and texts[tokenizer.convert_tokens_to_ids("ĊĠĠĠĠ")] == "\n    "
    )
