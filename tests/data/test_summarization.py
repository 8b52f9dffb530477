"""Summaries: asked for in a chat, as plain text, or of an encoder–decoder; what is cut is the document."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.families import roberta_like, t5_like
from data.rows_of import only_problem, only_row
from tiny import CHATML, pair, tiny_tokenizer
from tunesmith.data.collate import build_batch
from tunesmith.data.completion import DEFAULT_PROMPTS
from tunesmith.data.renderer import Renderer
from tunesmith.errors import ModelError, RecipeError
from tunesmith.tasks import TASKS
from tunesmith.types import Example, Part, Problem, Row, Source

CHAT = tiny_tokenizer(CHATML)
PLAIN = tiny_tokenizer(None, eos="</s>", adds_bos=True)
T5 = t5_like()
BART = roberta_like()
DOCUMENT = "The quick brown fox jumps over the lazy dog. " * 20
SUMMARY = "A fox jumps."


def summed_up(document: str = DOCUMENT, summary: str = SUMMARY) -> Example:
    parts = (Part("document", document, False), Part("summary", summary, True))
    return Example(parts, Source("a.jsonl", 4), "document_summary", plain=True)


def renderer(tokenizer: Any, task: Any = "summarize", **options: Any) -> Renderer:
    kind = "encoder_decoder" if tokenizer in (T5, BART) else "causal"
    settings = {"max_tokens": None, "too_long": "cut", "control_tokens": "error", "kind": kind, **options}
    return Renderer(tokenizer, TASKS[task], **settings)


def learnt(row: Row, tokenizer: Any) -> str:
    return str(tokenizer.decode(row.ids[row.trained]))


def test_a_chat_model_is_asked_by_its_user() -> None:
    made = renderer(CHAT)
    row = only_row(made.encode([summed_up()])[0])
    question = {"role": "user", "content": DEFAULT_PROMPTS["causal"].replace("{document}", DOCUMENT)}
    messages = [question, {"role": "assistant", "content": SUMMARY}]
    assert row.ids.tolist() == CHAT.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert learnt(row, CHAT) == f"{SUMMARY}<|im_end|>"
    prompt = made.prompt_ids(summed_up().parts[:1])
    assert prompt == CHAT.apply_chat_template([question], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert row.ids[: len(prompt)].tolist() == prompt


def test_a_model_without_template_reads_plain_text() -> None:
    made = renderer(PLAIN)
    row = only_row(made.encode([summed_up()])[0])
    prompt = f"Summarize the following text.\n\n{DOCUMENT}\n\n"
    assert PLAIN.decode(row.ids) == f"<s>{prompt}{SUMMARY}</s>"
    assert learnt(row, PLAIN) == f"{SUMMARY}</s>"
    assert made.prompt_ids(summed_up().parts[:1]) == PLAIN(prompt).input_ids
    asked = renderer(PLAIN, prompt="{document}\nTL;DR:").prompt_ids(summed_up("a").parts[:1])
    assert PLAIN.decode(asked) == "<s>a\nTL;DR:"


# trap: L7
@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN, tiny_tokenizer(CHATML, metaspace=True)], ids=["chat", "plain", "▁"])
@settings(max_examples=25, deadline=None)
@given(limit=st.integers(90, 260), words=st.integers(1, 200), data=st.data())
def test_the_summary_stays_whole_whatever_is_cut(tokenizer: Any, limit: int, words: int, data: Any) -> None:
    document = " ".join(data.draw(st.sampled_from(["quick", "山", "é", "fox.", "\n"])) for _ in range(words))
    heard: list[Problem] = []
    whole = only_row(renderer(tokenizer).encode([summed_up(f"x{document}")])[0])
    made = renderer(tokenizer, max_tokens=limit)
    row = only_row(made.encode([summed_up(f"x{document}")], on_warning=heard.append)[0])
    assert len(row.ids) <= limit
    assert row.ids[row.trained].tolist() == whole.ids[whole.trained].tolist()
    assert [warning.code for warning in heard] == (["cut"] if len(whole.ids) > limit else [])
    room = made.prompt_ids(summed_up(f"x{document}").parts[:1], max_tokens=limit - 20)
    assert len(room) <= limit - 20


def test_a_cut_keeps_as_much_of_the_document_as_fits() -> None:
    row = only_row(renderer(PLAIN, max_tokens=100).encode([summed_up("Q " * 300)])[0])
    assert len(row.ids) == 100
    assert PLAIN.decode(row.ids).endswith(" Q Q Q\n\nA fox jumps.</s>")


def test_a_document_without_room_is_a_problem() -> None:
    for tokenizer in (CHAT, PLAIN):
        problem = only_problem(renderer(tokenizer, max_tokens=20).encode([summed_up()])[0])
        assert problem.code == "too_long"
        assert "prompt and summary alone" in problem.message
        assert "summary" in problem.fix
        problem = only_problem(renderer(tokenizer, max_tokens=100, too_long="error").encode([summed_up()])[0])
        assert problem.code == "too_long"
        assert "data.too_long: drop or cut" in problem.fix


def test_an_empty_document_is_a_problem() -> None:
    for tokenizer in (CHAT, PLAIN, T5):
        assert only_problem(renderer(tokenizer).encode([summed_up(" \n")])[0]).code == "empty"


def test_a_prompt_says_where_the_document_stands() -> None:
    for tokenizer in (CHAT, T5):
        with pytest.raises(RecipeError, match=r"data.prompt: 'Sum up.'.*\{document\}"):
            renderer(tokenizer, prompt="Sum up.")


# --- Encoder–decoders


@pytest.mark.parametrize("tokenizer", [T5, BART], ids=["t5", "bart"])
def test_both_sides_are_what_the_tokenizer_makes_of_them(tokenizer: Any) -> None:
    made = renderer(tokenizer)
    row = only_row(made.encode([summed_up()])[0])
    source = tokenizer(f"summarize: {DOCUMENT}").input_ids
    assert row.ids[~row.trained].tolist() == source == made.prompt_ids(summed_up().parts[:1])
    assert row.ids[row.trained].tolist() == tokenizer(SUMMARY).input_ids
    assert not row.trained[: len(source)].any()
    assert row.trained[len(source) :].all()
    assert made.stop_ids == (tokenizer.eos_token_id,)


def test_a_completion_is_a_target_too() -> None:
    row = only_row(renderer(T5, "generate").encode([pair("Hello there,", "how are you?")])[0])
    assert row.ids[~row.trained].tolist() == T5("Hello there,").input_ids
    assert row.ids[row.trained].tolist() == T5("how are you?").input_ids


def test_a_tokenizer_that_does_not_close_a_text_gets_an_end() -> None:
    tokenizer = tiny_tokenizer(None)
    row = only_row(renderer(tokenizer, "generate", kind="encoder_decoder").encode([pair("a", "b")])[0])
    assert tokenizer.decode(row.ids) == "ab<|im_end|>"
    with pytest.raises(ModelError, match="no EOS token"):
        renderer(tiny_tokenizer(None, eos=None), "generate", kind="encoder_decoder")
    assert only_problem(
        renderer(tokenizer, "generate", kind="encoder_decoder").encode([pair("", "b")])[0]
    ).code == "empty"  # fmt: skip


# trap: L7
@pytest.mark.parametrize("tokenizer", [T5, BART], ids=["t5", "bart"])
def test_a_source_that_is_cut_stays_closed_and_it_is_said(tokenizer: Any) -> None:
    heard: list[Problem] = []
    made = renderer(tokenizer, max_tokens=40)
    row = only_row(made.encode([summed_up()], on_warning=heard.append)[0])
    source = row.ids[~row.trained].tolist()
    assert source == tokenizer(f"summarize: {DOCUMENT}", truncation=True, max_length=40).input_ids
    assert source == made.prompt_ids(summed_up().parts[:1])
    assert [warning.code for warning in heard] == ["cut"]
    problem = only_problem(made.encode([summed_up("short", SUMMARY * 30)])[0])
    assert (problem.code, "tokens of its answer" in problem.message) == ("too_long", True)
    problem = only_problem(renderer(tokenizer, max_tokens=40, too_long="error").encode([summed_up()])[0])
    assert (problem.code, "tokens of its prompt" in problem.message) == ("too_long", True)


def test_an_encoder_decoder_learns_every_token_of_its_target() -> None:
    rows = [
        only_row(renderer(T5).encode([summed_up(text, answer)])[0]) for text, answer in (("a", "fox"), ("the", "1"))
    ]
    batch = build_batch(rows, (4, 7), layout="encoder_decoder", device="cpu", decoder_start=T5.pad_token_id)
    targets = [row.ids[row.trained].tolist() for row in rows]
    assert batch.targets_N.tolist() == [*targets[0], *targets[1]]
    assert batch.row_of_N.tolist() == [0] * len(targets[0]) + [1] * len(targets[1])
    longest = batch.decoder_ids_BU.shape[1]
    flat = batch.predict_N.tolist()
    assert flat == [*range(len(targets[0])), *range(longest, longest + len(targets[1]))]
    for b, (row, target) in enumerate(zip(rows, targets, strict=True)):
        assert batch.decoder_ids_BU[b, : len(target)].tolist() == [T5.pad_token_id, *target[:-1]]
        assert batch.ids_BT[b][batch.mask_BT[b].bool()].tolist() == row.ids[~row.trained].tolist()  # type: ignore[index]
    assert batch.lengths == tuple(len(row.ids) for row in rows)
    assert batch.row_indices == (4, 7)
