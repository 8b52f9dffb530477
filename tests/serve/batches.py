"""Tiny models with adapters, what they answer alone, and a batch that answers all at once."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel

from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tunesmith.generation.adapters import AdapterSet, LowRankPath
from tunesmith.generation.decoder import BatchedDecoder, Decoder
from tunesmith.generation.padded import GeneratedAnswer, generate
from tunesmith.generation.scheduler import KeyedEvent, PreparedRequest, Scheduler
from tunesmith.methods import lora
from tunesmith.methods.lora import LoraAttachment
from tunesmith.models.heads import generator
from tunesmith.recipe.methods import LoraMethod
from tunesmith.serve.protocol import Delta, Finished, GenerationRequest, RequestError, Started, Token

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
STOPS = frozenset({TOKENIZER.eos_token_id})
RUNS = {"first": LoraMethod(rank=2, alpha=16), "second": LoraMethod(rank=5, alpha=20, targets=("attention",))}
"""Two runs that adapt different layers."""


def sharp(arch: str, **settings: Any) -> PreTrainedModel:
    """A model whose likeliest token is no matter of rounding."""
    wide = {} if arch == "t5" else {"init_std" if arch == "bart" else "initializer_range": 0.3}
    return tiny_model(arch, vocab_size=VOCAB, **wide, **settings).eval()


def adapt(model: PreTrainedModel, run: str) -> LoraAttachment:
    """The adapter of a run, as trained: its B is not zero any more."""
    attachment = lora.attach(model, RUNS[run], seed=3)
    for name, tensor in attachment.trained.items():
        if "lora_B" in name:
            tensor.data.normal_(0.0, 0.2, generator=generator(4, f"{run} {name}"))
    attachment.publish()
    return attachment


def taken(attachment: LoraAttachment) -> dict[str, LowRankPath]:
    """The paths of an adapter that is on a model, which is off it then."""
    paths = {
        layer: LowRankPath(module.lora_A.detach(), module.lora_B.detach(), module.scale)
        for layer, module in attachment.layers.items()
    }
    attachment.unload()
    return paths


def put_on(adapters: AdapterSet, paths: Mapping[str, Mapping[str, LowRankPath]]) -> None:
    for name, of_run in paths.items():
        adapters.put(name, of_run)


def decoder(arch: str, kind: Any = BatchedDecoder, runs: Sequence[str] = tuple(RUNS), **settings: Any) -> Decoder:
    model = sharp(arch, **settings)
    adapters = AdapterSet(model)
    put_on(adapters, {run: taken(adapt(model, run)) for run in runs})
    made: Decoder = kind(model, adapters)
    return made


@functools.cache
def tuned(arch: str, run: str | None) -> PreTrainedModel:
    """The model of one run alone."""
    model = sharp(arch)
    if run is not None:
        adapt(model, run)
    return model


RENDERER: Any = SimpleNamespace(tokenizer=TOKENIZER, stop_ids=tuple(STOPS), task_name="generate")


@functools.cache
def alone(arch: str, run: str | None, prompt: tuple[int, ...], max_new_tokens: int) -> GeneratedAnswer:
    """What transformers' own generation answers, greedily and to this prompt alone."""
    return generate(tuned(arch, run), RENDERER, [prompt], max_new_tokens)[0]


def prompts(num: int, *, seed: int = 0, longest: int = 40) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(20, VOCAB) for _ in range(draw.randint(1, longest))) for _ in range(num)]


def job(key: int, prompt: Sequence[int], **how: Any) -> PreparedRequest:
    sampling = replace(how.pop("sampling", GenerationRequest("", temperature=0.0)), n=how.pop("n", 1))
    return PreparedRequest(key, tuple(prompt), TOKENIZER, sampling, stop_ids=STOPS, **how)


@dataclass
class Heard:
    """What was told of one ask."""

    started: int | None = None
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    pieces: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[int, list[Token]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[int, Finished] = field(default_factory=dict)
    refused: RequestError | None = None

    def hear(self, told: Any) -> None:
        if isinstance(told, Started):
            assert self.started is None
            self.started = told.prompt_tokens
        elif isinstance(told, Delta):
            assert told.index not in self.ended
            self.texts[told.index] += told.text
            self.pieces[told.index].append(told.text)
            self.tokens[told.index] += told.tokens
        elif isinstance(told, Finished):
            assert told.index not in self.ended
            self.ended[told.index] = told
        else:
            self.refused = told

    def answer(self, index: int = 0) -> GeneratedAnswer:
        return GeneratedAnswer(self.texts[index], self.ended[index].reason == "stop")


def hear(news: Sequence[KeyedEvent], heard: Mapping[int, Heard]) -> None:
    for key, told in news:
        heard[key].hear(told)


def run(batch: Scheduler, *jobs: PreparedRequest) -> dict[int, Heard]:
    """Every ask, all at once, to its end."""
    heard: dict[int, Heard] = defaultdict(Heard)
    for one in jobs:
        batch.add(one)
    while batch.is_busy:
        hear(batch.step(), heard)
    return heard
