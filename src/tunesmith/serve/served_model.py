"""Models by the names clients use: those that write text, those with a head that
classifies, and text embedders."""

# L texts, D hidden size

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.branch_encoders import first_pooled, pooled
from tunesmith.data.collate import build_batch
from tunesmith.data.images import BadImage, image_at, look_at
from tunesmith.data.renderer import Renderer
from tunesmith.data.sampler import make_micro_batches, pass_cost
from tunesmith.errors import DataError, ModelError
from tunesmith.generation.adapters import LowRankPath
from tunesmith.generation.decoder import Decoder
from tunesmith.generation.sampling import JsonGrammars
from tunesmith.generation.scheduler import PreparedRequest
from tunesmith.inference.load import LoadedModel
from tunesmith.inference.predict import Done, Predictor
from tunesmith.inference.rows import Line
from tunesmith.models.forward import hidden_at_targets
from tunesmith.models.modes import eval_mode
from tunesmith.models.pooling import pool
from tunesmith.recipe.schema import Limits
from tunesmith.serve.protocol import EngineOptions, GenerationRequest, ModelCard, RequestError
from tunesmith.tasks import TASKS
from tunesmith.types import BatchImage, Example, ImageRef, JsonObject, Part, Pooling, Problem, Row, Source

PREPARED_BYTES = 32 * 2**20
"""Most that prepared images of a request may take while it waits."""


@dataclass
class ServedModel:
    """A base model, or a run's adapter on it, that answers in text."""

    card: ModelCard
    loaded: LoadedModel
    decoder: Decoder
    paths: Mapping[str, LowRankPath] = field(default_factory=dict)
    """Low-rank paths of its adapter by layer; empty: the loaded model answers as it is."""

    @property
    def renderer(self) -> Renderer:
        return self.loaded.renderer

    @property
    def adapter(self) -> str | None:
        return self.card.name if self.paths else None

    @property
    def vocab_size(self) -> int:
        return int(self.loaded.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def grammars(self) -> JsonGrammars:
        """Raises RequestError where answers in JSON are not supported."""
        return JsonGrammars(self.renderer.tokenizer, vocab_size=self.vocab_size, stop_ids=self.renderer.stop_ids)

    def prepare(self, key: int, request: GenerationRequest, options: EngineOptions) -> PreparedRequest:
        """The request as the scheduler takes it. Raises RequestError."""
        if request.n > options.streams:
            raise RequestError(f"n is {request.n}; it has to be from 1 to {options.streams}", param="n")
        images = self._images(request)
        prompt = self.prompt_ids(request, images)
        if why := self.loaded.without_vector(prompt):
            raise RequestError(why, param="messages" if request.prompt is None else "prompt")
        return PreparedRequest(
            key,
            tuple(prompt),
            self.renderer.tokenizer,
            replace(request, images=()),  # in base64, for as long as it waits and is answered
            adapter=self.adapter,
            max_new_tokens=self._max_new_tokens(request, len(prompt), options),
            stop_ids=frozenset(self.renderer.stop_ids),
            strip=not TASKS[self.renderer.task_name].raw_text,
            images=self._shown(images) if images else (),
            grammar=None if request.json_schema is None else self.grammars.compile(request.json_schema),
        )

    @torch.no_grad()
    def score(self, prompt: str | Sequence[int], *, top: int) -> Iterator[JsonObject | None]:
        """Tokens that the model finds likely at each place of a prompt, as vLLM's `prompt_logprobs`, and the
        one behind it: {"prompt_logprobs": [null, {id: {"logprob", "rank", "decoded_token"}, ...}, ...], "text",
        "ended"}.

        Ids are read as they are. Yields None after each piece of a long prompt, and then the result. Raises
        RequestError.
        """
        request = GenerationRequest(self.card.name, prompt=prompt if isinstance(prompt, str) else "", max_tokens=1)
        ids = self.prompt_ids(request) if isinstance(prompt, str) else list(prompt)
        if self.renderer.kind != "causal":
            raise RequestError(f"{self.card.name} has an encoder: its prompts are not scored", param="prompt_logprobs")
        self._max_new_tokens(request, len(ids), EngineOptions())
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise RequestError(f"a token is none of the {self.vocab_size:,} of {self.card.name}", param="prompt")
        places = list[JsonObject | None]([None])
        text_of = cache(lambda token: str(self.renderer.tokenizer.decode([token])))
        for logits_TV in self.decoder.score(self.adapter, ids):
            logp_TV = logits_TV.log_softmax(-1)
            for logp_V, token in zip(logp_TV, ids[len(places) :], strict=False):
                rank_of = {listed: rank for rank, listed in enumerate(logp_V.topk(top).indices.tolist(), start=1)}
                rank_of.setdefault(token, int((logp_V > logp_V[token]).sum()) + 1)
                places.append(
                    {
                        str(listed): {"logprob": float(logp_V[listed]), "rank": rank, "decoded_token": text_of(listed)}
                        for listed, rank in rank_of.items()
                    }
                )
            last = int(logp_TV[-1].argmax())
            yield None
        ended = last in self.renderer.stop_ids
        yield {"prompt_logprobs": places, "text": "" if ended else text_of(last), "ended": ended}

    def decoder_of(self, request: PreparedRequest) -> Decoder:
        """The decoder that answers a request."""
        return self.decoder.seeing if request.images and self.decoder.seeing is not None else self.decoder

    def _images(self, request: GenerationRequest) -> list[tuple[int, int, ImageRef]]:
        """The images of a request: index of message, character, and what its header
        says. Raises RequestError."""
        images, limits = list[tuple[int, int, ImageRef]](), Limits()
        if len(request.images) > limits.images:  # of a few kilobytes each takes a tenth of a second to decode
            words = f"{len(request.images):,} images, and at most {limits.images} are read: show fewer"
            raise RequestError(words, code="too_many_images", param="messages")
        if request.images and (self.decoder.seeing is None or not self.card.sees):
            words = f"{self.card.name} reads text alone: leave the image out, or ask a model that sees"
            raise RequestError(words, code="no_images_here", param="messages")
        for message, place, content in request.images:
            try:
                image = look_at(image_at({"base64": content}, f"messages[{message}]"), Path(), limits)
            except BadImage as bad:
                words = f"messages[{message}]: {bad.message} {bad.fix}"
                raise RequestError(words, code=bad.code, param="messages") from bad
            images.append((message, place, image))
        return images

    def _shown(self, images: Sequence[tuple[int, int, ImageRef]]) -> tuple[BatchImage, ...]:
        """The images of a request, each prepared once before anything waits for it: the step that reads a
        prompt has answers of others in it. What is more than `PREPARED_BYTES` is prepared again there. Raises
        RequestError.
        """
        shown, left = list[BatchImage](), PREPARED_BYTES
        all_images = self.renderer.batch_images([[image for _, _, image in images]])
        for (message, _, _), image in zip(images, all_images, strict=True):
            try:
                pixels = image.pixels()
            except (DataError, ValueError) as error:
                words = f"messages[{message}]: its image cannot be prepared: {error}"
                raise RequestError(words, code="damaged_image", param="messages") from error
            left -= sum(tensor.nbytes for tensor in pixels.values())
            shown.append(image if left < 0 else replace(image, pixels=partial(dict, pixels)))
        return tuple(shown)

    def prompt_ids(self, request: GenerationRequest, images: Sequence[tuple[int, int, ImageRef]] = ()) -> list[int]:
        """The ids that the model reads, from the code that rendered the training rows. Raises RequestError."""
        prompt, is_chat = request.prompt, TASKS[self.renderer.task_name].is_chat
        if prompt is not None and is_chat:  # a text to continue: no template is put around it
            return list(self.renderer.tokenizer(prompt).input_ids)
        tools, cuts = tuple(request.tools), list[int]()
        try:
            parts = (
                self._conversation(request, images) if is_chat else [Part("user", self._single(request), trained=False)]
            )
            ids = self.renderer.prompt_ids(parts, tools, on_cut=cuts.append)
            shows_tools = not tools or ids != self.renderer.prompt_ids(parts, (), on_cut=cuts.append)
        except (DataError, ModelError) as error:  # the template refuses it, or exceeds its limits
            raise RequestError(str(error), param="messages") from error
        if not shows_tools:
            message = f"the chat template of {self.card.name} does not show tools: leave them out"
            raise RequestError(message, param="tools")
        if sum(cuts):
            message = f"the prompt has {sum(cuts):,} tokens more than {self.card.name} reads: shorten it"
            raise RequestError(message, code="context_length_exceeded", param="messages")
        return ids

    def _single(self, request: GenerationRequest) -> str:
        """The prompt of a task that is not a conversation."""
        if request.prompt is not None:
            return request.prompt
        if len(request.messages) != 1 or request.messages[0].get("role") != "user" or request.tools:
            raise RequestError(
                f"{self.card.name} was tuned for the task {self.renderer.task_name}, not for conversations: "
                "send one message of the user, or use /v1/completions",
                param="messages",
            )
        return str(request.messages[0]["content"])

    def _conversation(self, request: GenerationRequest, images: Sequence[tuple[int, int, ImageRef]]) -> list[Part]:
        parts = []
        for index, message in enumerate(request.messages):
            shown = tuple((place, image) for of_message, place, image in images if of_message == index)
            fields = {key: value for key, value in message.items() if key not in ("role", "content")}
            parts.append(Part(message["role"], message["content"], trained=False, fields=fields, images=shown))
        example = Example(tuple(parts), Source("request", 1), "messages", tuple(request.tools))
        for problem in self.renderer.control_problems(example):
            raise RequestError(problem.message, param="messages")
        return parts

    def _max_new_tokens(self, request: GenerationRequest, num_prompt: int, options: EngineOptions) -> int:
        param, wanted = "messages" if request.prompt is None else "prompt", request.max_tokens
        if num_prompt == 0:
            raise RequestError("the prompt has no token: there is nothing to answer", param=param)
        if (wanted or 0) > options.max_new_tokens:
            message = f"at most {options.max_new_tokens:,} tokens are written here: lower it"
            raise RequestError(message, param="max_tokens")
        window = self.card.max_tokens
        room = window if self.renderer.kind == "encoder_decoder" else window - num_prompt
        if num_prompt > window or room < (wanted or 1):
            message = (
                f"{num_prompt:,} tokens of prompt and {wanted or 1:,} of answer are more than the {window:,} "
                f"that {self.card.name} can attend to: shorten the prompt or lower max_tokens"
            )
            raise RequestError(message, code="context_length_exceeded", param=param)
        return min(options.max_new_tokens, room) if wanted is None else wanted


@dataclass
class Classifier:
    """A model whose head answers with classes, a number, or a tag for each word."""

    card: ModelCard
    loaded: LoadedModel

    def classify(self, texts: Sequence[str | Sequence[str]], done: Done = lambda num: None) -> list[Line]:
        """A line for each text, as `tunesmith predict` writes it. `done` is called after each batch.

        Raises RequestError for the first bad text.
        """
        lines = []
        examples = [self._example(text, i) for i, text in enumerate(texts)]
        for line in Predictor(self.loaded)(examples, done, lambda problem: None):
            if isinstance(line, Problem):
                code = "context_length_exceeded" if line.code == "too_long" else "invalid_value"
                raise RequestError(f"input[{line.source.line - 1}]: {line.message}", code=code, param="input")
            lines.append(line)
        return lines

    def _example(self, text: str | Sequence[str], index: int) -> Example:
        source = Source("input", index + 1)
        if (head := TASKS[self.card.task].head) and head.by_word:
            if not isinstance(text, str):
                raise RequestError("a model that tags words takes one text, not a pair")
            return Example(tuple(Part("word", word, False) for word in text.split()), source, "tokens_tags")
        if TASKS[self.card.task].outcome == "rewards":
            if isinstance(text, str):
                raise RequestError('a reward is of a prompt and its answer: {"text": PROMPT, "text_pair": ANSWER}')
            sides = (Part("user", text[0], False), Part("assistant", text[1], True))
            return Example(sides, source, "prompt_completion", plain=True)
        texts = (text,) if isinstance(text, str) else text
        parts = (
            Part(name, text_of_part, False) for name, text_of_part in zip(("text", "text_pair"), texts, strict=False)
        )
        return Example(tuple(parts), source, "text_label")


@dataclass
class Embedder:
    """A model without a head: its hidden states, pooled as its run or its files say."""

    card: ModelCard
    loaded: LoadedModel
    pooling: Pooling

    def embed(
        self,
        texts: Sequence[str],
        done: Done = lambda num: None,
        *,
        dimensions: int | None = None,
        is_query: bool = False,
    ) -> tuple[list[list[float]], int]:
        """A vector for each text, cut to `dimensions` numbers, and the number of tokens read.
        `done` is called after each batch.

        Raises RequestError for an empty or too long text, or more numbers than a vector has.
        """
        model = self.loaded.model
        size = int(model.config.get_text_config().hidden_size)
        if dimensions is not None and dimensions > size:
            raise RequestError(f"dimensions: the vectors of this model have {size:,} numbers", param="dimensions")
        prompt = self.pooling.query_prompt if is_query else self.pooling.document_prompt
        rows = [self._row(prompt, text, i) for i, text in enumerate(texts)]
        lengths = [len(row.ids) for row in rows]
        most = self.loaded.tokens_per_pass
        vectors: dict[int, list[float]] = {}
        cut: dict[str, Any] = {"tokens_per_pass": most, "layout": "padded", "cost": pass_cost(model.device)}
        with eval_mode(model):
            for members in make_micro_batches(range(len(rows)), lengths, **cut):
                options: dict[str, Any] = {"device": model.device, "pad_id": self.loaded.pad_id, "pools": True}
                batch = build_batch([rows[i] for i in members], range(len(members)), layout="padded", **options)
                found_LD = pool(hidden_at_targets(model, batch), batch, self.pooling.kind)[:, :dimensions]
                if self.pooling.normalizes:
                    found_LD = torch.nn.functional.normalize(found_LD, dim=-1)
                vectors |= zip(members, found_LD.tolist(), strict=True)
                done(len(vectors))
        return [vectors[i] for i in range(len(rows))], sum(lengths)

    def _row(self, prompt: str, text: str, index: int) -> Row:
        if not text.strip():
            raise RequestError(f"input[{index}] is empty", param="input")
        ids, most = list(self.loaded.renderer.tokenizer(prompt + text).input_ids), self.card.max_tokens
        if len(ids) > most:
            message = f"input[{index}] has {len(ids):,} tokens, at most {most:,} are read: shorten it"
            raise RequestError(message, code="context_length_exceeded", param="input")
        if why := self.loaded.without_vector(ids):
            raise RequestError(f"input[{index}]: {why}", param="input")
        first = first_pooled(self.pooling, prompt, self.loaded.renderer.tokenizer)
        return Row(np.array(ids, np.int32), pooled(len(ids), self.pooling.kind, first), Source("input", index + 1))
