"""Tokens as a person reads them, each by itself."""

from __future__ import annotations

from collections.abc import Sequence

LOST = "\N{REPLACEMENT CHARACTER}"
"""What a decoder makes of bytes that are no whole character."""


class TokenText:
    """Token ids to text. Spaces and line breaks are themselves; a part of a character is its bytes, as <0xE2>."""

    def __init__(self, tokenizer) -> None:
        """tokenizer: a transformers tokenizer, byte-level or sentencepiece."""
        self._tokenizer = tokenizer
        # Decoders drop the space that begins a text; behind something else it stays.
        self._ahead = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._known: dict[int, str] = {}

    def token(self, token: int) -> str:
        """One token."""
        if token not in self._known:
            text = self.join([token])
            self._known[token] = self._bytes(token, text) if LOST in text else text
        return self._known[token]

    def join(self, tokens: Sequence[int]) -> str:
        """Neighbouring tokens as running text; of a character that the cut goes through, a replacement character is
        left.
        """
        return self._decode([*self._ahead, *tokens])[len(self._decode(self._ahead)) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _bytes(self, token: int, text: str) -> str:
        """A token whose text has something lost in it, with the bytes that make no whole character."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        # A byte of sentencepiece is spelt <0xE2>, in letters that stand for themselves among those of byte-level
        # tokenizers, too.
        if not all(letter in BYTE_LEVEL for letter in piece):
            return text
        content = bytes(BYTE_LEVEL[letter] for letter in piece)
        # Whole characters stay readable; surrogateescape keeps each other byte apart.
        readable = content.decode("utf-8", errors="surrogateescape")
        return "".join(
            f"<0x{ord(letter) - 0xDC00:02X}>" if "\udc80" <= letter <= "\udcff" else letter for letter in readable
        )


def _byte_level() -> dict[str, int]:
    """The letters by which byte-level tokenizers spell bytes: a printable Latin-1 character is itself, the others
    follow from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL = _byte_level()
