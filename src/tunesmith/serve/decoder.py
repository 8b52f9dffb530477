"""The next tokens of many texts at once, each with what was read of it before.

`Together` runs all of them in one forward pass. `Apart` runs each alone with the cache of transformers: for models
whose attention is their own, for encoder–decoders, and as what the other is held equal to.
"""

# T tokens of a pass, N texts, V vocabulary

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from tunesmith.models.attention import Segments, longrope_limit, packed_forward
from tunesmith.serve.adapters import Adapters
from tunesmith.serve.cache import Block, Cache, Lane, Pass, Rows, Span, room_for, use_cached

Fill = tuple[Lane, Sequence[int]]
"""A text whose prompt is read, and the next tokens of the prompt."""


class Decoder(Protocol):
    """Reads prompts and tells the next tokens of texts."""

    reads_whole: bool
    """Whether a prompt has to be read in one piece."""

    def begin(self, adapter: str | None, num_tokens: int) -> Lane:
        """A place for a prompt of so many tokens, of which nothing is read."""
        ...

    def step(self, written: Mapping[Lane, int], fills: Sequence[Fill]) -> tuple[list[Lane], Tensor]:
        """Read one more token of every text that is written, and more of the prompts.

        `written` has the newest token of every lane that has joined. Returns the lanes in some order and float32
        [N, V]: what each says of the token after those read.
        """
        ...

    def join(self, lane: Lane, copies: int) -> list[Lane]:
        """The texts that go on from a prompt that has been read, whose own lane is not used any more."""
        ...

    def leave(self, lane: Lane) -> None:
        """Forget a text."""
        ...

    def tokens_in(self, num_bytes: int) -> int | None:
        """How many tokens' keys and values so much memory holds; None where it cannot be told."""
        ...


class Together:
    """All texts in one forward pass, their keys and values in pools."""

    def __init__(self, model: PreTrainedModel, adapters: Adapters) -> None:
        use_cached(model)
        self.reads_whole = False
        self.model = model
        self._adapters = adapters
        self._cache = Cache()

    def begin(self, adapter: str | None, num_tokens: int) -> Lane:
        return Lane(adapter, Block(1, room_for(num_tokens)))

    @torch.inference_mode()
    def join(self, lane: Lane, copies: int) -> list[Lane]:
        lanes = [Lane(lane.adapter, lane.block, lane.length) for _ in range(copies)]
        for one in lanes:
            self._cache.join(one)
        return lanes

    @torch.inference_mode()
    def leave(self, lane: Lane) -> None:
        self._cache.leave(lane)

    def tokens_in(self, num_bytes: int) -> int | None:
        lane = self.begin(None, 1)
        self.step({}, [(lane, [0])])
        return max(0, num_bytes) // lane.block.bytes_per_token()

    @torch.inference_mode()
    def step(self, written: Mapping[Lane, int], fills: Sequence[Fill]) -> tuple[list[Lane], Tensor]:
        device = self.model.device
        self._cache.make_room()
        lanes = self._cache.lanes()
        ids = [written[lane] for lane in lanes]
        positions = [lane.length for lane in lanes]
        adapters = [lane.adapter for lane in lanes]
        last = list(range(len(lanes)))
        rows, first = [], 0
        for pool in self._cache.pools.values():
            rows.append(Rows.of(pool, first, device))
            first += len(pool.lanes)
        spans = []
        for lane, prompt in fills:
            spans.append(Span(lane, len(ids), len(prompt)))
            ids += prompt
            positions += range(lane.length, lane.length + len(prompt))
            adapters += [lane.adapter] * len(prompt)
            last.append(len(ids) - 1)
        segments = Segments(sizes=(), device=device)
        # An adapted head has to see every token: which row goes through which adapter is counted by tokens.
        head = self.model.get_output_embeddings()
        kept = 0 if self._adapters.adapts(head) else torch.tensor(last, device=device)
        with packed_forward(), self._adapters.serving(adapters, mixed=True):
            logits_NV: Tensor = self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=kept,
                lanes=Pass(rows, spans, segments),
            ).logits[0]
        if len(logits_NV) != len(last):  # of a model that does not know logits_to_keep, or whose head is adapted
            logits_NV = logits_NV[last]
        for lane in lanes:
            lane.length += 1
        for lane, prompt in fills:
            lane.length += len(prompt)
        return [*lanes, *(lane for lane, _ in fills)], logits_NV.float()


class Apart:
    """Each text in a pass of its own, with the cache of transformers."""

    def __init__(self, model: PreTrainedModel, adapters: Adapters) -> None:
        self.reads_whole = bool(model.config.is_encoder_decoder)
        self.model = model
        self._adapters = adapters
        self._caches: dict[Lane, Any] = {}
        self._encoded: dict[Lane, Any] = {}
        self._border = longrope_limit(model.config)
        self._texts: dict[Lane, list[int]] = {}
        """What was read, of a model whose positions change at a border."""

    def begin(self, adapter: str | None, num_tokens: int) -> Lane:
        lane = Lane(adapter, Block(0, 0))
        self._caches[lane], self._texts[lane] = self._new_cache(), []
        return lane

    def _new_cache(self) -> Any:
        cache: Any = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return EncoderDecoderCache(cache, DynamicCache()) if self.model.config.is_encoder_decoder else cache

    def join(self, lane: Lane, copies: int) -> list[Lane]:
        lanes = [Lane(lane.adapter, lane.block, lane.length) for _ in range(copies)]
        for one in lanes:
            self._caches[one], self._texts[one] = copy.deepcopy((self._caches[lane], self._texts[lane]))
            if lane in self._encoded:
                self._encoded[one] = self._encoded[lane]
        self.leave(lane)
        return lanes

    def leave(self, lane: Lane) -> None:
        self._caches.pop(lane, None)
        self._texts.pop(lane, None)
        self._encoded.pop(lane, None)

    def tokens_in(self, num_bytes: int) -> int | None:
        return None

    @torch.inference_mode()
    def step(self, written: Mapping[Lane, int], fills: Sequence[Fill]) -> tuple[list[Lane], Tensor]:
        told = [self._read(lane, [token]) for lane, token in written.items()]
        told += [self._read(lane, prompt) for lane, prompt in fills]
        return [*written, *(lane for lane, _ in fills)], torch.stack(told).float()

    def _read(self, lane: Lane, ids: Sequence[int]) -> Tensor:
        """[V]"""
        if self._border is not None:
            text = self._texts[lane]
            text += ids
            if lane.length <= self._border < len(text):  # keys that were read with other positions are of no use
                self._caches[lane], lane.length, ids = self._new_cache(), 0, text
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        how: dict[str, Any] = {"past_key_values": self._caches[lane], "use_cache": True}
        num_tokens = len(ids)
        if not self.model.config.is_encoder_decoder:
            how["input_ids"] = ids_1T
        elif lane in self._encoded:
            how |= {"decoder_input_ids": ids_1T, "encoder_outputs": self._encoded[lane]}
        else:
            num_tokens = 1
        with self._adapters.serving([lane.adapter] * len(ids)):
            if self.model.config.is_encoder_decoder and lane not in self._encoded:
                self._encoded[lane] = self.model.get_encoder()(input_ids=ids_1T)
                start = self.model.config.decoder_start_token_id
                how |= {"encoder_outputs": self._encoded[lane]}
                how["decoder_input_ids"] = torch.tensor([[start]], device=self.model.device)
        with self._adapters.serving([lane.adapter] * num_tokens):
            out = self.model(**how)
        lane.length += num_tokens
        logits_V: Tensor = out.logits[0, -1]
        return logits_V
