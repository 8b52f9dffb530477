"""Next-token logits of many sequences, each with what was read of it before.

`BatchedDecoder` runs all of them in one forward pass. `SequentialDecoder` runs each alone with the cache of
transformers: for models whose attention cannot be replaced, for encoder-decoders, and as the reference in tests.
"""

# T tokens of a pass, N sequences, V vocabulary

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from tunesmith.models.attention import packed_forward
from tunesmith.models.segments import Segments
from tunesmith.serve.adapters import AdapterSet
from tunesmith.serve.kv_cache import (
    BatchLayout,
    DecodeRows,
    KVBlock,
    KVCache,
    PrefillSpan,
    SequenceSlot,
    room_for,
    use_cached_attention,
)

PromptPart = tuple[SequenceSlot, Sequence[int]]
"""A sequence whose prompt is read, and the next tokens of the prompt."""


class BatchedDecoder:
    """All sequences in one forward pass, their keys and values in pools."""

    reads_whole = False
    """Whether a prompt has to be read in one part."""

    def __init__(self, model: PreTrainedModel, adapters: AdapterSet) -> None:
        use_cached_attention(model)
        self.model = model
        self._adapters = adapters
        self._cache = KVCache()

    def another(self) -> BatchedDecoder:
        """A decoder of the same model, without any sequence: a step of it is none for those of this one."""
        return BatchedDecoder(self.model, self._adapters)

    def open(self, adapter: str | None, num_tokens: int) -> SequenceSlot:
        """A slot for a prompt of so many tokens, of which nothing has been read."""
        return SequenceSlot(adapter, KVBlock(1, room_for(num_tokens)))

    @torch.inference_mode()
    def fork(self, slot: SequenceSlot, copies: int) -> list[SequenceSlot]:
        """Sequences that continue a prompt that has been read; its own slot is not used any more."""
        slots = [SequenceSlot(slot.adapter, slot.block, slot.length) for _ in range(copies)]
        for one in slots:
            self._cache.add(one)
        return slots

    @torch.inference_mode()
    def close(self, slot: SequenceSlot) -> None:
        """Free a sequence."""
        self._cache.free(slot.pool, slot.row)

    def token_capacity(self, num_bytes: int) -> int | None:
        """Number of tokens whose keys and values fit into so much memory; None if unknown."""
        slot = self.open(None, 1)
        self.step({}, [(slot, [0])])
        return max(0, num_bytes) // slot.block.bytes_per_token()

    @torch.inference_mode()
    def step(
        self, last_tokens: Mapping[SequenceSlot, int], parts: Sequence[PromptPart]
    ) -> tuple[list[SequenceSlot], Tensor]:
        """Read one more token of every forked sequence, and more of the prompts.

        Returns the slots, in some order and those of `parts` last, and float32 logits [N, V] of the tokens to come.
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
            rows.append(DecodeRows.of(pool, sum(len(one.pool.slots) for one in rows), device))
        spans = []
        for slot, prompt in parts:
            spans.append(PrefillSpan(slot, len(ids), len(prompt)))
            ids += prompt
            positions += range(slot.length, slot.length + len(prompt))
            adapters += [slot.adapter] * len(prompt)
            last.append(len(ids) - 1)
        # An adapted head has to see every token, since adapters are assigned by token.
        head_is_adapted = self._adapters.adapts(self.model.get_output_embeddings())
        with packed_forward(), self._adapters.active(adapters, mixed=True):
            logits_NV: Tensor = self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=0 if head_is_adapted else torch.tensor(last, device=device),
                layout=BatchLayout(rows, spans, Segments(sizes=(), device=device)),
            ).logits[0]
        if len(logits_NV) != len(last):  # a model without logits_to_keep, or an adapted head
            logits_NV = logits_NV[last]
        for slot in slots:
            slot.length += 1
        for slot, prompt in parts:
            slot.length += len(prompt)
        return [*slots, *(slot for slot, _ in parts)], logits_NV.float()


class SequentialDecoder:
    """Each sequence in a forward pass of its own, with the cache of transformers."""

    def __init__(self, model: PreTrainedModel, adapters: AdapterSet) -> None:
        self.reads_whole = bool(model.config.is_encoder_decoder)
        self.model = model
        self._adapters = adapters
        self._caches: dict[SequenceSlot, Any] = {}
        self._encoded: dict[SequenceSlot, Any] = {}

    def another(self) -> SequentialDecoder:
        """A decoder of the same model, without any sequence."""
        return SequentialDecoder(self.model, self._adapters)

    def open(self, adapter: str | None, num_tokens: int) -> SequenceSlot:
        slot = SequenceSlot(adapter, KVBlock(0, 0))
        cache: Any = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self._caches[slot] = EncoderDecoderCache(cache, DynamicCache()) if self.reads_whole else cache
        return slot

    def fork(self, slot: SequenceSlot, copies: int) -> list[SequenceSlot]:
        slots = [SequenceSlot(slot.adapter, slot.block, slot.length) for _ in range(copies)]
        for one in slots:
            self._caches[one] = copy.deepcopy(self._caches[slot])
            if slot in self._encoded:
                self._encoded[one] = self._encoded[slot]
        self.close(slot)
        return slots

    def close(self, slot: SequenceSlot) -> None:
        self._caches.pop(slot, None)
        self._encoded.pop(slot, None)

    def token_capacity(self, num_bytes: int) -> int | None:
        return None

    @torch.inference_mode()
    def step(
        self, last_tokens: Mapping[SequenceSlot, int], parts: Sequence[PromptPart]
    ) -> tuple[list[SequenceSlot], Tensor]:
        logits = [self._read(slot, [token]) for slot, token in last_tokens.items()]
        logits += [self._read(slot, prompt) for slot, prompt in parts]
        return [*last_tokens, *(slot for slot, _ in parts)], torch.stack(logits).float()

    def _read(self, slot: SequenceSlot, ids: Sequence[int]) -> Tensor:
        """[V]"""
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        inputs = {"input_ids": ids_1T}
        if self.reads_whole:
            if slot not in self._encoded:
                with self._adapters.active([slot.adapter] * len(ids)):
                    self._encoded[slot] = self.model.get_encoder()(input_ids=ids_1T)
                ids_1T = torch.tensor([[self.model.config.decoder_start_token_id]], device=self.model.device)
            inputs = {"decoder_input_ids": ids_1T, "encoder_outputs": self._encoded[slot]}
        with self._adapters.active([slot.adapter] * ids_1T.shape[1]):
            out = self.model(past_key_values=self._caches[slot], use_cache=True, **inputs)
        slot.length += ids_1T.shape[1]
        logits_V: Tensor = out.logits[0, -1]
        return logits_V


Decoder: TypeAlias = BatchedDecoder | SequentialDecoder
