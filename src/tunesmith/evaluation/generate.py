"""Answers of a model to prompts: batched generation, and held-out prompts that a run answers before and after.

Prompts are rendered by the code that renders training rows. Decoding is greedy.
"""

# B prompts, T tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from tunesmith.data.collate import batch_images
from tunesmith.data.renderer import Renderer
from tunesmith.errors import is_out_of_memory
from tunesmith.models.image_features import image_inputs
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.modes import eval_mode, generating_by
from tunesmith.phrases import plural
from tunesmith.tasks import TASKS
from tunesmith.types import Example, ImageRef, JsonObject, images_of

LEAST_CHUNK = 32
"""Tokens of a prompt that are read at a time at least, where memory ends."""
FEW_ANSWERS = 16
"""Prompts answered before and after a run for a person to read."""
SHORT_TOKENS, SHORT_LIMIT, MOST_SHORT = 8, 16, 256
"""Answers of at most 8 tokens, as a class, a name or a date, are right or wrong as a whole: 256 of those are
answered and counted, with 16 tokens at most."""
MOSTLY = 0.9
PREFIX_TOKENS = 48
"""Tokens of a document that are given as the prompt of a sample."""


ImagesOf = Sequence[Sequence[ImageRef]]
"""The images of each prompt; empty: no prompt has any."""


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """Text that a model wrote."""

    text: str
    stopped: bool
    """False: cut off at the most tokens."""


def generate(
    model: PreTrainedModel,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    chunk: int | None = None,
    images: ImagesOf = (),
) -> list[GeneratedAnswer]:
    """One answer a prompt, decoded in one batch, each equal to its answer alone. `chunk`: most tokens of a
    prompt that are read at a time; prompts with `images` are read at once.

    Prompts are padded on the left, so that all answers begin at one place. The source of an encoder–decoder is
    padded on the right, because BART and its like count positions from the first token.
    """
    longest = max(map(len, prompts))
    has_decoder = model.config.is_encoder_decoder
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if has_decoder else slice(longest - len(prompt), longest)
        ids_BT[b, place] = torch.tensor(prompt)
        mask_BT[b, place] = 1
    reads = {"prefill_chunk_size": chunk} if chunk is not None and chunk < longest and not has_decoder else {}
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    seen: JsonObject = {}
    if any(images):
        assert renderer.placeholders is not None, "a renderer without them refuses prompts with images"
        shown = batch_images([image for of_prompt in images for image in of_prompt], renderer.placeholders.pixels)
        with eval_mode(model):
            seen, reads = image_inputs(model, ids_BT, mask_BT, shown), {}
    out_BT = _generate(model, renderer, max_new_tokens, ids_BT, mask_BT, seen=seen, **reads)
    return [
        read_answer(renderer, [] if has_decoder else prompt, row[1 if has_decoder else longest :].tolist())
        for prompt, row in zip(prompts, out_BT, strict=True)
    ]


def _generate(
    model: PreTrainedModel,
    renderer: Renderer,
    max_new_tokens: int,
    ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    seen: JsonObject,
    **reads: int,
) -> Tensor:
    """Prompt and answer, [B, T]; of an encoder–decoder its start token and the answer."""
    # Every value is explicit, so that nothing left in the model's own generation config can change an answer.
    # Padding follows an end only: where nothing ends an answer, no answer is padded, whatever its id.
    stop_ids = renderer.stop_ids
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(stop_ids) or None,
        pad_token_id=(*stop_ids, 0)[0], use_cache=True,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None), **reads,
    )  # fmt: skip
    # transformers fills open values of a config from the model's own: a repetition penalty is not greedy.
    with eval_mode(model), generating_by(model, GenerationConfig()), _contiguous_head_input(model):
        out_BT: Tensor = model.generate(ids_BT, attention_mask=mask_BT, generation_config=config, **seen)
    return out_BT


@contextmanager
def _contiguous_head_input(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the output layer gets the last tokens of prompts as a matrix of their own.

    They are a slice of all tokens, and for a slice torch's matmul copies the layer's weights once for each
    prompt: 54 MiB each for SmolLM2, a GiB for 128,256 tokens of size 4,096.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    with head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:])):
        yield


def trimmed(renderer: Renderer, text: str) -> str:
    """An answer as it is shown: white space around a completion is part of it, around others not."""
    return text if TASKS[renderer.task_name].raw_text else text.strip()


def read_answer(renderer: Renderer, prompt: Sequence[int], ids: list[int]) -> GeneratedAnswer:
    """Generated tokens as text. Decoded with their prompt, of which some tokenizers make the white space at the
    beginning of the answer."""
    end = next((i for i, token_id in enumerate(ids) if token_id in renderer.stop_ids), None)
    before, with_prompt = (
        renderer.tokenizer.decode([*prompt, *written], skip_special_tokens=True) for written in ([], ids[:end])
    )
    if not with_prompt.startswith(before):
        before, with_prompt = "", renderer.tokenizer.decode(ids[:end], skip_special_tokens=True)
    return GeneratedAnswer(text=trimmed(renderer, with_prompt[len(before) :]), stopped=end is not None)


def has_short_answers(targets_I: NDArray[np.integer[Any]]) -> bool:
    """Whether most rows have so few targets that their answers are right or wrong as a whole."""
    return len(targets_I) > 0 and bool(np.mean(targets_I <= SHORT_TOKENS) >= MOSTLY)


def new_tokens_for(targets_I: NDArray[np.integer[Any]], most: int) -> int:
    """Most tokens of an answer to the prompts of rows with `targets_I` targets."""
    return min(most, SHORT_LIMIT) if has_short_answers(targets_I) else most


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A held-out row up to its last answer."""

    ids: tuple[int, ...]
    prompt: str
    """The last turn before the answer, for a person to read."""
    reference: str
    source: str
    cut: int = 0
    """Tokens of its end that were left out to fit."""
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """The longest prompts: for samples of a run, of an evaluation, and rows to predict."""

    max_tokens: int
    """Longest of any kind."""
    cut_to: int
    """Length to which prompts that can be cut are cut, as they were in training."""

    @classmethod
    def of(cls, renderer: Renderer, *, model_tokens: int, new_tokens: int) -> PromptLimit:
        """The limit with room for an answer of `new_tokens` where a model can attend to `model_tokens`.

        An encoder–decoder keeps its answer apart from the prompt.
        """
        left = model_tokens if renderer.kind == "encoder_decoder" else model_tokens - new_tokens
        return cls(left, left if renderer.max_tokens is None else min(left, renderer.max_tokens))

    def encode(self, renderer: Renderer, example: Example) -> tuple[list[int], int]:
        """The prompt ids of an example's parts, and how many tokens were cut off. Raises DataError."""
        cuts: list[int] = []
        ids = renderer.prompt_ids(example.parts, example.tools, max_tokens=self.cut_to, on_cut=cuts.append)
        return ids, sum(cuts)

    def limit(self, cut: int) -> int:
        """The longest prompt of which `cut` tokens were cut off."""
        return self.cut_to if cut else self.max_tokens


def sample_prompts(
    renderer: Renderer, examples: Sequence[Example], *, limit: PromptLimit, new_tokens: int
) -> list[SamplePrompt]:
    """The prompt of each example that has one within the limit: everything before its last trained part.

    The prompt of a document is its first tokens, and the reference is the `new_tokens` that follow.
    """
    made = [
        _document_prompt(renderer, example, new_tokens)
        if example.shape == "text"
        else _prompt(renderer, example, limit)
        for example in examples
    ]
    return [prompt for prompt in made if prompt is not None and 0 < len(prompt.ids) <= limit.limit(prompt.cut)]


def sample_notes(prompts: Sequence[SamplePrompt], *, num_rows: int) -> list[str]:
    """Notes on the prompts that could be made of `num_rows` rows."""
    num_cut, left_out = sum(prompt.cut > 0 for prompt in prompts), num_rows - len(prompts)
    verb = "has" if left_out == 1 else "have"
    was = "was" if num_cut == 1 else "were"
    cut = f"{num_cut} of {plural(len(prompts), 'sample prompt')} {was} cut at the end, to the limit of training rows"
    return [
        *([cut] if num_cut else []),
        *([f"{plural(left_out, 'held-out row')} {verb} no prompt to answer: empty or too long"] if left_out else []),
    ]


def _prompt(renderer: Renderer, example: Example, limit: PromptLimit) -> SamplePrompt | None:
    before = example.last_prompt
    if not before:
        return None
    ids, cut = limit.encode(renderer, replace(example, parts=before))
    reference = example.first_line[len(before)].text
    text, source, images = before[-1].text, str(example.source), images_of(before)
    return SamplePrompt(tuple(ids), text, reference=reference, source=source, cut=cut, images=images)


def _document_prompt(renderer: Renderer, example: Example, new_tokens: int) -> SamplePrompt | None:
    ids = tuple(renderer.prompt_ids(example.parts, ()))
    if len(ids) <= PREFIX_TOKENS:
        return None
    prefix, rest = ids[:PREFIX_TOKENS], ids[PREFIX_TOKENS : PREFIX_TOKENS + new_tokens]
    prompt, reference = (renderer.tokenizer.decode(part, skip_special_tokens=True) for part in (prefix, rest))
    return SamplePrompt(prefix, prompt, reference=reference, source=str(example.source))


def batch_size(prompt_tokens: float, new_tokens: int, most: int) -> int:
    """The number of prompts of `prompt_tokens` that are answered together, in `most` tokens."""
    return max(1, int(most // (prompt_tokens + 1 + new_tokens)))


def prompt_batches(prompts: Sequence[SamplePrompt], new_tokens: int, most: int) -> list[list[SamplePrompt]]:
    """Prompts in batches of as many as fit into `most` tokens with their answers and padding; at least one."""
    batches: list[list[SamplePrompt]] = []
    for prompt in prompts:
        longer = [*batches[-1], prompt] if batches else [prompt]
        if batches and len(longer) * (max(len(member.ids) for member in longer) + new_tokens) <= most:
            batches[-1] = longer
        else:
            batches.append([prompt])
    return batches


def generate_within(
    model: PreTrainedModel,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    most: int,
    images: ImagesOf = (),
) -> list[GeneratedAnswer]:
    """As `generate`. A prompt of more than `most` tokens is read in parts; where memory ends, half as many
    prompts are answered together, and then a prompt is read in smaller parts."""
    try:
        return generate(model, renderer, prompts, new_tokens, chunk=most, images=images)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or (len(prompts) == 1 and (most <= LEAST_CHUNK or any(images))):
            raise
    free_cached_memory()  # outside of the handler, whose traceback holds the tensors of the pass
    if len(prompts) == 1:
        return generate_within(model, renderer, prompts, new_tokens, most=max(1, min(most, len(prompts[0])) // 2))
    half = len(prompts) // 2
    parts = (prompts[:half], images[:half]), (prompts[half:], images[half:])
    return [
        answer
        for some, of_some in parts
        for answer in generate_within(model, renderer, some, new_tokens, most=most, images=of_some)
    ]


def answer_samples(
    model: PreTrainedModel,
    renderer: Renderer,
    prompts: Sequence[SamplePrompt],
    new_tokens: int,
    tick: Callable[[str, int, int], None],
    *,
    most: int,
) -> Iterator[JsonObject]:
    """The values of one "sample" event a prompt, in order. `most`: tokens of prompts and answers in a batch."""
    done = 0
    for batch in prompt_batches(prompts, new_tokens, most):
        ids, images = [sample.ids for sample in batch], [sample.images for sample in batch]
        answers = generate_within(model, renderer, ids, new_tokens, most=most, images=images)
        yield from map(sample_values, batch, answers)
        done += len(batch)
        tick("answer", done, len(prompts))


def sample_values(sample: SamplePrompt, given: GeneratedAnswer) -> JsonObject:
    """The values of the "sample" event of a prompt and its answer."""
    return {
        "prompt": sample.prompt,
        "reference": sample.reference,
        "answer": given.text,
        "stopped": given.stopped,
        "source": sample.source,
    }
