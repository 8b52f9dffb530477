"""Texts tokenized in stretches have the tokens, and the places of tokens, that they have as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tiny import SPECIALS, tiny_tokenizer
from tunesmith.data.cutting import Cutter, alternatives

WORDS = st.sampled_from(
    [
        *SPECIALS[:8],
        "<mask>",
        "whole",
        "<|im_start|",
        "user\n",
        "Hello",
        " there",
        "  ",
        "\n\n",
        "2024",
        "é",
        "山",
        "\t",
        "a",
    ]
)
TEXTS = st.lists(st.lists(WORDS, max_size=8).map("".join), max_size=5)


def tokenizer(kind: str) -> Any:
    made = tiny_tokenizer(metaspace=kind == "pieces")
    if kind in ("lstrip", "rstrip", "normalized"):
        made.add_tokens([AddedToken("<mask>", special=True, **{"normalized": False, kind: True})])
    if kind == "whole words":
        made.add_tokens([AddedToken("whole", special=True, single_word=True, normalized=False)])
    if kind == "longer":
        made.add_tokens([AddedToken("<s></s>", special=True, normalized=False)])
    return made


@pytest.mark.parametrize("kind", ["bytes", "pieces", "lstrip", "rstrip", "normalized", "whole words", "longer"])
def test_tokens_are_those_of_the_whole(kind: str) -> None:
    made = tokenizer(kind)
    backend = made.backend_tokenizer
    cutter = Cutter(backend, made.added_tokens_decoder)

    @settings(max_examples=150, deadline=None)
    @given(texts=TEXTS)
    def same(texts: list[str]) -> None:
        expected = backend.encode_batch(texts, add_special_tokens=False)
        for _ in range(2):  # stretches that recur are remembered
            found = cutter.encode(texts)
            assert [ids_T.tolist() for ids_T, _, _ in found] == [encoding.ids for encoding in expected]
            places = [list(zip(starts_T.tolist(), ends_T.tolist(), strict=True)) for _, starts_T, ends_T in found]
            assert places == [encoding.offsets for encoding in expected]
            assert all((ids_T.dtype, ends_T.dtype) == (np.int32, np.int64) for ids_T, _, ends_T in found)

    same()


class _Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.num_chars = 0

    def encode_batch(self, texts: list[str], **given: Any) -> Any:
        self.num_chars += sum(map(len, texts))
        return self.backend.encode_batch(texts, **given)


def test_what_recurs_is_tokenized_once() -> None:
    made = tiny_tokenizer()
    counting = _Counting(made.backend_tokenizer)
    cutter = Cutter(counting, made.added_tokens_decoder)  # type: ignore[arg-type]
    system, end = "<|im_start|>system\nYou are helpful.", "<|im_end|>\n"
    asked = [f"<|im_start|>user\n{i}" for i in range(10, 30)]
    cutter.encode([f"{system}{end}{question}{end}" for question in asked])
    assert counting.num_chars == len(system) + len(end) + sum(map(len, asked))
    before = counting.num_chars
    cutter.encode([f"{system}{end}<|im_start|>user\nHello{end}"])
    assert counting.num_chars - before == len("<|im_start|>user\nHello")


@settings(max_examples=200)
@given(texts=st.lists(st.text("ab<|>", min_size=1, max_size=4), max_size=6), within=st.text("ab<|>", max_size=20))
def test_the_longest_text_that_stands_at_a_place_is_found(texts: list[str], within: str) -> None:
    found = [(match.start(), match.group()) for match in alternatives(texts).finditer(within)]
    expected, at = [], 0
    while at < len(within):
        here = [text for text in texts if within.startswith(text, at)]
        if here:
            expected.append((at, max(here, key=len)))
        at += len(max(here, key=len)) if here else 1
    assert found == expected
