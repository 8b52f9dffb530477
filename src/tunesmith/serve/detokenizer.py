"""Text of tokens as they are written: whole characters, never part of a stop text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tunesmith.serve.protocol import TokenLogprob
from tunesmith.serve.sampling import SampledToken

CONTEXT = 16
"""Prompt tokens decoded with an answer's first ones: for some tokenizers they decide about its first white space."""
LONGEST_CHARACTER = 6
"""Tokens after which bytes that are no character are taken as they are; UTF-8 needs four."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TokenBytes:
    """The bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        decoder = str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
        self._bytes = _byte_level() if "ByteLevel" in decoder else None

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes a token adds to a text."""
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

    def logprob(self, token: SampledToken) -> TokenLogprob:
        """A sampled token for its client."""
        top = tuple(self._one(token_id, logprob, ()) for token_id, logprob in token.top)
        return self._one(token.token_id, token.logprob, top)

    def _one(self, token_id: int, logprob: float, top: tuple[TokenLogprob, ...]) -> TokenLogprob:
        spelling = self.bytes_of(token_id)
        return TokenLogprob(spelling.decode("utf-8", "replace"), spelling, logprob, top)


def _byte_level() -> dict[str, bytes]:
    """The characters that GPT-2's byte-level tokenizers write for bytes: printable ones as they are, others from 256.

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2, and its published code.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): bytes([byte]) for byte in printable}
    return signs | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


class StreamingDecoder:
    """The text of one answer. `strip`: without white space around the whole of it."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], *, stops: Sequence[str], strip: bool) -> None:
        self.is_stopped = False
        """Whether a stop text was written."""
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._longest_stop = max(map(len, stops), default=0)
        self._strip = strip
        self._ids = list(prompt)
        self._read = len(self._ids)
        self._start = max(0, self._read - CONTEXT)
        if not self._decode(self._start, self._read):  # all of it control tokens
            self._start = 0
        self._text = ""
        self._sent = 0
        self._tokens: list[tuple[int, int, TokenLogprob | None]] = []
        """Start and end in the text of each token that was not returned yet."""

    def add(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Append one token."""
        self._ids.append(token_id)
        start, new = len(self._text), self._new_text()
        if new and (not new.endswith(_BROKEN) or len(self._ids) - self._read > LONGEST_CHARACTER):
            self._append(new)
        self._tokens.append((start, len(self._text), logprob))
        self._find_stop(start)

    def finish(self) -> None:
        """Take text that was held back: no token follows."""
        if not self.is_stopped:
            start = len(self._text)
            self._append(self._new_text())
            self._find_stop(start)

    def take(self, *, last: bool = False) -> tuple[str, tuple[TokenLogprob, ...]]:
        """The text that is certain since the last call, and its tokens. `last`: after `finish`."""
        end = len(self._text)
        if not last and not self.is_stopped:
            end -= self._partial_stop()
        if self._strip:
            end = len(self._text[:end].rstrip())
        end = max(end, self._sent)
        if self._strip and not self._sent:
            self._sent = min(len(self._text) - len(self._text.lstrip()), end)
        text = self._text[self._sent : end]
        if not (text or last):
            return "", ()
        self._sent = max(self._sent, end)
        taken = [token for token in self._tokens if token[1] <= end or (last and token[0] < len(self._text))]
        self._tokens = [token for token in self._tokens if token[1] > end and not last]
        return text, tuple(logprob for _, _, logprob in taken if logprob is not None)

    def _partial_stop(self) -> int:
        """Characters at the end of the text that may be the start of a stop."""
        for num in range(min(self._longest_stop - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-num:]) for stop in self._stops if len(stop) > num):
                return num
        return 0

    def _find_stop(self, start: int) -> None:
        if self.is_stopped:
            return
        first = max(0, start - self._longest_stop + 1)
        if places := [place for stop in self._stops if (place := self._text.find(stop, first)) >= 0]:
            self._text = self._text[: min(places)]
            self.is_stopped = True

    def _append(self, new: str) -> None:
        self._text += new
        self._start, self._read = self._read, len(self._ids)

    def _new_text(self) -> str:
        """The text of tokens that were not appended yet."""
        before, whole = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._read, len(self._ids))

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))
