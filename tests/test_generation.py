"""Answers are the same in a batch as alone, with the cache as without it, and hold nothing of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from tiny import tiny_tokenizer
from tiny_model import TRANSLATORS, tiny_model
from tunesmith.generation import Answer, Sampling, answer, stream
from tunesmith.models.attention import use_ragged

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
HOW = Sampling(max_new_tokens=8)
PROMPTS = [
    TOKENIZER(text).input_ids
    for text in ("Hello there", "The quick brown fox jumps over the lazy dog. What is the tallest mountain?", "a b c")
]
ARCHS = ("llama", "gpt2", *TRANSLATORS)


def renderer(prompt: Sequence[int] = ()) -> Any:
    stops = (TOKENIZER.eos_token_id,)
    return SimpleNamespace(tokenizer=TOKENIZER, stop_ids=stops, prompt_ids=lambda parts: list(prompt))


def sharp(arch: str) -> PreTrainedModel:
    wide = {} if arch == "t5" else {"init_std" if arch == "bart" else "initializer_range": 0.3}
    return tiny_model(arch, vocab_size=VOCAB, **wide).eval()


@torch.no_grad()
def step_by_step(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """Greedy, one whole forward a token, no cache and no padding."""
    if model.config.is_encoder_decoder:
        start, source = [model.config.decoder_start_token_id], torch.tensor([list(prompt)])
    else:
        start, source = list(prompt), None
    written: list[int] = []
    while len(written) < HOW.max_new_tokens and written[-1:] != [TOKENIZER.eos_token_id]:
        ids_1T = torch.tensor([start + written])
        inputs = {"input_ids": ids_1T} if source is None else {"input_ids": source, "decoder_input_ids": ids_1T}
        written.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
    return written


# trap: A11
def assert_answers_together_are_those_alone(arch: str, ask: Any) -> None:
    model = sharp(arch)
    expected = []
    for prompt in PROMPTS:
        ids = step_by_step(model, prompt)
        stopped = ids[-1] == TOKENIZER.eos_token_id
        expected.append(Answer(TOKENIZER.decode(ids, skip_special_tokens=True).strip(), stopped))
    assert len({one.text for one in expected}) == len(PROMPTS)
    assert ask(model, renderer(), PROMPTS, HOW) == expected
    assert [answer(model, renderer(), [prompt], HOW)[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("arch", ARCHS)
def test_answers_together_are_those_alone(arch: str) -> None:
    assert_answers_together_are_those_alone(arch, answer)


def padded_on_the_other_side(model: PreTrainedModel, renderer: Any, prompts: Any, how: Sampling) -> list[Answer]:
    """The planted bug: causal prompts padded on the right, sources on the left."""
    longest = max(map(len, prompts))
    fill = [TOKENIZER.pad_token_id]
    if model.config.is_encoder_decoder:
        return answer(model, renderer, [fill * (longest - len(prompt)) + prompt for prompt in prompts], how)
    return answer(model, renderer, [prompt + fill * (longest - len(prompt)) for prompt in prompts], how)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bart"])
def test_the_test_sees_prompts_that_are_padded_on_the_other_side(arch: str) -> None:
    with pytest.raises(AssertionError):
        assert_answers_together_are_those_alone(arch, padded_on_the_other_side)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_streamed_answer_is_the_same(arch: str) -> None:
    model = sharp(arch)
    for prompt in PROMPTS[:2]:
        whole = "".join(stream(model, renderer(prompt), (), HOW))
        assert whole.strip() == answer(model, renderer(), [prompt], HOW)[0].text


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_models_own_settings_change_no_answer_and_stay(arch: str) -> None:
    model = sharp(arch)
    before = answer(model, renderer(), PROMPTS, HOW)
    own = GenerationConfig(num_beams=3, repetition_penalty=5.0, forced_bos_token_id=7, max_length=3)
    model.generation_config = own
    assert answer(model, renderer(), PROMPTS, HOW) == before
    assert model.generation_config is own


def test_generating_leaves_ragged_training_and_the_mode_as_they_were() -> None:
    model = sharp("llama").train()
    expected = answer(model, renderer(), PROMPTS, HOW)
    use_ragged(model)
    assert answer(model, renderer(), PROMPTS, HOW) == expected
    assert model.training
