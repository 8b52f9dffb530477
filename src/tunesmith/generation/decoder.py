"""Next-token logits of many sequences, each with the keys and values of its earlier tokens.

`BatchedDecoder` runs all of them in one forward pass. `SequentialDecoder` runs each alone with the cache of
transformers: for models whose attention cannot be replaced, for encoder-decoders, and as the reference in
tests. `choose_decoder` takes the one that gives sequences the logits that the model gives each alone.
Nothing is computed in torch's inference mode: a model may keep such a tensor, as a rotary buffer that
grows, and could not learn with it.
"""

# T tokens of a pass, N sequences, V vocabulary

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.generation.adapters import AdapterSet, MultiLoraLinear
from tunesmith.generation.kv_cache import (
    BatchLayout,
    DecodeRows,
    KVCache,
    KVPool,
    PrefillSpan,
    SequenceSlot,
    room_for,
    use_cached_attention,
)
from tunesmith.models.attention import AttentionTrace, packed_forward
from tunesmith.models.image_features import image_inputs, kept_vectors
from tunesmith.models.modes import eval_mode, silence_transformers
from tunesmith.models.packing_check import TOLERANCES, leak_tolerance, normalized_error, recurrent_layer
from tunesmith.models.segments import Segments, UnsupportedAttentionError
from tunesmith.models.vision import is_seeing
from tunesmith.types import BatchImage

KEPT_BYTES = 128 * 1024**2
"""Most that vectors of images fill while answers are decoded: keys and values may fill the rest of a server."""
SCORED_AT_ONCE = 256
"""Tokens of a text whose logits are in memory together."""
PROBES = ((37, 23), (11, 5), (64, 40))
"""Length of each probe text, and of its part that is read as a prompt; the rest is read as if written."""
_MODEL_ERRORS = (UnsupportedAttentionError, RuntimeError, TypeError, ValueError, LookupError)
"""A model that cannot be called in this way raises any of these."""
PromptPart = tuple[SequenceSlot, Sequence[int]]
"""A sequence whose prompt is read, and the next tokens of the prompt."""


class BatchedDecoder:
    """All sequences in one forward pass, their keys and values in pools."""

    seeing: SeeingDecoder | None = None
    """For prompts with images, of a model that sees."""

    reads_whole = False
    """Whether a prompt has to be read in one part."""
    can_redo = True
    """Whether a step that ended in the middle can be made again: keys are written where they were."""

    def __init__(self, model: PreTrainedModel, adapters: AdapterSet) -> None:
        use_cached_attention(model)
        self.model = model
        self.adapters = adapters
        self._cache = KVCache()

    def open(self, adapter: str | None, num_tokens: int) -> SequenceSlot:
        """A slot for a prompt of `num_tokens`, of which nothing has been read."""
        return SequenceSlot(adapter, KVPool(room_for(num_tokens)))

    @torch.no_grad()
    def fork(self, slot: SequenceSlot, copies: int) -> list[SequenceSlot]:
        """Sequences that continue a prompt that has been read; its own slot is not used any more."""
        slots = [SequenceSlot(slot.adapter, slot.pool, slot.length) for _ in range(copies)]
        for i, copy_of in enumerate(slots):
            try:
                self._cache.add(copy_of)
            except (MemoryError, RuntimeError):
                for added in slots[:i]:
                    self.close(added)
                raise
        return slots

    @torch.no_grad()
    def close(self, slot: SequenceSlot) -> None:
        """Free a sequence."""
        self._cache.free(slot.pool, slot.row)

    def token_capacity(self, num_bytes: int) -> int | None:
        """Number of tokens whose keys and values fit into so much memory; None if unknown."""
        slot = self.open(None, 1)
        self.step({}, [(slot, [0])])
        return max(0, num_bytes) // slot.pool.bytes_per_token()

    @torch.no_grad()
    def step(
        self, last_tokens: Mapping[SequenceSlot, int], parts: Sequence[PromptPart]
    ) -> tuple[list[SequenceSlot], Tensor]:
        """Read one more token of every forked sequence, and more of the prompts.

        Returns the slots, in some order and with `parts` last, and float32 logits [N, V] of the tokens to come.
        """
        device = self.model.device
        self._cache.make_room()
        slots = self._cache.slots
        ids = [last_tokens[slot] for slot in slots]
        positions = [slot.length for slot in slots]
        adapters = [slot.adapter for slot in slots]
        last = list(range(len(slots)))
        rows: list[DecodeRows] = []
        for pool in self._cache.pools.values():
            rows.append(DecodeRows(pool, sum(len(earlier.pool.slots) for earlier in rows), device))
        spans: list[PrefillSpan] = []
        for slot, prompt in parts:
            spans.append((slot, slice(len(ids), len(ids) + len(prompt))))
            ids += prompt
            positions += range(slot.length, slot.length + len(prompt))
            adapters += [slot.adapter] * len(prompt)
            last.append(len(ids) - 1)
        # An adapted head has to see every token, since adapters are assigned by token.
        head_is_adapted = isinstance(self.model.get_output_embeddings(), MultiLoraLinear)
        layout = BatchLayout(rows, spans, Segments(sizes=(), device=device))
        wanted = 0 if head_is_adapted else torch.tensor(last, device=device)
        logits_NV = self._logits(ids, positions, adapters, layout, wanted=wanted)
        if len(logits_NV) != len(last):  # a model without logits_to_keep, or an adapted head
            logits_NV = logits_NV[last]
        for slot in slots:
            slot.length += 1
        for slot, prompt in parts:
            slot.length += len(prompt)
        return [*slots, *(slot for slot, _ in parts)], logits_NV.float()

    @torch.no_grad()
    def score(self, adapter: str | None, ids: Sequence[int]) -> Iterator[Tensor]:
        """Float32 logits [T, V] behind each token of a text, some at a time. Nothing of it is kept, and other
        sequences are as they were."""
        slot = self.open(adapter, len(ids))
        for start in range(0, len(ids), SCORED_AT_ONCE):
            part = ids[start : start + SCORED_AT_ONCE]
            spans: list[PrefillSpan] = [(slot, slice(0, len(part)))]
            layout = BatchLayout([], spans, Segments(sizes=(), device=self.model.device))
            positions = range(start, start + len(part))
            logits_TV = self._logits(part, positions, [adapter] * len(part), layout, wanted=0)
            slot.length += len(part)
            yield logits_TV.float()

    def _logits(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        adapters: Sequence[str | None],
        layout: BatchLayout,
        *,
        wanted: Tensor | int,
    ) -> Tensor:
        """[N, V] of the tokens that are `wanted`, or of all (0)."""
        device = self.model.device
        with packed_forward(), self.adapters.active(adapters, mixed=True):
            logits_NV: Tensor = self.model(
                input_ids=torch.tensor([list(ids)], device=device),
                position_ids=torch.tensor([list(positions)], device=device),
                use_cache=False,
                logits_to_keep=wanted,
                layout=layout,
            ).logits[0]
        return logits_NV


class SequentialDecoder:
    """Each sequence in a forward pass of its own, with the cache of transformers."""

    seeing: SeeingDecoder | None = None
    can_redo = False

    def __init__(self, model: PreTrainedModel, adapters: AdapterSet) -> None:
        self.model = model
        self.adapters = adapters
        self.reads_whole = self._has_encoder = bool(model.config.is_encoder_decoder)
        takes = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # of earlier transformers
        self._caches: dict[SequenceSlot, Any] = {}
        self._encoded: dict[SequenceSlot, Any] = {}

    def open(self, adapter: str | None, num_tokens: int) -> SequenceSlot:
        slot = SequenceSlot(adapter, KVPool(0))
        cache: Any = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self._caches[slot] = EncoderDecoderCache(cache, DynamicCache()) if self._has_encoder else cache
        return slot

    def fork(self, slot: SequenceSlot, copies: int) -> list[SequenceSlot]:
        slots = [SequenceSlot(slot.adapter, slot.pool, slot.length) for _ in range(copies)]
        for copy_slot in slots:
            self._caches[copy_slot] = copy.deepcopy(self._caches[slot])
            if slot in self._encoded:
                self._encoded[copy_slot] = self._encoded[slot]
        self.close(slot)
        return slots

    def close(self, slot: SequenceSlot) -> None:
        self._caches.pop(slot, None)
        self._encoded.pop(slot, None)

    def token_capacity(self, num_bytes: int) -> int | None:
        return None

    @torch.no_grad()
    def step(
        self, last_tokens: Mapping[SequenceSlot, int], parts: Sequence[PromptPart]
    ) -> tuple[list[SequenceSlot], Tensor]:
        logits = [self._read(slot, [token]) for slot, token in last_tokens.items()]
        logits += [self._read(slot, prompt) for slot, prompt in parts]
        return [*last_tokens, *(slot for slot, _ in parts)], torch.stack(logits).float()

    @torch.no_grad()
    def score(self, adapter: str | None, ids: Sequence[int]) -> Iterator[Tensor]:
        """As `BatchedDecoder.score`, of a model without encoder."""
        cache: Any = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        for start in range(0, len(ids), SCORED_AT_ONCE):
            ids_1T = torch.tensor([list(ids[start : start + SCORED_AT_ONCE])], device=self.model.device)
            with self.adapters.active([adapter] * ids_1T.shape[1]):
                logits_TV = self._logits(cache, input_ids=ids_1T)
            yield logits_TV.float()

    def _logits(self, cache: Any, **inputs: Any) -> Tensor:
        """[T, V] of the next tokens of one sequence, which join its cache."""
        logits_TV: Tensor = self.model(use_cache=True, **{self._cache_name: cache}, **inputs).logits[0]
        return logits_TV

    def _read(self, slot: SequenceSlot, ids: Sequence[int]) -> Tensor:
        """[V]"""
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        inputs: dict[str, Any] = {"input_ids": ids_1T}
        if self._has_encoder:
            if slot not in self._encoded:
                with self.adapters.active([slot.adapter] * len(ids)):
                    self._encoded[slot] = self.model.get_encoder()(input_ids=ids_1T)
                ids_1T = torch.tensor([[self.model.config.decoder_start_token_id]], device=self.model.device)
            inputs = {"decoder_input_ids": ids_1T, "encoder_outputs": self._encoded[slot]}
        with self.adapters.active([slot.adapter] * ids_1T.shape[1]):
            logits_TV = self._logits(self._caches[slot], **inputs)
        slot.length += ids_1T.shape[1]
        return logits_TV[-1]


class SeeingDecoder(SequentialDecoder):
    """Sequences whose prompts have images, each in a pass of its own: a prompt is read at once, with its
    images.

    What comes behind an image in a model that counts positions in three ways is counted from where that ended.
    """

    def __init__(self, model: PreTrainedModel, adapters: AdapterSet) -> None:
        super().__init__(model, adapters)
        self.reads_whole, memory = True, kept_vectors(model)
        memory.room = min(memory.room, KEPT_BYTES)
        self._shown: dict[SequenceSlot, Sequence[BatchImage]] = {}
        self._ahead: dict[SequenceSlot, int] = {}
        """The position of the next token minus the number of tokens before it."""

    def show(self, slot: SequenceSlot, images: Sequence[BatchImage]) -> None:
        """Let the prompt that will be read into a slot have these images."""
        self._shown[slot] = images

    def fork(self, slot: SequenceSlot, copies: int) -> list[SequenceSlot]:
        ahead = self._ahead.get(slot)
        slots = super().fork(slot, copies)
        self._ahead |= {} if ahead is None else dict.fromkeys(slots, ahead)
        return slots

    def close(self, slot: SequenceSlot) -> None:
        super().close(slot)
        self._shown.pop(slot, None)
        self._ahead.pop(slot, None)

    def _read(self, slot: SequenceSlot, ids: Sequence[int]) -> Tensor:
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        inputs: dict[str, Any] = {}
        if images := self._shown.pop(slot, ()):
            inputs = image_inputs(self.model, ids_1T, torch.ones_like(ids_1T), images)
            if "position_ids" in inputs:
                self._ahead[slot] = int(inputs["position_ids"].max()) + 1 - len(ids)
        elif slot in self._ahead:
            first = slot.length + self._ahead[slot]
            positions_T = torch.arange(first, first + len(ids), device=self.model.device)
            inputs["position_ids"] = positions_T.expand(3, 1, -1)
        with self.adapters.active([slot.adapter] * len(ids)):
            logits_TV = self._logits(self._caches[slot], input_ids=ids_1T, **inputs)
        slot.length += len(ids)
        return logits_TV[-1]


Decoder: TypeAlias = BatchedDecoder | SequentialDecoder


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model decodes for a `BatchedDecoder`, without dropout, and does not learn; its
    attention is restored afterwards."""
    attention = model.config._attn_implementation
    with eval_mode(model), silence_transformers():
        try:
            use_cached_attention(model)
            yield
        finally:
            model.set_attn_implementation(attention)


def why_not_batched(model: PreTrainedModel, adapters: AdapterSet) -> str:
    """The reason why a `BatchedDecoder` cannot decode sequences of this model together; "" if it can."""
    if model.config.is_encoder_decoder:
        return "it is an encoder–decoder"
    return recurrent_layer(model) or why_unlike(BatchedDecoder, model, adapters)


def choose_decoder(
    name: str, model: PreTrainedModel, adapters: AdapterSet, note: Callable[[str], None], *, streams: int | None = None
) -> Decoder:
    """A decoder of many sequences at once if the model gives them the logits that it gives each alone.

    Of a model that sees it has another one for prompts with images. `streams`: number of
    sequences at a time; None: several. Raises ModelError for a model that keeps the state of a
    sequence in itself, if there are several.
    """
    decoder = _choose(name, model, adapters, note, streams=streams)
    decoder.seeing = SeeingDecoder(model, adapters) if is_seeing(model.config) else None
    return decoder


def _choose(
    name: str, model: PreTrainedModel, adapters: AdapterSet, note: Callable[[str], None], *, streams: int | None
) -> Decoder:
    if not (reason := why_not_batched(model, adapters)):
        return BatchedDecoder(model, adapters)
    is_causal = not model.config.is_encoder_decoder
    if is_causal and streams != 1 and (problem := why_unlike(SequentialDecoder, model, adapters)):
        raise ModelError(f"{name}: cannot be served: {problem}. Use `tunesmith chat` or `tunesmith predict`.")
    note(f"answers are decoded one by one, not together: {reason}")
    return SequentialDecoder(model, adapters)


def why_unlike(kind: type[BatchedDecoder | SequentialDecoder], model: PreTrainedModel, adapters: AdapterSet) -> str:
    """The reason why a decoder of this kind cannot be used; "" if sequences together
    have the logits of each alone.

    Texts of different lengths are read in parts and then continued together. Their logits are
    compared with the model's own attention on each text alone, and one text's logits among some
    texts with its logits among others.
    """
    attention, is_batched = model.config._attn_implementation, kind is BatchedDecoder
    texts = [probe(int(model.config.get_text_config().vocab_size), num) for num, _ in PROBES]
    with eval_mode(model):
        inputs = [torch.tensor([ids], device=model.device) for ids in texts]
        alone = [model(ids_1T, use_cache=False).logits[0, -1:] for ids_1T in inputs]
        try:  # transformers warns of attention that cannot be replaced
            with silence_transformers(), packed_forward() if is_batched else nullcontext(AttentionTrace()) as trace:
                together = _decoded(kind(model, adapters), texts)
                again = _decoded(kind(model, adapters), [texts[0], *(ids[::-1] for ids in texts[1:])])
        except _MODEL_ERRORS as refusal:
            return str(refusal) or type(refusal).__name__
        finally:
            with silence_transformers():
                model.set_attn_implementation(attention)
    if is_batched and trace.calls == 0:
        return "its attention is its own and cannot be replaced"
    if missing := trace.local_masks - trace.windows:
        return f"its attention is limited to {min(missing)} tokens by a mask alone"
    error = max(normalized_error(a_1V, b_1V.float()) for a_1V, b_1V in zip(together, alone, strict=True))
    leak = normalized_error(again[0], together[0])
    if error <= TOLERANCES[model.dtype] and leak <= leak_tolerance(model):
        return ""
    return f"others beside a text change its logits, by {max(error, leak):.2g}"


def _decoded(decoder: Decoder, texts: Sequence[list[int]]) -> list[Tensor]:
    """[1, V] of the last token of each text."""
    slots = [decoder.open(None, num) for num, _ in PROBES]
    prompts = [ids[:num] for ids, (_, num) in zip(texts, PROBES, strict=True)]
    for parts in ([ids[: len(ids) // 2] for ids in prompts], [ids[len(ids) // 2 :] for ids in prompts]):
        decoder.step({}, list(zip(slots, parts, strict=True)))
    unread = {decoder.fork(slot, 1)[0]: i for i, slot in enumerate(slots)}
    last_logits: dict[int, Tensor] = {}
    while unread:
        slots, logits_NV = decoder.step({slot: texts[i][slot.length] for slot, i in unread.items()}, [])
        for slot, logits_1V in zip(slots, logits_NV[:, None], strict=True):
            if slot.length == len(texts[unread[slot]]):
                last_logits[unread.pop(slot)] = logits_1V
                decoder.close(slot)
    return [last_logits[i] for i in range(len(texts))]


def probe(vocab_size: int, num: int) -> list[int]:
    """Random tokens, the same at every call."""
    return torch.randint(0, vocab_size, (num,), generator=torch.Generator().manual_seed(num)).tolist()
