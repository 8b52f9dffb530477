"""Plain text: every token is learnt once, whatever the length of a document and of a window."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.families import CAUSAL, MASKED, bert_like
from tunesmith.data.documents import _num_bytes, windows
from tunesmith.data.renderer import Encoded, Renderer
from tunesmith.data.tokenizer import FastTokenizer
from tunesmith.errors import ModelError, RecipeError
from tunesmith.tasks import TASKS
from tunesmith.types import Example, Part, Problem, Row, Source

KINDS = {**dict.fromkeys(CAUSAL, "causal"), **dict.fromkeys(MASKED, "encoder")}
TOKENIZERS = {name: make() for name, make in {**CAUSAL, **MASKED}.items()}
ALPHABET = ["the", " ", "fox", "\n", "é", "e\u0301", "山", "😀", ".", "9", "x", "\u200b", "Quick ", "  "]
DOCUMENTS = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=60).map("".join).filter(str.strip)


def document(text: str) -> Example:
    return Example((Part("text", text, True),), Source("a.txt", 1), "text", plain=True)


def renderer(name: str, **options: Any) -> Renderer:
    settings = {"max_tokens": None, "too_long": "error", "control_tokens": "error", **options}
    return Renderer(TOKENIZERS[name], TASKS["text"], kind=KINDS[name], **settings)  # type: ignore[arg-type]


def rows_of(encoded: Encoded) -> list[Row]:
    assert all(isinstance(item, Row) for item in encoded), encoded
    return encoded  # type: ignore[return-value]


def problem_of(encoded: Encoded) -> Problem:
    (problem,) = encoded
    assert isinstance(problem, Problem)
    return problem


def learnt(rows: list[Row]) -> list[int]:
    return [int(token_id) for row in rows for token_id in row.ids[row.trained]]


@given(num=st.integers(0, 300), width=st.integers(1, 40), data=st.data())
def test_windows_are_within_the_width_and_add_something_each(num: int, width: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, width))
    found = list(windows(num, width=width, stride=stride))
    assert all(0 <= start <= seen < end <= start + width for start, end, seen in found)
    assert [token for _, end, seen in found for token in range(seen, end)] == list(range(num))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=DOCUMENTS, width=st.integers(3, 20), overlap=st.integers(0, 15))
def test_every_token_is_learnt_once_and_its_bytes_counted_once(name: str, text: str, width: int, overlap: int) -> None:
    num_frame = 2 if KINDS[name] == "encoder" else 0
    longest = width - num_frame if num_frame else width - 1
    stride = max(1, longest - overlap)
    whole = renderer(name).encode([document(text)])[0]
    cut = renderer(name, max_tokens=width, stride=stride).encode([document(text)])[0]
    if isinstance(whole[0], Problem):
        assert [problem.code for problem in whole] == [problem_of(cut).code]
        return
    (one,), rows = rows_of(whole), rows_of(cut)
    assert max(len(row.ids) for row in rows) <= width
    assert learnt(rows) == learnt([one]) == one.ids[1 : len(one.ids) - num_frame // 2].tolist()
    assert sum(row.num_bytes for row in rows) == one.num_bytes


@pytest.mark.parametrize("name", KINDS)
def test_the_bytes_of_a_document_are_those_of_its_learnt_tokens(name: str) -> None:
    text = "naïve 山 😀 e\u0301!\n"
    (row,) = rows_of(renderer(name).encode([document(text)])[0])
    untold = 1 if name in ("byte level", "byte level without EOS") else 0  # its first token, "n": nothing predicts it
    assert row.num_bytes == len(text.encode()) - untold


def test_a_window_reads_what_the_one_before_has_trained() -> None:
    made = renderer("byte level", max_tokens=5, stride=3)
    rows = rows_of(made.encode([document("QZXJKVWY")])[0])
    end = TOKENIZERS["byte level"].eos_token
    texts = [TOKENIZERS["byte level"].convert_ids_to_tokens(row.ids.tolist()) for row in rows]
    assert texts == [list("QZXJK"), list("JKVWY"), ["W", "Y", end]]
    assert [row.trained.tolist() for row in rows] == [
        [False, True, True, True, True],
        [False, False, True, True, True],
        [False, False, True],
    ]
    assert [row.num_bytes for row in rows] == [4, 3, 0]


def test_bos_stands_before_the_first_window_and_eos_behind_the_last() -> None:
    tokenizer = TOKENIZERS["byte level with BOS"]
    rows = rows_of(renderer("byte level with BOS", max_tokens=4).encode([document("QZXJKVWY")])[0])
    ids = [row.ids.tolist() for row in rows]
    assert [tokenizer.bos_token_id in some for some in ids] == [True, False, False]
    assert [tokenizer.eos_token_id in some for some in ids] == [False, False, True]


def test_every_masked_window_stands_in_the_frame_which_is_not_learnt() -> None:
    tokenizer = TOKENIZERS["bert"]
    rows = rows_of(renderer("bert", max_tokens=5).encode([document("the fox 😀 the dog")])[0])
    for row in rows:
        assert (row.ids[0], row.ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert row.trained.tolist() == [False, *[True] * (len(row.ids) - 2), False]
    assert learnt(rows) == tokenizer("the fox 😀 the dog", add_special_tokens=False).input_ids


def test_an_unknown_character_is_no_control_token() -> None:
    (row,) = rows_of(renderer("bert").encode([document("fox ☃")])[0])
    assert TOKENIZERS["bert"].unk_token_id in row.ids[row.trained]


def test_serving_feeds_a_text_without_its_end() -> None:
    made = renderer("byte level with BOS")
    (row,) = rows_of(made.encode([document("Hello there")])[0])
    assert made.prompt_ids([Part("text", "Hello there", True)]) == row.ids[:-1].tolist()
    assert made.stop_ids == (row.ids[-1],)


def test_a_tokenizer_without_eos_gives_a_text_no_end() -> None:
    made = renderer("byte level without EOS")
    assert made.stop_ids == ()
    (row,) = rows_of(made.encode([document("ab")])[0])
    assert TOKENIZERS["byte level without EOS"].decode(row.ids) == "ab"
    assert problem_of(made.encode([document("a")])[0]).code == "no_target"


@pytest.mark.parametrize("text", ["", " \n\t ", "\u3000"])
@pytest.mark.parametrize("name", KINDS)
def test_a_text_of_white_space_is_a_problem(name: str, text: str) -> None:
    assert problem_of(renderer(name).encode([document(text)])[0]).code == "empty"


def test_a_text_that_gives_no_token_is_a_problem() -> None:
    assert problem_of(renderer("bert").encode([document("\u200b")])[0]).code == "no_target"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("byte level", {"max_tokens": 512, "stride": 512}, "data.stride: 512 .* to 511 or less"),
        ("bert", {"max_tokens": 512, "stride": 511}, "data.stride: 511 .* to 510 or less"),
        ("byte level", {"max_tokens": 1}, "data.max_tokens: .* Raise it"),
        ("bert", {"max_tokens": 2}, "data.max_tokens: .* Raise it"),
    ],
)
def test_windows_that_leave_tokens_out_are_refused(name: str, options: dict[str, int], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        renderer(name, **options)


def test_a_tokenizer_without_mask_is_refused_for_masked_text() -> None:
    with pytest.raises(ModelError, match=r"no mask token.*causal model"):
        Renderer(
            bert_like(mask=None), TASKS["text"], kind="encoder", max_tokens=9, too_long="error", control_tokens="error"
        )


@pytest.mark.parametrize("name", KINDS)
def test_a_text_without_the_end_of_a_token_is_counted_all_the_same(name: str) -> None:
    text = "山" * 3000  # one unknown word to BERT
    bytes_T = _num_bytes(text, FastTokenizer(TOKENIZERS[name]).encode([text])[0])
    assert bytes_T.sum() == len(text.encode())
    assert (bytes_T >= 0).all()
