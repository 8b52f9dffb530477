"""Text to ids and character offsets, special tokens around a text, control tokens, the fingerprint."""

# T tokens

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import itemgetter
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPELLING_PROBE = (
    "0 1 22 333 4444 3.14 1,000,000 2024-01-31\n\nA line.\n\n\nAnother\tone \r\n  four    spaces        eight"
    " I'm you'LL don't naïve cafe\u0301 Å A\u030a 今日は 你好吗 안녕 สวัสดี नमस्ते مرحبا"
    " 😀 \U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3fd 𝔘𝔫𝔦 ﬁ ½ ²\u200b\u00a0end "
    'def f(x):\n    return x != 0  # <b>&amp;</b> {"a": [1, -2.5e3]} snake_case camelCase ALLCAPS ...---!!!???\n'
)
"""Text on which tokenizers, and releases of one library, are known to differ."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of one text."""

    ids: list[int]
    ids_T: NDArray[np.int32]
    find_offsets: Callable[[], list[tuple[int, int]]]

    @cached_property
    def offsets(self) -> list[tuple[int, int]]:
        """The characters [start, end) of each token: white space at its sides may be left out."""
        return self.find_offsets()

    @property
    def starts_T(self) -> NDArray[np.int64]:
        return np.fromiter((start for start, _ in self.offsets), np.int64, len(self.offsets))

    @property
    def ends_T(self) -> NDArray[np.int64]:
        return np.fromiter((end for _, end in self.offsets), np.int64, len(self.offsets))

    def num_until(self, char: int) -> int:
        """Number of tokens that end at or before a character."""
        return bisect_right(self.offsets, char, key=itemgetter(1))


@dataclass(frozen=True, slots=True)
class Frame:
    """The special tokens that a tokenizer puts around one text, or around and between two."""

    before_ids: NDArray[np.int32]
    between_ids: NDArray[np.int32]
    after_ids: NDArray[np.int32]
    second_after: int | None = None
    """Tokens from the end of the first text to where token type 1 begins; None: there are no token types."""

    def num_added(self, num_texts: int = 1) -> int:
        """Number of special tokens around `num_texts` texts."""
        return len(self.before_ids) + (num_texts - 1) * len(self.between_ids) + len(self.after_ids)

    def around(self, *texts: NDArray[np.int32]) -> NDArray[np.int32]:
        """One text, or two, with the special tokens."""
        first, *more = texts
        second = [part for text in more for part in (self.between_ids, text)]
        return np.concatenate([self.before_ids, first, *second, self.after_ids])

    def second(self, num_first: int) -> int:
        """Index of the first token of type 1 behind a first text of `num_first` tokens; 0: there is none."""
        return 0 if self.second_after is None else len(self.before_ids) + num_first + self.second_after


class FastTokenizer:
    """The Rust tokenizer inside a tokenizer of transformers, without padding and truncation.

    Raises `ModelError` for a tokenizer without offsets, or one that does not agree with its tokenizer.json.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{tokenizer.name_or_path}: {type(tokenizer).__name__} is a tokenizer written in Python, which "
                "gives no character offsets of its tokens. Use a model folder with a tokenizer.json."
            )
        self.name = str(tokenizer.name_or_path)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        check_against_file(tokenizer, Path(self.name) / "tokenizer.json")

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text, without special tokens around it: a chat template has already written BOS."""
        self._reset()
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            Tokens(encoding.ids, np.array(encoding.ids, np.int32), partial(getattr, encoding, "offsets"))
            for encoding in encodings
        ]

    def encode_alike(self, texts: Sequence[str], num_common: int) -> list[Tokens]:
        """As `encode`, in less time unless offsets are needed. Texts begin with `ControlTokens.num_common` same
        characters, which are tokenized once."""
        head, *expected = self.ids([texts[0][:num_common], texts[0]] if texts else [""])
        rests = self.ids([text[num_common:] for text in texts])
        if expected and not np.array_equal(np.concatenate([head, rests[0]]), expected[0]):
            head, rests = head[:0], self.ids(texts)  # a tokenizer that does look behind control tokens
        joined = [np.concatenate([head, rest]) for rest in rests]
        return [
            Tokens(ids_T.tolist(), ids_T, partial(self._offsets, text))
            for ids_T, text in zip(joined, texts, strict=True)
        ]

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        return self.encode([text])[0].offsets

    def ids(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[NDArray[np.int32]]:
        """Ids of each text."""
        self._reset()
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def frame(self, num_texts: Literal[1, 2]) -> Frame:
        """The special tokens that the tokenizer puts around one text or two."""
        self._reset()
        encoding = self._backend.encode("a") if num_texts == 1 else self._backend.encode("a", "b")
        ids = np.array(encoding.ids, np.int32)
        firsts, seconds = (np.flatnonzero([of == text for of in encoding.sequence_ids]) for text in (0, 1))
        end, last = int(firsts[-1]) + 1, int(seconds[-1] if num_texts == 2 else firsts[-1]) + 1
        of_second = np.flatnonzero(np.array(encoding.type_ids) == 1)
        return Frame(
            before_ids=ids[: firsts[0]],
            between_ids=ids[end : seconds[0]] if num_texts == 2 else ids[:0],
            after_ids=ids[last:],
            second_after=int(of_second[0]) - end if len(of_second) else None,
        )

    def causal_frame(self, *, closed: bool) -> Frame:
        """The special tokens around one text, or two lines; if `closed`, EOS at the end if there is one."""
        frame = self.frame(1)
        is_closed = len(frame.after_ids) > 0 or self.eos_id is None or not closed
        after = frame.after_ids if is_closed else np.array([self.eos_id], np.int32)
        return Frame(frame.before_ids, self.ids(["\n"])[0], after)

    def decode(self, ids_T: NDArray[np.int32]) -> str:
        return str(self._backend.decode(ids_T.tolist(), skip_special_tokens=False))

    def _reset(self) -> None:
        # Padding and truncation live in the backend, and every call through transformers sets them.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = False


class ControlTokens:
    """The tokens that structure a text: added to the vocabulary and matched before anything else."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_text: str) -> None:
        added = {int(token_id): token for token_id, token in tokenizer.added_tokens_decoder.items()}
        named = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        special = {i: token.content for i, token in added.items() if token.special or i in named}
        # Whole words only: whether such a token is matched depends on its neighbours.
        self.reserved = {i: text for i, text in special.items() if not added[i].single_word}
        self.closing = special | {
            i: token.content
            for i, token in added.items()
            if token.content in template_text and not token.content.isspace()
        }
        self._reserved_re = _alternatives(self.reserved.values())
        # What no word of the vocabulary spells becomes the unknown token, which structures nothing.
        known = {i: text for i, text in self.reserved.items() if i != tokenizer.unk_token_id}
        self._closing_re = _alternatives(self.closing.values())
        self._cuts = frozenset(
            i for i, t in added.items() if not (t.normalized or t.lstrip or t.rstrip or t.single_word)
        )
        self._is_reserved = np.zeros(max([*added, 0]) + 2, np.bool_)  # the last entry is for every id beyond
        self._is_reserved[list(known)] = True
        control = {**{i: added[i].content for i in self._cuts}, **known, **self.closing}
        self._control_re = _alternatives(control.values())
        self._control = frozenset(control)
        self._id_of = {text: i for i, text in control.items()}
        self._is_spelled = control.keys() <= self._cuts
        """Whether a text spells each of them out where its tokens have it, with nothing around it."""

    def in_text(self, text: str) -> str | None:
        """The first control token in a text."""
        match = self._reserved_re.search(text)
        return match.group() if match else None

    def num_common(self, texts: Sequence[str]) -> int:
        """Characters that all texts begin with, before a control token that cuts them: what precedes it has the
        same tokens in each, and what follows is tokenized as if it began there. 0 for a single text."""
        matches = self._control_re.finditer(commonprefix(texts)) if len(texts) > 1 else ()  # noqa: RUF071 (it is text)
        return max((match.start() for match in matches if self._id_of[match.group()] in self._cuts), default=0)

    def places(self, text: str, tokens: Tokens) -> ControlPlaces:
        """The control tokens of a text."""
        places = [place for place, token_id in enumerate(tokens.ids) if token_id in self._control]
        ids = [tokens.ids[place] for place in places]
        spelled = list(self._control_re.finditer(text)) if self._is_spelled else []
        if [self._id_of[match.group()] for match in spelled] == ids:
            spans = [match.span() for match in spelled]
        else:
            spans = [tokens.offsets[place] for place in places]
        located = list(zip(ids, zip(places, spans, strict=True), strict=True))
        return ControlPlaces(
            cuts=[place for token_id, place in located if token_id in self._cuts],
            closing=[place for token_id, place in located if token_id in self.closing],
        )

    def closing_run(self, text: str) -> list[int]:
        """Ids of the tokens that can close a turn with which a text begins, one directly after the other.

        White space may precede the first.
        """
        text, run = text.lstrip(), []
        while match := self._closing_re.match(text):
            run.append(self._closing_id(match.group()))
            text = text[match.end() :]
        return run

    def last_closing_id(self, text: str) -> int | None:
        """The id of the token that a text ends with, white space aside, if it can close a turn."""
        text = text.rstrip()
        matches = [match for match in self._closing_re.finditer(text) if match.end() == len(text)]
        return self._closing_id(matches[-1].group()) if matches else None

    def _closing_id(self, text: str) -> int:
        return next(token_id for token_id, content in self.closing.items() if content == text)

    def are_reserved(self, ids_T: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Mask of the control tokens that structure a text; the unknown token does not."""
        return self._is_reserved[np.minimum(ids_T, len(self._is_reserved) - 1)]


@dataclass(frozen=True, slots=True)
class ControlPlaces:
    """Control tokens of a text, each as its index among the tokens and its characters."""

    cuts: list[tuple[int, tuple[int, int]]]
    """Tokens behind which a text is tokenized as if it began there, whatever precedes them."""
    closing: list[tuple[int, tuple[int, int]]]
    """Tokens that can close a turn."""


def check_against_file(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Raise `ModelError` when a tokenizer does not split the probe as its own tokenizer.json does.

    Releases of transformers have built another tokenizer of the same file: models then read unknown words.
    """
    if not file.is_file():
        return
    read_directly = Tokenizer.from_file(str(file))
    read_directly.no_truncation()  # files of sentence encoders cut and pad every text
    read_directly.no_padding()
    expected = read_directly.encode(SPELLING_PROBE, add_special_tokens=False).ids
    actual = tokenizer(SPELLING_PROBE, add_special_tokens=False).input_ids
    if list(actual) != expected:
        at = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), len(expected))
        raise ModelError(
            f"{file}: transformers reads it as another tokenizer: {len(actual)} tokens for a probe text of "
            f"{len(expected)}, the first difference at token {at + 1}. What is trained would not be what the "
            "model knows. Use a release of transformers that agrees with the file."
        )


def fingerprint(tokenizer: PreTrainedTokenizerBase, template_text: str, *, vocabulary: bool = True) -> str:
    """SHA-256 over what makes ids of text: the template, the probe's ids, every added and named token, each
    word with its id or score, each merge. Equal after saving and loading, by any release of its library.

    Without `vocabulary` as earlier versions computed it: two vocabularies that spell the probe alike were one.
    """
    added = {str(i): [t.content, t.special, t.normalized, t.lstrip, t.rstrip, t.single_word]
             for i, t in tokenizer.added_tokens_decoder.items()}  # fmt: skip
    parts = {
        "template": template_text,
        "probe": list(tokenizer(SPELLING_PROBE, add_special_tokens=True).input_ids),
        "added": added,
        "named": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }
    if vocabulary:
        model = json.loads(serialized(tokenizer))["model"]
        merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ())
        parts |= {"vocabulary": model["vocab"], "merges": list(merges)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def serialized(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Rust tokenizer as its tokenizer.json has it, without padding and truncation, which calls change: all
    that ids follow from. A tokenizer without one is refused by `FastTokenizer`."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())


def _alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of some texts: at a place the longest one matches, as for tokenizers. Without texts it matches
    nothing."""
    longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
