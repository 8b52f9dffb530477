"""Text comes in whole characters, never with a part of a stop, and is what decoding all tokens at once gives."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from tiny import tiny_tokenizer
from tiny_tasks import word_tokenizer
from tunesmith.generation.padded import read_answer
from tunesmith.generation.sampling import SampledToken, StreamingDecoder, with_text
from tunesmith.serve.protocol import Token

SAID = "Ça va très bien 🦊🦊, 今日はいい天気ですね。\n\n  The quick  brown fox end "


def chance(token_id: int) -> Token:
    return {"token": str(token_id), "logprob": -1.0}


def written(tokenizer: Any, prompt: list[int], ids: list[int], *, stops: tuple[str, ...] = ()) -> list[str]:
    writer = StreamingDecoder(tokenizer, prompt, stops=stops, strip=False)
    pieces, told = [], []
    for token_id in ids:
        writer.add(token_id, chance(token_id))
        text, tokens = writer.take()
        pieces.append(text)
        told += tokens
        if writer.is_stopped:
            break
    writer.finish()
    text, tokens = writer.take(last=True)
    told += tokens
    if not stops:
        assert [token["token"] for token in told] == [str(token_id) for token_id in ids]
    return [*pieces, text]


@pytest.mark.parametrize("metaspace", [False, True])
def test_pieces_are_whole_characters_and_together_the_text(metaspace: bool) -> None:
    tokenizer = tiny_tokenizer(metaspace=metaspace)
    ids = tokenizer(SAID, add_special_tokens=False).input_ids
    prompt = tokenizer("Hello there", add_special_tokens=False).input_ids
    pieces = written(tokenizer, prompt, ids)
    assert "".join(pieces) == tokenizer.decode([*prompt, *ids])[len("Hello there") :]
    assert [piece for piece in pieces if piece.strip() not in SAID] == []


def any_ids(tokenizer: Any, seed: int) -> list[int]:
    """Of byte-fallback tokenizers without the bytes: they take a whole run of them for no text if any is wrong."""
    draw = random.Random(seed)
    known = [i for i in range(20, len(tokenizer)) if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
    return draw.choices(known, k=60)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("metaspace", [False, True])
def test_any_tokens_are_what_the_whole_decodes_to(metaspace: bool, seed: int) -> None:
    """Random tokens hold many bytes that are no character: the same as `generation` makes of all of them at once."""
    tokenizer = tiny_tokenizer(metaspace=metaspace)
    prompt, ids = any_ids(tokenizer, 99), any_ids(tokenizer, seed)
    renderer: Any = type("R", (), {"tokenizer": tokenizer, "stop_ids": (), "task_name": "generate"})
    assert "".join(written(tokenizer, prompt, ids)) == read_answer(renderer, prompt, ids).text


@pytest.mark.parametrize("stop", ["quick", "x j", "ver the lazy", "The", "n fox jumps over t", "fox"])
def test_a_stop_is_found_across_tokens_and_no_part_of_it_is_told(stop: str) -> None:
    tokenizer = tiny_tokenizer()
    text = "The quick brown fo fox jumps over the lazy dog."
    ids = tokenizer(text).input_ids
    told = ""
    for piece in written(tokenizer, [], ids, stops=("never", stop)):
        told += piece
        assert text.partition(stop)[0].startswith(told)
    assert told == text.partition(stop)[0]


def test_the_earliest_of_several_stops_counts() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("one two three four").input_ids
    assert "".join(written(tokenizer, [], ids, stops=("three", "wo t"))) == "one t"


def test_what_looked_like_a_stop_is_told_at_the_end() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("The quick brow").input_ids
    assert "".join(written(tokenizer, [], ids, stops=("brown",))) == "The quick brow"


def test_without_holding_back_the_test_sees_a_part_of_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: text is told as soon as it is there."""
    monkeypatch.setattr(StreamingDecoder, "_partial_stop", lambda self: 0)
    with pytest.raises(AssertionError):
        test_a_stop_is_found_across_tokens_and_no_part_of_it_is_told("ver the lazy")


@pytest.mark.parametrize("said", ["  \n Yes, please. \n ", "   ", "Yes"])
def test_white_space_around_an_answer_is_left_out(said: str) -> None:
    tokenizer = tiny_tokenizer()
    writer = StreamingDecoder(tokenizer, [], stops=(), strip=True)
    text = ""
    for token_id in tokenizer(said).input_ids:
        writer.add(token_id)
        text += writer.take()[0]
        assert said.strip().startswith(text)
    writer.finish()
    assert text + writer.take(last=True)[0] == said.strip()


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_tokenizer(metaspace=True), word_tokenizer()])
def test_listed_tokens_spell_the_text(tokenizer: Any) -> None:
    text = " Ask 12" if tokenizer.unk_token != "[UNK]" else "red"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    listed = [with_text(tokenizer, SampledToken(i, -0.5, ((i, -0.5), (ids[-1], -math.inf)))) for i in ids]
    assert "".join(token["token"] for token in listed).strip() == text.strip()
    assert [token["logprob"] for token in listed[0]["top_logprobs"]] == [-0.5, -9999.0]
    assert [one["token"] for one in listed[0]["top_logprobs"]] == [listed[0]["token"], listed[-1]["token"]]


def test_an_id_beyond_the_tokenizer_has_no_text() -> None:
    """Rows that pad a model's table, as Qwen's and Phi's do."""
    tokenizer = tiny_tokenizer()
    token = SampledToken(5, -0.1, ((5, -0.1), (len(tokenizer) + 3, -9.0)))
    assert with_text(tokenizer, token)["top_logprobs"][1]["token"] == ""
