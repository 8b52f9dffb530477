"""Answers are the same in a batch as alone, with the cache as without it, and hold nothing of the prompt."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from tiny import pair, tiny_tokenizer
from tiny_model import TRANSLATORS, tiny_model
from tiny_tasks import task_recipe, write
from tunesmith.data.renderer import Renderer
from tunesmith.errors import NonFiniteError, OutOfMemoryError
from tunesmith.generation import padded as generation
from tunesmith.generation.decoder import BatchedDecoder
from tunesmith.generation.padded import GeneratedAnswer, generate
from tunesmith.generation.writer import AnswerWriter, Writing
from tunesmith.models.attention import use_packed_attention
from tunesmith.tasks import TASKS
from tunesmith.training import trainer as training

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
HOW = 8
PROMPTS = [
    TOKENIZER(text).input_ids
    for text in ("Hello there", "The quick brown fox jumps over the lazy dog. What is the tallest mountain?", "a b c")
]
ARCHS = ("llama", "gpt2", *TRANSLATORS)


def renderer() -> Any:
    return SimpleNamespace(tokenizer=TOKENIZER, stop_ids=(TOKENIZER.eos_token_id,), task_name="chat")


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
    while len(written) < HOW and written[-1:] != [TOKENIZER.eos_token_id]:
        ids_1T = torch.tensor([start + written])
        inputs = {"input_ids": ids_1T} if source is None else {"input_ids": source, "decoder_input_ids": ids_1T}
        written.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
    return written


def assert_the_head_reads_matrices() -> None:
    """A slice of all tokens would make torch copy the layer's weights once for each prompt."""
    model = sharp("llama")
    head, seen = model.get_output_embeddings(), []
    real = head.forward
    head.forward = lambda hidden: seen.append(hidden.is_contiguous()) or real(hidden)
    generate(model, renderer(), PROMPTS, HOW)
    assert seen
    assert all(seen)


def test_the_output_layer_is_not_copied_for_each_prompt() -> None:
    assert_the_head_reads_matrices()


def test_the_test_of_the_output_layer_sees_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_contiguous_head_input", nullcontext)
    with pytest.raises(AssertionError):
        assert_the_head_reads_matrices()


# trap: A11
def assert_answers_together_are_those_alone(arch: str, ask: Any) -> None:
    model = sharp(arch)
    expected = []
    for prompt in PROMPTS:
        ids = step_by_step(model, prompt)
        stopped = ids[-1] == TOKENIZER.eos_token_id
        expected.append(GeneratedAnswer(TOKENIZER.decode(ids, skip_special_tokens=True).strip(), stopped))
    assert len({one.text for one in expected}) == len(PROMPTS)
    assert ask(model, renderer(), PROMPTS, HOW) == expected
    assert [generate(model, renderer(), [prompt], HOW)[0] for prompt in PROMPTS] == expected


def written(model: PreTrainedModel, renderer: Any, prompts: Any, how: int) -> list[GeneratedAnswer]:
    return AnswerWriter(model, renderer, how, tokens_per_pass=20, cache=600).write(prompts)


@pytest.mark.parametrize("arch", ARCHS)
def test_answers_together_are_those_alone(arch: str) -> None:
    assert_answers_together_are_those_alone(arch, generate)
    assert_answers_together_are_those_alone(arch, written)


@pytest.mark.parametrize(
    ("arch", "why"),
    [("llama", ""), ("bart", "encoder–decoder"), ("bloom", "its attention is its own")],
)
def test_models_that_no_batch_runs_write_padded(arch: str, why: str) -> None:
    writer = AnswerWriter(sharp(arch), renderer(), HOW, tokens_per_pass=1000, cache=1000)
    assert why in writer.why_padded
    assert bool(writer.why_padded) == bool(why)
    heard: list[int] = []
    expected = [generate(writer.model, renderer(), [prompt], HOW)[0] for prompt in PROMPTS]
    assert writer.write(PROMPTS, heard.append) == expected
    assert heard[-1] == 3
    assert writer.write([]) == []
    kinds = ["conv", "full_attention"]
    recurrent = tiny_model("lfm2", vocab_size=VOCAB, layer_types=kinds, num_hidden_layers=2).eval()
    assert "carry a state" in replace(writer, model=recurrent).why_padded


def test_the_test_sees_answers_that_are_given_to_other_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longest first, and not put back in order."""
    add = Writing.add

    def shifted(self: Writing, key: int, prompt: Sequence[int]) -> None:
        add(self, (key + 1) % len(PROMPTS), prompt)

    monkeypatch.setattr(Writing, "add", shifted)
    with pytest.raises(AssertionError):
        assert_answers_together_are_those_alone("llama", written)


def test_an_answer_that_never_fits_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: BatchedDecoder, *how: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    writer = AnswerWriter(sharp("llama"), renderer(), HOW, tokens_per_pass=1000, cache=1000)
    assert writer.why_padded == ""
    monkeypatch.setattr(BatchedDecoder, "step", full)
    with pytest.raises(OutOfMemoryError, match=r"up to 8 tokens .* fewer tokens of an answer"):
        writer.write(PROMPTS)


def test_logits_that_are_no_numbers_are_an_error_with_a_way_out() -> None:
    model = sharp("llama")
    writer = AnswerWriter(model, renderer(), HOW, tokens_per_pass=1000, cache=1000)
    assert writer.why_padded == ""
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"while answers were written: .* Set precision: float32"):
        writer.write(PROMPTS)


def padded_on_the_other_side(model: PreTrainedModel, renderer: Any, prompts: Any, how: int) -> list[GeneratedAnswer]:
    """The planted bug: causal prompts padded on the right, sources on the left."""
    longest = max(map(len, prompts))
    fill = [TOKENIZER.pad_token_id]
    if model.config.is_encoder_decoder:
        return generate(model, renderer, [fill * (longest - len(prompt)) + prompt for prompt in prompts], how)
    return generate(model, renderer, [prompt + fill * (longest - len(prompt)) for prompt in prompts], how)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bart"])
def test_the_test_sees_prompts_that_are_padded_on_the_other_side(arch: str) -> None:
    with pytest.raises(AssertionError):
        assert_answers_together_are_those_alone(arch, padded_on_the_other_side)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_models_own_settings_change_no_answer_and_stay(arch: str) -> None:
    model = sharp(arch)
    before = generate(model, renderer(), PROMPTS, HOW)
    own = GenerationConfig(num_beams=3, repetition_penalty=5.0, forced_bos_token_id=7, max_length=3)
    model.generation_config = own
    assert generate(model, renderer(), PROMPTS, HOW) == before
    assert model.generation_config is own


def test_generating_leaves_ragged_training_and_the_mode_as_they_were() -> None:
    model = sharp("llama").train()
    expected = generate(model, renderer(), PROMPTS, HOW)
    use_packed_attention(model)
    assert generate(model, renderer(), PROMPTS, HOW) == expected
    assert model.training


class Writes:
    """A model that writes these tokens, whatever it is asked."""

    config = SimpleNamespace(is_encoder_decoder=False, decoder_start_token_id=None)
    device = torch.device("cpu")
    generation_config = GenerationConfig()

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids

    def can_generate(self) -> bool:
        return True

    def generate(self, ids_BT: torch.Tensor, **rest: Any) -> torch.Tensor:
        return torch.cat([ids_BT, torch.tensor([self.ids]).expand(len(ids_BT), -1)], 1)


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("completion", [" yes", "yes", "\n yes \n", "  yes"])
def test_a_completion_keeps_its_white_space(metaspace: bool, completion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learnt comes back: the tokens that a row trains, written by a model, are its completion."""
    monkeypatch.setattr(generation, "eval_mode", lambda model: nullcontext())
    monkeypatch.setattr(generation, "_contiguous_head_input", nullcontext)
    tokenizer = tiny_tokenizer(None, eos="</s>", metaspace=metaspace, adds_bos=metaspace)
    made = Renderer(tokenizer, TASKS["generate"], max_tokens=None, too_long="error", control_tokens="error")
    example = pair("Is it you?", completion)
    [[row]] = made.encode([example])
    [told] = generate(Writes(row.ids[row.trained].tolist()), made, [made.prompt_ids(example.parts[:1])], HOW)
    assert told == GeneratedAnswer(completion, stopped=True)
    talks = Renderer(tiny_tokenizer(), TASKS["chat"], max_tokens=None, too_long="error", control_tokens="error")
    assert generation.trimmed(talks, completion) == "yes"


def test_a_model_that_nothing_stops_writes_to_the_end(tmp_path: Path) -> None:
    """A tokenizer without an end of text, through a whole run whose samples are gone on with."""
    recipe = task_recipe(tmp_path, "text", "causal", evaluation={"samples": 2, "sample_tokens": 4}, train={"epochs": 1})
    tiny_tokenizer(None, eos=None).save_pretrained(recipe.model)
    rows = [{"text": "The quick brown fox jumps over the lazy dog, 12 * 34 == 408. " * (4 + i)} for i in range(4)]
    for (file,) in (recipe.data.train, recipe.data.eval):
        write(Path(file.path), rows)
    run = training.train(recipe, root=tmp_path / "runs", offline=True)
    told = [event.values for event in run.events() if event.kind == "sample"]
    assert len(told) == 4
    assert not any(sample["stopped"] for sample in told)
    assert all(sample["answer"] for sample in told)
