"""Answers of models that no `BatchedDecoder` runs: encoder–decoders, recurrent models, and
those whose attention cannot be replaced; and answers to prompts with images. Decoded by
transformers in padded batches, greedily."""

# B prompts, T tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from tunesmith.data.renderer import Renderer
from tunesmith.errors import is_out_of_memory
from tunesmith.models.image_features import image_inputs
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.modes import eval_mode, generating_by
from tunesmith.tasks import TASKS
from tunesmith.types import ImageRef, JsonObject

LEAST_CHUNK = 32
"""Tokens of a prompt that are read at a time at least, where memory ends."""

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
        shown = renderer.batch_images(images)
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
    """The answer as it is shown. White space around it is kept for completions only, of which it is a part."""
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
        less = max(1, min(most, len(prompts[0])) // 2)
        return generate_within(model, renderer, prompts, new_tokens, most=less)
    half = len(prompts) // 2
    parts = (prompts[:half], images[:half]), (prompts[half:], images[half:])
    return [
        answer
        for half_prompts, half_images in parts
        for answer in generate_within(model, renderer, half_prompts, new_tokens, most=most, images=half_images)
    ]


def prompt_batches(
    prompts: Sequence[Sequence[int]], numbers: Sequence[int], new_tokens: int, most: int
) -> list[list[int]]:
    """Numbers of prompts, in this order, in batches: as many as fit into `most` tokens with their
    answers and padding, at least one."""
    batches: list[list[int]] = []
    for number in numbers:
        longer = [*batches[-1], number] if batches else [number]
        if batches and len(longer) * (max(len(prompts[i]) for i in longer) + new_tokens) <= most:
            batches[-1] = longer
        else:
            batches.append([number])
    return batches
