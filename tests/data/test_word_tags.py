"""Words with tags: each learns at the first token that is its own."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.families import bert_like, roberta_like, t5_like
from data.rows_of import only_row
from tiny import tiny_tokenizer
from tunesmith.data.renderer import Renderer
from tunesmith.tasks import TASKS
from tunesmith.types import IGNORE, Example, Part, Problem, Source

BERT = bert_like()
CAUSAL = tiny_tokenizer(None, eos="</s>", adds_bos=True)
WORDS = st.lists(
    st.sampled_from(["Quick", "fox", "tallest", "12", "...", "don't", "naïve", "山山", "☃"]), min_size=1, max_size=12
)


def sentence(*words: str, tags: tuple[str, ...] | None = None) -> Example:
    parts = tuple(Part("word", word, False) for word in words)
    labels = tuple(f"t{i}" for i in range(len(words))) if tags is None else tags
    return Example(parts, Source("a.conll", 3), "tokens_tags", labels=labels)


def renderer(tokenizer: Any, **options: Any) -> Renderer:
    settings = {"max_tokens": 64, "too_long": "cut", "control_tokens": "error", **options}
    kind = "causal" if tokenizer is CAUSAL else "encoder"
    return Renderer(tokenizer, TASKS["tag"], kind=kind, **settings)  # type: ignore[arg-type]


def learnt(made: Renderer, example: Example) -> list[int]:
    """The words of an example, each with a tag of its own, that have a target."""
    vocabulary: dict[str, int] = {}
    row = only_row(made.encode([example], vocabulary=vocabulary)[0])
    names = list(vocabulary)
    return [example.labels.index(names[i]) for i in row.labels.tolist()]


def first_pieces(tokenizer: Any, words: list[str]) -> list[int]:
    word_ids = tokenizer(words, is_split_into_words=True).word_ids()
    return [i for i, word in enumerate(word_ids) if word is not None and word not in word_ids[:i]]


@settings(max_examples=60, deadline=None)
@given(words=WORDS)
def test_an_encoder_learns_at_the_first_piece_of_each_word(words: list[str]) -> None:
    row = only_row(renderer(BERT).encode([sentence(*words)])[0])
    assert row.ids.tolist() == BERT(words, is_split_into_words=True).input_ids
    assert row.trained.nonzero()[0].tolist() == first_pieces(BERT, words)
    assert row.labels.tolist() == list(range(len(words)))


@pytest.mark.parametrize("tokenizer", [CAUSAL, roberta_like(), t5_like()], ids=["causal", "roberta", "pieces"])
@settings(max_examples=40, deadline=None)
@given(words=WORDS)
def test_words_are_read_as_a_sentence(tokenizer: Any, words: list[str]) -> None:
    made = renderer(tokenizer, max_tokens=None)
    row = only_row(made.encode([sentence(*words)])[0])
    encoding = tokenizer(" ".join(words), return_offsets_mapping=True)
    assert row.ids.tolist() == encoding.input_ids
    starts = [len(" ".join([*words[:i], ""])) for i in range(len(words))]
    places = row.trained.nonzero()[0]
    assert learnt(made, sentence(*words)) == list(range(len(words)))
    for place, start, word in zip(places, starts, words, strict=True):
        first, last = encoding.offset_mapping[place]
        assert start - 1 <= first < start + len(word)
        assert last > start


def test_words_without_a_token_are_said_and_left_out() -> None:
    heard: list[Problem] = []
    example = sentence("the", "\u200b", " ", "fox", "", "dog")
    row = only_row(renderer(BERT).encode([example], on_warning=heard.append)[0])
    assert [(warning.code, warning.severity) for warning in heard] == [("no_token", "warning")]
    assert "3 of its words" in heard[0].message
    assert "tokens[1]" in heard[0].message
    assert int(row.trained.sum()) == 3
    assert learnt(renderer(BERT), example) == [0, 3, 5]


def test_words_that_a_cut_takes_are_counted() -> None:
    heard: list[Problem] = []
    example = sentence(*["山"] * 10)
    row = only_row(renderer(BERT, max_tokens=6).encode([example], on_warning=heard.append)[0])
    assert len(row.ids) == 6
    assert row.ids[-1] == BERT.sep_token_id
    assert "the first tokens of 6 words" in heard[0].message
    assert learnt(renderer(BERT, max_tokens=6), example) == [0, 1, 2, 3]
    (problem,) = renderer(BERT, max_tokens=6, too_long="error").encode([example])[0]
    assert isinstance(problem, Problem)
    assert problem.code == "too_long"


def test_a_row_without_any_word_is_a_problem() -> None:
    for words, code in (((" ", ""), "empty"), (("\u200b",), "no_target"), ((), "empty")):
        (problem,) = renderer(BERT).encode([sentence(*words)])[0]
        assert isinstance(problem, Problem)
        assert problem.code == code


def test_equal_tags_have_one_id_and_words_to_be_tagged_none() -> None:
    tagged, bare = renderer(BERT).encode([sentence("the", "fox", tags=("O", "O")), sentence("the", "fox", tags=())])
    assert only_row(tagged).labels.tolist() == [0, 0]  # type: ignore[union-attr]
    assert only_row(bare).labels.tolist() == [IGNORE, IGNORE]  # type: ignore[union-attr]
