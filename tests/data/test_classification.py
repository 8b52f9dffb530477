"""Texts with classes: the tokenizer's own frame, cut by a stated rule, learnt at one token."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.families import MASKED
from data.rows_of import only_problem, only_row
from tiny import tiny_tokenizer
from tunesmith.data.classification import cut_longest
from tunesmith.data.renderer import Renderer
from tunesmith.tasks import TASKS
from tunesmith.types import IGNORE, Example, Part, Problem, Row, Source

TOKENIZERS = {name: make() for name, make in MASKED.items()}
TOKENIZERS["causal"] = tiny_tokenizer(None, eos="</s>", adds_bos=True)
TEXTS = st.lists(st.sampled_from(["the", "fox", "naïve", "山", "12", "."]), min_size=1, max_size=9).map(" ".join)


def labelled(*texts: str, labels: tuple[str, ...] = ("good",), many: bool = False) -> Example:
    parts = tuple(Part(name, text, False) for name, text in zip(("text", "text_pair"), texts, strict=False))
    return Example(parts, Source("a.csv", 2), "text_label", labels=labels, many=many)


def renderer(name: str, **options: Any) -> Renderer:
    settings = {"max_tokens": 64, "too_long": "cut", "control_tokens": "error", **options}
    kind = "causal" if name == "causal" else "encoder"
    return Renderer(TOKENIZERS[name], TASKS["classify"], kind=kind, **settings)  # type: ignore[arg-type]


def types_of(row: Row) -> list[int]:
    return [int(0 < row.second <= i) for i in range(len(row.ids))]


@pytest.mark.parametrize("name", MASKED)
@settings(max_examples=60, deadline=None)
@given(first=TEXTS, second=st.none() | TEXTS, limit=st.integers(6, 40))
def test_an_encoder_reads_what_its_tokenizer_makes_of_texts(
    name: str, first: str, second: str | None, limit: int
) -> None:
    texts = [first] if second is None else [first, second]
    row = only_row(renderer(name, max_tokens=limit).encode([labelled(*texts)])[0])
    expected = TOKENIZERS[name](*texts, truncation="longest_first", max_length=limit, return_token_type_ids=True)
    assert row.ids.tolist() == expected.input_ids
    assert types_of(row) == expected.token_type_ids
    assert row.trained.tolist() == [True, *[False] * (len(row.ids) - 1)]


def test_a_causal_model_reads_its_tokenizers_ids_and_learns_at_the_last() -> None:
    tokenizer = TOKENIZERS["causal"]
    row = only_row(renderer("causal").encode([labelled("the fox", "a dog")])[0])
    assert tokenizer.decode(row.ids) == "<s>the fox\na dog"
    assert row.trained.tolist() == [False] * (len(row.ids) - 1) + [True]
    assert row.second == 0
    one = only_row(renderer("causal").encode([labelled("the fox")])[0])
    assert one.ids.tolist() == tokenizer("the fox").input_ids


def test_a_causal_text_that_is_cut_learns_at_the_last_token_that_is_left() -> None:
    row = only_row(renderer("causal", max_tokens=6).encode([labelled("the fox " * 20)])[0])
    assert row.ids.tolist() == TOKENIZERS["causal"]("the fox " * 20).input_ids[:6]
    assert row.trained.tolist() == [False] * 5 + [True]


@given(lengths=st.tuples(st.integers(0, 30), st.integers(0, 30)), data=st.data())
def test_the_longer_text_is_cut_first(lengths: tuple[int, int], data: st.DataObject) -> None:
    excess = data.draw(st.integers(0, sum(lengths)))
    kept = cut_longest(lengths, excess)
    assert sum(kept) == sum(lengths) - excess
    lost = [before - after for before, after in zip(lengths, kept, strict=True)]
    assert min(lost) >= 0
    shorter, longer = sorted((0, 1), key=lambda i: lengths[i])
    assert lost[shorter] == 0 or abs(kept[longer] - kept[shorter]) <= 1


# trap: L7
def test_what_a_cut_costs_is_said() -> None:
    heard: list[Problem] = []
    renderer("bert", max_tokens=12).encode([labelled("山 " * 30, "the fox")], on_warning=heard.append)
    (warning,) = heard
    assert (warning.code, warning.severity) == ("cut", "warning")
    assert "data.max_tokens, which is 12" in warning.message
    assert "of the longer text first" in warning.message
    too_long = only_problem(renderer("bert", max_tokens=12, too_long="error").encode([labelled("山 " * 30)])[0])
    assert too_long.code == "too_long"


# trap: T14
@pytest.mark.parametrize(("name", "token"), [("bert", "[SEP]"), ("roberta", "</s>"), ("causal", "<|im_end|>")])
def test_a_control_token_in_a_text_is_a_problem(name: str, token: str) -> None:
    for texts in ((f"a {token} b",), ("a", f"{token}")):
        problem = only_problem(renderer(name).encode([labelled(*texts)])[0])
        assert problem.code == "control_token"
        assert f"its text contains {token}" in problem.message
    only_row(renderer(name, control_tokens="allow").encode([labelled(f"a {token} b")])[0])


def test_classes_are_counted_by_first_appearance_in_used_rows() -> None:
    vocabulary: dict[str, int] = {}
    examples = [labelled("a", labels=(name,)) for name in ("b", "a", "b")]
    examples.insert(0, labelled("", labels=("never",)))
    encoded = renderer("bert").encode(examples, vocabulary=vocabulary)
    assert [only_row(item).labels.tolist() for item in encoded[1:]] == [[0], [1], [0]]  # type: ignore[union-attr]
    renderer("bert").encode([labelled("a", labels=("c", "a"), many=True)], vocabulary=vocabulary)
    assert vocabulary == {"b": 0, "a": 1, "c": 2}


def test_a_row_without_any_class_is_not_one_without_an_answer() -> None:
    none, unanswered = renderer("bert").encode([labelled("a", labels=(), many=True), labelled("a", labels=())])
    assert only_row(none).labels.tolist() == []  # type: ignore[union-attr]
    assert only_row(unanswered).labels.tolist() == [IGNORE]  # type: ignore[union-attr]
