"""Answers that a model draws to learn from: with the tokens that it was fed and the log-probability of each.

The model draws with the very tensors that learn, and its caches end with the draw. Nothing is tokenized again:
the ids of an answer are those that the decoder got.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from tunesmith.data.renderer import Renderer
from tunesmith.errors import ModelError, OutOfMemoryError
from tunesmith.generation.adapters import AdapterSet
from tunesmith.generation.decoder import BatchedDecoder, Decoder, decoding, why_not_batched
from tunesmith.generation.requests import Delta, Finished, GenerationRequest, RequestError
from tunesmith.generation.scheduler import PreparedRequest, Scheduler, not_finite
from tunesmith.models.memory import peak_memory_bytes


@dataclass(frozen=True, slots=True)
class DrawnAnswer:
    """One answer."""

    ids: tuple[int, ...]
    """Its tokens, and the one that ended it."""
    logps: tuple[float, ...]
    """Log-probability of each token in the distribution that it was drawn from:
    float32 logits over the temperature."""
    text: str
    ended: bool
    """False: it was cut at the most tokens, and its last one ends nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Settings by which answers are drawn. There is no top-p, no penalty and no stop text: every token that
    the model may write has to be one that can be drawn."""

    renderer: Renderer
    """Knows the tokens that end an answer, and the text of the others."""
    num: int
    """Answers to each prompt."""
    temperature: float
    max_new_tokens: int
    streams: int
    """Most answers that are decoded together. Another number changes rounding."""


def refuse_undrawable(name: str, model: PreTrainedModel) -> None:
    """Raise ModelError for a model whose answers cannot be decoded together with the
    logits that each has alone."""
    if reason := why_not_batched(model, AdapterSet(model)):
        raise ModelError(
            f"{name}: answers cannot be drawn from this model, since many are decoded together: {reason}. Use another "
            "model."
        )


@contextmanager
def drawing(model: PreTrainedModel) -> Iterator[Decoder]:
    """A decoder of the model as it is now, see `decoding`."""
    with decoding(model):
        yield BatchedDecoder(model, AdapterSet(model))


def draw_answers(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: Draw,
    *,
    adapter: str | None = None,
    on_answers: Callable[[int, Sequence[DrawnAnswer]], None] = lambda prompt, answers: None,
) -> list[list[DrawnAnswer]]:
    """`settings.num` answers to each prompt, token ids. They follow from the seed of the prompt, whatever else
    is drawn. `adapter`: its name in the decoder's set; None: the model as it is. `on_answers` gets the number
    of a prompt and its answers as soon as all of them have ended.

    Raises OutOfMemoryError where not even the answers to one prompt fit,
    NonFiniteError for logits that are no numbers.
    """
    answers: dict[int, list[DrawnAnswer]] = {}
    streams, waiting = max(settings.streams, settings.num), list(range(len(prompts)))
    while waiting:
        requests = [_request(i, prompts[i], seeds[i], settings, adapter) for i in waiting]
        for i, drawn in _drawn(Scheduler(decoder, streams=streams), requests):
            answers[i] = drawn
            on_answers(i, drawn)
        failed = [i for i in waiting if i not in answers]
        if failed and streams <= settings.num:
            lengths = [len(prompts[i]) for i in failed]
            raise OutOfMemoryError(
                f"out of memory while {settings.num} answers of up to {settings.max_new_tokens:,} tokens were drawn "
                f"to a prompt of {max(lengths):,}. Fewer reinforce.samples or reinforce.max_new_tokens take less.",
                step=0,
                lengths=lengths,
                peak=peak_memory_bytes(decoder.model.device),
            )
        waiting, streams = failed, max(settings.num, streams // 2)
    return [answers[i] for i in range(len(prompts))]


def _request(key: int, prompt: Sequence[int], seed: int, settings: Draw, adapter: str | None) -> PreparedRequest:
    request = GenerationRequest("", temperature=settings.temperature, seed=seed, n=settings.num)
    return PreparedRequest(
        key,
        tuple(prompt),
        settings.renderer.tokenizer,
        request,
        adapter=adapter,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=frozenset(settings.renderer.stop_ids),
        strip=True,
        keeps=True,
    )


def _drawn(scheduler: Scheduler, requests: Sequence[PreparedRequest]) -> Iterator[tuple[int, list[DrawnAnswer]]]:
    """Key and answers of each request that there was memory for."""
    for request in requests:
        scheduler.add(request)
    texts: dict[tuple[int, int], list[str]] = defaultdict(list)
    drawn: dict[int, dict[int, DrawnAnswer]] = defaultdict(dict)
    while scheduler.is_busy:
        for key, event in scheduler.step():
            if isinstance(event, RequestError) and event.code != "out_of_memory":
                raise not_finite(event, "drawn")
            if isinstance(event, Delta):
                texts[key, event.index].append(event.text)
            elif isinstance(event, Finished):
                text, of_prompt = "".join(texts.pop((key, event.index), [])), drawn[key]
                ended = event.reason == "stop"
                of_prompt[event.index] = DrawnAnswer(tuple(event.ids), tuple(event.logps), text, ended)
                if len(of_prompt) == requests[0].sampling.n:
                    yield key, [answer for _, answer in sorted(drawn.pop(key).items())]
