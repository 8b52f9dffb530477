"""Text of tokens as they are written: whole characters, never part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.serve.protocol import TokenLogprob
from tunesmith.serve.sampling import SampledToken

CONTEXT = 16
"""Prompt tokens decoded with an answer's first ones: for some tokenizers they decide about its first white space."""
LONGEST_CHARACTER = 6
"""Tokens after which bytes that are no character are taken as they are; UTF-8 needs four."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def with_text(tokenizer: Any, token: SampledToken) -> TokenLogprob:
    """A sampled token for its client."""
    before = list(tokenizer("a", add_special_tokens=False).input_ids)  # some tokenizers drop white space at the start
    length = len(tokenizer.decode(before))

    def one(token_id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        return TokenLogprob(tokenizer.decode([*before, token_id])[length:], logprob, top)

    return one(token.token_id, token.logprob, tuple(one(*listed) for listed in token.top))


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
