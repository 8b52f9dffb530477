"""Answers that go on from measured rows are those of writing each alone, and the rows' losses stay what they are."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from often import often
from packed import CAN, VOCAB, rows_of, sharp
from tiny_run import tiny_recipe
from tunesmith.data.collate import Collator
from tunesmith.data.row_targets import RowTargets
from tunesmith.evaluation.predict_rows import Predictions, predict_rows
from tunesmith.generation import continuation
from tunesmith.generation.continuation import Continuation
from tunesmith.generation.decoder import BatchedDecoder
from tunesmith.generation.kv_cache import KVCache, SequenceSlot
from tunesmith.generation.padded import GeneratedAnswer
from tunesmith.generation.writer import AnswerWriter
from tunesmith.models.attention import PACKED, use_packed_attention
from tunesmith.models.segments import UnsupportedAttentionError
from tunesmith.tasks import bind
from tunesmith.training import trainer as training
from tunesmith.types import Row, Source

STOP = 2
NEW = 6
MOST_READ = 60
"""Tokens that a step reads where memory is short; the probe of a decoder reads 55."""
PROMPTS = (19, 4, 11, 11, 7, 2)
"""Tokens of the prompts, longer than the tiny models' windows and shorter."""


class Letters:
    """A tokenizer with a character for each token, so that answers say which tokens were written."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(chr(ord("一") + token) for token in ids)


def spelled(ids: Sequence[int]) -> GeneratedAnswer:
    """The answer of these tokens."""
    stops = ids[-1:] == [STOP]
    return GeneratedAnswer(Letters().decode(ids[:-1] if stops else ids, skip_special_tokens=True), stops)


@torch.no_grad()
def written_alone(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """Greedy, one whole forward a token, by the model's own attention."""
    ids: list[int] = []
    while len(ids) < NEW and ids[-1:] != [STOP]:
        whole = torch.tensor([[*prompt, *ids]])
        ids.append(int(model(input_ids=whole, use_cache=False).logits[0, -1].argmax()))
    return ids


class Shelf:
    """As much of a row store as an evaluation needs."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.lengths = np.array([len(row.ids) for row in rows], np.int32)
        self.denominators = np.array([row.trained[1:].sum() for row in rows], np.float64)
        self.num_bytes = np.zeros(len(rows), np.int32)
        self.learnt = RowTargets()

    def lengths_in(self, layout: str) -> Any:
        return self.lengths

    def row(self, index: int) -> Row:
        return self.rows[index]


def row_of(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    ids = np.array([*prompt, *answer], np.int32)
    return Row(ids, np.arange(len(ids)) >= len(prompt), Source("x", 1))


def rows_and_answers(model: PreTrainedModel) -> tuple[list[Row], list[list[int]]]:
    """Rows whose answers the model would write from none to all of, and what it writes."""
    prompts = [row.ids.tolist() for row in rows_of(PROMPTS)]
    expected = [written_alone(model, prompt) for prompt in prompts]
    other = [[(token + 1) % VOCAB for token in ids] for ids in expected]
    cut = [ids[:n] + away[n:] for n, ids, away in zip((0, 1, 3, NEW, NEW, 2), expected, other, strict=True)]
    cut[4] = cut[4][:2]  # a row that ends before the answer does
    return [row_of(*pair) for pair in zip(prompts, cut, strict=True)], expected


def measured(
    model: PreTrainedModel, rows: Sequence[Row], writing: Continuation | None, *, tokens: int = 40
) -> Predictions:
    collator = Collator(Shelf(rows), layout="packed", device="cpu")  # type: ignore[arg-type]
    return predict_rows(
        model, bind("chat", None), collator, range(len(rows)), tokens_per_pass=tokens, answering=writing
    )


def writer(model: PreTrainedModel, *, most: int = 10_000) -> Continuation:
    renderer: Any = SimpleNamespace(tokenizer=Letters(), stop_ids=(STOP,), task_name="chat")
    writes = AnswerWriter(model, renderer, NEW, tokens_per_pass=40, cache=most)
    return Continuation(writes, bind("chat", None), dict(enumerate(PROMPTS)))


# trap: A18
def assert_answers_are_those_alone(arch: str, most: int) -> None:
    model = sharp(arch)
    rows, expected = rows_and_answers(model)
    use_packed_attention(model)
    before = measured(model, rows, None)
    writing = writer(model, most=most)
    found = measured(model, rows, writing)
    assert writing.why == ""
    assert [writing.answers[i] for i in range(len(rows))] == [spelled(ids) for ids in expected]
    assert found.losses_I.tolist() == before.losses_I.tolist()
    assert model.config._attn_implementation == PACKED


@pytest.mark.parametrize("most", [1, 600, 10_000])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_answers_are_those_alone_however_many_are_written_together(arch: str, most: int) -> None:
    assert_answers_are_those_alone(arch, most)


@pytest.mark.parametrize("arch", often([arch for arch in CAN if arch not in ("llama", "gpt2")], "gemma2"))
def test_answers_are_those_alone_in_every_architecture(arch: str) -> None:
    model = sharp(arch)
    rows, expected = rows_and_answers(model)
    use_packed_attention(model)
    writing = writer(model)
    measured(model, rows, writing)
    assert writing.why or [writing.answers[i] for i in range(len(rows))] == [spelled(ids) for ids in expected]


def test_the_test_sees_an_answer_that_goes_on_after_the_references_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(self: Continuation, places: Any, targets: Any, outputs: Any) -> list[int]:
        return outputs.tolist()[: self.writer.new_tokens]  # whatever the row says in between

    monkeypatch.setattr(Continuation, "_known", known)
    with pytest.raises(AssertionError):
        assert_answers_are_those_alone("llama", 10_000)


def test_the_test_sees_an_answer_that_goes_on_from_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    slot_of, slots = continuation.slot_of, list[SequenceSlot]()

    def swapped(layers: Any, num_tokens: int) -> SequenceSlot:
        slots.append(slot_of(layers, num_tokens))
        pool = slots[-1].pool
        for layer, (key_1GLD, value_1GLD) in slots[0].pool.layers.items():
            pool.layers[layer] = tuple(  # type: ignore[assignment]
                part.new_zeros(1, part.shape[1], pool.room, part.shape[3]) for part in (key_1GLD, value_1GLD)
            )
            least = min(pool.room, slots[0].pool.room)
            for mine, others in zip(pool.layers[layer], (key_1GLD, value_1GLD), strict=True):
                mine[:, :, :least] = others[:, :, :least]
        return slots[-1]

    monkeypatch.setattr(continuation, "slot_of", swapped)
    monkeypatch.setattr(Continuation, "_prove", lambda self, *of_a_token: None)
    with pytest.raises(AssertionError):
        assert_answers_are_those_alone("llama", 10_000)


def test_a_model_that_decodes_otherwise_is_found_out_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    step = BatchedDecoder.step

    def turned(self: BatchedDecoder, *how: Any) -> Any:
        slots, logits_NV = step(self, *how)
        return slots, logits_NV.flip(-1)

    monkeypatch.setattr(BatchedDecoder, "step", turned)
    model = sharp("llama")
    rows, _ = rows_and_answers(model)
    use_packed_attention(model)
    writing = writer(model)
    measured(model, rows, writing)
    assert "another loss" in writing.why
    assert model.config._attn_implementation == PACKED


def test_a_row_that_is_done_leaves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = BatchedDecoder.step

    def counted(self: BatchedDecoder, last: Any, parts: Any) -> Any:
        sizes.append(len(last) + len(parts))
        return step(self, last, parts)

    monkeypatch.setattr(BatchedDecoder, "step", counted)
    model = sharp("llama")
    rows, expected = rows_and_answers(model)
    use_packed_attention(model)
    measured(model, rows, writer(model))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1
    assert sizes[0] == sum(row.ids[num:].tolist() != ids for row, num, ids in zip(rows, PROMPTS, expected, strict=True))


def samples_of(folder: Any, **sections: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Values of the samples of a run, and its notes."""
    recipe = tiny_recipe(folder, **sections)
    run = training.train(recipe, root=folder / "runs", offline=True)
    events = list(run.events())
    return [e.values for e in events if e.kind == "sample"], [e.values["text"] for e in events if e.kind == "note"]


HELD = {
    "data": {"held_out": 0.5},
    "evaluation": {"samples": 8, "sample_tokens": 4, "general": False},
    "train": {"max_steps": 2},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The samples of a run whose answers do not go on from measured rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.training.evaluate.continuation", lambda *a: None)
        return samples_of(tmp_path_factory.mktemp("plain"), **HELD)[0]


def test_a_runs_answers_are_those_of_prompts_alone(tmp_path: Any, plain: list[dict[str, Any]]) -> None:
    ours, _ = samples_of(tmp_path, **HELD)
    keys = ("name", "index", "prompt", "reference", "answer", "stopped")
    assert len(ours) == 16
    assert [[one[key] for key in keys] for one in ours] == [[one[key] for key in keys] for one in plain]


def test_where_memory_ends_the_rest_is_answered_by_fewer_at_a_time(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, plain: list[dict[str, Any]]
) -> None:
    add = KVCache.add

    def short(self: KVCache, slot: Any) -> None:
        if len(self.slots) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(self, slot)

    monkeypatch.setattr(KVCache, "add", short)
    found, notes = samples_of(tmp_path, **HELD)
    assert [one["answer"] for one in found] == [one["answer"] for one in plain]
    assert notes == []


def test_a_model_without_continuation_is_noted_and_writes_padded(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*a: Any, **k: Any) -> Any:
        raise UnsupportedAttentionError("its attention has sinks")

    monkeypatch.setattr(BatchedDecoder, "step", refuse)
    found, notes = samples_of(tmp_path, **HELD)
    assert len(found) == 16
    assert [text[: text.index(":")] for text in notes if "sinks" in text] == [
        "answers are written by themselves, not from the rows that are measured",
        "answers are written in padded batches, slower",
    ]


def test_too_large_batches_are_halved_and_long_prompts_read_in_parts(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, plain: list[dict[str, Any]]
) -> None:
    """Before, eight prompts of any length were one batch, and the run ended before its first step."""
    monkeypatch.setattr("tunesmith.training.evaluate.continuation", lambda *a: None)
    step, seen = BatchedDecoder.step, list[int]()

    def short(self: BatchedDecoder, last: Any, parts: Any) -> Any:
        seen.append(len(last) + sum(len(ids) for _, ids in parts))
        if seen[-1] > MOST_READ:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, last, parts)

    monkeypatch.setattr(BatchedDecoder, "step", short)
    found, _ = samples_of(tmp_path, **HELD)
    assert max(seen) > MOST_READ
    assert [one["answer"] for one in found] == [one["answer"] for one in plain]
