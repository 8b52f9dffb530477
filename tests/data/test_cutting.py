"""Texts tokenized in pieces have the tokens, and the places of tokens, that they have as a whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from data.families import bert_like, roberta_like
from tiny import SPECIALS, tiny_tokenizer
from tunesmith.data.cutting import Cutter, alternatives
from tunesmith.data.word_rules import find_rule

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
        "'s",
        "'LL",
        "1/2",
        "Ωμέγα",
        "naïve’s",
        "Å",
        "-->",
        "\r\n ",
        "\x1c",
        "x\u00a0y",
    ]
)
TEXTS = st.lists(
    st.lists(WORDS | st.text("aB 'sd\n7.é\u017fЖΣ😀\u200d\ufe0f\u00a0", max_size=4), max_size=8).map("".join),
    max_size=5,
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BY_WORDS = [
    "bytes",
    "untrimmed",
    "single digits",
    "llama 3",
    "o200k",
    "nfc",
    "lstrip",
    "rstrip",
    "longer",
    "bert",
    "roberta",
]
"""Tokenizers of which it is known how they split text into words."""


def tokenizer(kind: str) -> Any:
    if kind in ("bert", "roberta"):
        return bert_like() if kind == "bert" else roberta_like()
    made = tiny_tokenizer(metaspace=kind == "pieces")
    backend = made.backend_tokenizer
    if kind in ("lstrip", "rstrip", "normalized"):
        made.add_tokens([AddedToken("<mask>", special=True, **{"normalized": False, kind: True})])
    if kind == "whole words":
        made.add_tokens([AddedToken("whole", special=True, single_word=True, normalized=False)])
    if kind == "longer":
        made.add_tokens([AddedToken("<s></s>", special=True, normalized=False)])
    if kind == "untrimmed":
        backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    if kind == "nfc":
        backend.normalizer = normalizers.NFC()
    if kind == "single digits":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if kind in ("llama 3", "o200k"):
        split = pre_tokenizers.Split(Regex(LLAMA3 if kind == "llama 3" else O200K), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    return made


@pytest.mark.parametrize("kind", [*BY_WORDS, "pieces", "normalized", "whole words"])
def test_tokens_are_those_of_the_whole(kind: str) -> None:
    made = tokenizer(kind)
    backend = made.backend_tokenizer
    cutter = Cutter(backend, made.added_tokens_decoder)
    assert cutter.knows_words == (kind in BY_WORDS or kind == "whole words")

    @settings(max_examples=150, deadline=None)
    @given(texts=TEXTS)
    def same(texts: list[str]) -> None:
        expected = backend.encode_batch(texts, add_special_tokens=False)
        for _ in range(2):  # pieces that recur are remembered
            assert [ids_T.tolist() for ids_T in cutter.ids(texts)] == [encoding.ids for encoding in expected]
            found = cutter.encode(texts).each()
            assert [ids_T.tolist() for ids_T, _, _ in found] == [encoding.ids for encoding in expected]
            places = [list(zip(starts_T.tolist(), ends_T.tolist(), strict=True)) for _, starts_T, ends_T in found]
            assert places == [encoding.offsets for encoding in expected]
            assert all((ids_T.dtype, ends_T.dtype) == (np.int32, np.int64) for ids_T, _, ends_T in found)

    same()


@pytest.mark.parametrize("kind", ["bytes", "single digits", "llama 3", "o200k", "bert"])
def test_words_are_those_of_the_tokenizer_for_each_character_that_is_known(kind: str) -> None:
    """Beside a letter, a digit, a blank, an end of line, a mark and itself."""
    backend = tokenizer(kind).backend_tokenizer
    rule = find_rule(backend)
    assert rule is not None
    num_known = 0
    for char in map(chr, [*range(0xD800), *range(0xE000, 0x20000)]):
        if rule.split(char) is None:
            continue
        num_known += 1
        text = f"{char} a{char}7{char} {char}  {char}\n{char}.{char}{char}a b{char}'s'{char}S 1{char}\n\n {char}"
        expected = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
        assert rule.split(text) == expected, repr(char)
    assert 3_500 < num_known < 4_000


@pytest.mark.parametrize(
    "step",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Split(Regex(r"\p{L}+"), "removed"),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"(?<=a)b|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        ),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\p{L}++|."), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        ),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]),
    ],
    ids=str,
)
def test_of_other_rules_nothing_is_supposed(step: Any) -> None:
    backend = tiny_tokenizer().backend_tokenizer
    assert find_rule(backend) is not None
    backend.pre_tokenizer = step
    assert find_rule(backend) is None


def test_a_word_with_other_tokens_each_time_is_not_remembered() -> None:
    backend = Tokenizer(models.BPE(dropout=0.5))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert find_rule(backend) is None


def test_what_stands_between_matches_is_a_word_too_and_left_to_the_tokenizer() -> None:
    backend = tiny_tokenizer().backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    rule = find_rule(backend)
    assert rule is not None
    assert rule.split("abc") == ["abc"]
    assert rule.split("abc 1") is None


def test_words_that_do_not_recur_are_not_learnt() -> None:
    """Keys and the like: the tokenizer takes a stretch of them whole, and those that are met again are learnt."""
    made = tiny_tokenizer()
    counting = _Counting(made.backend_tokenizer)
    cutter = Cutter(counting, made.added_tokens_decoder)  # type: ignore[arg-type]
    lead = "<|im_start|>"
    keys = " ".join(f"{chr(97 + i % 26)}q{'x' * i}z" for i in range(30))
    cutter.encode([f"{lead}{keys}"])
    assert counting.num_chars == len(lead + keys)
    assert len(cutter._numbers) == 0
    expected = made.backend_tokenizer.encode(f"{lead}{keys}", add_special_tokens=False).ids
    for _ in range(2):
        assert cutter.encode([f"{lead}{keys}"]).ids_T.tolist() == expected
    assert len(cutter._numbers) == 1 + 30


def test_memory_does_not_grow_with_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.cutting.MOST_KEPT", 50)
    made = tiny_tokenizer()
    cutter = Cutter(made.backend_tokenizer, made.added_tokens_decoder)
    for i in range(40):
        texts = [f"<|im_start|>user\nword{'x' * i}{j} <|im_end|>" for j in range(10)]
        expected = made.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        assert [ids_T.tolist() for ids_T in cutter.ids(texts)] == [encoding.ids for encoding in expected]
        assert len(cutter._numbers) == cutter._pieces.num <= 50 + 4 * 10


def test_several_threads_may_ask() -> None:
    """A server answers several people at once."""
    made = tiny_tokenizer()
    cutter = Cutter(made.backend_tokenizer, made.added_tokens_decoder)
    texts = [[f"<|im_start|>user\n{a} and {b} are {a * b}<|im_end|>" for b in range(20)] for a in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(cutter.ids, texts))
    for some, rows in zip(texts, found, strict=True):
        expected = made.backend_tokenizer.encode_batch(some, add_special_tokens=False)
        assert [ids_T.tolist() for ids_T in rows] == [encoding.ids for encoding in expected]


def test_a_failure_leaves_nothing_half_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_tokenizer()
    cutter = Cutter(made.backend_tokenizer, made.added_tokens_decoder)
    texts = ["<|im_start|>user\nHello there<|im_end|>"]
    with monkeypatch.context() as broken:
        broken.setattr("tunesmith.data.cutting.tokenized", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cutter.ids(texts)
    assert cutter.ids(texts)[0].tolist() == made.backend_tokenizer.encode(texts[0], add_special_tokens=False).ids


class _Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.num_chars = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_batch(self, texts: list[str], **given: Any) -> Any:
        self.num_chars += sum(map(len, texts))
        return self.backend.encode_batch(texts, **given)


def test_what_recurs_is_tokenized_once() -> None:
    made = tiny_tokenizer()
    counting = _Counting(made.backend_tokenizer)
    cutter = Cutter(counting, made.added_tokens_decoder)  # type: ignore[arg-type]
    cutter._rule = None
    system, end = "<|im_start|>system\nYou are helpful.", "<|im_end|>\n"
    asked = [f"<|im_start|>user\n{i}" for i in range(10, 30)]
    cutter.encode([f"{system}{end}{question}{end}" for question in asked])
    assert counting.num_chars == len(system) + len(end) + sum(map(len, asked))
    before = counting.num_chars
    cutter.encode([f"{system}{end}<|im_start|>user\nHello{end}"])
    assert counting.num_chars - before == len("<|im_start|>user\nHello")


def test_words_are_tokenized_once() -> None:
    made = tiny_tokenizer()
    counting = _Counting(made.backend_tokenizer)
    cutter = Cutter(counting, made.added_tokens_decoder)  # type: ignore[arg-type]
    for _ in range(2):  # words that were never met are taken whole at first
        cutter.encode(["<|im_start|>user\nHello there, you<|im_end|>"])
    before = counting.num_chars
    cutter.encode(["<|im_start|>Hello, you<|im_end|>", "<|im_start|> there,\nuser<|im_end|>"])
    assert counting.num_chars == before
    cutter.encode(["<|im_start|>Hello there, user<|im_end|>"])
    assert counting.num_chars - before == len(min(cutter._cuts) + " user")


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
