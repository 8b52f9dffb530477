"""From tokens to text as it is written: whole characters, never part of a text that ends the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tunesmith.serve.choosing import Chosen
from tunesmith.serve.protocol import TokenChance

CONTEXT = 16
"""Tokens of the prompt that an answer's first ones are read with: some tokenizers make white space of what stands
before."""
LONGEST_CHARACTER = 6
"""Tokens after which bytes that are no character are taken as they are; UTF-8 needs four."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Tokens:
    """The bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        decoder = str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
        self._bytes = _byte_level() if "ByteLevel" in decoder else None

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text, alone."""
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a row that pads the model's table
            return b""
        if token_id in self._special:
            return token.encode()
        if match := _BYTE.fullmatch(token):
            return bytes([int(match[1], 16)])
        if self._bytes is not None:
            return b"".join(self._bytes.get(sign, sign.encode()) for sign in token)
        return token.replace("▁", " ").encode()

    def chance(self, chosen: Chosen) -> TokenChance:
        """A token as it is told."""
        top = tuple(self._told(token_id, logprob, ()) for token_id, logprob in chosen.top)
        return self._told(chosen.token_id, chosen.logprob, top)

    def _told(self, token_id: int, logprob: float, top: tuple[TokenChance, ...]) -> TokenChance:
        spelled = self.bytes_of(token_id)
        return TokenChance(spelled.decode("utf-8", "replace"), spelled, logprob, top)


def _byte_level() -> dict[str, bytes]:
    """The signs that GPT-2's byte-level tokenizers write for bytes: printable ones for themselves, others from 256 on.

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2, and its published code.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): bytes([byte]) for byte in printable}
    return signs | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


class Writer:
    """The text of one answer. `trims`: without the white space around the whole of it, as by `generation.as_answer`."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], *, stops: Sequence[str], trims: bool) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._longest_stop = max(map(len, stops), default=0)
        self._trims = trims
        self._ids = list(prompt)
        self._read = len(self._ids)
        self._begin = max(0, self._read - CONTEXT)
        if not self._decode(self._begin, self._read):  # all of it control tokens
            self._begin = 0
        self._text = ""
        self._sent = 0
        self._tokens: list[tuple[int, int, TokenChance | None]] = []
        """Where the text of each token that was not told yet begins and ends."""
        self.is_stopped = False
        """Whether a text that ends the answer was written."""

    def add(self, token_id: int, chance: TokenChance | None = None) -> None:
        """One token more."""
        self._ids.append(token_id)
        start = len(self._text)
        new = self._new_text()
        if new and (not new.endswith(_BROKEN) or len(self._ids) - self._read > LONGEST_CHARACTER):
            self._take(new)
        self._tokens.append((start, len(self._text), chance))
        self._find_stop(start)

    def finish(self) -> None:
        """Nothing comes any more: what was held back is text too."""
        if not self.is_stopped:
            start = len(self._text)
            self._take(self._new_text())
            self._find_stop(start)

    def take(self, *, last: bool = False) -> tuple[str, tuple[TokenChance, ...]]:
        """What can be told since the last call, and its tokens. `last`: after `finish`."""
        end = self._told_until(last)
        if self._trims and not self._sent:
            begun = len(self._text) - len(self._text.lstrip())
            self._sent = min(begun, end)
        text = self._text[self._sent : end]
        if not (text or last):
            return "", ()
        self._sent = max(self._sent, end)
        told = [token for token in self._tokens if token[1] <= end or (last and token[0] < len(self._text))]
        self._tokens = [token for token in self._tokens if token[1] > end and not last]
        return text, tuple(chance for _, _, chance in told if chance is not None)

    def _told_until(self, last: bool) -> int:
        end = len(self._text)
        if not last and not self.is_stopped:
            end -= self._begun_stop()
        if self._trims:
            end = len(self._text[:end].rstrip())
        return max(end, self._sent)

    def _begun_stop(self) -> int:
        """How much of the end of the text may be the beginning of a stop."""
        for num in range(min(self._longest_stop - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-num:]) for stop in self._stops if len(stop) > num):
                return num
        return 0

    def _find_stop(self, start: int) -> None:
        if self.is_stopped or not self._stops:
            return
        begin = max(0, start - self._longest_stop + 1)
        places = [place for stop in self._stops if (place := self._text.find(stop, begin)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.is_stopped = True

    def _take(self, new: str) -> None:
        self._text += new
        self._begin, self._read = self._read, len(self._ids)

    def _new_text(self) -> str:
        """What the tokens that were not taken yet add to the text."""
        before = self._decode(self._begin, self._read)
        whole = self._decode(self._begin, len(self._ids))
        if whole.startswith(before):
            return whole[len(before) :]
        return self._decode(self._read, len(self._ids))

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True))
