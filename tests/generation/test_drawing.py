"""Answers are drawn from the distribution that learns them, with the ids that the model was fed."""

import math
from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from often import often
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tunesmith.generation import sampling
from tunesmith.generation.draws import Draw, DrawnAnswer, draw_answers, drawing, refuse_undrawable
from tunesmith.generation.requests import GenerationRequest
from tunesmith.generation.sampling import Sampler, sample_together

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
END = TOKENIZER.eos_token_id
FAMILIES = (
    "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "phi3", "olmo2", "granite", "qwen3_moe",
    "cohere", "smollm3",
)  # fmt: skip
PROMPTS = [TOKENIZER(text).input_ids for text in ("What is the tallest mountain", "Hello there, how can I", "In 2024")]
SEEDS = [11, 22, 33]
TOLERANCE = 1e-4
"""Of log-probabilities in float32: two orders of the same sums."""


def how(*, stop_ids: Collection[int] = (END,), **changes) -> Draw:
    renderer: Any = SimpleNamespace(tokenizer=TOKENIZER, stop_ids=stop_ids)
    usual = Draw(renderer=renderer, num=4, temperature=1.0, max_new_tokens=12, streams=16)
    return replace(usual, **changes)


def drawn(model, prompts=PROMPTS, seeds=SEEDS, **changes) -> list[list[DrawnAnswer]]:
    with drawing(model) as decoder:
        return draw_answers(decoder, prompts, seeds, how(**changes))


def learnt(model, prompt, answer: DrawnAnswer, temperature: float) -> torch.Tensor:
    """Log-probabilities of an answer's tokens by the model on the whole text alone."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
    return (logits_TV.float() / temperature).log_softmax(-1)[range(len(answer.ids)), list(answer.ids)]


def sampler(index: int, **params) -> Sampler:
    return Sampler(GenerationRequest("", seed=5, **params), index=index, grammar=None, keeps=True)


@pytest.mark.parametrize("size", [300, 49_152])
def test_tokens_that_are_drawn_together_are_those_of_each_alone(size):
    logits = torch.randn(70, size, generator=torch.Generator().manual_seed(1)) * 3
    together, alone = ([sampler(i, temperature=0.5 + i / 50) for i in range(70)] for _ in range(2))
    for _ in range(2):  # the second token follows from another random number of each
        found = sample_together(together, logits)
        assert found == [one.sample(logits_V) for one, logits_V in zip(alone, logits, strict=True)]


def test_a_row_of_logits_that_are_no_numbers_fails_alone():
    logits = torch.randn(3, 50)
    logits[1, 4] = math.nan
    found = sample_together([sampler(i) for i in range(3)], logits)
    assert [isinstance(one, sampling.SampledToken) for one in found] == [True, False, True]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("arch", often(FAMILIES, "llama", "gemma2", "qwen3_moe"))
def test_log_probabilities_are_those_of_the_model_on_the_text_alone(arch, temperature):  # trap: G2, G5, G27
    model = tiny_model(arch, vocab_size=VOCAB, initializer_range=0.3).eval()
    refuse_undrawable(arch, model)
    for prompt, group in zip(PROMPTS, drawn(model, temperature=temperature), strict=True):
        for answer in group:
            expected = learnt(model, prompt, answer, temperature)
            assert torch.allclose(torch.tensor(answer.logps), expected, atol=TOLERANCE, rtol=0)


def test_the_comparison_catches_what_lies_before_a_prompt():  # trap: G27 planted: padding is read
    model = tiny_model("llama", vocab_size=VOCAB, initializer_range=0.3).eval()
    answer = drawn(model)[0][0]
    padded = learnt(model, [END, END, *PROMPTS[0]], answer, 1.0)
    with pytest.raises(AssertionError):
        assert torch.allclose(torch.tensor(answer.logps), padded, atol=TOLERANCE, rtol=0)


def test_the_comparison_catches_another_temperature_and_a_shift():  # trap: G2, G5 planted
    model = tiny_model("llama", vocab_size=VOCAB, initializer_range=0.3).eval()
    answer = drawn(model, temperature=0.7)[0][0]
    with pytest.raises(AssertionError):
        assert torch.allclose(
            torch.tensor(answer.logps), learnt(model, PROMPTS[0], answer, 1.0), atol=TOLERANCE, rtol=0
        )
    rolled = torch.tensor(answer.logps).roll(1)
    with pytest.raises(AssertionError):
        assert torch.allclose(rolled, learnt(model, PROMPTS[0], answer, 0.7), atol=TOLERANCE, rtol=0)


def test_ids_are_kept_and_not_those_of_the_text_tokenized_again():  # trap: G1
    """A model without training writes tokens as nobody would spell the text that they make."""
    model = tiny_model("llama", vocab_size=VOCAB).eval()
    answers = [answer for group in drawn(model, max_new_tokens=20) for answer in group]
    for prompt, group in zip(PROMPTS, drawn(model, max_new_tokens=20), strict=True):
        for answer in group:
            assert len(answer.ids) == len(answer.logps)
            expected = learnt(model, prompt, answer, 1.0)
            assert torch.allclose(torch.tensor(answer.logps), expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(AssertionError):  # trap: G1 planted
        assert all(list(answer.ids) == TOKENIZER(answer.text, add_special_tokens=False).input_ids for answer in answers)


def test_dropout_is_off_while_answers_are_drawn_and_on_again_afterwards():  # trap: G4
    model = tiny_model("llama", vocab_size=VOCAB, dropout=0.3).train()
    first, second = drawn(model), drawn(model)
    assert first == second
    assert model.training
    assert model.config._attn_implementation != "tunesmith_cached"
    model.eval()
    assert drawn(model) == first
    model.train()
    with pytest.raises(AssertionError):  # trap: G4 planted: what a model in training mode finds
        assert torch.allclose(
            torch.tensor(first[0][0].logps), learnt(model, PROMPTS[0], first[0][0], 1.0), atol=TOLERANCE, rtol=0
        )


def test_tokens_have_the_frequencies_of_the_distribution():  # trap: G7
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0])
    expected = logits.double().softmax(-1) * 20_000

    def chi_square(**params) -> float:
        counts = torch.zeros(8)
        some = [sampler(i, **params) for i in range(100)]
        for _ in range(200):
            for token in sample_together(some, logits.expand(100, -1)):
                counts[token.token_id] += 1
        return float(((counts - expected) ** 2 / expected).sum())

    assert chi_square() < 24.3  # 7 degrees of freedom: 0.1 % of honest draws are beyond
    with pytest.raises(AssertionError):  # trap: G7 planted
        assert chi_square(top_p=0.9) < 24.3


def test_settings_of_the_model_do_not_narrow_the_choice():  # trap: G7
    model = tiny_model("llama", vocab_size=VOCAB).eval()
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=5.0)
    assert len({answer.ids for answer in drawn(model)[0]}) == 4


def test_every_token_that_ends_an_answer_ends_it_and_is_kept():  # trap: G8
    model = tiny_model("llama", vocab_size=VOCAB).eval()
    ends = frozenset(range(0, VOCAB, 3))
    answers = [answer for group in drawn(model, stop_ids=ends, num=16) for answer in group]
    ended = [answer for answer in answers if answer.ended]
    assert {answer.ids[-1] for answer in ended} <= ends
    assert len({answer.ids[-1] for answer in ended}) > 3
    assert all(token not in ends for answer in answers for token in answer.ids[:-1])
    cut = [answer for answer in answers if not answer.ended]
    assert all(len(answer.ids) == 12 for answer in cut)
    others = [answer for group in drawn(model, stop_ids=frozenset({0}), num=16) for answer in group]
    with pytest.raises(AssertionError):  # trap: G8 planted: one end of two
        assert all(token not in ends for answer in others for token in answer.ids[:-1])


def test_answers_follow_from_their_seed_whatever_else_is_drawn():  # trap: G27
    model = tiny_model("llama", vocab_size=VOCAB, initializer_range=0.3).eval()
    all_of_them = drawn(model)
    assert [drawn(model, [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)] != []
    alone = [drawn(model, [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert [[one.ids for one in group] for group in alone] == [[one.ids for one in group] for group in all_of_them]
    few = drawn(model, streams=4)
    assert [[one.text for one in group] for group in few] == [[one.text for one in group] for group in all_of_them]
    assert all(len({one.ids for one in group}) == 4 for group in all_of_them)


def test_answers_for_which_there_is_no_memory_are_drawn_with_fewer_at_once(monkeypatch):
    model = tiny_model("llama", vocab_size=VOCAB, initializer_range=0.3).eval()
    expected, most = drawn(model), []
    with drawing(model) as decoder:
        step = decoder.step

        def limited(last_tokens, parts):
            most.append(len(last_tokens))
            if len(last_tokens) > 8:
                raise MemoryError
            return step(last_tokens, parts)

        monkeypatch.setattr(decoder, "step", limited)
        found = draw_answers(decoder, PROMPTS, SEEDS, how())
    assert max(most) > 8
    assert [[one.ids for one in group] for group in found] == [[one.ids for one in group] for group in expected]
