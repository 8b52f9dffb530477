"""Documents and their summaries for causal models: asked for in a chat, or as plain text; the summary stays whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.data.conversations import Conversations
from tunesmith.data.drafts import Drafted, Room
from tunesmith.data.pairs import Pairs
from tunesmith.data.prompts import PLACE
from tunesmith.data.tokens import Encoder
from tunesmith.types import Example, Part, Problem


class Summaries:
    """One question, the prompt with the document in it, and one answer, the summary.

    With a chat template two messages; without, plain text, in which two line breaks part a prompt that ends with the
    document from the summary. Where the room asks for a cut, the end of the document is cut off.
    """

    def __init__(self, tokenizer: Any, encoder: Encoder, room: Room, prompt: str, date: str | None) -> None:
        unbounded = Room(None, room.too_long)
        self._is_chat = bool(tokenizer.chat_template)
        self._way = (
            Conversations(tokenizer, encoder, unbounded, date)
            if self._is_chat
            else Pairs(tokenizer, encoder, unbounded)
        )
        self._encoder = encoder
        self._room = room
        self._prompt = prompt + ("\n\n" if prompt.endswith(PLACE) and not self._is_chat else "")
        self.control = self._way.control
        self.template_text = self._way.template_text
        self.stop_ids = self._way.stop_ids

    def encode(self, examples: Sequence[Example]) -> list[Drafted]:
        """Aligned with `examples`."""
        documents = [example.parts[0].text for example in examples]
        results = self._answered(examples, documents)
        sizes = [_size(result) for result in results]
        while over := [i for i, result in enumerate(results) if self._room.excess(_size(result))]:
            for i in over:
                documents[i] = self._shorter(documents[i], self._room.excess(_size(results[i])))
            shown = self._answered([examples[i] for i in over], [documents[i] for i in over])
            for i, result in zip(over, shown, strict=True):
                results[i] = result if documents[i] else self._refusal(examples[i], sizes[i])
        for i, result in enumerate(results):
            if not isinstance(result, Problem) and sizes[i] > _size(result):
                chars = len(examples[i].parts[0].text) - len(documents[i])
                cost = f"the last {chars:,} characters of its document were cut off"
                what = f"its {sizes[i]} tokens"
                result[0].warnings.append(self._room.cut_warning(examples[i].source, what, cost=cost))
        return results

    def prompt_ids(
        self,
        parts: Sequence[Part],
        tools: Sequence[Any],
        *,
        max_tokens: int | None = None,
        on_cut: Callable[[int], None] = lambda num_tokens: None,
    ) -> list[int]:
        """What serving feeds to have a document summarized, its end cut off down to `max_tokens` where cuts are made.

        `on_cut` hears how many tokens were cut off. Raises `DataError` when the template refuses it.
        """
        document = parts[0].text
        num_tokens = 0
        while True:
            ids = self._way.prompt_ids([Part("user", self._ask(document), False)], tools)
            num_tokens = num_tokens or len(ids)
            excess = Room(max_tokens, self._room.too_long).excess(len(ids))
            if not excess or not document or self._room.too_long != "cut":
                if len(ids) < num_tokens:
                    on_cut(num_tokens - len(ids))
                return ids
            document = self._shorter(document, excess)

    def _answered(self, examples: Sequence[Example], documents: Sequence[str]) -> list[Drafted]:
        asked = []
        for example, document in zip(examples, documents, strict=True):
            summary = Part("assistant", example.parts[-1].text, True)
            parts = (Part("user", self._ask(document), False), summary)
            asked.append(replace(example, parts=parts, plain=not self._is_chat))
        return self._way.encode(asked)

    def _ask(self, document: str) -> str:
        return self._prompt.replace(PLACE, document)

    def _shorter(self, document: str, excess: int) -> str:
        """The document without its last tokens; empty where that is not enough, or no cut is to be made."""
        if self._room.too_long != "cut":
            return ""
        starts_T = self._encoder.encode([document])[0].starts_T
        if len(starts_T) <= excess:
            return ""
        return document[: min(int(starts_T[-excess]), len(document) - 1)]  # shorter, whatever a tokenizer's places say

    def _refusal(self, example: Example, num_tokens: int) -> Problem:
        if self._room.too_long != "cut":
            return self._room.refusal(example.source, f"its {num_tokens} tokens")
        fix = "Raise it, or shorten the prompt or the summary."
        return replace(self._room.refusal(example.source, "the tokens of its prompt and summary alone"), fix=fix)


def _size(result: Drafted) -> int:
    return 0 if isinstance(result, Problem) else len(result[0].ids_T)
