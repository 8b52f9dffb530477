"""Text to ids, and where each token stands; control tokens; and the proof that a tokenizer is what it was."""

# T tokens

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tunesmith.data.cutting import Cutter, alternatives, cuts
from tunesmith.data.pieces import Tokenized
from tunesmith.errors import ModelError

PROBE = (
    "0 1 22 333 4444 3.14 1,000,000 2024-01-31\n\nA line.\n\n\nAnother\tone \r\n  four    spaces        eight"
    " I'm you'LL don't naïve cafe\u0301 Å A\u030a 今日は 你好吗 안녕 สวัสดี नमस्ते مرحبا"
    " 😀 \U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3fd 𝔘𝔫𝔦 ﬁ ½ ²\u200b\u00a0end "
    'def f(x):\n    return x != 0  # <b>&amp;</b> {"a": [1, -2.5e3]} snake_case camelCase ALLCAPS ...---!!!???\n'
)
"""Text on which tokenizers, and releases of one library, are known to differ."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids of one text and the characters [start, end) of each: white space at the sides of a token may be left out."""

    ids_T: NDArray[np.int32]
    starts_T: NDArray[np.int64]
    ends_T: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around one text, or around and between two: the special tokens that a model knows."""

    before_ids: NDArray[np.int32]
    between_ids: NDArray[np.int32]
    after_ids: NDArray[np.int32]
    second_after: int | None = None
    """Tokens from the end of the first text to where token type 1 begins; None: nothing has it."""

    def num_added(self, num_texts: int = 1) -> int:
        """Tokens that are not of a text."""
        return len(self.before_ids) + (num_texts - 1) * len(self.between_ids) + len(self.after_ids)

    def around(self, *texts: NDArray[np.int32]) -> NDArray[np.int32]:
        """One text, or two, in the frame."""
        first, *more = texts
        second = [part for text in more for part in (self.between_ids, text)]
        return np.concatenate([self.before_ids, first, *second, self.after_ids])

    def second(self, num_first: int) -> int:
        """Where token type 1 begins behind a first text of so many tokens; 0: nowhere."""
        return 0 if self.second_after is None else len(self.before_ids) + num_first + self.second_after


class Encoder:
    """A fast tokenizer, without padding, truncation or anything else that a text does not say.

    Raises `ModelError` for a tokenizer that cannot tell where its tokens stand, or that does not agree with its file.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{tokenizer.name_or_path}: {type(tokenizer).__name__} is a tokenizer in Python, which does not tell "
                "where its tokens stand in the text. Use a model folder with a tokenizer.json."
            )
        self.name = str(tokenizer.name_or_path)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._cutter = Cutter(self._backend, tokenizer.added_tokens_decoder)
        check_against_file(tokenizer, Path(self.name) / "tokenizer.json")

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text as it stands: the template has already written BOS, if any."""
        return [Tokens(*arrays) for arrays in self.tokenized(texts).each()]

    def tokenized(self, texts: Sequence[str]) -> Tokenized:
        """The same, end to end."""
        self._reset()
        return self._cutter.encode(texts)

    def ids(self, texts: Sequence[str], *, plain: bool) -> list[NDArray[np.int32]]:
        """Ids of each text; `plain` text gets the BOS that the tokenizer puts in front of what is not a chat."""
        self._reset()
        if not self._cutter.knows_words:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=plain)
            return [np.array(encoding.ids, np.int32) for encoding in encodings]
        bare = self._cutter.ids(texts)
        frame = self.frame(1) if plain else None
        return [frame.around(ids_T) for ids_T in bare] if frame is not None and frame.num_added() else bare

    def frame(self, num_texts: Literal[1, 2]) -> Frame:
        """What the tokenizer puts around one text or two."""
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
        """What the tokenizer puts around one text, or two lines; if `closed`, EOS behind where there is one."""
        frame = self.frame(1)
        is_closed = len(frame.after_ids) > 0 or self.eos_id is None or not closed
        after = frame.after_ids if is_closed else np.array([self.eos_id], np.int32)
        return Frame(frame.before_ids, self.ids(["\n"], plain=False)[0], after)

    def decode(self, ids_T: NDArray[np.int32]) -> str:
        return str(self._backend.decode(ids_T.tolist(), skip_special_tokens=False))

    def _reset(self) -> None:
        # Padding and truncation live in the backend and are set anew by every call through transformers.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = False


class ControlTokens:
    """The tokens that structure a text: added to the vocabulary and matched before anything else."""

    def __init__(self, tokenizer: Any, template_text: str) -> None:
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
        self._reserved_re = alternatives(self.reserved.values())
        # What no word of the vocabulary spells becomes the unknown token, which structures nothing.
        known = {i: text for i, text in self.reserved.items() if i != tokenizer.unk_token_id}
        self._known_re = alternatives(known.values())
        self._closing_re = alternatives(self.closing.values())
        size = max([*added, 0]) + 1
        self._is_reserved = _table(known, size)
        self._is_closing = _table(self.closing, size)
        self._is_cut = _table(cuts(added), size)

    def in_text(self, text: str) -> str | None:
        """The first control token that stands in a text."""
        found = self._reserved_re.search(text)
        return found.group() if found else None

    def count(self, text: str) -> int:
        """Control tokens that a text spells out."""
        return len(self._known_re.findall(text))

    def num_unspelled(self, ids_T: NDArray[np.int32], *texts: str) -> int:
        """Control tokens among the ids of texts that these do not spell out."""
        return int(self.are_reserved(ids_T).sum()) - sum(self.count(text) for text in texts)

    def closing_run(self, text: str) -> list[int]:
        """Ids of the tokens that can close a turn with which a text begins, one directly after the other.

        White space may stand before the first.
        """
        text, run = text.lstrip(), []
        while found := self._closing_re.match(text):
            run.append(self._closing_id(found.group()))
            text = text[found.end() :]
        return run

    def last_closing_id(self, text: str) -> int | None:
        """The id of the token that a text ends with, white space aside, if it can close a turn."""
        text = text.rstrip()
        found = [match for match in self._closing_re.finditer(text) if match.end() == len(text)]
        return self._closing_id(found[-1].group()) if found else None

    def _closing_id(self, text: str) -> int:
        return next(token_id for token_id, content in self.closing.items() if content == text)

    def are_reserved(self, ids_T: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which are control tokens that structure a text; the unknown token does not."""
        return _look_up(self._is_reserved, ids_T)

    def are_closing(self, ids_T: NDArray[np.int32]) -> NDArray[np.bool_]:
        return _look_up(self._is_closing, ids_T)

    def are_cuts(self, ids_T: NDArray[np.int32]) -> NDArray[np.bool_]:
        return _look_up(self._is_cut, ids_T)


def check_against_file(tokenizer: Any, file: Path) -> None:
    """Raise `ModelError` when a tokenizer does not split the probe as its own tokenizer.json does.

    Releases of transformers have built another tokenizer from the same file: the model then reads words it never saw.
    """
    if not file.is_file():
        return
    read_directly = Tokenizer.from_file(str(file))
    read_directly.no_truncation()  # files of sentence encoders cut and pad every text
    read_directly.no_padding()
    expected = read_directly.encode(PROBE, add_special_tokens=False).ids
    found = tokenizer(PROBE, add_special_tokens=False).input_ids
    if list(found) != expected:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
        raise ModelError(
            f"{file}: transformers reads it as another tokenizer: {len(found)} tokens for a probe text of "
            f"{len(expected)}, the first difference at token {at + 1}. What is trained would not be what the model "
            "knows. Use a release of transformers that agrees with the file."
        )


def fingerprint(tokenizer: Any, template_text: str) -> str:
    """SHA-256 over what makes ids of text: the template, the probe's ids, and every added and named token."""
    added = {str(i): [t.content, t.special, t.normalized, t.lstrip, t.rstrip, t.single_word]
             for i, t in tokenizer.added_tokens_decoder.items()}  # fmt: skip
    parts = {
        "template": template_text,
        "probe": list(tokenizer(PROBE, add_special_tokens=True).input_ids),
        "added": added,
        "named": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _table(token_ids: Iterable[int], size: int) -> NDArray[np.bool_]:
    table = np.zeros(size + 1, np.bool_)  # the last entry stands for every id beyond
    table[list(token_ids)] = True
    return table


def _look_up(table: NDArray[np.bool_], ids_T: NDArray[np.int32]) -> NDArray[np.bool_]:
    return table[np.minimum(ids_T, len(table) - 1)]
